"""The embedded model's VAE in training: the pictures it learns from, what it minimises, begins with and leaves."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.distill.components import (
    first_weights,
    pictures,
    vae,
    vae_training,
)
from flashtalk_cli.distill.components.vae import encode
from flashtalk_cli.distill.muon import Muon, orthogonalise
from flashtalk_cli.models.vae import Vae, VaeParams

CPU = torch.device("cpu")
SMALL = VaeParams(dim=8, dim_mult=(1, 1, 2, 2), num_res_blocks=1)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def clip(seed: int = 0, n: int = 2, n_frames: int = 5, side_px: int = 32) -> Tensor:
    """Moving pictures [n, 3, T, side, side] in [-1, 1]."""
    stills = pictures.draw_stills(max(n, 5), 48, generator(seed))[:n]
    return pictures.film(stills, n_frames, side_px, side_px, generator(seed)) * 2 - 1


def new_vae(seed: int = 0) -> Vae:
    torch.manual_seed(seed)
    model = Vae(SMALL)
    first_weights.draw(model)
    for name, weight in model.named_parameters():  # a block that is the identity would hide its own faults
        if name.endswith("residual.6.weight"):
            torch.nn.init.normal_(weight, std=0.05)
    return model.eval()


# Pictures


@settings(max_examples=10)
@given(count=st.integers(1, 7), seed=st.integers(0, 99))
def test_pictures_are_in_range_and_follow_from_their_seed(count: int, seed: int) -> None:
    drawn = pictures.draw_stills(count, 32, generator(seed))
    assert drawn.shape == (count, 3, 32, 32)
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    assert drawn.std() > 0.01
    assert torch.equal(drawn, pictures.draw_stills(count, 32, generator(seed)))


def test_films_move_or_rest() -> None:
    """Some cameras move and some rest; a resting one's frames are equal."""
    clips = pictures.film(torch.rand(24, 3, 48, 48, generator=generator()), 5, 16, 24, generator(1))
    assert clips.shape == (24, 3, 5, 16, 24)
    change = (clips[:, :, 1:] - clips[:, :, :-1]).abs().amax((1, 2, 3, 4))
    assert 4 <= (change == 0).sum() <= 20
    assert change.max() > 0.01


def test_colours_vary_only_where_chosen() -> None:
    clips = torch.rand(6, 3, 2, 8, 8, generator=generator())
    assert torch.equal(pictures.vary_colours(clips, generator(1), turned=0.0, share=0.0), clips)
    turned = pictures.vary_colours(clips, generator(1), turned=0.5, share=0.0)
    assert torch.equal(turned[3:], clips[3:])
    lengths = [(x[:3] - 0.5).norm(dim=1) for x in (turned, clips)]
    inside = lengths[1] < 0.5  # none of these can have met the limits
    torch.testing.assert_close(lengths[0][inside], 0.75 * lengths[1][inside])
    varied = pictures.vary_colours(clips, generator(1), turned=0.0, share=1.0)
    assert (varied - clips).abs().amax((1, 2, 3, 4)).min() > 0.01
    assert varied.min() >= 0
    assert varied.max() <= 1


# The VAE


@torch.no_grad()
def test_training_walks_as_rendering_does() -> None:
    """Parity: latents and video of the trained walk are those of `encode` and `decode`, the clamp aside."""
    model, video = new_vae(), clip(n_frames=9)
    made, latents, _ = vae.autoencode(model, video, torch.zeros(2, 16, 3, 4, 4))
    wanted, _ = model.encode(video)
    torch.testing.assert_close(rearrange(latents, "b t h w c -> b c t h w"), wanted, rtol=1e-4, atol=1e-5)
    decoded, _ = model.decode(wanted)
    torch.testing.assert_close(
        rearrange(made.clamp(-1, 1), "b t h w c -> b c t h w"), decoded, rtol=1e-4, atol=1e-5
    )


@torch.no_grad()
def test_normalised_latents_are_unit_and_decode_to_the_same_video() -> None:
    """Exact: measured again, every channel has mean 0 and deviation 1; the video does not change."""
    model, video = new_vae(), clip(n_frames=9)
    latents, _ = model.encode(video)
    before, _ = model.decode(latents)
    quiet = torch.zeros_like(latents)
    _, _, log_variance = vae.autoencode(model, video, quiet)
    mean, std = vae.latent_statistics(model, [video])
    vae.normalise_latents(model, mean, std)
    mean_after, std_after = vae.latent_statistics(model, [video])
    torch.testing.assert_close(mean_after, torch.zeros(16), rtol=0, atol=1e-4)
    torch.testing.assert_close(std_after, torch.ones(16), rtol=1e-4, atol=0)
    after, _ = model.decode(model.encode(video)[0])
    torch.testing.assert_close(after, before, rtol=0, atol=2e-4)
    _, _, moved = vae.autoencode(model, video, quiet)
    wanted = (log_variance - 2 * std.log()).clamp(-12, 4)  # the range that training uses
    torch.testing.assert_close(moved, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_first_weights_make_a_mosaic_in_the_right_colours() -> None:
    """A VAE begins by giving each patch its mean colour, of video that its weights were not fitted to too."""
    torch.manual_seed(0)
    model = Vae(vae.MINI)

    def blurs(seed: int, n: int) -> Tensor:
        coarse = torch.rand(n, 3, 7, 7, generator=generator(seed)) * 2 - 1
        still = torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic").clamp(-1, 1)
        return still[:, :, None].expand(-1, -1, 5, -1, -1)

    first_weights.begin(model, blurs(0, 16), *vae.statistics(CPU))
    video = blurs(7, 4)
    latents, _ = model.encode(video)
    made, _ = model.decode(latents)
    frames = rearrange(torch.stack([video, made]), "k b c t h w -> k (b t) c h w")
    truth, patches = (torch.nn.functional.avg_pool2d(x, 8) for x in frames)
    unexplained = (truth - patches).var((0, 2, 3)) / truth.var((0, 2, 3))
    assert (unexplained < 0.35).all(), f"{unexplained.tolist()} of red, green and blue"
    flat = rearrange(latents, "b c t h w -> c (b t h w)")
    assert (flat.std(1) > 0.5).all()
    assert (flat.std(1) < 2).all()


@settings(max_examples=20)
@given(rows=st.integers(1, 24), columns=st.integers(1, 24), seed=st.integers(0, 99))
def test_muon_moves_every_direction_alike(rows: int, columns: int, seed: int) -> None:
    """The update of any matrix of full rank has singular values near 1, and its directions' signs."""
    rank = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, rank, generator=generator(seed)))
    right, _ = torch.linalg.qr(torch.randn(columns, rank, generator=generator(seed + 1)))
    gradient = (left * torch.logspace(0, -1.2, rank)) @ right.T
    found = torch.linalg.svdvals(orthogonalise(gradient[None])[0])
    assert found.min() > 0.5
    assert found.max() < 1.3
    assert (left.T @ orthogonalise(gradient[None])[0] @ right).diagonal().min() > 0.4


def test_muon_treats_equal_shapes_each_by_itself() -> None:
    """Weights worked on together move as each would alone, against their gradient."""
    weights = [torch.nn.Parameter(torch.zeros(3, 2, 2)) for _ in range(2)]
    for i, weight in enumerate(weights):
        weight.grad = torch.randn(3, 2, 2, generator=generator(i))
    alone = torch.nn.Parameter(torch.zeros(3, 2, 2))
    alone.grad = weights[1].grad.clone()  # type: ignore[union-attr]
    for parameters in (weights, [alone]):
        optimiser = Muon(parameters, lr=0.1)
        optimiser.step()
        optimiser.step()
    torch.testing.assert_close(weights[1], alone)
    assert (alone * alone.grad).sum() < 0


def test_reconstruction_loss_is_zero_at_the_truth_alone() -> None:
    video = rearrange(clip(), "b c t h w -> b t h w c")
    nothing = vae.reconstruction_loss(video, video)
    assert 0 <= nothing < 0.01  # what is left are the soft corners of the absolute values
    worse = [
        float(vae.reconstruction_loss(video + amount * torch.randn_like(video), video))
        for amount in (0.02, 0.1, 0.3)
    ]
    assert float(nothing) < worse[0] < worse[1] < worse[2]


def test_the_first_frame_weighs_more_than_another() -> None:
    video = rearrange(clip(), "b c t h w -> b t h w c")
    first, third = (torch.zeros_like(video) for _ in range(2))
    first[:, 0], third[:, 2] = 0.2, 0.2
    assert vae.reconstruction_loss(video + first, video) > 1.3 * vae.reconstruction_loss(video + third, video)


def test_similarity_is_scikit_images() -> None:
    """Parity with the measure that figures are given in, on smooth pictures (windows every second pixel)."""
    metrics = pytest.importorskip("skimage.metrics")
    truth = clip(n=1, n_frames=1)[0, :, 0]
    other = (truth + 0.1 * torch.randn(truth.shape, generator=generator())).clamp(-1, 1)
    theirs = metrics.structural_similarity(
        truth.numpy(), other.numpy(), channel_axis=0, data_range=2, use_sample_covariance=False
    )
    assert float(vae.similarity(truth[None], other[None])) == pytest.approx(theirs, abs=0.02)
    assert float(vae.similarity(truth[None], truth[None])) == pytest.approx(1)


def test_latents_are_drawn_towards_uncorrelated_unit_channels() -> None:
    white = torch.randn(2, 3, 16, 16, 16, generator=generator())
    quiet = torch.zeros_like(white)
    best = vae.latent_loss(white, quiet, 0.0, 1.0)
    assert 0 <= best < 0.02
    alike = white.clone()
    alike[..., 1] = alike[..., 0]
    for worse in (alike, 2 * white, 0.3 * white, white + 1):
        assert vae.latent_loss(worse, quiet, 0.0, 1.0) > best + 0.05


class StillPool:
    """One clip, given again and again."""

    def __init__(self) -> None:
        self.refreshed = 0

    def draw(self, batch: int, n_frames: int, height_px: int, width_px: int, rng: Any) -> Tensor:
        return (clip(3, batch, n_frames, height_px) + 1) / 2

    def refresh(self, share: float, since_s: float) -> None:
        self.refreshed += 1


def test_the_vae_learns_and_comes_back() -> None:
    """A few steps on one clip lower its error; coming back gives the very weights that were kept."""
    plan = replace(vae_training.TOY, rate=4e-3, warm_up_steps=1)
    trainer = vae_training.Trainer(plan, SMALL, "cpu")
    video, noise = clip(3), torch.zeros(2, 16, 2, 4, 4)
    trainer.begin(video)
    errors = [float(trainer.step(video, noise, 0.0)[1]) for _ in range(10)]
    assert errors[-1] < 0.8 * errors[0]
    trainer.remember()
    kept = [weight.detach().clone() for weight in trainer.weights]
    trainer.step(video, noise, 0.0)
    assert not all(torch.equal(a, b) for a, b in zip(kept, trainer.weights, strict=True))
    trainer.come_back()
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.weights, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, trainer.runs.parameters(), strict=True))


def test_a_decoder_goes_on_with_the_latents_it_has() -> None:
    """The encoder's weights stay as they were given; the decoder's error falls."""
    plan = replace(vae_training.TOY, rate=4e-3, warm_up_steps=1)
    video, noise = clip(3), torch.zeros(2, 16, 2, 4, 4)
    whole = vae_training.Trainer(plan, SMALL, "cpu")
    whole.begin(video)
    given = {name: weight.clone() for name, weight in whole.master.state_dict().items()}
    trainer = vae_training.Trainer(replace(plan, only_decoder=True), SMALL, "cpu", given)
    trainer.begin(video)
    errors = [float(trainer.step(video, noise, 0.0)[1]) for _ in range(6)]
    assert errors[-1] < 0.9 * errors[0]
    changed = {
        name for name, weight in trainer.master.state_dict().items() if not torch.equal(weight, given[name])
    }
    assert changed
    assert all(name.startswith(vae_training.DECODING) for name in changed)


def test_both_halves_go_on_near_the_latents_that_are_known() -> None:
    """What a motion network knows moves less where that is asked for; encoder and decoder both change."""
    video, noise = clip(3), torch.zeros(2, 16, 2, 4, 4)
    whole = vae_training.Trainer(vae_training.TOY, SMALL, "cpu")
    whole.begin(video)
    given = {name: weight.clone() for name, weight in whole.master.state_dict().items()}
    known, _ = encode(whole.master, video)
    moved: list[float] = []
    for hold in (0.0, 100.0):
        plan = replace(vae_training.TOY, rate=4e-3, warm_up_steps=1, unlike=3.0, hold=hold)
        trainer = vae_training.Trainer(plan, SMALL, "cpu", given)
        for _ in range(6):
            trainer.step(video, noise, 0.0)
        moved.append(float((encode(trainer.master, video)[0] - known).detach().square().mean()))
        now = trainer.master.state_dict()
        for half in ("encoder.conv1.weight", "decoder.conv1.weight"):
            assert not torch.equal(now[half], given[half])
    assert moved[1] < 0.5 * moved[0]


def test_training_ends_in_time_and_saves_its_average() -> None:
    plan = replace(vae_training.TOY, seconds=2.0, stills=5, batches=(vae_training.Batch(1, 1, 1, 5, 16, 16),))
    model, lines = vae_training.train(StillPool(), plan, "cpu", SMALL)  # type: ignore[arg-type]
    assert lines[0]["step"] == 1
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert not model.training


def test_batches_take_turns() -> None:
    """Every size comes as often as the plan says, people first, and noise fits the latents."""
    plan = replace(
        vae_training.TOY,
        batches=(vae_training.Batch(1, 2, 1, 5, 16, 16), vae_training.Batch(3, 1, 1, 9, 16, 24)),
    )
    pool: Any = SimpleNamespace(draw=lambda n, t, h, w, rng: torch.rand(n, 3, t, h, w))
    stills = (torch.rand(4, 3, 32, 32) * 255).byte()
    stream = vae_training.batches(pool, stills, plan, generator())
    shapes = [(tuple(video.shape), tuple(noise.shape)) for video, noise in (next(stream) for _ in range(6))]
    usual, rare = ((3, 3, 5, 16, 16), (3, 16, 2, 2, 2)), ((2, 3, 9, 16, 24), (2, 16, 3, 2, 3))
    assert shapes == [usual, usual, rare, usual, usual, rare]


# Kernels


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("channels", [8, 12, 96])
@pytest.mark.parametrize("silu", [True, False])
def test_fused_norm_is_the_plain_one(channels: int, silu: bool) -> None:
    """Parity of values and gradients with torch's own, for widths that are powers of two and others."""
    from flashtalk_cli.models.vae_triton import NormSilu

    x = torch.randn(2, 3, 7, 11, channels, device="cuda", requires_grad=True)
    gamma = (torch.rand(channels, device="cuda") + 0.5).requires_grad_()
    weight = torch.randn_like(x)
    ours = NormSilu.apply(x, gamma, silu)
    theirs = torch.nn.functional.rms_norm(x, (channels,), gamma, eps=1e-24)
    theirs = torch.nn.functional.silu(theirs) if silu else theirs
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad((ours * weight).sum(), (x, gamma)),
        torch.autograd.grad((theirs * weight).sum(), (x, gamma)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_gradient_of_stacking_is_the_plain_one() -> None:
    from flashtalk_cli.models.vae_triton import StackFrames

    frames = torch.randn(2, 6, 5, 7, 12, device="cuda", requires_grad=True)
    ours = StackFrames.apply(frames)
    theirs = torch.cat([frames[:, :-2], frames[:, 1:-1], frames[:, 2:]], dim=-1)
    weight = torch.randn_like(ours)
    torch.testing.assert_close(
        torch.autograd.grad((ours * weight).sum(), frames),
        torch.autograd.grad((theirs * weight).sum(), frames),
    )
