"""Talking people as training data: one clip by hand, or batches without end.

    clip = render_clip(draw_person(7), performance, (160, 160), "cpu")
    for batch in ClipStream(bank, Drawing(height_px=144, width_px=144, n_frames=33), seed=0): ...

A clip's people, words and manners all follow from its number, so that a run can be repeated, and
the held-out split never shares a person, a voice or a sentence with training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flashtalk_cli.distill.people.backdrop import draw_backdrop
from flashtalk_cli.distill.people.bank import Speech, SpeechBank, disturb
from flashtalk_cli.distill.people.figure import Motion
from flashtalk_cli.distill.people.head import unit_names
from flashtalk_cli.distill.people.perform import Performance, perform
from flashtalk_cli.distill.people.person import PersonSpec
from flashtalk_cli.distill.people.render import Clip, Detail, film, prepare
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM, draw_person


def motion_of(performances: list[Performance], device: str) -> Motion:
    """Performances of one length as tensors [B, T, ...] on a device."""

    def stacked(name: str) -> Tensor:
        return torch.from_numpy(np.stack([getattr(performance, name) for performance in performances])).to(
            device
        )

    return Motion(*(stacked(name) for name in ("curves", "turn", "gaze", "sway", "breath")))


def render_clips(
    specs: list[PersonSpec],
    performances: list[Performance],
    size_px: tuple[int, int],
    device: str,
    detail: Detail | None = None,
    backdrops: list[Tensor] | None = None,
) -> Clip:
    """Films B people, each in a performance of their own; size_px is (height, width).

    Frames are uint8 [B, T, H, W, 3] on the device; see `render.Clip` for the truth beside them.
    """
    with torch.inference_mode():
        scene = prepare(specs, size_px[0], size_px[1], device, detail, backdrops)
        return film(scene, motion_of(performances, device))


def render_clip(spec: PersonSpec, performance: Performance, size_px: tuple[int, int], device: str) -> Clip:
    """Films one person: `render_clips` with B = 1."""
    return render_clips([spec], [performance], size_px, device)


@dataclass(frozen=True)
class Drawing:
    """What a stream draws: the size and length of clips, how many at once, and from which split."""

    height_px: int = 144
    width_px: int = 144
    n_frames: int = 33
    batch: int = 16
    held_out: bool = False


@dataclass(frozen=True)
class Plan:
    """One clip before it is rendered."""

    spec: PersonSpec
    speech: Speech
    heard: np.ndarray
    performance: Performance
    backdrop: Tensor


def draw_plan(number: int, bank: SpeechBank, drawing: Drawing) -> Plan:
    """Clip `number`: who, what they say and how. `heard` is the speech through a room and noise."""
    rng = np.random.default_rng((3, number, drawing.held_out))
    spec = draw_person(number + (HELD_OUT_FROM if drawing.held_out else 0))
    speech = bank.draw(rng, drawing.n_frames)
    performance = perform(spec, speech.sounds, speech.loudness, unit_names(), seed=spec.seed)
    backdrop = draw_backdrop(spec, drawing.height_px, drawing.width_px)
    return Plan(spec, speech, disturb(speech.samples, rng), performance, backdrop)


@dataclass(frozen=True)
class Batch:
    """B rendered clips.

    frames uint8 [B, T, H, W, 3]; samples and heard float32 [B, T * 640], clean and as a microphone
    has it; sounds int64 [B, T] phoneme classes; loudness, opening [B, T]; mouth_box [B, 4] pixels.
    """

    frames: Tensor
    samples: Tensor
    heard: Tensor
    sounds: Tensor
    loudness: Tensor
    opening: Tensor
    opening_px: Tensor
    mouth_box: Tensor
    specs: list[PersonSpec]


class _Plans(IterableDataset):
    def __init__(self, bank: SpeechBank, drawing: Drawing, first: int) -> None:
        self.bank, self.drawing, self.first = bank, drawing, first

    def __iter__(self) -> Iterator[list[Plan]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        place, step = (worker.id, worker.num_workers) if worker else (0, 1)
        group = place
        while True:
            start = self.first + group * self.drawing.batch
            yield [draw_plan(start + offset, self.bank, self.drawing) for offset in range(self.drawing.batch)]
            group += step


class ClipStream:
    """Batches of clips without end: planned by worker processes, rendered on `device`.

    `first` is the number of the first clip; clip n is the same whatever the batch or the workers.
    """

    def __init__(
        self, bank: SpeechBank, drawing: Drawing, *, first: int = 0, device: str = "cpu", workers: int = 0
    ) -> None:
        self.drawing, self.device = drawing, device
        self.plans = DataLoader(
            _Plans(bank, drawing, first),
            batch_size=None,
            num_workers=workers,
            prefetch_factor=4 if workers else None,
        )

    def __iter__(self) -> Iterator[Batch]:
        for plans in self.plans:
            yield self.render(plans)

    def render(self, plans: list[Plan]) -> Batch:
        """Renders planned clips."""
        size_px = (self.drawing.height_px, self.drawing.width_px)
        clip = render_clips(
            [plan.spec for plan in plans],
            [plan.performance for plan in plans],
            size_px,
            self.device,
            backdrops=[plan.backdrop for plan in plans],
        )

        def stacked(values: list[np.ndarray]) -> Tensor:
            return torch.from_numpy(np.stack(values)).to(self.device)

        return Batch(
            frames=clip.frames,
            samples=stacked([plan.speech.samples for plan in plans]),
            heard=stacked([plan.heard for plan in plans]),
            sounds=stacked([plan.performance.sounds for plan in plans]),
            loudness=stacked([plan.speech.loudness.astype(np.float32) for plan in plans]),
            opening=clip.opening,
            opening_px=clip.opening_px,
            mouth_box=clip.mouth_box,
            specs=[plan.spec for plan in plans],
        )
