"""Stage 1, spatiotemporal adaptation: flow matching on chunks, under the conditions of use.

An example is a chunk-long window of a clip. Its first latents are given clean, as motion latents
are in use: one for a video's first chunk, two for all others. Text and speech are left out at random
and each by itself, so that the network also knows what it would do without them, which guidance
needs; left out means zeros: zero rows for the prompt, zero features for the speech. Zero features
are not silence, which has features of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from flashtalk_cli.config import VAE_STRIDE_PX
from flashtalk_cli.distill import losses
from flashtalk_cli.distill.config import Adapt
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Batch, Pool
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.parallel.sequence import Sequence

ALONE = Sequence()


def velocity_of(
    dit: DiT, x: Tensor, time: Tensor, y: Tensor, text: Tensor, tokens: Tensor, windows: Tensor
) -> Tensor:
    """The network's velocity at times [B] in 0..1, with its conditions embedded on the way: float32."""
    return dit(x, time * 1000, y, dit.condition(text, tokens), dit.hear(windows), ALONE)


def left_out(values: Tensor, share: float, generator: Generator) -> Tensor:
    """values [B, ...] with zeros for a random share of the batch."""
    drawn = torch.rand(len(values), generator=generator, device=generator.device).to(values.device)
    return values * (drawn >= share).view(-1, *[1] * (values.ndim - 1)).to(values.dtype)


def face_weight(box: Tensor, shape: torch.Size, weight: float) -> Tensor:
    """`weight` inside the box and 1 outside: box [B, 4] in pixels, latents of `shape` -> [B, 1, 1, h, w].

    A latent pixel counts by the share of it that the box covers; an unknown box is all zeros and covers
    nothing.
    """
    h, w = shape[-2:]

    def cover(low: Tensor, high: Tensor, n: int) -> Tensor:
        edges = torch.arange(n + 1, device=box.device) * VAE_STRIDE_PX
        overlap = torch.minimum(edges[1:], high[:, None]) - torch.maximum(edges[:-1], low[:, None])
        return (overlap / VAE_STRIDE_PX).clamp(0, 1)

    across, down = cover(box[:, 0], box[:, 2], w), cover(box[:, 1], box[:, 3], h)
    return 1 + (weight - 1) * (down[:, :, None] * across[:, None])[:, None, None]


def around_mouth(box: Tensor, free: Tensor, shape: torch.Size) -> Tensor:
    """What is `free` [B, 1, T, 1, 1] and in the box [B, 4], as weights of latents of `shape`; all of it where no box is known."""
    inside = free * (face_weight(box, shape, 2.0) - 1)
    unknown = (inside.flatten(1).sum(1) == 0).view(-1, 1, 1, 1, 1)
    return torch.where(unknown, free, inside)


def adapt_loss(dit: DiT, batch: Batch, stage: Adapt, generator: Generator) -> Tensor:
    """The loss of stage 1 on a batch: a scalar."""
    clean = batch.latents
    noise = torch.randn(clean.shape, generator=generator, device=generator.device).to(clean.device)
    time = losses.draw_times(len(clean), stage.shift, generator).to(clean.device)
    free = losses.free_mask(clean, batch.held)
    given = worn(clean, batch.held, stage.wear, generator) if stage.wear else clean
    x = torch.lerp(given, losses.noised(clean, noise, time), free)
    text = left_out(batch.text, stage.text_dropout, generator)
    windows = left_out(batch.windows, stage.audio_dropout, generator)
    velocity = velocity_of(dit, x, time, batch.y, text, batch.tokens, windows)
    weight = free * face_weight(batch.box, clean.shape, stage.face_weight)
    loss = losses.flow_matching(velocity, clean, noise, weight)
    if stage.temporal_weight:
        loss = loss + stage.temporal_weight * losses.change_between_frames(velocity, clean, noise, weight)
    return loss


def worn(clean: Tensor, held: Tensor, wear: float, generator: Generator) -> Tensor:
    """Latents as a long rollout may leave them: [B, C, T, h, w] with grain, blotches and a tint, still in time.

    Each of the three has a strength of its own, up to `wear` standard deviations, in a random half of the
    examples that continue a video; what begins one (held = 1) is the picture itself, which nothing wears.
    """
    device = generator.device
    marks = torch.zeros(clean[:, :, 0].shape, device=device)
    for side in (clean.shape[3:], (3, 3), (1, 1)):
        mark = torch.randn(*clean.shape[:2], *side, generator=generator, device=device)
        strength = torch.rand(len(clean), 1, 1, 1, generator=generator, device=device)
        marks += strength * F.interpolate(mark, clean.shape[3:], mode="bicubic", align_corners=False)
    chosen = torch.rand(len(clean), generator=generator, device=device) < 0.5
    marks = wear * marks.to(clean.device) * (chosen.to(held.device) & (held > 1)).view(-1, 1, 1, 1)
    return clean + marks[:, :, None].to(clean.dtype)


def hearing(dit: DiT, batch: Batch, shift: float, generator: Generator) -> Tensor:
    """By what share errors around the mouth grow when each example hears another's speech.

    About 0 for a network that does not listen yet (or that hears a batch of one). Computed as in
    training, gradients recorded and dropped, so that a compiled network needs no second compilation.
    """
    noise = torch.randn(batch.latents.shape, generator=generator, device=generator.device)
    time = losses.draw_times(len(noise), shift, generator)
    free = losses.free_mask(batch.latents, batch.held)
    x = torch.lerp(batch.latents, losses.noised(batch.latents, noise, time), free)
    mouth = around_mouth(batch.box, free, batch.latents.shape)

    def error(windows: Tensor) -> Tensor:
        velocity = velocity_of(dit, x, time, batch.y, batch.text, batch.tokens, windows).detach()
        return losses.flow_matching(velocity, batch.latents, noise, mouth)

    return error(batch.windows.roll(1, 0)) / error(batch.windows).clamp(min=1e-8) - 1


class AdaptStage:
    """Stage 1 as the trainer drives it."""

    name = "adapt"

    def __init__(
        self, trained: Trained, pool: Pool, stage: Adapt, world: int, shared: Generator, own: Generator
    ) -> None:
        self.trained, self.pool, self.stage = trained, pool, stage
        self.shared, self.own = shared, own
        self.accumulated, self.per_pass = passes(stage.batch, stage.micro_batch, world)

    @property
    def steps(self) -> int:
        """Updates of a whole run."""
        return self.stage.steps

    @property
    def step_count(self) -> int:
        """Updates done."""
        return self.trained.step_count

    def step(self) -> dict[str, Tensor]:
        """One update; what to log, on the device."""
        total = torch.zeros((), device=self.trained.working[0].device)
        bucket = self.pool.choose(self.shared)
        for _ in range(self.accumulated):
            batch = bucket.draw(self.per_pass, self.stage.first_share, self.own)
            loss = adapt_loss(self.trained.dit, batch, self.stage, self.own) / self.accumulated
            loss.backward()
            total += loss.detach()
        return {"loss": total, "gradient_norm": self.trained.update()}

    def probe(self) -> dict[str, Tensor]:
        """How much the network listens: see `hearing`."""
        generator = torch.Generator(self.own.device).manual_seed(self.step_count)
        batch = self.pool.buckets[0].draw(self.per_pass, self.stage.first_share, generator)
        return {"hearing": hearing(self.trained.dit, batch, self.stage.shift, generator)}

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"trained": self.trained.state()}

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        self.trained.load(state["trained"])

    def weights(self) -> tuple[list[str], list[Tensor]]:
        """What the stage is for: names and tensors of the moving average."""
        return self.trained.names, self.trained.average or self.trained.parameters


def passes(batch: int, micro_batch: int, world: int) -> tuple[int, int]:
    """A global batch as (passes of a rank, examples in each), the batch rounded up to what divides."""
    here = -(-batch // world)
    n_passes = -(-here // micro_batch)
    return n_passes, -(-here // n_passes)
