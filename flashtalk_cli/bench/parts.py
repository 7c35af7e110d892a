"""A part of a chunk, as a plain value."""

from __future__ import annotations

from typing import NamedTuple

MAIN, HOST = "main", "host"  # lanes: the stream that a chunk is computed on, and this process's own clock


class Part(NamedTuple):
    """One stretch of work; seconds since its chunk had the main lane."""

    name: str
    lane: str
    start_s: float
    end_s: float

    def later(self, by_s: float) -> Part:
        """The same, so much later."""
        return self._replace(start_s=self.start_s + by_s, end_s=self.end_s + by_s)

    @property
    def duration_s(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s
