"""A whole model in the released layout, small enough to write and load in a moment, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.export import (
    released_tensors,
    write_byte_tokenizer,
    write_component,
    write_config,
    write_speech_config,
)
from flashtalk_cli.models.image import ImageParams, build_image, image_layout
from flashtalk_cli.models.speech import build_speech
from flashtalk_cli.models.text import TextParams, build_text, text_layout
from flashtalk_cli.models.vae import Vae, VaeParams
from flashtalk_cli.models.weights import fill_random

CONFIG: dict[str, Any] = {
    **{
        "dim": 48,
        "ffn_dim": 64,
        "num_heads": 4,
        "num_layers": 2,
        "freq_dim": 16,
        "text_dim": 32,
        "text_len": 24,
    },
    **{"intermediate_dim": 8, "output_dim": 16, "context_tokens": 4, "audio_layers": 3, "audio_dim": 32},
    **{"image_dim": 32, "clip_heads": 4, "vae_dim": 8, "_packer": "tests"},
}
SPEECH_CONFIG: dict[str, Any] = {
    **{"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64},
    **{"conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
}
TEXT = TextParams(vocabulary=264, dim=32, attention_dim=32, ffn_dim=48, heads=4, layers=2)
IMAGE = ImageParams(image_px=28, patch_px=14, dim=32, ffn_dim=64, heads=4, layers=3, head_dim=16)


def tensors(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """Every component's tensors under their released names, without the prefix `visual.`."""
    cpu = torch.device("cpu")
    with torch.device("meta"):
        dit, vae = DiT(DitParams.from_config(CONFIG)), Vae(VaeParams.from_config(CONFIG))
    text, image, speech = build_text(TEXT), build_image(IMAGE), build_speech(SPEECH_CONFIG)
    for module in (dit, vae, text, image, speech):
        fill_random(module, cpu, torch.float32, seed)
    return {
        "dit": dict(dit.state_dict()),
        "vae": dict(vae.state_dict()),
        "text": released_tensors(text, text_layout(TEXT)),
        "image": released_tensors(image, image_layout(image, IMAGE)),
        "speech": dict(speech.state_dict()),
    }


def write(folder: Path, seed: int = 0, shards: int = 1) -> dict[str, dict[str, Tensor]]:
    """Write the model; returns what `tensors` does."""
    written = tensors(seed)
    write_config(folder, CONFIG)
    write_speech_config(folder, SPEECH_CONFIG)
    write_byte_tokenizer(folder)
    write_component(folder, "dit", written["dit"], shards)
    write_component(folder, "vae", written["vae"])
    write_component(folder, "text", written["text"])
    write_component(folder, "image", {f"visual.{key}": value for key, value in written["image"].items()})
    write_component(folder, "speech", written["speech"])
    return written
