"""`flashtalk train people`: examples of generated people, as many as wanted, on the machine that trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flashtalk_cli.config import SAMPLE_RATE_HZ, Preset
from flashtalk_cli.distill.config import TrainPreset
from flashtalk_cli.distill.encoding import Clip, Encoders, loudness_gain
from flashtalk_cli.distill.people.backdrop import draw_backdrop
from flashtalk_cli.distill.people.bank import Speech, SpeechBank, disturb
from flashtalk_cli.distill.people.clips import render_clips
from flashtalk_cli.distill.people.head import unit_names
from flashtalk_cli.distill.people.perform import FPS, Performance, begin_elsewhere, begin_smiling, perform
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM, PersonSpec, draw_person
from flashtalk_cli.errors import InputError

CLIPS_AT_ONCE = 16
MOUTH_TO_FACE = 1.9  # the weighted box is this many times as large as the mouth's own
SMILING_SHARE = 0.3  # clips that begin with a smile, as portraits have it
ELSEWHERE_SHARE = 0.6  # clips that begin with the mouth of another moment, as most portraits do
BEFORE_SHARE = 0.4  # clips cut out of the middle of a talk; the others begin one


@dataclass(frozen=True)
class Cast:
    """What generated clips are like: sizes, and which split of people, voices and sentences."""

    height_px: int
    width_px: int
    n_frames: int
    before_frames: int  # heard before the first frame, where the clip is cut out of a talk
    after_frames: int  # heard after the last one
    loudness_lufs: float
    silent_share: float
    held_out: bool = False

    @staticmethod
    def of(preset: TrainPreset, base: Preset, n_chunks: int, held_out: bool) -> Cast:
        """Clips of that many chunks."""
        sampling, hearing = base.sampling, base.hearing
        if sampling.fps != FPS:
            raise InputError(f"generated people move at {FPS} frames a second, the preset has {sampling.fps}")
        return Cast(
            height_px=base.canvas.height_px,
            width_px=base.canvas.width_px,
            n_frames=sampling.motion_frames + n_chunks * sampling.new_frames,
            before_frames=round(hearing.context_s * sampling.fps),
            after_frames=round(hearing.lookahead_s * sampling.fps) + 2,
            loudness_lufs=hearing.loudness_lufs,
            silent_share=preset.data.silent_share,
            held_out=held_out,
        )


@dataclass(frozen=True)
class Plan:
    """One clip before it is rendered."""

    spec: PersonSpec
    performance: Performance
    samples: np.ndarray
    origin: int
    backdrop: (
        np.ndarray
    )  # no tensor: those would travel through shared memory, of which containers have little


def draw_plan(number: int, bank: SpeechBank, cast: Cast) -> Plan:
    """Clip `number` of a cast: who, saying what, heard how; the same on every machine."""
    rng = np.random.default_rng((17, number, cast.held_out))
    spec = draw_person(number + (HELD_OUT_FROM if cast.held_out else 0))
    before = cast.before_frames if rng.random() < BEFORE_SHARE else 0
    n_frames = before + cast.n_frames + cast.after_frames
    speech = bank.draw(rng, n_frames)
    if rng.random() < cast.silent_share:
        speech = _hushed(speech)
    heard = disturb(speech.samples, rng)
    if speech.sounds == [] and rng.random() < 0.5:
        heard = np.zeros_like(heard)
    whole = perform(spec, speech.sounds, speech.loudness, unit_names(), seed=spec.seed)
    shown = whole.cut(before, before + cast.n_frames)
    if rng.random() < ELSEWHERE_SHARE:
        shown = begin_elsewhere(shown, unit_names(), rng)
    if rng.random() < SMILING_SHARE:  # portraits smile, and a talk begins with the portrait
        shown = begin_smiling(shown, unit_names(), rng)
    gain = loudness_gain(heard, cast.loudness_lufs)
    return Plan(
        spec=spec,
        performance=shown,
        samples=(heard * np.float32(gain)).astype(np.float32),
        origin=before * SAMPLE_RATE_HZ // FPS,
        backdrop=draw_backdrop(spec, cast.height_px, cast.width_px).numpy(),
    )


def _hushed(speech: Speech) -> Speech:
    return Speech(np.zeros_like(speech.samples), [], np.zeros_like(speech.loudness), speech.voice)


class _Plans(IterableDataset):
    def __init__(self, bank: SpeechBank, cast: Cast, batches: Sequence[range]) -> None:
        self.bank, self.cast, self.batches = bank, cast, batches

    def __iter__(self) -> Iterator[list[Plan]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        place, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for numbers in self.batches[place::step]:  # the loader asks its workers in turn: order is kept
            yield [draw_plan(number, self.bank, self.cast) for number in numbers]


@dataclass(frozen=True)
class Filmed:
    """Rendered clips and the truth about their mouths."""

    clips: list[Clip]
    opening_px: Tensor  # [B, F]
    mouth_box: Tensor  # [B, 4]


def film_plans(plans: list[Plan], cast: Cast, device: torch.device) -> Filmed:
    """Render planned clips; frames stay on the device."""
    rendered = render_clips(
        [plan.spec for plan in plans],
        [plan.performance for plan in plans],
        (cast.height_px, cast.width_px),
        str(device),
        backdrops=[torch.from_numpy(plan.backdrop) for plan in plans],
    )
    boxes = grown(rendered.mouth_box.float().cpu(), MOUTH_TO_FACE)
    clips = [
        Clip(frames, plan.samples, plan.origin, box=tuple(box.tolist()))  # type: ignore[arg-type]
        for frames, plan, box in zip(rendered.frames, plans, boxes, strict=True)
    ]
    return Filmed(clips, rendered.opening_px, rendered.mouth_box)


def grown(boxes: Tensor, factor: float) -> Tensor:
    """Boxes x0, y0, x1, y1 [N, 4] made larger about their middle."""
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    half = (boxes[:, 2:] - boxes[:, :2]) / 2 * factor
    return torch.cat([middle - half, middle + half], dim=1)


def stream(
    bank: SpeechBank, cast: Cast, batches: Sequence[range], device: torch.device, workers: int
) -> Iterator[Filmed]:
    """Clips of those numbers, planned by worker processes and rendered on the device, a batch at a time."""
    planned = _Plans(bank, cast, batches)
    plans: DataLoader = DataLoader(
        planned, batch_size=None, num_workers=workers, prefetch_factor=4 if workers else None
    )
    for batch in plans:
        yield film_plans(batch, cast, device)


def make_people(
    encoders: Encoders,
    preset: TrainPreset,
    bank_folder: Path,
    cast: Cast,
    shards: Sequence[range],
    workers: int,
) -> Iterator[dict[str, Tensor]]:
    """For each of `shards`, ranges of clips' numbers, its tensors, in order."""
    bank = SpeechBank(bank_folder, "held_out" if cast.held_out else "train")
    batches = [[*_batches(numbers)] for numbers in shards]
    films = stream(bank, cast, [one for some in batches for one in some], encoders.device, workers)
    for some in batches:
        made = (encoders.encode(next(films).clips, preset.data.pictures) for _ in some)
        yield merged([*made])


def _batches(numbers: range) -> Iterator[range]:
    for start in range(numbers.start, numbers.stop, CLIPS_AT_ONCE):
        yield range(start, min(start + CLIPS_AT_ONCE, numbers.stop))


def merged(parts: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Shards put together, their clips numbered on."""
    offset, found = 0, []
    for part in parts:
        n_clips = int(part["picture_clip"].max()) + 1
        found.append({**part, "clip": part["clip"] + offset, "picture_clip": part["picture_clip"] + offset})
        offset += n_clips
    return {name: torch.cat([part[name] for part in found]) for name in found[0]}
