"""Time between marks, on the device and without waiting for it."""

from __future__ import annotations

import time
from collections import defaultdict

import torch


class Timer:
    """Collects how long each named part took, in seconds.

    On a GPU a mark is an event in the stream, so nothing waits inside the loop; `durations`
    waits once, at the end. On a CPU a mark is a reading of the clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, torch.cuda.Event | float]] = []

    def start(self) -> None:
        """What follows is counted towards the next mark."""
        self._marks.append(("", self._now()))

    def mark(self, name: str) -> None:
        """The part that began at the last mark, or at `start`, ends here and is called `name`."""
        self._marks.append((name, self._now()))

    def durations_s(self) -> dict[str, list[float]]:
        """Every part's durations, in the order in which they were marked."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                found[name].append(_between_s(before, after))
        return dict(found)

    def _now(self) -> torch.cuda.Event | float:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _between_s(before: torch.cuda.Event | float, after: torch.cuda.Event | float) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after) / 1000
