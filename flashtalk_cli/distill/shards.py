"""Examples on disk: what training is fed with, made once by the renderer's own encoders.

    DATA/data.json                  what made them, see `Origin`
    DATA/texts.safetensors          rows of each prompt
    DATA/shard-HEIGHTxWIDTH-00000.safetensors

A shard holds some clips of one size. Of a clip there are windows of a chunk's length and candidate
pictures. With N windows and M pictures of all the shard's clips, T latents of h x w:

    latents        float16 [N, 16, T, h, w]     a window's frames; the first two are its motion latents
    heard          float16 [N, F + 4, layers, dim]  speech around its F frames, see `windows_of`
    start          int32 [N]                    its first frame in the clip
    clip           int32 [N]                    which clip of the shard
    text           int32 [N]                    which prompt
    box            float32 [N, 4]               x0, y0, x1, y1 of the face in pixels; zeros: unknown
    picture        float16 [M, 16, T, h, w]     [picture, black, black, ...]: y without its mask
    tokens         float16 [M, n, dim]          the image encoder's
    colour         float32 [M, 2, 3]            mean and deviation of L, a, b
    picture_clip   int32 [M]
    picture_frame  int32 [M]                    where in the clip it was taken

The VAE is causal, so a window's first latent is the latent of its first frame alone, and its
first two those of its first five frames alone: what a chunk in use is given to continue.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtalk_cli.config import Frozen, Hearing
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.models.folder import Component, ModelFolder
from flashtalk_cli.pipeline.chunks import WINDOW_FRAMES

FORMAT = 1
INDEX, TEXTS = "data.json", "texts.safetensors"
PROBE_BYTES = 1 << 20  # of each end of a file of weights
ENCODERS: tuple[Component, ...] = ("vae", "speech", "image", "text")


class Origin(Frozen):
    """What a folder of shards was made with: training on it with anything else would be wrong."""

    format: int = FORMAT
    chunk_frames: int
    motion_frames: int
    fps: int
    area_px: int  # of a frame, about: the canvas whose shapes the sizes of shards are
    shard_clips: int
    held_out: bool  # people kept from training
    hearing: Hearing
    encoders: dict[str, str]  # component -> digest
    prompts: list[str]
    clips: int = 0
    seconds: float = 0.0


def digest_of(folder: ModelFolder) -> dict[str, str]:
    """A fingerprint of each encoder's files."""
    return {component: fingerprint(folder.files(component)) for component in ENCODERS}


def fingerprint(paths: Sequence[Path]) -> str:
    """Of files of weights: their sizes, and the bytes at both ends of each."""
    digest = hashlib.sha256()
    for path in paths:
        size_bytes = path.stat().st_size
        with path.open("rb") as file:
            digest.update(str(size_bytes).encode() + file.read(PROBE_BYTES))
            file.seek(max(0, size_bytes - PROBE_BYTES))
            digest.update(file.read(PROBE_BYTES))
    return digest.hexdigest()[:16]


def write_origin(folder: Path, origin: Origin) -> None:
    """Write data.json; complete or not at all."""
    part = folder / f"{INDEX}.part"
    part.write_text(origin.model_dump_json(indent=2) + "\n", encoding="utf-8")
    os.replace(part, folder / INDEX)


def read_origin(folder: Path) -> Origin:
    """What data.json says. Raises InputError when it is absent, broken or of another format."""
    try:
        found = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"{folder} is no folder of examples ({INDEX}: {error.strerror}): "
            "flashtalk train prepare or flashtalk train people makes one"
        ) from None
    except ValueError as error:
        raise InputError(f"{folder / INDEX} is not JSON ({error}): prepare the examples again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise InputError(
            f"{folder} is of another format of examples than {FORMAT}: prepare the examples again"
        )
    try:
        return Origin.model_validate_json(json.dumps(found))
    except ValidationError as error:
        raise InputError(
            f"{folder / INDEX} does not say what made the examples ({error.error_count()} faults): "
            "prepare them again"
        ) from None


def check_origin(folder: Path, found: Origin, wanted: Origin) -> None:
    """Hold examples to the model and the settings that train on them; InputError names what differs."""
    for name in ("chunk_frames", "motion_frames", "fps", "hearing"):
        have, want = getattr(found, name), getattr(wanted, name)
        if have != want:
            raise InputError(f"{folder} was made with {name} {have}, the preset has {want}: prepare it again")
    if found.held_out != wanted.held_out:
        kept = "are held out of training" if found.held_out else "are not held out of training"
        raise InputError(f"the people of {folder} {kept}: choose another folder")
    differing = [name for name, digest in wanted.encoders.items() if found.encoders.get(name) != digest]
    if differing:
        raise InputError(
            f"{folder} was made by another model's {', '.join(differing)} encoder "
            f"({found.encoders.get(differing[0])}, not {wanted.encoders[differing[0]]}): prepare it again"
        )


def check_addition(folder: Path, found: Origin, wanted: Origin) -> None:
    """Hold a folder to those who would add to it, too: a shard's number must mean the same clips."""
    check_origin(folder, found, wanted)
    for name in ("area_px", "shard_clips", "prompts"):
        have, want = getattr(found, name), getattr(wanted, name)
        if have != want:
            raise InputError(f"{folder} was made with {name} {have}, now it is {want}: choose another folder")


def shard_paths(folder: Path) -> dict[tuple[int, int], list[Path]]:
    """Shards by (height, width) of their frames in pixels, in order."""
    sizes: dict[tuple[int, int], list[Path]] = {}
    for path in sorted(folder.glob("shard-*x*-*.safetensors")):
        height, _, width = path.stem.split("-")[1].partition("x")
        sizes.setdefault((int(height), int(width)), []).append(path)
    return sizes


def numbers_in(folder: Path) -> dict[int, Path]:
    """Shards by their number."""
    return {int(path.stem.rpartition("-")[2]): path for some in shard_paths(folder).values() for path in some}


def write_shard(folder: Path, size_px: tuple[int, int], number: int, tensors: Mapping[str, Tensor]) -> Path:
    """Write a shard; complete or not at all. Raises OutputError when the disk does not take it."""
    path = folder / f"shard-{size_px[0]}x{size_px[1]}-{number:05d}.safetensors"
    part = path.with_suffix(".part")
    try:
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, part)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path} cannot be written ({error}): free the disk, or choose another") from None
    os.replace(part, path)
    return path


def read_shard(path: Path) -> dict[str, Tensor]:
    """A shard's tensors on the CPU, mapped from the file. Raises InputError when it is broken."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is broken or cut off ({error}): remove it, or prepare it again") from None


def clips_in(path: Path) -> int:
    """Clips of a shard, read without its latents."""
    try:
        with safe_open(path, "pt") as file:
            return int(file.get_tensor("picture_clip").max()) + 1
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is broken or cut off ({error}): remove it, or prepare it again") from None


def write_texts(folder: Path, rows: Sequence[Tensor]) -> None:
    """Write the prompts' rows, each [L, dim]."""
    part = folder / f"{TEXTS}.part"
    save_file({str(i): text.cpu().float().contiguous() for i, text in enumerate(rows)}, part)
    os.replace(part, folder / TEXTS)


def read_texts(folder: Path) -> list[Tensor]:
    """Rows of each prompt, float32 [L, dim]."""
    found = read_shard(folder / TEXTS)
    return [found[str(i)] for i in range(len(found))]


def windows_of(heard: Tensor) -> Tensor:
    """What each frame sees, from a window's stored rows: [B, F + 4, layers, dim] -> [B, F, 5, layers, dim]."""
    return heard.unfold(1, WINDOW_FRAMES, 1).movedim(-1, 2)


def as_stored(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """In the number formats of the list above."""
    whole = {"start", "clip", "text", "picture_clip", "picture_frame"}
    exact = {"box", "colour"}

    def dtype(name: str) -> torch.dtype:
        return torch.int32 if name in whole else torch.float32 if name in exact else torch.float16

    return {name: tensor.to(dtype(name)) for name, tensor in tensors.items()}
