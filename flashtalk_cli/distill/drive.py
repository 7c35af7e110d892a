"""Many people driven by speech at once, chunk after chunk, exactly as one is in use."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Generator, Tensor

from flashtalk_cli.distill.adapt import ALONE
from flashtalk_cli.distill.losses import Guidance
from flashtalk_cli.distill.panel import Panel
from flashtalk_cli.distill.rollout import LATENTS_AT_ONCE
from flashtalk_cli.models.dit import AudioContext, Context, DiT
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.pipeline.colour import match_colour
from flashtalk_cli.pipeline.sampler import Predict, denoise, first_noise, hold_motion
from flashtalk_cli.pipeline.schedule import times


@dataclass(frozen=True)
class Method:
    """How chunks are drawn.

    With guidance the path from noise to picture is followed by Euler's rule, as a flow-matching
    teacher is; without, in the distilled student's way: guess, noise anew.
    """

    steps: int
    guidance: Guidance | None = None

    @property
    def evaluations(self) -> int:
        """Times that a network looks at a chunk."""
        return self.steps * (3 if self.guidance else 1)


def follow(predict: Predict, motion: Tensor, noise: Tensor, points: Tensor) -> Tensor:
    """Integrate from noise at time 1 to clean latents at time 0, the motion latents held."""
    x = hold_motion(noise, motion)
    for time, next_time in itertools.pairwise(points.tolist()):
        x = hold_motion(x + (next_time - time) * predict(x, time), motion)
    return x


def predictor(dit: DiT, panel: Panel, method: Method) -> Callable[[Tensor], Predict]:
    """A function from what a chunk hears to the velocity, with or without guidance."""
    n, n_text = len(panel), panel.text.shape[1]
    text = panel.text.to(panel.y.device).expand(n, -1, -1)
    if method.guidance is None:
        context = dit.condition(text, panel.tokens)
        return lambda windows: _plain(dit, panel.y, context, dit.hear(windows))
    guidance, unsaid = method.guidance, text.new_zeros(2 * n, n_text, text.shape[2])
    context = dit.condition(torch.cat([text, unsaid]), panel.tokens.repeat(3, 1, 1))
    y = panel.y.repeat(3, 1, 1, 1, 1)

    def chunk(windows: Tensor) -> Predict:
        heard = dit.hear(torch.cat([windows, windows, torch.zeros_like(windows)]))
        threefold = _plain(dit, y, context, heard)
        return lambda x, time: guidance.combine(*threefold(x.repeat(3, 1, 1, 1, 1), time).chunk(3))

    return chunk


def _plain(dit: DiT, y: Tensor, context: Context, heard: AudioContext) -> Predict:
    def predict(x: Tensor, time: float) -> Tensor:
        return dit(x, torch.full((len(x),), time * 1000, device=x.device), y, context, heard, ALONE)

    return predict


@torch.no_grad()
def drive(
    dit: DiT, vae: Vae, panel: Panel, method: Method, n_chunks: int, generator: Generator
) -> Iterator[Tensor]:
    """New frames of each chunk, uint8 [P, new_frames, H, W, 3] on the device."""
    sampling = panel.encoders.base.sampling
    points = times(method.steps, sampling.shift)
    hear = predictor(dit, panel, method)
    motion = panel.picture_latent
    for index in range(n_chunks):
        predict = hear(panel.windows(index))
        noise = first_noise(motion, sampling.chunk_latents, generator)
        if method.guidance:
            latents = follow(predict, motion, noise, points)
        else:
            latents = denoise(predict, motion, noise, points, generator)
        video, _ = vae.decode(latents, latents_at_once=LATENTS_AT_ONCE)
        video = match_colour(video[:, :, sampling.motion_frames :], panel.colour, sampling.colour_strength)
        yield to_frames(video)
        motion = vae.encode(video[:, :, -sampling.motion_frames :])[0].float()


def to_frames(video: Tensor) -> Tensor:
    """Video [P, 3, T, H, W] in [-1, 1] to bytes [P, T, H, W, 3]."""
    levels = ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return rearrange(levels, "p c t h w -> p t h w c").contiguous()
