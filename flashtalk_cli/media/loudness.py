"""Loudness by ITU-R BS.1770-4, measured while the sound streams by.

A file of hours is measured once and gets one gain; measuring each window anew would make
the gain pump. The result equals `pyloudnorm.Meter(rate).integrated_loudness` of the whole
array, whose filters are used here, but memory does not grow with the sound: per 100 ms one
number is kept, for the gates need all of them at the end.
"""

from __future__ import annotations

import math
from array import array

import numpy as np

from flashtalk_cli.config import SAMPLE_RATE_HZ

BLOCK_S = 0.4  # length of a gating block; blocks start every quarter of it
HOP = 0.25
ABSOLUTE_GATE_LUFS = -70.0
RELATIVE_GATE_LU = -10.0
OFFSET_LUFS = -0.691  # BS.1770's constant: a 997 Hz sine at full scale reads -3.01

MAX_PLAUSIBLE_LUFS = 100.0  # beyond it the reference leaves the sound as it is


class LoudnessMeter:
    """Integrated loudness of a mono sound that arrives in pieces of any length."""

    def __init__(self, rate_hz: int = SAMPLE_RATE_HZ) -> None:
        from pyloudnorm import Meter

        self._rate_hz = rate_hz
        self._stages = [(stage.b, stage.a) for stage in Meter(rate_hz)._filters.values()]
        self._memory = [np.zeros(max(len(b), len(a)) - 1) for b, a in self._stages]
        self._power = np.zeros(0)  # squares of the weighted samples that a block still needs
        self._power_from = 0  # index of its first sample in the whole sound
        self._n_samples = 0
        self._block_power = array("d")  # mean square of each block, in order

    def add(self, samples: np.ndarray) -> None:
        """Hear more: float [n]."""
        from scipy.signal import lfilter

        weighted = samples.astype(np.float64)
        for i, (b, a) in enumerate(self._stages):
            weighted, self._memory[i] = lfilter(b, a, weighted, zi=self._memory[i])
        self._power = np.concatenate([self._power, np.square(weighted)])
        self._n_samples += len(samples)
        while self._block_bounds(len(self._block_power))[1] <= self._n_samples:
            self._end_block()

    def integrated_lufs(self) -> float | None:
        """Loudness of everything heard, in LUFS; None when it is under 0.4 s long, silent or not finite.

        Hear no more after it.
        """
        if self._n_samples < BLOCK_S * self._rate_hz:
            return None
        duration_s = self._n_samples / self._rate_hz
        n_blocks = round((duration_s - BLOCK_S) / (BLOCK_S * HOP)) + 1
        while len(self._block_power) < n_blocks:  # the last block may hang over the end
            self._end_block()
        power = np.frombuffer(self._block_power)[:n_blocks]
        with np.errstate(divide="ignore", invalid="ignore"):
            block_lufs = _lufs(power)
        loud = block_lufs >= ABSOLUTE_GATE_LUFS
        if not loud.any():
            return None
        relative_gate = _lufs(power[loud].mean()) + RELATIVE_GATE_LU
        gated = power[(block_lufs > relative_gate) & (block_lufs > ABSOLUTE_GATE_LUFS)]
        if not len(gated):
            return None
        measured = float(_lufs(gated.mean()))
        return measured if math.isfinite(measured) else None

    def _block_bounds(self, block: int) -> tuple[int, int]:
        """First and end sample of a block, rounded as pyloudnorm rounds (a sample off shifts the result)."""
        start = int(BLOCK_S * (block * HOP) * self._rate_hz)
        return start, int(BLOCK_S * (block * HOP + 1) * self._rate_hz)

    def _end_block(self) -> None:
        start, end = (sample - self._power_from for sample in self._block_bounds(len(self._block_power)))
        self._block_power.append(float(self._power[start:end].sum()) / (BLOCK_S * self._rate_hz))
        next_start = self._block_bounds(len(self._block_power))[0]
        self._power = self._power[next_start - self._power_from :]
        self._power_from = next_start


def gain_to(measured_lufs: float | None, target_lufs: float) -> float:
    """Factor that brings a sound of that loudness to the target; 1 when the measure is none or implausible."""
    if measured_lufs is None or not abs(measured_lufs) <= MAX_PLAUSIBLE_LUFS:
        return 1.0
    return 10.0 ** ((target_lufs - measured_lufs) / 20.0)


def normalise_loudness(samples: np.ndarray, target_lufs: float, rate_hz: int = SAMPLE_RATE_HZ) -> np.ndarray:
    """Mono float [n] brought to the target loudness as one whole: float32 [n]."""
    meter = LoudnessMeter(rate_hz)
    meter.add(samples)
    gain = gain_to(meter.integrated_lufs(), target_lufs)
    return (samples * np.float64(gain)).astype(np.float32)


def _lufs(power: np.ndarray | float) -> np.ndarray:
    return OFFSET_LUFS + 10.0 * np.log10(power)
