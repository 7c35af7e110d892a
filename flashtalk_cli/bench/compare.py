"""Whether one report is slower than another by more than noise.

Noise within a run is the chunks' own spread: the difference of two medians, or two means, as a ratio, has a
standard error that a bootstrap gives. It draws runs of consecutive chunks, since neighbours are alike (clocks, heat,
other programs). Noise between runs, which no single run shows, is allowed for by DRIFT: two runs of one
program on a quiet machine differ by a few per cent. Slower is what is beyond both: the true ratio is above
1 + DRIFT with 99 %.

What decides is the time of a chunk, in the median and in the mean, the time to its first frame, and peak memory
(which has no noise but the allocator's, so MEMORY_DRIFT is all it may grow by). The mean is what frames a second
follow: a run whose every third chunk is late has the same median, and is live no longer. Single parts are only told.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from flashtalk_cli.errors import InputError

DRIFT, MEMORY_DRIFT = 0.03, 0.05
CONFIDENCE = 0.99
MEAN_CONFIDENCE = 0.995  # a second look at the same chunks, and one late chunk says little of its own noise
MIN_CHUNKS = 3
BLOCK_CHUNKS, DRAWS, SEED = 3, 2000, 20
ALIKE = ("preset", "model", "weights", "canvas", "steps", "chunk_frames", "new_frames", "ranks", "offload")

Verdict = Literal["slower", "faster", "same", "unclear"]


@dataclass(frozen=True)
class Row:
    """One figure of two reports; the ratio is new over old, with bounds of which each holds with 99 %."""

    name: str
    old: float
    new: float
    unit: str
    ratio: float
    low: float
    high: float
    verdict: Verdict
    decides: bool


@dataclass(frozen=True)
class Comparison:
    """All figures, and how small a slow-down of a chunk would have been noticed."""

    rows: tuple[Row, ...]
    noticed: float  # such as 0.06
    settings: tuple[str, ...]  # what differs in the settings, such as "precision.dit: bfloat16 -> fp8"
    changed: tuple[str, ...]  # what differs in the fingerprints, as such lines

    @property
    def regressions(self) -> list[Row]:
        """The figures for which the new report is found worse."""
        return [row for row in self.rows if row.decides and row.verdict == "slower"]


def check(old: Mapping[str, Any], setting: Mapping[str, Any], chunks: int) -> None:
    """Whether a report of so many chunks in this setting, measured or yet to be, can be compared with an old one.

    Raises InputError when they are of different things, or of too few chunks to know their noise.
    """
    for key in ALIKE:
        if old["setting"].get(key) != setting[key]:
            raise InputError(
                f"cannot be compared: {key} is {old['setting'].get(key)} in the old report and {setting[key]} now"
            )
    for name, count in (("old", len(old["chunk"]["samples_s"])), ("new", chunks)):
        if count < MIN_CHUNKS:
            raise InputError(
                f"cannot be compared: the {name} report has {count} chunks; to know their noise takes {MIN_CHUNKS}"
            )


def compare(old: Mapping[str, Any], new: Mapping[str, Any]) -> Comparison:
    """Compare two reports of the same setting on the same device.

    Raises InputError as `check` does, and when they are of different devices.
    """
    check(old, new["setting"], len(new["chunk"]["samples_s"]))
    devices = [report["fingerprint"]["device"] for report in (old, new)]
    if devices[0] != devices[1]:
        raise InputError(
            f"cannot be compared: the old report is of {devices[0]}, the new one of {devices[1]}"
        )
    rows = [
        _times("chunk", old["chunk"], new["chunk"], decides=True),
        _times("mean chunk", old["chunk"], new["chunk"], mean=True, decides=True),
        _times("first frame", old["live"]["first_frame"], new["live"]["first_frame"], decides=True),
        _memory(old["memory"]["peak_gib"], new["memory"]["peak_gib"]),
    ]
    before = {(part["name"], part["lane"]): part["time"] for part in old["parts"]}
    for part in new["parts"]:
        if (earlier := before.get((part["name"], part["lane"]))) and earlier["p50_s"] > 0 < part["time"][
            "p50_s"
        ]:
            rows.append(_times(part["name"], earlier, part["time"], decides=False))
    chunk = rows[0]
    noticed = (1 + DRIFT) * (chunk.high / chunk.low) - 1  # twice the interval's half width above the drift
    return Comparison(
        tuple(rows),
        noticed,
        settings=_differences(old["setting"], new["setting"]),
        changed=_differences(old["fingerprint"], new["fingerprint"]),
    )


def _times(
    name: str, old: Mapping[str, Any], new: Mapping[str, Any], *, mean: bool = False, decides: bool
) -> Row:
    """Of two spreads, the medians or the means."""
    key, statistic = ("mean_s", np.mean) if mean else ("p50_s", np.median)
    low, high = ratio_bounds(old["samples_s"], new["samples_s"], mean=mean)
    ratio = float(statistic(new["samples_s"]) / statistic(old["samples_s"]))
    return Row(name, old[key], new[key], "s", ratio, low, high, _verdict(ratio, low, high), decides)


def _verdict(ratio: float, low: float, high: float) -> Verdict:
    if low > 1 + DRIFT:
        return "slower"
    if high < 1 / (1 + DRIFT):
        return "faster"
    return "unclear" if ratio > 1 + DRIFT else "same"


def _memory(old: float, new: float) -> Row:
    ratio = new / old
    verdict: Verdict = "slower" if ratio > 1 + MEMORY_DRIFT else "same"
    return Row("peak memory", old, new, "GiB", ratio, ratio, ratio, verdict, True)


def ratio_bounds(
    old_s: Sequence[float], new_s: Sequence[float], *, mean: bool = False
) -> tuple[float, float]:
    """A lower and an upper bound of the ratio of two medians, or means, new over old; each holds with CONFIDENCE."""
    statistic, confidence = (np.mean, MEAN_CONFIDENCE) if mean else (np.median, CONFIDENCE)
    samples = [np.maximum(1e-9, x) for x in (old_s, new_s)]
    difference = float(np.log(statistic(samples[1])) - np.log(statistic(samples[0])))
    generator = np.random.default_rng(SEED)
    drawn = [np.log(statistic(_drawn(x, generator), axis=1)) for x in samples]
    variance = sum(float(x.var()) * len(one) / (len(one) - 1) for x, one in zip(drawn, samples, strict=True))
    half = _student(confidence, len(samples[0]) + len(samples[1]) - 2) * variance**0.5
    return float(np.exp(difference - half)), float(np.exp(difference + half))


def _drawn(samples: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """Many series drawn from one, a row each, in runs of neighbours (the last is followed by the first)."""
    count = len(samples)
    length = min(BLOCK_CHUNKS, max(1, count // 3))
    starts = generator.integers(0, count, (DRAWS, -(-count // length)))
    places = (starts[..., None] + np.arange(length)).reshape(DRAWS, -1)[:, :count] % count
    drawn: np.ndarray = samples[places]
    return drawn


def _student(quantile: float, freedom: int) -> float:
    """A quantile of Student's distribution, by its expansion around the normal one (Abramowitz & Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(quantile)
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / freedom + second / freedom**2 + third / freedom**3


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs, the date left out; None stands for what one of them does not say."""
    before, after = dict(_flat(old)), dict(_flat(new))
    keys = [key for key in {**after, **before} if key != "date" and before.get(key) != after.get(key)]
    return tuple(f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys)


def _flat(facts: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values, such as precision.dit."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{place}{key}.")
        else:
            yield place + key, value
