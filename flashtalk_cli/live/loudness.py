"""The gain that brings a live voice to the loudness that the model knows, without its future.

A file is measured whole and gets one gain. A live sound cannot be; so its gated loudness (ITU-R BS.1770-4)
is taken over the last half minute of speech, and the gain follows slowly, for a gain that pumps would
make the mouth pump. The model alone hears it: the listener gets the sound as it came.

The speech encoder brings whatever it hears to unit variance, the noise of an empty room too, and the mouth
would move with it. So a stretch without anything near the level of speech is heard as silence.
"""

from __future__ import annotations

import math
from collections import deque

import numpy as np

BLOCK_S = 0.4  # a gating block; one begins every quarter of it
KEPT_BLOCKS = 300  # with sound in them: half a minute of speech, however long ago it was
ABSOLUTE_GATE_LUFS = -60.0  # BS.1770 says -70; what lies between is the noise of microphones
RELATIVE_GATE_LU = -10.0
OFFSET_LUFS = -0.691  # BS.1770's constant
LIMIT_DB = 30.0  # noise before the first word is not made into a voice
SLEW_DB_PER_S = 3.0
NOISE_LU = 25.0  # so far below the target, after the gain, nothing is speech


class RunningGain:
    """A factor that follows a mono sound. Memory does not grow."""

    def __init__(self, rate_hz: int, target_lufs: float) -> None:
        from pyloudnorm import Meter

        self._stages = [(stage.b, stage.a) for stage in Meter(rate_hz)._filters.values()]
        self._memory = [np.zeros(max(len(b), len(a)) - 1) for b, a in self._stages]
        self._rate_hz = rate_hz
        self._hop = round(rate_hz * BLOCK_S / 4)
        self._rest = np.zeros(0)  # weighted and squared samples that no hop has taken
        self._hops: deque[float] = deque(maxlen=4)  # mean squares of the hops of a block
        self._blocks: deque[float] = deque(maxlen=KEPT_BLOCKS)
        self._target_lufs = target_lufs
        self._gain_db: float | None = None

    @property
    def factor(self) -> float:
        """The gain as of now; 1 before any sound was loud enough to measure."""
        return 10 ** ((self._gain_db or 0.0) / 20)

    def add(self, samples: np.ndarray) -> float:
        """Hear more, float [n], and return the gain after it."""
        from scipy.signal import lfilter

        weighted = samples.astype(np.float64)
        for i, (b, a) in enumerate(self._stages):
            weighted, self._memory[i] = lfilter(b, a, weighted, zi=self._memory[i])
        squares = np.concatenate([self._rest, np.square(weighted)])
        n_hops = len(squares) // self._hop
        self._rest = squares[n_hops * self._hop :]
        for power in squares[: n_hops * self._hop].reshape(n_hops, self._hop).mean(axis=1):
            self._hops.append(float(power))
            block = sum(self._hops) / len(self._hops)
            if len(self._hops) == self._hops.maxlen and _lufs(block) >= ABSOLUTE_GATE_LUFS:
                self._blocks.append(block)
        self._follow(len(samples) / self._rate_hz)
        return self.factor

    def hear(self, heard: np.ndarray) -> np.ndarray:
        """What the model is given of a stretch of sound, float [n] -> float32 [n]: with the gain, or silence."""
        size = round(self._rate_hz * BLOCK_S)
        padded = np.pad(heard.astype(np.float64), (0, -len(heard) % size))
        loudest = float(np.square(padded).reshape(-1, size).mean(axis=1).max(initial=0.0))
        if _lufs(loudest * self.factor**2) < self._target_lufs - NOISE_LU:
            return np.zeros(len(heard), np.float32)
        return (heard * self.factor).astype(np.float32)

    def _follow(self, elapsed_s: float) -> None:
        if not self._blocks:
            return
        power = np.array(self._blocks)
        gated = power[power > power.mean() * 10 ** (RELATIVE_GATE_LU / 10)]
        wanted_db = float(np.clip(self._target_lufs - _lufs(gated.mean()), -LIMIT_DB, LIMIT_DB))
        if self._gain_db is None:  # the first words get theirs at once
            self._gain_db = wanted_db
            return
        step_db = SLEW_DB_PER_S * elapsed_s
        self._gain_db += float(np.clip(wanted_db - self._gain_db, -step_db, step_db))


def _lufs(power: float) -> float:
    return OFFSET_LUFS + 10 * math.log10(power) if power > 0 else -math.inf
