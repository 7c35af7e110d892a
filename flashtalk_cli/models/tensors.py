"""Tensors from disk into modules: read one at a time, checked by name and shape, never held twice.

    Source      a file or several: what tensors there are, and how to read one of them
    Layout      where each parameter of a module lies in the released file
    fill        the two put together: a module built on the meta device gets its parameters

A released tensor is renamed, split (q, k and v stored as one) or stripped of leading dimensions
of size 1 on the way. Every tensor of the file must have a place and every parameter a tensor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flashtalk_cli.errors import ModelError

Shape = tuple[int, ...]

# The safetensors format's names; https://huggingface.co/docs/safetensors
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Source(Protocol):
    """Tensors by name; names and shapes are known without reading one."""

    @property
    def where(self) -> str:
        """The files, for messages."""
        ...

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of each tensor."""
        ...

    def read(self, key: str) -> Tensor:
        """The tensor of that name, on the CPU, in the file's number format."""
        ...


@dataclass(frozen=True)
class MemorySource:
    """Tensors that are already in memory."""

    tensors: Mapping[str, Tensor]
    where: str = "memory"

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor."""
        return {key: tuple(tensor.shape) for key, tensor in self.tensors.items()}

    def read(self, key: str) -> Tensor:
        """The tensor itself."""
        return self.tensors[key]


@dataclass(frozen=True)
class _Entry:
    path: Path
    dtype: torch.dtype
    shape: Shape
    offset: int  # bytes from the start of the file


class SafetensorsSource:
    """Tensors of one or more .safetensors files.

    Reads with plain `read` into the tensor's own memory. A memory map would do as well, but its
    pages count as this process's memory for as long as the file is open, which for a model of
    38 GB looks like twice the model.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._entries: dict[str, _Entry] = {}
        paths = list(paths)
        for path in paths:
            entries = _read_header(path)
            if twice := sorted(self._entries.keys() & entries.keys()):
                other = self._entries[twice[0]].path
                raise ModelError(
                    f"{other.name} and {path.name} in {path.parent} both have {_some(twice, show=1)}: "
                    "move the one that is not meant out of the folder"
                )
            self._entries.update(entries)
        self.where = _place(paths)
        self.shapes: dict[str, Shape] = {key: entry.shape for key, entry in self._entries.items()}

    def read(self, key: str) -> Tensor:
        """The tensor of that name."""
        entry = self._entries[key]
        flat = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        memory: Any = flat.view(torch.uint8).numpy()
        try:
            with entry.path.open("rb") as file:
                file.seek(entry.offset)
                n_bytes = file.readinto(memory)
        except OSError as error:
            raise ModelError(f"cannot read {entry.path}: {error.strerror or error}") from error
        if n_bytes != flat.nbytes:
            raise ModelError(f"{entry.path} ends inside {key}: was it changed while it was read?")
        return flat.reshape(entry.shape)


def _read_header(path: Path) -> dict[str, _Entry]:
    mend = "download it again (flashtalk models pull), or copy it again"
    try:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            if size_bytes < 10 or not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size_bytes - 8):
                raise ModelError(
                    f"{path} is not a safetensors file, or is cut off ({size_bytes} bytes): {mend}"
                )
            header = json.loads(file.read(header_bytes))
        entries = {
            key: _entry(path, 8 + header_bytes, value)
            for key, value in header.items()
            if key != "__metadata__"
        }
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} has a broken header ({error}): {mend}") from error
    needed = max((e.offset + math.prod(e.shape) * e.dtype.itemsize for e in entries.values()), default=0)
    if needed > size_bytes:
        raise ModelError(f"{path} is cut off: {size_bytes:,} of {needed:,} bytes; {mend}")
    return entries


def _entry(path: Path, start: int, value: dict[str, Any]) -> _Entry:
    if value["dtype"] not in DTYPES:
        raise ValueError(f"unknown number format {value['dtype']}")
    begin, end = value["data_offsets"]
    entry = _Entry(path, DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"]), start + begin)
    if begin < 0 or end - begin != math.prod(entry.shape) * entry.dtype.itemsize:
        raise ValueError(f"{end - begin} bytes for a tensor {list(entry.shape)} of {value['dtype']}")
    return entry


class PickleSource:
    """Tensors of a .pth or .bin file: a plain state dict, unpickled with `weights_only`, memory-mapped."""

    def __init__(self, path: Path) -> None:
        self.where = path.name
        state = _unpickle(path)
        if not isinstance(state, Mapping) or not all(
            isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
        ):
            raise ModelError(f"{path} is not a plain state dict (names to tensors)")
        self._state: Mapping[str, Tensor] = state
        self.shapes: dict[str, Shape] = {key: tuple(value.shape) for key, value in state.items()}

    def read(self, key: str) -> Tensor:
        """A copy of the tensor: the map ends with the source."""
        return self._state[key].clone()


def _unpickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            is_zip = (
                file.read(4) == b"PK\x03\x04"
            )  # what torch.save writes since 1.6; only that can be mapped
        return torch.load(path, map_location="cpu", mmap=is_zip, weights_only=True)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    # A damaged pickle fails anywhere in torch's reader, by an AssertionError among others.
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{path} is broken, cut off, or no file of weights ({reason[:120]}): "
            "download it again (flashtalk models pull), or copy it again"
        ) from error


def open_files(paths: list[Path]) -> Source:
    """The tensors of a component's files: one or more .safetensors, or one .pth or .bin.

    Raises ModelError for a file that is missing, broken or cut off.
    """
    if all(path.suffix == ".safetensors" for path in paths):
        return SafetensorsSource(paths)
    if len(paths) > 1:
        raise ModelError(
            f"{_place(paths)} are not all .safetensors files: several of another kind cannot be read"
        )
    return PickleSource(paths[0])


@dataclass(frozen=True)
class View:
    """Some tensors of a source under other names: what a prefix holds, or what is not to be ignored."""

    source: Source
    names: dict[str, str]  # name here -> name in the source

    @classmethod
    def of(cls, source: Source, rename: Callable[[str], str | None]) -> View:
        """`rename` gives a tensor's name here, or None for one that is ignored. Raises ModelError for two of one name."""
        names: dict[str, str] = {}
        for key in source.shapes:
            name = rename(key)
            if name in names:
                raise ModelError(f"{source.where} has the same tensor twice, as {names[name]} and as {key}")
            if name is not None:
                names[name] = key
        return cls(source, names)

    @property
    def where(self) -> str:
        """For messages."""
        return self.source.where

    @property
    def shapes(self) -> dict[str, Shape]:
        """Shape of each tensor."""
        shapes = self.source.shapes
        return {name: shapes[key] for name, key in self.names.items()}

    def read(self, key: str) -> Tensor:
        """The tensor of that name."""
        return self.source.read(self.names[key])


@dataclass(frozen=True)
class Piece:
    """Where a parameter lies: part `part` of `parts` equal row blocks of tensor `key`.

    `lead` dimensions of size 1 stand in front there and not in the parameter.
    """

    key: str
    part: int = 0
    parts: int = 1
    lead: int = 0

    def released_shape(self, shape: Shape) -> Shape:
        """Shape of the whole tensor `key` for a parameter of that shape."""
        return (1,) * self.lead + (shape[0] * self.parts, *shape[1:])

    def take(self, tensor: Tensor) -> Tensor:
        """The parameter, a view."""
        return tensor.reshape(tensor.shape[self.lead :]).chunk(self.parts, dim=0)[self.part]


@dataclass(frozen=True)
class Layout:
    """A module's parameters in the released file, and the tensors there that the module does not use."""

    pieces: dict[str, Piece]  # parameter name -> place
    unused: dict[str, Shape] = field(default_factory=dict)

    @classmethod
    def same_names(cls, module: nn.Module) -> Layout:
        """For a module whose parameters carry the released names."""
        return cls({name: Piece(name) for name in module.state_dict()})

    def shapes(self, module: nn.Module) -> dict[str, Shape]:
        """Name and shape of every tensor that the file must have, and no other."""
        parameters = dict(tensors_of(module))
        assert parameters.keys() == self.pieces.keys(), parameters.keys() ^ self.pieces.keys()
        expected = {
            piece.key: piece.released_shape(tuple(parameters[name].shape))
            for name, piece in self.pieces.items()
        }
        return expected | self.unused


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers, tied ones once."""
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


@dataclass(frozen=True)
class Difference:
    """How the tensors of a file differ from what is expected. False when they do not."""

    missing: list[str]
    unexpected: list[str]
    misshapen: list[str]  # "NAME [is] instead of [should be]"

    @classmethod
    def of(cls, found: Mapping[str, Shape], expected: Mapping[str, Shape]) -> Difference:
        """Compare names and shapes."""
        return cls(
            missing=[key for key in expected if key not in found],
            unexpected=[key for key in found if key not in expected],
            misshapen=[
                f"{key} {list(found[key])} instead of {list(shape)}"
                for key, shape in expected.items()
                if key in found and found[key] != shape
            ],
        )

    def __bool__(self) -> bool:
        return bool(self.missing or self.unexpected or self.misshapen)

    def __str__(self) -> str:
        kinds = {"missing": self.missing, "unexpected": self.unexpected, "misshapen": self.misshapen}
        return "; ".join(f"{len(v)} {kind}: {_some(v)}" for kind, v in kinds.items() if v)


def _some(names: list[str], show: int = 3) -> str:
    return ", ".join(names[:show]) + (f" and {len(names) - show} more" if len(names) > show else "")


def _place(paths: list[Path]) -> str:
    return paths[0].name if len(paths) == 1 else f"{paths[0].name} and {len(paths) - 1} more files"


def fill(
    module: nn.Module,
    layout: Layout,
    source: Source,
    device: torch.device | str,
    dtype: torch.dtype,
    on_host: str | None = None,
) -> None:
    """Give a module built on the meta device its tensors, read one by one in the file's order.

    A parameter keeps the memory format (strides) that the module was built with; floating-point
    tensors become `dtype`. Parameters come without gradients: ask for them with `requires_grad_`.
    Those whose names begin with `on_host` stay in host memory.
    Raises ModelError when tensors are missing, unexpected or misshapen, before anything is read.
    """
    difference = Difference.of(source.shapes, layout.shapes(module))
    if difference:
        raise ModelError(f"{source.where} does not fit this model: {difference}")
    wanted: dict[str, list[str]] = {}
    for name, piece in layout.pieces.items():
        wanted.setdefault(piece.key, []).append(name)
    for key in source.shapes:
        if key not in wanted:
            continue
        tensor = source.read(key)
        for name in wanted.pop(key):
            put(module, name, layout.pieces[name].take(tensor), home_of(name, device, on_host), dtype)
    settled(module)


def home_of(name: str, device: torch.device | str, on_host: str | None) -> torch.device | str:
    """Where a parameter goes: to the device, unless its name begins with `on_host`."""
    return "cpu" if on_host is not None and name.startswith(on_host) else device


def put(module: nn.Module, name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> None:
    """Replace a parameter or buffer of the module by `tensor`, in the memory format of what it replaces.

    Raises ModelError for whole numbers where others belong.
    """
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    built = getattr(owner, leaf)
    if built.is_floating_point() and not tensor.is_floating_point():
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ModelError(
            f"{name} is of {kind}, a tensor of floating-point numbers was expected: quantised weights do not load"
        )
    kept = dtype if tensor.is_floating_point() else tensor.dtype
    if tensor.stride() == built.stride():
        value = tensor.to(device=device, dtype=kept)
    else:
        value = torch.empty_strided(built.shape, built.stride(), device=device, dtype=kept).copy_(tensor)
    setattr(owner, leaf, nn.Parameter(value, requires_grad=False) if leaf in owner._parameters else value)


def settled(module: nn.Module) -> None:
    """Hold that nothing of the module was left on the meta device; buffers that no file has follow the rest."""
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not left, left
    device = next(module.parameters()).device
    for part in module.modules():
        for name in part._non_persistent_buffers_set:
            setattr(part, name, getattr(part, name).to(device))
