"""Denoise one chunk of latents."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from flashtalk_cli.models.dit import AudioContext, Context, DiT
from flashtalk_cli.parallel.sequence import Sequence
from flashtalk_cli.pipeline.schedule import renoise


def draw_noise(shape: tuple[int, ...], generator: Generator, device: torch.device) -> Tensor:
    """Standard normal float32, drawn on the CPU so that a seed means the same on every machine."""
    return torch.randn(shape, generator=generator, dtype=torch.float32).to(device, non_blocking=True)


@torch.no_grad()
def denoise(
    dit: DiT,
    y: Tensor,
    context: Context,
    audio: AudioContext,
    motion: Tensor,
    times: Tensor,
    generator: Generator,
    par: Sequence,
) -> Tensor:
    """Draw the latents of one chunk: float32 [1, 16, T, h, w].

    y: [1, 20, T, h, w], the picture's latents under their mask. motion: clean latents
    [1, 16, m, h, w] of the frames before; they are held in the first m latents throughout.
    times: float32 on the CPU, from 1 to 0. One noise is drawn first and one after each step,
    the last one included although it is multiplied by zero: the released program's order.
    """

    def hold_motion(x: Tensor) -> Tensor:
        return torch.cat([motion, x[:, :, motion.shape[2] :]], dim=2)

    shape = (motion.shape[1], *y.shape[2:])
    x = hold_motion(draw_noise(shape, generator, y.device)[None])
    for time, next_time in zip(times[:-1].tolist(), times[1:].tolist(), strict=True):
        t = torch.full((1,), time * 1000, dtype=torch.float32, device=y.device)
        velocity = dit(x, t, y, context, audio, par)
        noise = draw_noise(shape, generator, y.device)[None]
        x = hold_motion(renoise(x, velocity, time, next_time, noise))
    return x
