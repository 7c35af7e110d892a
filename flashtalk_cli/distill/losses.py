"""What training minimises, as pure functions of tensors.

Notation: a latent video `clean`, Gaussian `noise`, time t in 0..1 and the straight path
x_t = (1 - t) clean + t noise between them, whose velocity is noise - clean. All tensors are float32
[B, 16, T, h, w], times [B]. `held` is the number of first latents that are given (the motion
frames): nothing is asked of the network there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtalk_cli.pipeline.schedule import shift_time


def draw_times(
    n: int, shift: float, generator: torch.Generator, low: float = 0.0, high: float = 1.0
) -> Tensor:
    """n times on the generator's device: uniform before the shift, and inside [low, high] after it."""
    u = torch.rand(n, generator=generator, device=generator.device)
    unshifted_low, unshifted_high = (
        shift_time(torch.tensor(end, dtype=torch.float64), 1 / shift).item() for end in (low, high)
    )
    return shift_time(unshifted_low + (unshifted_high - unshifted_low) * u, shift)


def noised(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_t on the straight path."""
    t = time.view(-1, 1, 1, 1, 1)
    return (1 - t) * clean + t * noise


def free_mask(clean: Tensor, held: Tensor) -> Tensor:
    """1 for the latents that the network makes, 0 for the `held` [B] first ones: [B, 1, T, 1, 1]."""
    latent = torch.arange(clean.shape[2], device=clean.device)
    return (latent >= held[:, None]).to(clean.dtype)[:, None, :, None, None]


def flow_matching(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Mean squared error of a velocity, over what has weight (broadcast to the latents): a scalar.

    Zero where velocity = noise - clean (rectified flow; the paper's stage 1 and its critic).
    """
    weight = weight.expand_as(velocity)
    return (weight * (velocity - (noise - clean)).square()).sum() / weight.sum().clamp(min=1e-8)


def change_between_frames(velocity: Tensor, clean: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """The same for differences of neighbouring latents: errors that flicker cost more than still ones."""
    error = velocity - (noise - clean)
    weight = (weight * torch.ones_like(error))[:, :, 1:]
    return (weight * error.diff(dim=2).square()).sum() / weight.sum().clamp(min=1e-8)


@dataclass(frozen=True)
class Guidance:
    """How strongly the teacher is steered (the released teacher: text 3, audio 4)."""

    text: float = 3.0
    audio: float = 4.0

    def combine(self, full: Tensor, audio_only: Tensor, neither: Tensor) -> Tensor:
        """Classifier-free guidance with two conditions, taken off one after the other.

        neither -> audio_only is what the sound adds, audio_only -> full what the prompt adds on
        top of it. Scales of 1 give `full` back.
        """
        return neither + self.audio * (audio_only - neither) + self.text * (full - audio_only)


def distribution_matching(
    student: Tensor, real_clean: Tensor, fake_clean: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """DMD: a scalar whose gradient moves the student's video towards what the teacher finds likely.

    student: clean latents with gradient. real_clean and fake_clean: what the teacher, and the
    critic that knows the student's own distribution, take the noised student for; no gradient.
    The gradient of the KL divergence is fake - real, scaled for each video by how far the
    teacher is from the student (Yin et al. 2023, eq. 8). Returns the loss and the gradient's
    root mean square before scaling, which tells how far the student still is.
    """
    n = weight.expand_as(student).flatten(1).sum(1).clamp(min=1e-8).view(-1, 1, 1, 1, 1)
    with torch.no_grad():
        difference = (fake_clean - real_clean) * weight
        distance = ((student - real_clean).abs() * weight).flatten(1).sum(1).view_as(n) / n
        gradient = torch.nan_to_num(difference / distance.clamp(min=1e-3))
        target = student - gradient
        rms = (difference.square().sum() / n.sum()).sqrt()
    loss = 0.5 * (weight * (student - target).square()).sum() / n.sum()
    return loss, rms
