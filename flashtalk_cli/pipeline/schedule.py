"""The times at which a chunk is denoised, and the one line that moves it from a time to the next."""

from __future__ import annotations

import torch
from torch import Tensor


def shift_time(time: Tensor, shift: float) -> Tensor:
    """Move times in 0..1 towards the noisy end: u -> shift u / (1 + (shift - 1) u)."""
    return shift * time / (1 + (shift - 1) * time)


def times(steps: int, shift: float = 5.0) -> Tensor:
    """The times of a chunk: float32 [steps + 1], from 1 (noise) down to 0 (picture).

    4 and 2 steps use the times that the released model was distilled at; any other count
    spreads them evenly, as the released program does.
    """
    distilled = {4: [1000.0, 750.0, 500.0, 250.0], 2: [1000.0, 500.0]}
    even = torch.linspace(1000, 1, steps, dtype=torch.float64)
    before_shift = torch.tensor(distilled[steps], dtype=torch.float64) if steps in distilled else even
    return torch.cat([shift_time(before_shift / 1000, shift), torch.zeros(1, dtype=torch.float64)]).float()


def renoise(x: Tensor, velocity: Tensor, time: float, next_time: float, noise: Tensor) -> Tensor:
    """Step from `time` to `next_time`: guess the clean latents, then noise them afresh.

    The student of distribution matching is trained for this, and not for following the
    ODE: x, velocity and noise are float32 of one shape, the times in 0..1.
    """
    clean = x - time * velocity
    return (1 - next_time) * clean + next_time * noise
