"""Put the trained parts together as the embedded model's folder, in the released layout.

    python -m flashtalk_cli.distill.components.export OUT flashtalk_cli/assets/mini

OUT holds what `components.train` wrote. The text encoder is drawn from a seed and never trained: the
embedded model is trained for one prompt, and needs of it only that different words give different
rows. The motion network (the diffusion transformer) is trained by `flashtalk train`; until its file is
there zeros stand in its place, and config.json has a notice that says so.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashtalk_cli.distill.components import image, speech, vae
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import ModelError
from flashtalk_cli.log import setup
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.export import (
    released_tensors,
    write_byte_tokenizer,
    write_component,
    write_config,
    write_speech_config,
)
from flashtalk_cli.models.folder import CONFIG, ModelFolder, find, read_json
from flashtalk_cli.models.text import TextParams, build_text, text_layout
from flashtalk_cli.models.verify import verify_folder
from flashtalk_cli.models.weights import fill_random

log = logging.getLogger(__name__)

UNTRAINED = "the motion network of this model is not trained yet: its video is noise"
CONFIG_MINI: dict[str, Any] = {
    **{"dim": 256, "ffn_dim": 1024, "num_heads": 4, "num_layers": 8, "in_dim": 36, "out_dim": 16},
    **{"freq_dim": 128, "text_dim": 64, "text_len": 16, "eps": 1e-6, "vae_scale": 4},
    **{"audio_window": 5, "intermediate_dim": 64, "output_dim": 128, "context_tokens": 8},
    **{"audio_layers": 4, "audio_dim": 192, "image_dim": 96, "clip_heads": image.MINI.heads},
    **{"vae_dim": vae.MINI.dim, "vae_dim_mult": list(vae.MINI.dim_mult)},
}
TEXT = TextParams(vocabulary=259, dim=64, attention_dim=64, ffn_dim=128, heads=4, layers=2)
SEED = 20_251_122


def write_mini(parts: Path, folder: Path) -> None:
    """Write the folder; a trained motion network that is already in it stays, with its config's words.

    parts: a folder with vae.safetensors, speech.safetensors and image.safetensors. Raises ModelError
    when one is absent, or when the folder would not verify.
    """
    trained = {name: _read(parts / f"{name}.safetensors") for name in ("vae", "speech", "image")}
    already = _config_of(folder)
    write_config(folder, CONFIG_MINI | already if already else {"_notice": UNTRAINED, **CONFIG_MINI})
    write_speech_config(folder, {**speech.MINI, "architectures": ["Wav2Vec2Model"]})
    assert write_byte_tokenizer(folder) == TEXT.vocabulary
    write_component(folder, "vae", _cast(trained["vae"], torch.float16))
    write_component(folder, "speech", _cast(trained["speech"], torch.float16))
    write_component(folder, "image", _cast(trained["image"], torch.float16))
    write_component(folder, "text", _cast(draw_text_encoder(), torch.float16))
    if not already:
        write_component(folder, "dit", no_motion_network())
    for report in verify_folder(find(folder)):
        if report.problem:
            raise ModelError(f"{report.component}: {report.problem}")
        log.info("%s: %d tensors", report.component, report.n_tensors)
    log.info("%s: %.1f MB", folder, find(folder).size_bytes() / 1e6)


def draw_text_encoder() -> dict[str, Tensor]:
    """The text encoder's tensors under their released names, from the seed."""
    module = build_text(TEXT)
    fill_random(module, torch.device("cpu"), torch.float32, SEED)
    return released_tensors(module, text_layout(TEXT))


def no_motion_network() -> dict[str, Tensor]:
    """The diffusion transformer's tensors, all zero: it predicts no velocity, and packs to nothing."""
    with torch.device("meta"):
        module = DiT(DitParams.from_config(CONFIG_MINI))
    return {
        name: torch.zeros(tensor.shape, dtype=torch.bfloat16) for name, tensor in module.state_dict().items()
    }


def _config_of(folder: Path) -> dict[str, Any]:
    """config.json of a folder whose motion network was trained; {} where there is none."""
    if not (folder / CONFIG).is_file() or not ModelFolder("", folder, folder).files("dit"):
        return {}
    config = read_json(folder / CONFIG)
    return {} if config.get("_notice") == UNTRAINED else config


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise ModelError(f"{path} is missing: scripts/train-mini makes it")
    return load_file(path)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", type=Path)
    parser.add_argument("folder", type=Path)
    given = parser.parse_args()
    setup(debug=True)
    write_mini(given.parts, given.folder)


if __name__ == "__main__":
    told_in_a_line(main)
