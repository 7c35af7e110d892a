"""Training the embedded model's video VAE from nothing: see `vae` for what is minimised.

Three things keep it from stopping at brightness and one colour axis, as it did at first: weights that
begin with every colour (`first_weights`), an optimiser that takes faint directions as seriously as
loud ones (`muon`), and clips whose colours are turned about, so that no axis is rarer than another.

What is kept is the running average of the weights. Noise of up to 0.03 standard deviations is added
to what the decoder sees, in the last two thirds of the time, so that a diffusion model's small errors
stay small in the picture.
"""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Generator, Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from flashtalk_cli.distill.components import first_weights
from flashtalk_cli.distill.components.pictures import draw_stills, film, vary_colours
from flashtalk_cli.distill.components.pool import CLOSE_SHARE, ClipPool
from flashtalk_cli.distill.components.vae import MINI, objective, statistics
from flashtalk_cli.distill.muon import Muon
from flashtalk_cli.models.vae import Vae, VaeParams

log = logging.getLogger(__name__)

DECODING = ("decoder.", "conv2.")  # what a latent goes through on its way to pixels


@dataclass(frozen=True)
class Batch:
    """Clips of one size, taken every so many steps: a clip's beginning trains every shorter clip too."""

    every: int
    people: int
    pictures: int
    n_frames: int
    height_px: int
    width_px: int


@dataclass(frozen=True)
class Plan:
    """How to train."""

    seconds: float = 450.0  # of training, compilation included
    fill_s: float = 45.0  # of rendering before it
    pool_clips: int = 3000
    pool_frames: int = 33
    pool_side_px: int = 192
    stills: int = 1500
    stills_side_px: int = 256
    held_out_clips: int = 16
    batches: tuple[Batch, ...] = (
        Batch(every=1, people=6, pictures=2, n_frames=5, height_px=128, width_px=128),
        Batch(every=4, people=3, pictures=1, n_frames=17, height_px=160, width_px=160),
        Batch(every=16, people=1, pictures=1, n_frames=33, height_px=128, width_px=192),
    )
    rate: float = 4e-3  # of convolutions, by Muon
    rate_others: float = 2e-3  # of norms and biases, by AdamW
    warm_up_steps: int = 200
    average: float = 0.999
    noise: float = 0.03  # standard deviations at most; none in the first third of the time
    kl: float = 1e-6
    unit: float = 2e-3
    unlike: float = 0.15
    hold: float = 0.0  # to the latents of the VAE that training goes on with
    only_decoder: bool = False
    close_share: float = CLOSE_SHARE  # of the people, who are reframed
    turned: bool = True  # the colours of clips
    refresh_share: float = 0.1
    seed: int = 0


FINER = Plan(
    only_decoder=True,
    turned=False,
    unlike=3.0,
    rate=1e-3,
    rate_others=5e-4,
    batches=(
        Batch(every=1, people=8, pictures=1, n_frames=5, height_px=128, width_px=128),
        Batch(every=4, people=4, pictures=1, n_frames=17, height_px=144, width_px=144),
    ),
)
"""A trained VAE's decoder once more, on people: latents stay what they are, and look more alike."""

BOTH = replace(
    FINER,
    only_decoder=False,
    hold=0.3,
    close_share=0.3,
    unlike=8.0,
    rate=6e-4,
    rate_others=3e-4,
    pool_side_px=152,
    batches=(
        Batch(every=1, people=8, pictures=1, n_frames=5, height_px=144, width_px=144),
        Batch(every=4, people=4, pictures=1, n_frames=17, height_px=144, width_px=144),
    ),
)
"""Both halves of a trained VAE, mostly on people framed as the motion network has them; latents move little."""

TOY = Plan(
    pool_clips=2,
    pool_frames=9,
    pool_side_px=40,
    stills=10,
    stills_side_px=64,
    held_out_clips=1,
    batches=(Batch(1, 1, 1, 5, 32, 32), Batch(4, 1, 1, 9, 32, 40)),
    warm_up_steps=5,
)
"""Nothing is learned at this size; every line is run."""


class Gradient:
    """The objective's gradient, left in `weights`' grads; on a GPU one CUDA graph a shape of video.

    The network is small: the thousands of kernels of a step take longer to launch than to run.
    """

    def __init__(self, plan: Plan, runs: Vae, weights: list[nn.Parameter], known: Vae | None) -> None:
        self.plan, self.runs, self.weights, self.known = plan, runs, weights, known
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
        self._graphs: dict[
            torch.Size, tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]
        ] = {}

    def compute(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and squared error of a batch; overwritten by the next call of that shape."""
        if not video.is_cuda:
            return self._compute(video, noise)
        if video.shape not in self._graphs:
            self._graphs[video.shape] = self._capture(video.clone(), noise.clone())
        graph, inputs, outputs = self._graphs[video.shape]
        for kept, new in zip(inputs, (video, noise), strict=True):
            kept.copy_(new)
        graph.replay()
        loss, squared = outputs
        return loss, squared

    def _compute(self, video: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        self.runs.zero_grad(set_to_none=True)
        plan = self.plan
        costs = (plan.kl, plan.unit, plan.unlike)
        loss, squared = objective(self.runs, video, noise, *costs, self.known, plan.hold)
        loss.backward()
        learning = (run for run in self.runs.parameters() if run.requires_grad)
        for weight, run in zip(self.weights, learning, strict=True):
            assert weight.grad is not None
            assert run.grad is not None
            weight.grad.copy_(run.grad)
        return loss.detach(), squared

    def _capture(
        self, video: Tensor, noise: Tensor
    ) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...], tuple[Tensor, ...]]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # kernels are chosen and compiled before they are recorded
            for _ in range(2):
                self._compute(video, noise)
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._compute(video, noise)
        return graph, (video, noise), outputs


class Trainer:
    """Weights, their running average, and a copy whose gradients belong to CUDA graphs."""

    def __init__(
        self, plan: Plan, params: VaeParams, device: str, start: Mapping[str, Tensor] | None = None
    ) -> None:
        torch.manual_seed(plan.seed)
        self.plan, self.begun = plan, start is not None
        self.master = Vae(params).to(device)
        first_weights.draw(self.master)
        if start is not None:
            self.master.load_state_dict({name: tensor.float() for name, tensor in start.items()})
        self.runs = Vae(params).to(device)
        for vae in (self.master, self.runs):
            for name, weight in vae.named_parameters():
                weight.requires_grad_(not plan.only_decoder or name.startswith(DECODING))
        self.averaged = AveragedModel(self.master, multi_avg_fn=get_ema_multi_avg_fn(plan.average))
        named = {name: w for name, w in self.master.named_parameters() if w.requires_grad}
        self.weights = list(named.values())
        matrices = {name for name, w in named.items() if w.ndim >= 4 and not name.endswith("gamma")}
        others = [w for name, w in named.items() if name not in matrices]
        fused = {"fused": True} if device != "cpu" else {}
        self.optimizers: list[tuple[torch.optim.Optimizer, float]] = [
            (Muon([w for name, w in named.items() if name in matrices], lr=plan.rate), plan.rate),
            (
                torch.optim.AdamW(others, lr=plan.rate_others, betas=(0.9, 0.98), weight_decay=0, **fused),
                plan.rate_others,
            ),
        ]
        known = deepcopy(self.master).requires_grad_(False) if plan.hold and self.begun else None
        self.gradient = Gradient(plan, self.runs, self.weights, known)
        self.steps = 0
        self._share()
        self.remember()

    @property
    def average(self) -> Vae:
        """The VAE of the averaged weights."""
        module = self.averaged.module
        assert isinstance(module, Vae)
        return module

    @torch.no_grad()
    def _share(self) -> None:
        torch._foreach_copy_([*self.runs.parameters()], [*self.master.parameters()])

    def begin(self, video: Tensor) -> None:
        """Fit weights that were drawn, and not given, to a first batch of video."""
        if not self.begun:
            first_weights.begin(self.master, video, *statistics(video.device))
        self._share()
        self.remember()

    def remember(self) -> None:
        """Keep a copy of all that training has changed, to come back to."""
        states = [optimizer.state_dict() for optimizer, _ in self.optimizers]
        self._kept = deepcopy((self.master.state_dict(), self.averaged.state_dict(), states))

    def come_back(self) -> None:
        """Return to the last copy: for a step that made numbers that are none."""
        master, averaged, states = deepcopy(self._kept)
        self.master.load_state_dict(master)
        self.averaged.load_state_dict(averaged)
        for (optimizer, _), state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)
        self._share()

    def step(self, video: Tensor, noise: Tensor, progress: float) -> tuple[Tensor, Tensor]:
        """One update; `progress` in 0..1 sets the learning rates. Returns loss and squared error."""
        warm = min(1.0, (self.steps + 1) / self.plan.warm_up_steps)
        share = warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0))))
        loss, squared = self.gradient.compute(video, noise)
        nn.utils.clip_grad_norm_(self.weights, 1.0)
        for optimizer, rate in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * share
            optimizer.step()
        self._share()
        self.averaged.update_parameters(self.master)
        self.steps += 1
        return loss, squared


def batches(
    pool: ClipPool, stills: Tensor, plan: Plan, generator: Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches without end: video [B, 3, T, H, W] in [-1, 1], and noise for its latents."""
    rng = np.random.default_rng(plan.seed)
    for number in itertools.count():
        size = [batch for batch in plan.batches if number % batch.every == batch.every - 1][-1]
        shape = (size.n_frames, size.height_px, size.width_px)
        people = pool.draw(size.people, *shape, rng)
        if plan.turned:
            people = vary_colours(people, generator)
        chosen = torch.from_numpy(rng.integers(len(stills), size=size.pictures)).to(stills.device)
        video = torch.cat([people, film(stills[chosen].float() / 255, *shape, generator)]) * 2 - 1
        latents = (len(video), 16, 1 + (size.n_frames - 1) // 4, size.height_px // 8, size.width_px // 8)
        noise = torch.randn(latents, generator=generator, device=video.device)
        amount = torch.rand((len(video), 1, 1, 1, 1), generator=generator, device=video.device)
        yield video, noise * amount * plan.noise


def train(
    pool: ClipPool,
    plan: Plan,
    device: str,
    params: VaeParams = MINI,
    start: Mapping[str, Tensor] | None = None,
    save: Callable[[Vae, int], None] | None = None,
) -> tuple[Vae, list[dict[str, float]]]:
    """Trains for `plan.seconds`; returns the averaged VAE, float32 on the device, and a log of lines.

    start: weights to begin with, in place of drawn ones.
    save(vae, step): called about every minute with the average so far.
    """
    trainer = Trainer(plan, params, device, start)
    generator = torch.Generator(device).manual_seed(plan.seed)
    stills = torch.cat(
        [(draw_stills(n, plan.stills_side_px, generator) * 255).byte() for n in _pieces(plan.stills, 100)]
    )
    began_s = said_s = saved_s = time.monotonic()
    lines: list[dict[str, float]] = []
    sums, counted = torch.zeros(2, device=device), 0
    for video, noise in batches(pool, stills, plan, generator):
        spent_s = time.monotonic() - began_s
        if spent_s > plan.seconds:
            break
        if not trainer.steps:
            trainer.begin(video)
        progress = spent_s / plan.seconds
        noise = noise * (1 if start else min(max(3 * progress - 1, 0), 1))
        sums += torch.stack(trainer.step(video, noise, progress))
        counted += 1
        if trainer.steps % 10 == 0:
            pool.refresh(plan.refresh_share, began_s)
        if trainer.steps <= 3 or time.monotonic() - said_s > 10:
            loss, squared = (sums / counted).tolist()
            ratio_db = round(10 * math.log10(max(4 / squared, 1e-9)), 2)
            line = {
                "step": trainer.steps,
                "seconds": round(spent_s, 1),
                "loss": round(loss, 4),
                "psnr_db": ratio_db,
            }
            log.info("vae %s", line)
            lines.append(line)
            said_s, counted = time.monotonic(), 0
            sums.zero_()
            if math.isfinite(loss):
                trainer.remember()
            else:
                log.warning("vae came back from a loss of %s at step %d", loss, trainer.steps)
                trainer.come_back()
        if save and time.monotonic() - saved_s > 60 and math.isfinite(lines[-1]["loss"]):
            save(trainer.average, trainer.steps)
            saved_s = time.monotonic()
    return trainer.average.eval(), lines


def _pieces(total: int, at_most: int) -> list[int]:
    return [min(at_most, total - start) for start in range(0, total, at_most)]
