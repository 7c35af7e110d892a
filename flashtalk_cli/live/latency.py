"""From a sound's arrival to its frame's sending: where the time goes, over the last minute or so."""

from __future__ import annotations

import threading

import numpy as np

PARTS = ("total", "fill", "compute", "delivery")
QUANTILES = (50, 95, 99)


class Latency:
    """Percentiles over the last `size` frames that had sound.

    fill: from the arrival of a frame's first sample until its chunk began; compute: until the frame was
    decoded; delivery: until it was sent; total: all three.
    """

    def __init__(self, size: int = 1500) -> None:
        self._seconds = np.full((size, len(PARTS)), np.nan)
        self._at = 0
        self._lock = threading.Lock()  # frames are sent in one thread, and asked about in others

    def add(self, arrived_s: np.ndarray, begun_s: float, ready_s: float, sent_s: float) -> None:
        """Note frames sent together; arrived_s: float64 [n], NaN for those without sound."""
        arrived_s = arrived_s[np.isfinite(arrived_s)][-len(self._seconds) :]
        with self._lock:
            rows = (self._at + np.arange(len(arrived_s))) % len(self._seconds)
            self._seconds[rows, 0] = sent_s - arrived_s
            self._seconds[rows, 1] = begun_s - arrived_s
            self._seconds[rows, 2] = ready_s - begun_s
            self._seconds[rows, 3] = sent_s - ready_s
            self._at = (self._at + len(arrived_s)) % len(self._seconds)

    def summary(self) -> dict[str, dict[str, float | None]]:
        """{"total": {"p50_s": ..., "p95_s": ..., "p99_s": ...}, "fill": ...}; null before the first sound."""
        with self._lock:
            seen = self._seconds[np.isfinite(self._seconds[:, 0])]
        if not len(seen):
            return {part: {f"p{q}_s": None for q in QUANTILES} for part in PARTS}
        values = np.percentile(seen, QUANTILES, axis=0)
        return {
            part: {f"p{q}_s": round(float(values[i, j]), 4) for i, q in enumerate(QUANTILES)}
            for j, part in enumerate(PARTS)
        }
