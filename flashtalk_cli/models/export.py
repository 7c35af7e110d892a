"""Write a model folder in the released layout, as safetensors: the way back from `weights`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn

from flashtalk_cli.models.folder import (
    CONFIG,
    DIT_INDEX,
    DIT_STEM,
    SPEECH_FILES,
    SPEECH_FOLDER,
    STEMS,
    TOKENIZER,
    Component,
)
from flashtalk_cli.models.tensors import Layout, tensors_of


def released_tensors(module: nn.Module, layout: Layout) -> dict[str, Tensor]:
    """The module's parameters under their released names; tensors that it does not use are zeros."""
    parts: dict[str, dict[int, Tensor]] = {}
    expected = layout.shapes(module)
    for name, tensor in tensors_of(module):
        piece = layout.pieces[name]
        parts.setdefault(piece.key, {})[piece.part] = tensor.detach()
    tensors = {
        key: torch.cat([rows[i] for i in sorted(rows)]).reshape(expected[key]) for key, rows in parts.items()
    }
    dtype = next(iter(tensors.values())).dtype
    return {key: tensors.get(key, torch.zeros(shape, dtype=dtype)) for key, shape in expected.items()}


def write_component(
    folder: Path, component: Component, tensors: Mapping[str, Tensor], shards: int = 1
) -> list[Path]:
    """Write a component's tensors, under their released names, where the layout wants them.

    shards: files to spread a DiT over, with an index. A file replaces its predecessor when it is
    complete; other files of a DiT that was there are removed then. Returns the files.
    """
    assert shards == 1 or component == "dit"
    if component != "dit":
        path = (
            folder / SPEECH_FOLDER / SPEECH_FILES[0]
            if component == "speech"
            else folder / f"{STEMS[component]}.safetensors"
        )
        return [save_tensors(path, tensors)]
    if shards == 1:
        paths = [save_tensors(folder / f"{DIT_STEM}.safetensors", tensors)]
        _remove_other_dits(folder, paths)
        return paths
    keys = list(tensors)
    shard_keys = [keys[i::shards] for i in range(shards)]
    names = [f"{DIT_STEM}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    paths = [
        save_tensors(folder / name, {key: tensors[key] for key in part})
        for name, part in zip(names, shard_keys, strict=True)
    ]
    weight_map = {key: name for name, part in zip(names, shard_keys, strict=True) for key in part}
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / DIT_INDEX, {"metadata": {"total_size": size_bytes}, "weight_map": weight_map})
    _remove_other_dits(folder, [folder / DIT_INDEX, *paths])
    return paths


def _remove_other_dits(folder: Path, written: list[Path]) -> None:
    """Remove what else the loader would take for the DiT: an index first, which goes before files."""
    for old in sorted(folder.glob(f"{DIT_STEM}*"), key=lambda path: path.name != DIT_INDEX):
        if old not in written:
            old.unlink()


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.json: the DiT's sizes in the released words, `vae_...`, `clip_heads`."""
    write_json(folder / CONFIG, config)


def write_speech_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write the speech encoder's config.json, in transformers' words."""
    write_json(folder / SPEECH_FOLDER / CONFIG, {"model_type": "wav2vec2", **config})


def write_byte_tokenizer(folder: Path) -> int:
    """Write a tokenizer with a token a byte, for a text encoder too small to need another.

    Returns its number of tokens: 3 special ones (padding, end, unknown: 0, 1, 2) and 256 bytes.
    """
    special = ["<pad>", "</s>", "<unk>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(
        BPE({token: i for i, token in enumerate([*special, *alphabet])}, [], unk_token="<unk>")
    )
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    tokenizer.post_processor = TemplateProcessing(  # type: ignore[assignment]
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    (folder / TOKENIZER).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / TOKENIZER / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, for people to read; whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all, for whoever may read the user's other files; raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.unlink(missing_ok=True)
    part.touch()
    mode = part.stat().st_mode  # what follows would be the user's alone
    try:
        save_file(
            {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, part, metadata
        )
    except SafetensorError as error:  # of a full disk, too
        part.unlink(missing_ok=True)
        raise OSError(str(error)) from None
    part.chmod(mode)
    os.replace(part, path)
    return path
