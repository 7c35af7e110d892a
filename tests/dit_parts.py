"""A small DiT with random weights, and inputs for it."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.parallel.sequence import Sequence

CPU = torch.device("cpu")
SMALL = DitParams(
    dim=48,
    ffn_dim=64,
    num_heads=4,
    num_layers=2,
    freq_dim=16,
    text_dim=20,
    text_len=10,
    intermediate_dim=8,
    output_dim=24,
    context_tokens=3,
    audio_layers=2,
    audio_dim=5,
    image_dim=14,
)


def random_dit(params: DitParams = SMALL, seed: int = 0) -> DiT:
    """Weights of sensible size, and none of them a constant that could hide a mistake."""
    random = torch.Generator().manual_seed(seed)
    dit = DiT(params).eval()
    for name, weight in dit.named_parameters():
        std = weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1
        mean = 1.0 if re.search(r"norm|proj\.[04]\.weight", name) and name.endswith("weight") else 0.0
        weight.data = torch.randn(weight.shape, generator=random) * (std if weight.ndim > 1 else 0.1) + mean
    return dit


@dataclass(frozen=True)
class Inputs:
    """What a DiT is given, drawn from a seed."""

    x: Tensor
    t: Tensor
    y: Tensor
    text: Tensor
    image: Tensor
    windows: Tensor

    @classmethod
    def draw(
        cls, p: DitParams, b: int = 1, latents: int = 3, h: int = 6, w: int = 4, seed: int = 1
    ) -> Inputs:
        random = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        frames = 1 + p.vae_scale * (latents - 1)
        return cls(
            x=normal(b, p.out_dim, latents, h, w),
            t=torch.rand(b, generator=random) * 1000,
            y=normal(b, p.in_dim - p.out_dim, latents, h, w),
            text=normal(b, min(7, p.text_len), p.text_dim),
            image=normal(b, 9, p.image_dim),
            windows=normal(b, frames, p.audio_window, p.audio_layers, p.audio_dim),
        )

    def row(self, i: int) -> Inputs:
        """One of the batch, as a batch of one."""
        return Inputs(*(getattr(self, name)[i : i + 1] for name in self.__dataclass_fields__))

    def through(self, dit: DiT, par: Sequence | None = None) -> Tensor:
        context, audio = dit.condition(self.text, self.image), dit.hear(self.windows)
        return dit(self.x, self.t, self.y, context, audio, par or Sequence())


def relative_error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).abs().max() / theirs.double().abs().max())


def gradients_of(dit: DiT, given_: Inputs) -> dict[str, Tensor]:
    dit.zero_grad()
    given_.through(dit).square().mean().backward()
    return {name: weight.grad.clone() for name, weight in dit.named_parameters() if weight.grad is not None}
