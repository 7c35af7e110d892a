"""Training the embedded model's image encoder: a small CLIP-shaped vision transformer.

It learns to tell who is in the picture: colours of skin, hair, lips and clothes, hair style, beard,
glasses, where the face is and how it is turned and lit. The class token and the mean of the others
carry that; each patch's token besides carries its own pixels, in a thumbnail of 4 x 4.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashtalk_cli.distill.components.pool import ClipPool
from flashtalk_cli.distill.people.person import BEARDS, GARMENTS, HAIR_STYLES, PersonSpec
from flashtalk_cli.models.export import released_tensors, save_tensors
from flashtalk_cli.models.image import ImageParams, build_image, image_layout, normalise, tokens
from flashtalk_cli.models.weights import fill_random

log = logging.getLogger(__name__)

MINI = ImageParams(image_px=64, patch_px=16, dim=96, ffn_dim=384, heads=4, layers=4, head_dim=64)
CHOICES = {"hair_style": HAIR_STYLES, "beard": BEARDS, "garment": GARMENTS}
AMOUNTS = (
    "skin",
    "hair",
    "lip",
    "cloth",
    "female",
    "age",
    "face_height",
    "place",
    "turn",
    "key_angle",
    "exposure",
    "glasses",
)
THUMBNAIL_PX = 4


@dataclass(frozen=True)
class Truth:
    """What is true of N people: amounts float32 [N, A], near zero mean and unit variance; choices int64 [N, C]."""

    amounts: Tensor
    choices: Tensor


def truth_of(specs: list[PersonSpec], device: str) -> Truth:
    """The attributes of people, from who they are."""
    amounts = np.asarray([_amounts(spec) for spec in specs], dtype=np.float32)
    choices = [[names.index(getattr(spec, key)) for key, names in CHOICES.items()] for spec in specs]
    amounts = (amounts - amounts.mean(0)) / (amounts.std(0) + 1e-3)
    return Truth(torch.from_numpy(amounts).to(device), torch.tensor(choices, device=device))


def _amounts(spec: PersonSpec) -> list[float]:
    found: list[float] = []
    for name in AMOUNTS:
        value = getattr(spec, name)
        found += (
            list(value)
            if isinstance(value, tuple)
            else [float(value > 0) if name == "glasses" else float(value)]
        )
    return found


class Readers(nn.Module):
    """Linear readers of the tokens: attributes of the person, and the pixels of each patch."""

    def __init__(self, dim: int, amounts: int) -> None:
        super().__init__()
        self.person = nn.Linear(2 * dim, amounts + sum(map(len, CHOICES.values())))
        self.patch = nn.Linear(dim, 3 * THUMBNAIL_PX**2)

    def forward(self, found: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [N, 1 + P, dim] to attributes [N, A + all choices] and pixels [N, P, 48]."""
        return self.person(torch.cat([found[:, 0], found[:, 1:].mean(1)], -1)), self.patch(found[:, 1:])


def loss_of(read: tuple[Tensor, Tensor], pixels: Tensor, truth: Truth) -> Tensor:
    """Squared error of amounts and pixels, cross-entropy of choices."""
    person, patches = read
    side = pixels.shape[-1] // (MINI.patch_px // THUMBNAIL_PX)
    small = F.interpolate(pixels, size=(side, side), mode="area")
    wanted = rearrange(small, "n c (h p) (w q) -> n (h w) (c p q)", p=THUMBNAIL_PX, q=THUMBNAIL_PX)
    amounts = truth.amounts.shape[1]
    total = F.mse_loss(person[:, :amounts], truth.amounts) + F.mse_loss(patches, wanted)
    scores = person[:, amounts:].split([len(names) for names in CHOICES.values()], dim=1)
    for i, score in enumerate(scores):
        total = total + 0.3 * F.cross_entropy(score, truth.choices[:, i])
    return total


def train(
    pool: ClipPool, seconds: float, device: str, batch: int = 128, seed: int = 0
) -> tuple[Any, dict[str, float]]:
    """Trains on frames of the pool; returns the network and figures on its last tenth, which is held out."""
    torch.manual_seed(seed)
    specs = [spec for spec in pool.specs if spec is not None]
    truth = truth_of(specs, device)
    n_frames = pool.frames.shape[1]
    rng = np.random.default_rng(seed)
    shown = rng.integers(n_frames, size=(len(specs), 2))
    pictures = torch.stack([_seen(pool.frames[i, t]) for i, row in enumerate(shown) for t in row])
    kept = max(1, len(specs) // 10)
    module = build_image(MINI)
    fill_random(module, torch.device(device), torch.float32, seed)
    module.requires_grad_(True).train()
    readers = Readers(MINI.dim, truth.amounts.shape[1]).to(device)
    module.to(device)  # the numbers of the positions too, which are no parameter
    weights = [*module.parameters(), *readers.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=1e-3, weight_decay=0.05)
    began_s, step = time.monotonic(), 0
    while (spent_s := time.monotonic() - began_s) < seconds:
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * (1 - 0.99 * spent_s / seconds)
        who = (
            torch.from_numpy(rng.integers(kept, len(specs), size=batch)).to(device)
            if len(specs) > kept
            else torch.zeros(batch, dtype=torch.int64, device=device)
        )
        pixels = pictures[who * 2 + step % 2]
        read = readers(tokens(module, pixels))
        loss = loss_of(read, pixels, Truth(truth.amounts[who], truth.choices[who]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        step += 1
    figures = _measure(
        module.eval(), readers, pictures[: 2 * kept : 2], Truth(truth.amounts[:kept], truth.choices[:kept])
    )
    figures |= {"steps": step, "people": len(specs) - kept, "loss": round(loss.item(), 4)}
    log.info("image %s", figures)
    return module, figures


@torch.no_grad()
def _measure(module: Any, readers: Readers, pictures: Tensor, truth: Truth) -> dict[str, float]:
    found = tokens(module, pictures)
    person, _ = readers(found)
    n = truth.amounts.shape[1]
    error = (person[:, :n] - truth.amounts).square().mean() / truth.amounts.square().mean()
    figures = {"amounts_explained": round(1 - error.item(), 3), "token_std": round(found.std().item(), 3)}
    scores = person[:, n:].split([len(names) for names in CHOICES.values()], dim=1)
    for i, (name, score) in enumerate(zip(CHOICES, scores, strict=True)):
        figures[f"{name}_right"] = round((score.argmax(1) == truth.choices[:, i]).float().mean().item(), 3)
    return figures


def _seen(frame: Tensor) -> Tensor:
    """A frame uint8 [S, S, 3] as the encoder sees it: float32 [3, 64, 64]."""
    return normalise(rearrange(frame, "h w c -> c h w").float() / 127.5 - 1, MINI.image_px)[0]


def save_weights(module: nn.Module, path: Path) -> None:
    """The weights, float32, under their released names, the unused last block as zeros."""
    tensors = released_tensors(module.cpu(), image_layout(module, MINI))
    save_tensors(path, {f"visual.{name}": value.float() for name, value in tensors.items()})
