"""Give a motion network another speech encoder without training the network again.

    python -m flashtalk_cli.distill.components.transfer BANK MODEL SPEECH OUT --engines espeak flite

A motion network knows one speech encoder's features and no others', but all that it does with them begins with two linear
layers (`models/audio.py`). Those are fitted anew, by least squares, so that of the features of SPEECH, weights that
`components.train speech` wrote, they give what they gave of MODEL's encoder's: over windows of BANK, of those engines' voices
that the old encoder learned from, which it hears well. Where the new one tells the same sounds in other voices, the network
is then moved by voices that it never understood. OUT is the whole model, in the released layout.
"""

from __future__ import annotations

import argparse
import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from flashtalk_cli.distill.components import speech
from flashtalk_cli.distill.components.speech import draw_windows, hear
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.voices import ENGINES
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import InputError
from flashtalk_cli.log import setup
from flashtalk_cli.models.dit import DitParams
from flashtalk_cli.models.export import write_component, write_config, write_speech_config
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.weights import load_speech_encoder

log = logging.getLogger(__name__)

WINDOWS, WINDOWS_AT_ONCE, WINDOWS_ASKED = 600, 40, 24
RIDGE = 1e-3  # of the features' mean power


@dataclass
class Layer:
    """One linear layer that reads `n_frames` of features in a row, and what its new weights are fitted to."""

    n_frames: int
    weight: Tensor
    bias: Tensor
    power: Tensor | float = 0.0
    shared: Tensor | float = 0.0

    def gives(self, features: Tensor) -> Tensor:
        """What it makes of the old encoder's features [N, T, layers, dim]: [N * (T - n_frames + 1), out]."""
        return rows(features, self.n_frames) @ self.weight.T + self.bias

    def see(self, old: Tensor, new: Tensor) -> None:
        """Count in the same windows as both encoders hear them."""
        x = _with_one(rows(new, self.n_frames))
        self.power = self.power + x.T @ x
        self.shared = self.shared + x.T @ self.gives(old)

    def fitted(self) -> tuple[Tensor, Tensor]:
        """Weight and bias for the new encoder's features."""
        assert isinstance(self.power, Tensor)
        assert isinstance(self.shared, Tensor)
        power = self.power.double()
        features = power.diagonal()[:-1]  # the bias is free: where the features' origin lies must not matter
        features.add_(RIDGE * features.mean())
        found = torch.linalg.solve(power, self.shared.double()).float()
        return found[:-1].T.contiguous(), found[-1].contiguous()


def rows(features: Tensor, n_frames: int) -> Tensor:
    """Features [N, T, layers, dim] as rows of `n_frames` in a row each, the earliest first."""
    return features.unfold(1, n_frames, 1).movedim(-1, 2).flatten(2).flatten(0, 1)


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(len(x), 1)], dim=1)


@torch.no_grad()
def transfer(
    tensors: dict[str, Tensor], params: DitParams, old: Any, new: Any, bank: SpeechBank, windows: int
) -> dict[str, float]:
    """Replace the two layers of a motion network's `tensors`, in place.

    Returns for each the share of the variance of what it gave that it still gives, in windows it was not fitted to.
    """
    device = next(old.parameters()).device
    layers = {
        f"audio_proj.{name}": Layer(n, *(tensors[f"audio_proj.{name}.{part}"].float() for part in ("weight", "bias")))
        for name, n in (("proj1", params.audio_window), ("proj1_vf", params.audio_window + params.vae_scale - 1))
    }  # fmt: skip
    for start in range(0, windows, WINDOWS_AT_ONCE):
        drawn = draw_windows(bank, min(WINDOWS_AT_ONCE, windows - start), 1 + start, True, device)
        heard = hear(old, drawn).float(), hear(new, drawn).float()
        for layer in layers.values():
            layer.see(*heard)
        log.info("transfer: %d of %d windows", min(start + WINDOWS_AT_ONCE, windows), windows)
    asked = draw_windows(bank, min(WINDOWS_ASKED, windows), 0, True, device)
    kept = {}
    for name, layer in layers.items():
        weight, bias = layer.fitted()
        was = layer.gives(hear(old, asked).float())
        off = rows(hear(new, asked).float(), layer.n_frames) @ weight.T + bias - was
        kept[name] = 1 - (off.square().mean(0) / was.var(0).clamp_min(1e-12)).mean().item()
        for part, value in (("weight", weight), ("bias", bias)):
            tensors[f"{name}.{part}"] = value.to(tensors[f"{name}.{part}"].dtype)
    return kept


def write(
    bank_folder: Path,
    model: str,
    weights: Path,
    out: Path,
    windows: int = WINDOWS,
    engines: Sequence[str] = ENGINES,
) -> dict[str, float]:
    """The command: what `transfer` returns. Raises InputError where OUT is there already, or the bank has no such voices."""
    if out.exists():
        raise InputError(f"{out} is there already: choose another folder")
    folder, cpu = find(model), torch.device("cpu")
    old = load_speech_encoder(folder, cpu, torch.float32).module
    new = speech.build_trainable(speech.MINI, 0).eval()
    new.load_state_dict(load_file(weights))
    tensors = {name: value for path in folder.files("dit") for name, value in load_file(path).items()}
    config = folder.config()
    bank = SpeechBank(bank_folder, "train")
    bank.keep(lambda voice: voice.partition(":")[0] in engines)
    kept = transfer(tensors, DitParams.from_config(config), old, new, bank, windows)
    shutil.copytree(folder.path, out)
    sizes = {"audio_layers": speech.MINI["num_hidden_layers"], "audio_dim": speech.MINI["hidden_size"]}
    write_config(out, {**config, **sizes})
    write_speech_config(out, {**speech.MINI, "architectures": ["Wav2Vec2Model"]})
    write_component(out, "speech", {name: value.half() for name, value in new.state_dict().items()})
    write_component(out, "dit", tensors)
    return kept


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("bank", type=Path)
    parser.add_argument("model")
    parser.add_argument("speech", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES, help="whose voices")
    given = parser.parse_args()
    setup(debug=True)
    kept = write(given.bank, given.model, given.speech, given.out, engines=given.engines)
    log.info("kept of their variance: %s", {name: round(share, 3) for name, share in kept.items()})


if __name__ == "__main__":
    told_in_a_line(main)
