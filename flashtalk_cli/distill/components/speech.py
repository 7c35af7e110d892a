"""Training the embedded model's speech encoder from nothing: a small wav2vec 2.0.

It learns from synthetic speech whose sounds are known. From the output of every block, at every
frame of the video, four readers tell which sound is heard, how the mouth is shaped by it and its
neighbours, and how loud it is: the readers are thrown away, and what they read stays in the
features. The windows are those of rendering (8 s, zero mean and unit variance, at times beginning
with the zeros of a stream's start), brought to the video's frame rate inside the network as
rendering does it, by the same code.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flashtalk_cli.distill.components.windows import (
    WINDOW_FRAMES,
    WindowPool,
    Windows,
    draw_window,
    normalise,
    vary,
)
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.phonemes import CLASSES, MOUTHS, SHAPES
from flashtalk_cli.models.export import save_tensors
from flashtalk_cli.models.speech import build_speech, features_of

log = logging.getLogger(__name__)

MINI: dict[str, Any] = {
    **{"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "intermediate_size": 768},
    **{"conv_dim": [64, 96, 128, 128, 192, 192, 192]},
    **{"num_conv_pos_embeddings": 32, "num_conv_pos_embedding_groups": 8},
    **{"feat_extract_norm": "group", "do_stable_layer_norm": False},
}
LAYER_WEIGHTS = (0.2, 0.4, 0.6, 1.0)
SHAPES_WEIGHT = 20.0  # shapes are what moves lips, and their errors are small numbers beside a cross-entropy


@dataclass(frozen=True)
class Plan:
    """How to train."""

    seconds: float = 300.0
    fill_s: float = 25.0  # of drawing windows before it
    pool_windows: int = 6000
    batch: int = 48
    rate: float = 1.5e-3
    warm_up_steps: int = 400
    average: float = 0.999
    workers: int = 6
    measured_windows: int = 96
    seed: int = 0

    def rate_at(self, step: int, spent_s: float) -> float:
        """The learning rate: up over the first steps, down by a cosine to a hundredth over the time."""
        cooled = 0.01 + 0.495 * (1 + math.cos(math.pi * min(1.0, spent_s / self.seconds)))
        return self.rate * min(1.0, (step + 1) / self.warm_up_steps) * cooled


TOY = Plan(pool_windows=8, batch=2, warm_up_steps=2, workers=0, measured_windows=2)
"""Nothing is learned at this size; every line is run."""


def build_trainable(config: dict[str, Any], seed: int) -> Any:
    """The network with its initial weights, float32 on the CPU."""
    from transformers import Wav2Vec2Model

    torch.manual_seed(seed)
    settings = build_speech(
        {**config, "layerdrop": 0.0, "hidden_dropout": 0.1, "attention_dropout": 0.1}
    ).config
    return Wav2Vec2Model(settings)


class Readers(nn.Module):
    """A linear reader for each block: scores of every sound, then mouth shapes, then loudness."""

    def __init__(self, layers: int, dim: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(dim, len(CLASSES) + len(SHAPES) + 1) for _ in range(layers))

    def forward(self, heard: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[B, T, layers, dim] to scores [B, T, layers, sounds], shapes [..., 7] and loudness [...]."""
        read = torch.stack([layer(heard[:, :, i]) for i, layer in enumerate(self.layers)], dim=2).float()
        return read[..., : len(CLASSES)], read[..., len(CLASSES) : -1], read[..., -1]


def reading_loss(read: tuple[Tensor, Tensor, Tensor], labels: Windows) -> Tensor:
    """Cross-entropy of sounds, and mean error of shapes and loudness; later blocks weigh more."""
    scores, shapes, loudness = read
    weights = torch.tensor(LAYER_WEIGHTS[-scores.shape[2] :], device=scores.device)
    total = torch.zeros((), device=scores.device)
    for i, weight in enumerate(weights):
        sounds = F.cross_entropy(scores[:, :, i].flatten(0, 1), labels.sounds.flatten(), label_smoothing=0.03)
        shaped = F.smooth_l1_loss(shapes[:, :, i], labels.shapes, beta=0.1)
        loud = F.smooth_l1_loss(loudness[:, :, i], labels.loudness, beta=0.1)
        total = total + weight * (sounds + SHAPES_WEIGHT * shaped + loud)
    return total / weights.sum()


class Learner:
    """The network, its readers, their moving average and the optimiser: what training goes on from."""

    def __init__(self, plan: Plan, device: str) -> None:
        module = build_trainable(MINI, plan.seed)
        readers = Readers(module.config.num_hidden_layers, module.config.hidden_size)
        self.both = nn.ModuleDict({"module": module, "readers": readers}).to(device).train()
        self.averaged = AveragedModel(self.both, multi_avg_fn=get_ema_multi_avg_fn(plan.average))
        fused = {"fused": True} if device != "cpu" else {}
        self.optimizer = torch.optim.AdamW(
            self.both.parameters(), lr=plan.rate, betas=(0.9, 0.98), weight_decay=0.05, **fused
        )
        self.step, self.spent_s = 0, 0.0

    @property
    def best(self) -> tuple[Any, Readers]:
        """The averaged network and its readers, for use."""
        averaged: Any = self.averaged.module.eval()
        return averaged["module"], averaged["readers"]

    def learn(
        self, samples: Tensor, labels: Windows, rate: float
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """One step; the loss and what was read."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = samples.device.type
        with torch.autocast(device, torch.bfloat16, enabled=device != "cpu"):
            read = self.both["readers"](features_of(self.both["module"], samples, labels.sounds.shape[1]))
        loss = reading_loss(read, labels)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.both.parameters(), 1.0)
        self.optimizer.step()
        self.averaged.update_parameters(self.both)
        self.step += 1
        return loss, read

    def keep(self, path: Path) -> None:
        """Write all of it under its name once it is whole."""
        parts = {name: getattr(self, name).state_dict() for name in ("both", "averaged", "optimizer")}
        part = path.with_name(f"{path.name}.part")
        torch.save({**parts, "step": self.step, "spent_s": self.spent_s}, part)
        part.replace(path)

    def resume(self, path: Path) -> None:
        """Go on from what `keep` wrote."""
        state = torch.load(path, map_location=next(self.both.parameters()).device, weights_only=True)
        for name in ("both", "averaged", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.spent_s = state["step"], state["spent_s"]


def train(
    bank: SpeechBank,
    plan: Plan,
    device: str,
    save: Callable[[nn.Module, int], None] | None = None,
    kept: Path | None = None,
) -> tuple[Any, Readers, list[dict[str, float]]]:
    """Trains for `plan.seconds` after drawing; returns the averaged network, its readers, and a log.

    save(network, step): called about every minute. kept: a file that then remembers everything; if it is there
    already, training goes on from it, for what is left of its seconds.
    """
    learner = Learner(plan, device)
    if kept and kept.exists():
        learner.resume(kept)
        log.info("speech: goes on from step %d, after %.0f s", learner.step, learner.spent_s)
    seed = plan.seed + learner.step  # what was heard before is not heard again in the same order
    pool = WindowPool(bank, plan.pool_windows, device, plan.workers, seed)
    generator = torch.Generator(device).manual_seed(seed)
    rng = np.random.default_rng(seed)
    filled_s = time.monotonic() + plan.fill_s
    while pool.count < min(plan.batch, plan.pool_windows) or (
        pool.count < plan.pool_windows and time.monotonic() < filled_s
    ):
        pool.add()
    log.info("speech: %d windows of 8 s", pool.count)
    lines: list[dict[str, float]] = []
    before_s = learner.spent_s
    began_s = said_s = saved_s = time.monotonic()
    while learner.spent_s < plan.seconds:
        samples, labels = vary(pool.draw(plan.batch, generator), generator, rng)
        loss, read = learner.learn(samples, labels, plan.rate_at(learner.step, learner.spent_s))
        if learner.step % 2 == 0:
            pool.add()
        if learner.step <= 3 or time.monotonic() - said_s > 10:
            lines.append(
                {
                    "step": learner.step,
                    "seconds": round(learner.spent_s, 1),
                    "loss": round(loss.item(), 4),
                    **accuracy(read, labels),
                }
            )
            log.info("speech %s", lines[-1])
            said_s = time.monotonic()
        learner.spent_s = before_s + time.monotonic() - began_s
        if time.monotonic() - saved_s > 60 or learner.spent_s >= plan.seconds:
            saved_s = time.monotonic()
            if kept:
                learner.keep(kept)
            if save:
                save(learner.best[0], learner.step)
    return *learner.best, lines


# Sounds that look alike: by the shape of the mouth that makes them.
LOOKS = torch.tensor(
    [sorted({repr(m) for m in MOUTHS.values()}).index(repr(MOUTHS[name])) for name in CLASSES]
)


@torch.no_grad()
def accuracy(read: tuple[Tensor, Tensor, Tensor], labels: Windows) -> dict[str, float]:
    """Shares of frames told right by the last block: sounds, looks, sounds where someone speaks; and
    the correlation of the jaw's curve."""
    told, truth = read[0][:, :, -1].argmax(-1), labels.sounds
    looks = LOOKS.to(truth.device)
    right = (told == truth).float()
    jaw = torch.corrcoef(torch.stack([read[1][:, :, -1, 0].flatten(), labels.shapes[..., 0].flatten()]))[0, 1]
    return {
        "sounds": round(right.mean().item(), 4),
        "spoken": round(right[truth > 0].mean().item(), 4),
        "looks": round((looks[told] == looks[truth]).float().mean().item(), 4),
        "silence": round(((told == 0) == (truth == 0)).float().mean().item(), 4),
        "jaw": round(jaw.item(), 4),
    }


def opening_of(labels: Windows) -> Tensor:
    """How far the lips are apart, up to the speaker's scale: [N, T], of the jaw's curve and the lips'."""
    return labels.shapes[..., SHAPES.index("jaw")] * (1 - labels.shapes[..., SHAPES.index("closed")])


@torch.no_grad()
def read_opening(
    module: Any, known: SpeechBank, asked: SpeechBank, count: int, reach: int = 2, ridge: float = 1e-2
) -> float:
    """How well the opening can be read from the features: correlation over `count` windows of `asked`.

    The reader is a ridge regression on windows of `known` of the features of all blocks `reach` frames about a frame,
    which is what a motion network is given: it could hardly move lips better than this.
    """
    device = next(module.parameters()).device

    def seen(bank: SpeechBank, seed: int) -> tuple[Tensor, Tensor]:
        windows = draw_windows(bank, count, seed, True, device)
        heard = hear(module, windows).flatten(2)
        near = F.pad(heard, (0, 0, reach, reach)).unfold(1, 2 * reach + 1, 1).flatten(2)
        return near.flatten(0, 1).double(), opening_of(windows).flatten().double()

    x, y = seen(known, 1)
    mean, spread = x.mean(0), x.std(0) + 1e-6
    x = (x - mean) / spread
    power = x.T @ x
    power.diagonal().add_(ridge * len(x))
    weights = torch.linalg.solve(power, x.T @ (y - y.mean()))
    x, y = seen(asked, 2)
    return round(torch.corrcoef(torch.stack([((x - mean) / spread) @ weights, y]))[0, 1].item(), 4)


def draw_windows(bank: SpeechBank, count: int, seed: int, clean: bool, device: torch.device) -> Windows:
    """Windows of a bank, the same for the same seed."""
    rng = np.random.default_rng((43, seed))
    drawn = [draw_window(bank, rng, clean) for _ in range(count)]
    return Windows(*(torch.from_numpy(np.stack(values)).to(device) for values in zip(*drawn, strict=True)))


def hear(module: Any, windows: Windows) -> Tensor:
    """Features [N, T, layers, dim] of windows of 8 s."""
    pieces = windows.samples.split(16)
    return torch.cat([features_of(module, normalise(some.float() / 32768), WINDOW_FRAMES) for some in pieces])


@torch.no_grad()
def measure(
    module: Any, readers: Readers, bank: SpeechBank, count: int, seed: int = 0, clean: bool = True
) -> dict[str, Any]:
    """Accuracies on windows of a bank, by every block, and the features' mean and standard deviation."""
    windows = draw_windows(bank, count, seed, clean, next(module.parameters()).device)
    heard = hear(module, windows)
    scores, shapes, loudness = readers(heard)
    by_layer = {
        f"layer_{i + 1}": accuracy(
            (scores[:, :, i : i + 1], shapes[:, :, i : i + 1], loudness[:, :, i : i + 1]), windows
        )
        for i in range(scores.shape[2])
    }
    return {
        **by_layer,
        "feature_mean": round(heard.mean().item(), 3),
        "feature_std": [round(v, 3) for v in heard.std((0, 1, 3)).tolist()],
    }


def save_weights(module: nn.Module, path: Path) -> None:
    """The weights, float32, under their released names."""
    save_tensors(path, deepcopy(module).float().state_dict())
