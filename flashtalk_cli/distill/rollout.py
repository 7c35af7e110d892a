"""Multi-step retrospective self-correction: the student learns on what it made itself.

A student that only ever continues real video meets its own mistakes for the first time when it
is used, and they pile up from chunk to chunk. So it is trained on its own output: k chunks are
generated one after another, each decoded to pixels, its last frames encoded again as the next
one's motion latents, exactly as in use; only the k-th moves the student, and of its denoising steps
only one, drawn at random, which is computed again for its gradient. So a rollout may be looked at
by others before, and the memory of a training step does not grow with k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.colour import Statistics, match_colour
from flashtalk_cli.pipeline.sampler import Predict, denoise, first_noise, hold_motion

LATENTS_AT_ONCE = 4  # that the VAE decodes together: fewer, larger kernels


@dataclass(frozen=True)
class Made:
    """A chunk that the student made, and the way there; all without gradient."""

    motion: Tensor  # [B, 16, m, h, w], what it continued
    clean: Tensor  # [B, 16, T, h, w]
    noisy: tuple[Tensor, ...]  # what each step was given [B, 16, T, h, w]
    guesses: tuple[Tensor, ...]  # the clean chunk as each step guessed it [B, 16, T, h, w]


def guess(predict: Predict, x: Tensor, time: float, motion: Tensor) -> Tensor:
    """The student's guess of the clean chunk, of x at that time."""
    return hold_motion(x - time * predict(x, time), motion)


def make_chunk(predict: Predict, motion: Tensor, n_latents: int, times: Tensor, generator: Generator) -> Made:
    """One chunk as it is made in use."""
    noisy, guesses = [], []

    def noted(x: Tensor, time: float) -> Tensor:
        velocity = predict(x, time)
        noisy.append(x)
        guesses.append(hold_motion(x - time * velocity, motion))
        return velocity

    clean = denoise(noted, motion, first_noise(motion, n_latents, generator), times, generator)
    return Made(motion, clean, tuple(noisy), tuple(guesses))


def continue_from(vae: Vae, clean: Tensor, colour: Statistics, sampling: Sampling) -> Tensor:
    """A finished chunk's latents -> the next one's motion latents, through pixels as in use."""
    video, _ = vae.decode(clean, latents_at_once=LATENTS_AT_ONCE)
    tail = match_colour(video[:, :, -sampling.motion_frames :], colour, sampling.colour_strength)
    motion, _ = vae.encode(tail)
    return motion.float()


@torch.no_grad()
def roll_out(
    predict: Callable[[int], Predict],
    vae: Vae,
    first_motion: Tensor,
    colour: Statistics,
    n_chunks: int,
    times: Tensor,
    sampling: Sampling,
    generator: Generator,
) -> tuple[Made, ...]:
    """Generate n_chunks chunks, each from the one before.

    predict: the student for chunk i, with that chunk's speech. first_motion: what the first one
    continues. The draw of n_chunks is the caller's: all ranks must share it.
    """
    motion = first_motion
    chunks: list[Made] = []
    for index in range(n_chunks):
        if chunks:
            motion = continue_from(vae, chunks[-1].clean, colour, sampling)
        chunks.append(make_chunk(predict(index), motion, sampling.chunk_latents, times, generator))
    return tuple(chunks)
