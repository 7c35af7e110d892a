"""Multi-step retrospective self-correction: the student learns on what it made itself.

A student that only ever continues real video meets its own mistakes for the first time when it
is used, and they pile up from chunk to chunk. So it is trained on its own output: k chunks are
generated one after another, each decoded to pixels, its last frames encoded again as the next
one's motion latents, exactly as in use; only the k-th is scored, and of its denoising steps only
one, drawn at random, keeps its gradient. The memory of a training step does not grow with k.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.colour import Statistics, match_colour
from flashtalk_cli.pipeline.sampler import Predict, denoise, draw_noise, hold_motion
from flashtalk_cli.pipeline.schedule import renoise

LATENTS_AT_ONCE = 4  # that the VAE decodes together: fewer, larger kernels


@dataclass(frozen=True)
class Rollout:
    """The chunk that is scored."""

    clean: Tensor  # [B, 16, T, h, w], with gradient through one step
    motion: Tensor  # [B, 16, m, h, w], what it continued
    interval: tuple[float, float]  # the times between which that step moves


def predict_clean(
    predict: Predict, motion: Tensor, n_latents: int, times: Tensor, kept: int, generator: Generator
) -> Tensor:
    """The student's guess of the clean chunk at its `kept`-th step; only that step has a gradient."""
    shape = (*motion.shape[:2], n_latents, *motion.shape[3:])
    points = times.tolist()
    with torch.no_grad():
        x = hold_motion(draw_noise(shape, generator, motion.device), motion)
        for time, next_time in itertools.pairwise(points[: kept + 1]):
            noise = draw_noise(shape, generator, motion.device)
            x = hold_motion(renoise(x, predict(x, time), time, next_time, noise), motion)
    clean = x - points[kept] * predict(x, points[kept])
    return hold_motion(clean, motion)


@torch.no_grad()
def continue_from(vae: Vae, clean: Tensor, colour: Statistics, sampling: Sampling) -> Tensor:
    """A finished chunk's latents -> the next one's motion latents, through pixels as in use."""
    video, _ = vae.decode(clean, latents_at_once=LATENTS_AT_ONCE)
    tail = match_colour(video[:, :, -sampling.motion_frames :], colour, sampling.colour_strength)
    motion, _ = vae.encode(tail)
    return motion.float()


def roll_out(
    predict: Callable[[int], Predict],
    vae: Vae,
    first_motion: Tensor,
    colour: Statistics,
    n_chunks: int,
    kept: int,
    times: Tensor,
    sampling: Sampling,
    generator: Generator,
) -> Rollout:
    """Generate n_chunks chunks; the last with gradient through its `kept`-th step.

    predict: the student for chunk i, with that chunk's speech. first_motion: what the first one
    continues. The draws of n_chunks and kept are the caller's: all ranks must share them.
    """
    motion = first_motion
    with torch.no_grad():
        for index in range(n_chunks - 1):
            clean = denoise(predict(index), motion, sampling.chunk_latents, times, generator)
            motion = continue_from(vae, clean, colour, sampling)
    clean = predict_clean(predict(n_chunks - 1), motion, sampling.chunk_latents, times, kept, generator)
    points: Sequence[float] = times.tolist()
    return Rollout(clean, motion, (points[kept + 1], points[kept]))
