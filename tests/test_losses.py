"""Properties of the training losses: fixed points, directions, and where the gradient goes."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.config import Sampling
from flashtalk_cli.distill import losses, rollout
from flashtalk_cli.pipeline.schedule import times

SHAPE = (2, 16, 3, 4, 4)


def latents(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed))


def test_flow_matching_is_zero_at_the_true_velocity() -> None:
    """And nowhere else; what is held does not count."""
    clean, noise = latents(0), latents(1)
    everything = torch.ones(2, 1, 3, 1, 1)
    assert losses.flow_matching(noise - clean, clean, noise, everything) == 0
    assert losses.change_between_frames(noise - clean, clean, noise, everything) == 0
    wrong = (noise - clean).clone()
    wrong[:, :, 0] += 5
    assert losses.flow_matching(wrong, clean, noise, everything) > 1
    free = losses.free_mask(clean, torch.tensor([1, 2]))
    assert losses.flow_matching(wrong, clean, noise, free) == 0


@given(held=st.lists(st.integers(0, 3), min_size=2, max_size=2))
def test_free_mask(held: list[int]) -> None:
    """Latents before `held` are given, those from it on are made, in each video by itself."""
    mask = losses.free_mask(latents(0), torch.tensor(held))[:, 0, :, 0, 0]
    assert mask.sum(1).tolist() == [3 - h for h in held]
    assert (mask.diff(dim=1) >= 0).all()


@settings(max_examples=30)
@given(low=st.floats(0, 0.9), width=st.floats(0.01, 0.1), shift=st.floats(1, 8))
def test_times_stay_inside_their_interval(low: float, width: float, shift: float) -> None:
    """The teacher's time lies inside the step that keeps its gradient."""
    t = losses.draw_times(500, shift, torch.Generator().manual_seed(0), low, low + width)
    assert t.min() >= low - 1e-5
    assert t.max() <= low + width + 1e-5
    assert t.max() - t.min() > width / 2


def test_guidance_of_one_is_none() -> None:
    """Scales of 1 give the full prediction; audio alone is weighed against neither."""
    full, audio, neither = latents(0), latents(1), latents(2)
    torch.testing.assert_close(losses.Guidance(1, 1).combine(full, audio, neither), full)
    torch.testing.assert_close(losses.Guidance(0, 2).combine(full, audio, neither), 2 * audio - neither)


def test_distribution_matching_rests_where_critic_and_teacher_agree() -> None:
    """No gradient at the fixed point; held latents never have one."""
    student = latents(0).requires_grad_()
    weight = losses.free_mask(student, torch.tensor([1, 2]))
    loss, rms = losses.distribution_matching(student, latents(1), latents(1), weight)
    loss.backward()
    assert rms == 0
    assert student.grad is not None
    assert student.grad.abs().max() == 0
    student.grad = None
    losses.distribution_matching(student, latents(1), latents(2), weight)[0].backward()
    assert student.grad is not None
    assert (student.grad * (1 - weight)).abs().max() == 0
    assert (student.grad * weight).abs().max() > 0


@pytest.mark.parametrize("student_mean", [-1.5, 2.0])
def test_distribution_matching_on_gaussians(student_mean: float) -> None:
    """Student N(m, s^2), teacher N(0, 1): the best guesses are known, and descent finds the teacher.

    For clean ~ N(m, s^2) the posterior mean of clean given x_t is
    m + (1 - t) s^2 (x_t - (1 - t) m) / ((1 - t)^2 s^2 + t^2).
    """

    def best_guess(x: Tensor, t: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
        a = 1 - t.view(-1, 1, 1, 1, 1)
        return mean + a * variance * (x - a * mean) / (a**2 * variance + (1 - a) ** 2)

    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor(student_mean, requires_grad=True)
    log_std = torch.tensor(-1.0, requires_grad=True)
    optimiser = torch.optim.Adam([mean, log_std], lr=0.05)
    weight = torch.ones(1)
    directions = []
    for _ in range(300):
        student = mean + log_std.exp() * torch.randn(64, 1, 1, 2, 2, generator=generator)
        t = losses.draw_times(64, 1.0, generator, 0.05, 0.95)
        x = losses.noised(student.detach(), torch.randn(student.shape, generator=generator), t)
        real = best_guess(x, t, torch.tensor(0.0), torch.tensor(1.0))
        fake = best_guess(x, t, mean.detach(), (2 * log_std.detach()).exp())
        optimiser.zero_grad()
        losses.distribution_matching(student, real, fake, weight)[0].backward()
        assert mean.grad is not None
        directions.append(mean.grad.item())
        optimiser.step()
    assert directions[0] * student_mean > 0, "the first step must lead towards the teacher"
    assert abs(mean.item()) < 0.15
    assert log_std.exp().item() == pytest.approx(1, abs=0.15)


class Toy(torch.nn.Module):
    """A velocity that depends on one parameter a chunk and counts its evaluations."""

    def __init__(self, n_chunks: int) -> None:
        super().__init__()
        self.gain = torch.nn.Parameter(torch.full((n_chunks,), 0.5))
        self.calls: list[tuple[int, float, bool]] = []

    def forward(self, chunk: int, x: Tensor, time: float) -> Tensor:
        self.calls.append((chunk, time, torch.is_grad_enabled()))
        return self.gain[chunk] * x


def test_a_rollout_has_no_gradient_and_a_guess_of_one_step_has() -> None:
    """Chunks continue one another as in use; a step that is computed again guesses what it had guessed."""
    from flashtalk_cli.models.vae import Vae, VaeParams
    from flashtalk_cli.pipeline.colour import Statistics, to_lab

    torch.manual_seed(0)
    sampling = Sampling(chunk_frames=9, motion_frames=5)
    vae = Vae(VaeParams(dim=4)).eval().requires_grad_(False)
    picture = torch.rand(1, 3, 1, 16, 16) * 2 - 1
    first, _ = vae.encode(picture)
    toy = Toy(3)
    points = times(4)
    colour = Statistics.of(to_lab(picture))
    chunks = rollout.roll_out(
        lambda i: lambda x, t: toy(i, x, t),
        vae,
        first,
        colour,
        3,
        points,
        sampling,
        torch.Generator().manual_seed(0),
    )
    assert toy.calls == [(chunk, time, False) for chunk in range(3) for time in points[:-1].tolist()]
    assert torch.equal(chunks[0].motion, first)
    for before, after in itertools.pairwise(chunks):
        with torch.no_grad():
            assert torch.equal(after.motion, rollout.continue_from(vae, before.clean, colour, sampling))
    last = chunks[-1]
    assert len(last.noisy) == len(last.guesses) == 4
    torch.testing.assert_close(last.guesses[-1], last.clean)  # the last step ends at time 0
    for kept in range(4):
        toy.gain.grad = None
        again = rollout.guess(lambda x, t: toy(2, x, t), last.noisy[kept], points[kept].item(), last.motion)
        torch.testing.assert_close(again.detach(), last.guesses[kept])
        assert torch.equal(again[:, :, :2], last.motion)
        again.square().sum().backward()
        assert toy.gain.grad is not None
        assert toy.gain.grad[:2].abs().max() == 0
        assert toy.gain.grad[2].abs() > 0
    assert sum(gradient for _, _, gradient in toy.calls) == 4
