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
        self._marks.append(("", _now(self._on_gpu)))

    def mark(self, name: str) -> None:
        """The part that began at the last mark, or at `start`, ends here and is called `name`."""
        self._marks.append((name, _now(self._on_gpu)))

    def durations_s(self) -> dict[str, list[float]]:
        """Every part's durations, in the order in which they were marked."""
        if self._on_gpu:
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for (_, before), (name, after) in zip(self._marks, self._marks[1:], strict=False):
            if name:
                found[name].append(_between_s(before, after))
        return dict(found)


class ExchangeTimer:
    """Sums, chunk by chunk, what passes between the beginnings and the ends of exchanges with other ranks.

    An exchange begins when this rank could give, so waiting for a slower rank is part of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._chunks: list[list[torch.cuda.Event | float]] = []

    def start(self) -> None:
        """What follows belongs to another chunk."""
        self._chunks.append([])

    def begin(self) -> None:
        """What follows is an exchange."""
        self._chunks[-1].append(_now(self._on_gpu))

    def end(self) -> None:
        """The exchange is over."""
        self._chunks[-1].append(_now(self._on_gpu))

    def totals_s(self) -> list[float]:
        """Seconds of each chunk that went by in exchanges."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return [
            sum(_between_s(begun, ended) for begun, ended in zip(marks[::2], marks[1::2], strict=True))
            for marks in self._chunks
        ]


def _now(on_gpu: bool) -> torch.cuda.Event | float:
    """The device's present: an event in its stream, or a reading of the clock."""
    if not on_gpu:
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
