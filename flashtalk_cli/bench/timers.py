"""Time between marks, on the device and without waiting for it.

On a GPU a mark is an event in the current stream, so nothing waits inside the loop; whoever reads the
times waits once, at the end. On a CPU a mark is a reading of the clock.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from flashtalk_cli.bench.parts import HOST, MAIN, Part


@dataclass
class _Chunk:
    """What was marked in a chunk: moments are events or, in the lane of the host, clock readings."""

    start: torch.cuda.Event | float
    parts: list[tuple[str, str, torch.cuda.Event | float, torch.cuda.Event | float]] = field(
        default_factory=list
    )


class Timer:
    """Collects the parts of chunks: `mark` is what pipeline/marks.py describes."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)  # here the two clocks are compared, once
        self._origin = (_now(self._on_gpu), time.perf_counter())
        self._lanes = {self._stream(): MAIN}
        self._last: dict[str, torch.cuda.Event | float] = {}
        self._chunks: list[_Chunk] = []

    def start(self) -> None:
        """What follows belongs to the next chunk."""
        begun = _now(self._on_gpu)
        self._chunks.append(_Chunk(begun))
        self._last[self._lane()] = begun

    def mark(self, name: str) -> None:
        """What ran on this stream since its last mark ends here and is called `name`; "": begin here."""
        lane, now = self._lane(), _now(self._on_gpu)
        if name and lane in self._last:
            self._chunks[-1].parts.append((name, lane, self._last[lane], now))
        self._last[lane] = now

    def mark_host(self, name: str, start_s: float) -> None:
        """What this process itself did since `start_s`, a reading of `time.perf_counter`, is called `name`."""
        if self._on_gpu:
            self._chunks[-1].parts.append((name, HOST, start_s, time.perf_counter()))
        else:
            self.mark(name)  # there is one lane, and it was busy with that

    def chunks(self) -> list[list[Part]]:
        """Of every chunk its parts, in the order in which they were marked; waits for the device.

        Seconds are from where the main lane is free for it: its sound may be encoded before, at less than zero.
        """
        if self._on_gpu:
            torch.cuda.synchronize()
        return [[self._placed(chunk, *part) for part in chunk.parts] for chunk in self._chunks]

    def between_s(self, first: int) -> float:
        """From the beginning of chunk `first` to the beginning of the last one; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return _between_s(self._chunks[first].start, self._chunks[-1].start)

    def _placed(
        self,
        chunk: _Chunk,
        name: str,
        lane: str,
        begun: torch.cuda.Event | float,
        ended: torch.cuda.Event | float,
    ) -> Part:
        if lane == HOST and isinstance(begun, float) and isinstance(ended, float):
            chunk_start_s = self._origin[1] + _between_s(self._origin[0], chunk.start)
            return Part(name, lane, begun - chunk_start_s, ended - chunk_start_s)
        start_s = _between_s(chunk.start, begun)
        return Part(name, lane, start_s, start_s + _between_s(begun, ended))

    def _stream(self) -> int:
        return torch.cuda.current_stream().cuda_stream if self._on_gpu else 0

    def _lane(self) -> str:
        return self._lanes.setdefault(self._stream(), f"side {len(self._lanes)}")


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

    def counts(self) -> list[int]:
        """Exchanges of each chunk."""
        return [len(marks) // 2 for marks in self._chunks]

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
