"""From sounds to a moving face: articulation with co-articulation, and the life around it.

Each sound pulls the mouth towards its shape with a pull that rises before the sound, holds, and
dies away after it; where pulls overlap they average by strength, so that neighbours colour each
other. Lip closures (p, b, m) and lip-to-teeth sounds (f, v) pull harder and for a shorter while:
they are reached even in fast speech. Curves are made at 200 Hz and averaged over each frame's
own 40 ms: frame t shows the time from t / 25 to (t + 1) / 25 seconds, without lag.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from flashtalk_cli.distill.people.person import PersonSpec
from flashtalk_cli.distill.people.phonemes import CLASSES, MOUTHS, SHAPES, VOWELS, Sound

FPS = 25
FINE_HZ = 200
REACH_S = {
    "jaw": 0.055,
    "closed": 0.018,
    "tuck": 0.022,
    "round": 0.060,
    "funnel": 0.055,
    "spread": 0.055,
    "show": 0.050,
}
CLASS_SIL = 0


@dataclass(frozen=True)
class Performance:
    """What a person does over T frames at 25 a second.

    curves float32 [T, U], face units in the order of `unit_names()`; turn [T, 3] yaw, pitch and
    roll of the head added to the resting pose, rad; gaze [T, 2] yaw and pitch of the eyes against
    the head, rad; sway [T, 3] dm; breath [T] in 0..1; sounds int64 [T], the class heard in a frame.
    """

    curves: np.ndarray
    turn: np.ndarray
    gaze: np.ndarray
    sway: np.ndarray
    breath: np.ndarray
    sounds: np.ndarray

    def __len__(self) -> int:
        return len(self.breath)

    def cut(self, start: int, end: int) -> Performance:
        """Frames start .. end."""
        return self._at(slice(start, end))

    def every(self, step: int) -> Performance:
        """Every so many frames, from the first."""
        return self._at(slice(None, None, step))

    def _at(self, frames: slice) -> Performance:
        return replace(self, **{name: getattr(self, name)[frames] for name in self.__dataclass_fields__})


@dataclass(frozen=True)
class Manner:
    """How someone speaks and holds still; about 1 or 0 is usual."""

    jaw: float = 1.0
    lips: float = 1.0
    lively: float = 1.0
    smile: float = 0.1
    frown: float = 0.0
    lopsided: float = 0.0
    brows: float = 0.0
    squint: float = 0.0
    eye_contact: float = 1.0


def draw_manner(rng: np.random.Generator) -> Manner:
    """A manner of speaking."""
    return Manner(
        jaw=float(rng.uniform(0.75, 1.25)),
        lips=float(rng.uniform(0.7, 1.2)),
        lively=float(rng.uniform(0.3, 1.5)),
        smile=float(max(0.0, rng.normal(0.12, 0.16))),
        frown=float(max(0.0, rng.normal(-0.05, 0.12))),
        lopsided=float(rng.normal(0, 0.12)),
        brows=float(rng.normal(0, 0.12)),
        squint=float(rng.uniform(0, 0.16)),
        eye_contact=float(rng.random() < 0.8),
    )


def articulate(sounds: list[Sound], n_frames: int) -> np.ndarray:
    """Mouth shapes [T, 7] in the order of `SHAPES`."""
    fine = np.arange(n_frames * FINE_HZ // FPS, dtype=np.float64) / FINE_HZ + 0.5 / FINE_HZ
    pull = {shape: np.full(len(fine), 1e-3) for shape in SHAPES}
    drawn = {shape: np.zeros(len(fine)) for shape in SHAPES}
    for sound in sounds:
        mouth = MOUTHS[CLASSES[sound.sound]]
        low, high = np.searchsorted(fine, (sound.start_s - 0.4, sound.end_s + 0.4))
        around = fine[low:high]
        away_s = np.maximum(np.maximum(sound.start_s - around, around - sound.end_s), 0.0)
        for shape in SHAPES:
            target = getattr(mouth, shape)
            strength = mouth.insists * (3.0 if shape in ("closed", "tuck") and target > 0.5 else 1.0)
            weight = strength * np.exp(-((away_s / REACH_S[shape]) ** 1.4))
            pull[shape][low:high] += weight
            drawn[shape][low:high] += weight * target
    curves = np.stack([drawn[shape] / pull[shape] for shape in SHAPES], -1)
    steps = FINE_HZ // FPS
    return curves[: n_frames * steps].reshape(n_frames, steps, len(SHAPES)).mean(1)


def frame_sounds(sounds: list[Sound], n_frames: int) -> np.ndarray:
    """The class that sounds at the middle of each frame, int64 [T]."""
    middle = (np.arange(n_frames) + 0.5) / FPS
    found = np.full(n_frames, CLASS_SIL, dtype=np.int64)
    for sound in sounds:
        low, high = np.searchsorted(middle, (sound.start_s, sound.end_s))
        found[low:high] = sound.sound
    return found


def units_of_mouth(shapes: np.ndarray, loudness: np.ndarray, manner: Manner) -> dict[str, np.ndarray]:
    """Face units [T] for mouth shapes [T, 7]; loudness [T] about 1 scales the jaw."""
    jaw, closed, tuck, round_, funnel, spread, show = shapes.T
    jaw = 1.3 * jaw * manner.jaw * np.clip(0.55 + 0.5 * loudness, 0.5, 1.3)
    lips = manner.lips
    opened = jaw * (1 - 0.9 * closed) * (1 - 0.5 * tuck) + 0.05 * closed
    free = 1 - np.clip(closed + tuck, 0, 1)
    show = show * lips * (1 - closed)
    units = {
        "jawOpen": opened,
        "mouthClose": closed * opened,
        "mouthPucker": 0.75 * round_ * lips,
        "mouthFunnel": 0.65 * funnel * lips * free,
        "mouthRollLower": 0.22 * closed + 0.55 * tuck,
        "mouthRollUpper": 0.18 * closed,
    }
    side = {"Left": 1 + manner.lopsided, "Right": 1 - manner.lopsided}
    for name, gain in side.items():
        units[f"mouthStretch{name}"] = 0.38 * spread * lips * gain
        units[f"mouthSmile{name}"] = 0.16 * spread * lips * gain
        units[f"mouthUpperUp{name}"] = (0.22 * show + 0.30 * tuck + 0.25 * jaw * free) * gain
        units[f"mouthLowerDown{name}"] = (0.30 * show + 0.35 * jaw * free) * gain * (1 - tuck)
        units[f"mouthPress{name}"] = 0.25 * closed
        units[f"cheekSquint{name}"] = 0.10 * spread * gain
    return units


def wander(rng: np.random.Generator, n_frames: int, period_s: float, channels: int) -> np.ndarray:
    """Smooth noise [T, channels], standard deviation about 1, that turns about every `period_s`."""
    n_knots = int(n_frames / FPS / period_s) + 5
    knots = rng.normal(0, 1.15, (n_knots, channels))
    at = np.arange(n_frames) / FPS / period_s + 1 + rng.random()
    left = at.astype(int)
    t = (at - left)[:, None]
    before, here, there, after = (knots[left + step] for step in (-1, 0, 1, 2))
    slope, slope_after = (there - before) / 2, (after - here) / 2
    return (
        (2 * t**3 - 3 * t**2 + 1) * here
        + (t**3 - 2 * t**2 + t) * slope
        + (3 * t**2 - 2 * t**3) * there
        + (t**3 - t**2) * slope_after
    )


def blinks(rng: np.random.Generator, n_frames: int, per_s: float) -> np.ndarray:
    """How far the lids are shut [T] in 0..1; a blink closes in two frames and opens in four."""
    shut = np.zeros(n_frames + 16)
    profile = np.asarray((0.45, 1.0, 0.95, 0.6, 0.28, 0.08))
    at = int(rng.exponential(FPS / per_s))
    while at < n_frames:
        shut[at : at + len(profile)] = np.maximum(shut[at : at + len(profile)], profile)
        at += max(8, int(rng.gamma(2.2, FPS / per_s / 2.2))) if rng.random() > 0.08 else 7
    return shut[:n_frames]


def stresses(loudness: np.ndarray, sounds: np.ndarray) -> np.ndarray:
    """Soft bumps [T] in 0..1 at the loudest vowels: where heads nod and brows rise."""
    voiced = loudness * np.isin(sounds, list(VOWELS))
    bump = np.zeros(len(loudness) + 20)
    last = -99
    for frame in range(1, len(loudness) - 1):
        peak = (
            voiced[frame] > 1.15 and voiced[frame] >= voiced[frame - 1] and voiced[frame] >= voiced[frame + 1]
        )
        if peak and frame - last > 9:
            last = frame
            bump[frame : frame + 12] = np.maximum(bump[frame : frame + 12], np.hanning(14)[1:13])
    return np.clip(bump[: len(loudness)] * np.clip(loudness.max() / 2, 0.5, 1), 0, 1)


def look(rng: np.random.Generator, n_frames: int, contact: float) -> np.ndarray:
    """Where the eyes look in the room [T, 2] rad: mostly the camera, with small quick moves."""
    aim = np.zeros((n_frames, 2))
    at, home = 0, rng.normal(0, 0.12, 2) * (1 - contact)
    while at < n_frames:
        hold = int(rng.gamma(2.0, 0.5 * FPS)) + 3
        aside = rng.normal(0, (0.16, 0.09)) if rng.random() < 0.13 else rng.normal(0, 0.018, 2)
        aim[at : at + hold] = home + aside
        at += hold
    return aim


def perform(
    spec: PersonSpec,
    sounds: list[Sound],
    loudness: np.ndarray,
    unit_names: tuple[str, ...],
    seed: int,
    manner: Manner | None = None,
) -> Performance:
    """A person saying those sounds; loudness [T] (about 1 when speaking) sets the number of frames."""
    rng = np.random.default_rng((31, seed))
    manner = manner or draw_manner(rng)
    n_frames = len(loudness)
    heard = frame_sounds(sounds, n_frames)
    stress = stresses(loudness, heard)
    units = units_of_mouth(articulate(sounds, n_frames), loudness, manner)
    slow = wander(rng, n_frames, 2.5, 3)
    turn = wander(rng, n_frames, 1.4, 3) * (0.035, 0.022, 0.018) + wander(rng, n_frames, 4.0, 3) * (
        0.05,
        0.03,
        0.02,
    )
    turn = turn * manner.lively
    turn[:, 1] += stress * 0.055 * manner.lively * rng.uniform(0.3, 1.2)
    gaze = (
        look(rng, n_frames, manner.eye_contact) - turn[:, :2] - (spec.turn[0] + spec.body_turn, spec.turn[1])
    )
    gaze = np.clip(gaze, (-0.55, -0.35), (0.55, 0.35))
    _add_life(units, rng, manner, stress, slow, gaze)
    curves = np.zeros((n_frames, len(unit_names)), dtype=np.float32)
    for name, values in units.items():
        curves[:, unit_names.index(name)] = np.clip(values, 0, 1)
    rate_hz = rng.uniform(0.2, 0.32)
    breath = 0.5 - 0.5 * np.cos(2 * np.pi * (rate_hz * np.arange(n_frames) / FPS + rng.random()))
    sway = wander(rng, n_frames, 3.5, 3) * (0.035, 0.012, 0.03) * manner.lively
    return Performance(
        curves,
        turn.astype(np.float32),
        gaze.astype(np.float32),
        sway.astype(np.float32),
        breath.astype(np.float32),
        heard,
    )


def begin_smiling(
    performance: Performance, unit_names: tuple[str, ...], rng: np.random.Generator
) -> Performance:
    """The same, but begun with the smile that people give a photographer; it is gone within seconds."""
    held, fading = rng.uniform(0, 8), rng.uniform(3, 12)  # frames
    smile = rng.uniform(0.3, 1.0) * np.exp(-np.maximum(0, np.arange(len(performance)) - held) / fading)
    teeth = rng.uniform(0.3, 1.0) if rng.random() < 0.7 else 0.0
    added = {
        "mouthSmile": 0.75,
        "cheekSquint": 0.4,
        "eyeSquint": 0.25,
        "mouthStretch": 0.15,
        "mouthUpperUp": 0.7 * teeth,
        "mouthLowerDown": 0.5 * teeth,
    }
    curves = performance.curves.copy()
    for name, amount in added.items():
        for side in ("Left", "Right"):
            column = unit_names.index(name + side)
            curves[:, column] = np.clip(curves[:, column] + amount * smile, 0, 1)
    return replace(performance, curves=curves)


def begin_elsewhere(
    performance: Performance, unit_names: tuple[str, ...], rng: np.random.Generator
) -> Performance:
    """The same, but begun with the mouth of another of its moments, which is gone within half a second.

    A portrait was not taken of the talk that it begins: how wide its mouth is tells nothing of the words or of the
    speaker's manner, and a network that had only seen frames of the talk itself would read both from it.
    """
    held, fading = rng.uniform(0, 3), rng.uniform(1.5, 4)  # frames
    share = np.exp(-np.maximum(0, np.arange(len(performance)) - held) / fading)[:, None].astype(np.float32)
    mouth = [i for i, name in enumerate(unit_names) if name.startswith(("jaw", "mouth"))]
    curves = performance.curves.copy()
    photographed = curves[rng.integers(len(curves)), mouth]
    curves[:, mouth] += share * (photographed - curves[:, mouth])
    return replace(performance, curves=curves)


def _add_life(
    units: dict[str, np.ndarray],
    rng: np.random.Generator,
    manner: Manner,
    stress: np.ndarray,
    slow: np.ndarray,
    gaze: np.ndarray,
) -> None:
    """Blinks, brows, mood, and lids that follow the eyes, into `units`."""
    n_frames = len(stress)
    shut = blinks(rng, n_frames, rng.uniform(0.2, 0.45))
    brow = (
        manner.brows + 0.10 * manner.lively * slow[:, 0] + 0.35 * manner.lively * stress * rng.uniform(0, 1)
    )
    smile = np.clip(manner.smile * (1 + 0.35 * slow[:, 1]), 0, 0.7)
    for name, gain in {"Left": 1 + manner.lopsided, "Right": 1 - manner.lopsided}.items():
        units[f"eyeBlink{name}"] = np.maximum(
            shut, 0.01 + 0.10 * manner.squint + 0.35 * np.clip(gaze[:, 1], 0, 1)
        )
        units[f"eyeSquint{name}"] = np.clip(manner.squint * (1 + 0.3 * slow[:, 2]) + 0.3 * smile, 0, 1)
        units[f"eyeWide{name}"] = np.clip(0.6 * (brow - 0.15), 0, 0.5) + 0.6 * np.clip(-gaze[:, 1], 0, 1)
        units[f"browOuterUp{name}"] = np.clip(0.7 * brow, 0, 1)
        units[f"browDown{name}"] = np.clip(manner.frown - brow, 0, 0.6)
        units[f"mouthSmile{name}"] = units[f"mouthSmile{name}"] + smile * gain
        units[f"mouthFrown{name}"] = np.full(n_frames, 0.4 * manner.frown)
        units[f"cheekSquint{name}"] = units[f"cheekSquint{name}"] + 0.4 * smile
    units["browInnerUp"] = np.clip(0.8 * brow, 0, 1)
