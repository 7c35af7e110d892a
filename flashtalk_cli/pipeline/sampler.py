"""Denoise one chunk of latents."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Generator, Tensor

from flashtalk_cli.pipeline.schedule import renoise

Predict = Callable[[Tensor, float], Tensor]
"""Noisy latents float32 [B, 16, T, h, w] and their time in 0..1 -> velocity of the same shape."""


def draw_noise(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    """Standard normal float32, drawn where the generator lives.

    A session's generator lives on the CPU, so that a seed means the same on every machine. For a GPU it draws into
    pinned memory: an ordinary copy would wait for all that the GPU was asked for before.
    """
    pin = device.type == "cuda" and generator.device.type == "cpu"
    noise = torch.randn(
        shape, generator=generator, dtype=torch.float32, device=generator.device, pin_memory=pin
    )
    return noise.to(device, non_blocking=pin)


def hold_motion(x: Tensor, motion: Tensor) -> Tensor:
    """x [B, 16, T, h, w] with the clean latents [B, 16, m, h, w] of the frames before in its first m."""
    return torch.cat([motion, x[:, :, motion.shape[2] :]], dim=2)


def first_noise(motion: Tensor, n_latents: int, generator: Generator) -> Tensor:
    """What a chunk of so many latents begins as: float32 [B, 16, n_latents, h, w]."""
    return draw_noise((*motion.shape[:2], n_latents, *motion.shape[3:]), generator, motion.device)


def denoise(predict: Predict, motion: Tensor, noise: Tensor, times: Tensor, generator: Generator) -> Tensor:
    """Draw the latents of one chunk from its first noise: float32 [B, 16, n_latents, h, w].

    motion: clean latents [B, 16, m, h, w] of the frames before; they are held in the first m
    latents throughout. times: float32 on the CPU, from 1 to 0. Another noise is drawn after each
    step, the last one included although it is multiplied by zero: the released program's order.
    """
    x = hold_motion(noise, motion)
    for time, next_time in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        velocity = predict(x, time)
        noise = draw_noise(tuple(x.shape), generator, motion.device)
        x = hold_motion(renoise(x, velocity, time, next_time, noise), motion)
    return x
