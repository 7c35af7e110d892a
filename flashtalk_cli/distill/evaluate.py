"""`flashtalk train eval`: teacher and students on people and speech that no training has seen.

    lips        10 s of each person against the generator's truth: correlation of the gap between the
                lips with the true gap, and at which lag it is best; again at the end of a long rollout
    rollouts    5 minutes on end: measures.py's six figures over time, first minute against last
    silence     the same people with nothing to say: is the mouth shut, do they still move?
    recording   the same people speaking with a real person's voice: correlation of the gap with how loud the
                voice is, which rises and falls with its syllables

Writes eval.json, eval.md, plots and film strips.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from torch import Tensor

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill.config import Evaluation
from flashtalk_cli.distill.drive import Method, drive, to_frames
from flashtalk_cli.distill.encoding import as_video
from flashtalk_cli.distill.measures import (
    NAMES,
    Lips,
    Reference,
    compare_lips,
    gaps_of,
    measure_frames,
    mouth_crops,
)
from flashtalk_cli.distill.panel import Panel
from flashtalk_cli.distill.rollout import LATENTS_AT_ONCE
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.vae import FRAMES_PER_LATENT, Vae

STRIP_TIMES = 8  # frames of a film strip, from the first to the last
SILENT_CHUNKS = 6
SEED = 7
CHUNK_COST = 8.0  # sound, decoding, measuring: reckoned, not measured, as so many evaluations of the network
QUIET_DB = 35.0  # below the loudest frame, a voice pauses
RECORDING = Path(__file__).parent.parent / "assets" / "speech" / "austen.wav"


class Interrupted(Exception):
    """Asked to end in the middle of a run."""


@dataclass(frozen=True)
class Candidate:
    """A network and a way to draw from it, under a name."""

    name: str
    dit: Callable[[], DiT]
    method: Method
    n_chunks: int


@dataclass(frozen=True)
class Result:
    """What was found of a candidate."""

    name: str
    method: Method
    lips: Lips  # over the beginning
    lips_at_end: Lips | None  # over a long rollout's last window
    series: Tensor  # [seconds, 6]: NAMES, mean over people
    first: dict[str, float]  # means over the first window
    last: dict[str, float]  # and the last; of a short rollout the same
    silent_gap: float  # mean gap in silence over the mouth's width
    silent_life: float
    recorded: Lips  # against how loud a recorded voice is
    gap: Tensor  # [P, frames of the beginning]
    strip: Tensor  # uint8 [P, STRIP_TIMES, H, W, 3]
    talking: Tensor  # uint8 [P, n, H, W, 3]: the first seconds

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        kept = {name: self.last[name] / self.first[name] if self.first[name] else None for name in NAMES}
        return {
            "name": self.name,
            "steps": self.method.steps,
            "evaluations": self.method.evaluations,
            "seconds": len(self.series),
            "lips": vars(self.lips),
            "lips_at_end": vars(self.lips_at_end) if self.lips_at_end else None,
            "first": self.first,
            "last": self.last,
            "last_over_first": kept,
            "silent_gap": self.silent_gap,
            "silent_life": self.silent_life,
            "recorded": vars(self.recorded),
            "series": {name: self.series[:, i].tolist() for i, name in enumerate(NAMES)},
        }


@dataclass(frozen=True)
class Bench:
    """What candidates are put to."""

    panel: Panel
    vae: Vae
    reference: Reference
    plan: Evaluation
    stop: threading.Event
    report: Callable[[str, int, int], None]  # name, chunks done, of how many

    def run(self, candidate: Candidate) -> Result:
        """Drive the panel with a candidate and measure. Raises Interrupted when asked to end."""
        panel, plan = self.panel, self.plan
        dit = candidate.dit()
        sampling = panel.encoders.base.sampling
        widths = panel.mouth_box[:, 2] - panel.mouth_box[:, 0]
        n_shown = min(plan.short_chunks, candidate.n_chunks) * sampling.new_frames
        n_frames = candidate.n_chunks * sampling.new_frames
        wanted = [round(i * (n_frames - 1) / (STRIP_TIMES - 1)) for i in range(STRIP_TIMES)]
        measured, crops, strip, talking = [], [], [], []
        before = panel.pictures.to(panel.encoders.device)
        at = 0
        for index, frames in enumerate(self._drive(dit, candidate, panel)):
            measured.append(measure_frames(frames, before, self.reference))
            crops.append(mouth_crops(frames, panel.mouth_box))
            before = frames[:, -1]
            strip += [frames[:, t - at].cpu() for t in wanted if at <= t < at + frames.shape[1]]
            if at < 2 * sampling.fps:
                talking.append(frames.cpu())
            at += frames.shape[1]
            self.report(candidate.name, index + 1, candidate.n_chunks)
        gap = gaps_of(torch.cat(crops, dim=1), widths)
        values = torch.cat(measured, dim=1).mean(0).cpu()
        window = min(round(plan.window_s * sampling.fps), n_frames)
        long = n_frames >= 2 * window
        silent_gap, silent_life = self._silence(dit, candidate)
        return Result(
            name=candidate.name,
            method=candidate.method,
            lips=compare_lips(gap[:, :n_shown].numpy(), panel.gap[:, :n_shown].numpy()),
            lips_at_end=compare_lips(
                gap[:, -window:].numpy(), panel.gap[:, n_frames - window : n_frames].numpy()
            )
            if long
            else None,
            series=per_second(values, sampling.fps),
            first=_named(values[:window].mean(0)),
            last=_named(values[-window:].mean(0)),
            silent_gap=silent_gap,
            silent_life=silent_life,
            recorded=self._recorded(dit, candidate),
            gap=gap[:, :n_shown],
            strip=torch.stack(strip, dim=1),
            talking=torch.cat(talking, dim=1),
        )

    def _silence(self, dit: DiT, candidate: Candidate) -> tuple[float, float]:
        """Mean gap over the mouth's width, and life, once the first chunk is over."""
        panel = self.panel.hushed()
        quiet = Candidate(candidate.name, candidate.dit, candidate.method, SILENT_CHUNKS)
        crops, life = [], []
        before: Tensor | None = None
        for frames in self._drive(dit, quiet, panel):
            if before is not None:
                crops.append(mouth_crops(frames, panel.mouth_box))
                life.append(measure_frames(frames, before, self.reference)[..., -1])
            before = frames[:, -1]
        gap = gaps_of(torch.cat(crops, dim=1), torch.ones(len(panel)))
        return gap.clamp(min=0).mean().item(), torch.cat(life, dim=1).mean().item()

    def _recorded(self, dit: DiT, candidate: Candidate) -> Lips:
        """How the gap follows a recorded voice."""
        base = self.panel.encoders.base
        samples = recording()
        panel = self.panel.saying(samples)
        n_chunks = max(1, int(len(samples) / SAMPLE_RATE_HZ / base.sampling.new_s))
        loud = Candidate(
            candidate.name, candidate.dit, candidate.method, min(n_chunks, self.plan.short_chunks)
        )
        crops = [mouth_crops(frames, panel.mouth_box) for frames in self._drive(dit, loud, panel)]
        gap = gaps_of(torch.cat(crops, dim=1), torch.ones(len(panel)))
        voice = loudness_of(samples, base.sampling.fps)[: gap.shape[1]]
        return compare_lips(gap.numpy(), np.tile(voice, (len(panel), 1)))

    def _drive(self, dit: DiT, candidate: Candidate, panel: Panel) -> Any:
        generator = torch.Generator(panel.encoders.device).manual_seed(SEED)
        for frames in drive(dit, self.vae, panel, candidate.method, candidate.n_chunks, generator):
            if self.stop.is_set():
                raise Interrupted
            yield frames


def recording() -> np.ndarray:
    """The recorded voice that comes with the program, float32 at 16 kHz."""
    samples, rate_hz = soundfile.read(RECORDING, dtype="float32")
    assert rate_hz == SAMPLE_RATE_HZ
    return samples


def loudness_of(samples: np.ndarray, fps: int) -> np.ndarray:
    """How loud sound at 16 kHz is under each frame: 1 at its loudest, 0 from 35 dB below that on."""
    import librosa

    hop = SAMPLE_RATE_HZ // fps
    power = librosa.feature.rms(y=samples, frame_length=2 * hop, hop_length=hop)[0]
    loud_db = librosa.amplitude_to_db(power, ref=np.max)
    return np.clip(1 + loud_db / QUIET_DB, 0, 1)


@dataclass(frozen=True)
class Yardstick:
    """The meters on frames that no network here has made: what a candidate's figures are to be held against."""

    name: str
    lips: Lips
    seen: dict[str, float]  # NAMES


@torch.no_grad()
def yardsticks(panel: Panel, vae: Vae, reference: Reference) -> tuple[Yardstick, Yardstick]:
    """The panel's own frames, which a perfect model would make; and through the VAE, as a perfect network would."""
    n_frames = 1 + (panel.frames.shape[1] - 1) // FRAMES_PER_LATENT * FRAMES_PER_LATENT
    frames, device = panel.frames[:, :n_frames], panel.encoders.device
    decoded = []
    for person in frames.split(1):
        latents, _ = vae.encode(as_video(person, device))
        decoded.append(to_frames(vae.decode(latents, latents_at_once=LATENTS_AT_ONCE)[0].float()).cpu())
    return (
        _measured("truth", panel, frames, reference),
        _measured("truth through the VAE", panel, torch.cat(decoded), reference),
    )


def _measured(name: str, panel: Panel, frames: Tensor, reference: Reference) -> Yardstick:
    """Measure frames uint8 [P, T, H, W, 3] of the panel's beginning, a second at a time."""
    crops, measured, before = [], [], panel.pictures
    for some in frames.split(panel.encoders.base.sampling.fps, dim=1):
        crops.append(mouth_crops(some, panel.mouth_box))
        device = reference.token.device
        measured.append(measure_frames(some.to(device), before.to(device), reference))
        before = some[:, -1]
    gap = gaps_of(torch.cat(crops, dim=1), panel.mouth_box[:, 2] - panel.mouth_box[:, 0])
    lips = compare_lips(gap.numpy(), panel.gap[:, : gap.shape[1]].numpy())
    return Yardstick(name, lips, _named(torch.cat(measured, dim=1).mean((0, 1))))


def share_out(candidates: Sequence[Candidate], n_ranks: int) -> list[list[int]]:
    """Each rank's candidates by place: the longest first, each to the rank that has least to do."""
    shares: list[list[int]] = [[] for _ in range(n_ranks)]
    busy = [0.0] * n_ranks
    cost = [c.n_chunks * (c.method.evaluations + CHUNK_COST) for c in candidates]
    for place in sorted(range(len(candidates)), key=lambda place: -cost[place]):
        rank = busy.index(min(busy))
        shares[rank].append(place)
        busy[rank] += cost[place]
    return shares


def per_second(values: Tensor, fps: int) -> Tensor:
    """Means over whole seconds (or over all, when there is less): [T, n] -> [seconds, n]."""
    whole = len(values) // fps * fps
    if whole == 0:
        return values.mean(0, keepdim=True)
    return values[:whole].view(-1, fps, values.shape[1]).mean(1)


def _named(values: Tensor) -> dict[str, float]:
    return dict(zip(NAMES, values.tolist(), strict=True))
