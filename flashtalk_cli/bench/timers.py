"""Time between marks, on the device and without waiting for it.

On a GPU a mark is an event in the current stream, so nothing waits inside the loop; whoever reads the
times waits once, at the end. On a CPU a mark is a reading of the clock.

Marks made while a CUDA graph is recorded become part of it, and every replay moves their events. They are
read when the next chunk starts: the last frame of the one before has been waited for by then, so they are over.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

import torch

from flashtalk_cli.bench.parts import HOST, MAIN, Part

Moment: TypeAlias = "torch.cuda.Event | float"
Recorded: TypeAlias = "list[tuple[str, torch.cuda.Event]]"  # marks inside a graph


@dataclass
class _Stretch:
    """A part as it was marked: moments are events or, in the lane of the host, clock readings."""

    name: str
    lane: str
    begun: Moment
    ended: Moment
    replayed: Recorded = field(default_factory=list)
    inside: list[tuple[str, float]] = field(default_factory=list)  # when each was, in seconds since `begun`


@dataclass
class _Chunk:
    """What was marked in a chunk."""

    start: Moment
    stretches: list[_Stretch] = field(default_factory=list)


class Timer:
    """Collects the parts of chunks: `mark` is what pipeline/marks.py describes."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        if self._on_gpu:
            torch.cuda.synchronize(device)  # here the two clocks are compared, once
        self._origin = (_now(self._on_gpu), time.perf_counter())
        self._lanes = {self._stream(): MAIN}
        self._last: dict[str, Moment] = {}
        self._chunks: list[_Chunk] = []
        self._recorded: Recorded = []  # of a graph that was not replayed yet
        self._graphs: dict[str, Recorded] = {}  # by the mark that follows a replay

    def start(self) -> None:
        """What follows belongs to the next chunk."""
        self._read_replays()
        begun = _now(self._on_gpu)
        self._chunks.append(_Chunk(begun))
        self._last[self._lane()] = begun

    def mark(self, name: str) -> None:
        """What ran on this stream since its last mark ends here and is called `name`; "": begin here.

        The mark that follows a graph has a name of its own, none of those inside the graph.
        """
        if self._on_gpu and torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True, external=True)
            event.record()
            self._recorded.append((name, event))
            return
        lane, now = self._lane(), _now(self._on_gpu)
        if name in dict(self._recorded):
            self._recorded.clear()  # the recording was given up, and what it was of runs as it is
        if name and lane in self._last:
            if self._recorded:
                self._graphs[name], self._recorded = self._recorded, []
            stretch = _Stretch(name, lane, self._last[lane], now, self._graphs.get(name, []))
            self._chunks[-1].stretches.append(stretch)
        self._last[lane] = now

    def mark_host(self, name: str, start_s: float) -> None:
        """What this process itself did since `start_s`, a reading of `time.perf_counter`, is called `name`."""
        if self._on_gpu:
            self._chunks[-1].stretches.append(_Stretch(name, HOST, start_s, time.perf_counter()))
        else:
            self.mark(name)  # there is one lane, and it was busy with that

    def chunks(self) -> list[list[Part]]:
        """Of every chunk its parts, in the order in which they were marked; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        self._read_replays()
        return [[p for one in chunk.stretches for p in self._parts(chunk, one)] for chunk in self._chunks]

    def between_s(self, first: int) -> float:
        """From the beginning of chunk `first` to the beginning of the last one; waits for the device."""
        if self._on_gpu:
            torch.cuda.synchronize()
        return _between_s(self._chunks[first].start, self._chunks[-1].start)

    def _read_replays(self) -> None:
        """Read the events of graphs before another replay moves them."""
        for stretch in self._chunks[-1].stretches if self._chunks else ():
            if stretch.replayed and not stretch.inside:
                stretch.replayed[-1][1].synchronize()
                stretch.inside = [(name, _between_s(stretch.begun, at)) for name, at in stretch.replayed]

    def _parts(self, chunk: _Chunk, stretch: _Stretch) -> Iterator[Part]:
        """A stretch as parts of its chunk: itself, or what was marked inside and the rest."""
        if stretch.lane == HOST:
            start_s = _between_s(self._origin[1], stretch.begun) - _between_s(self._origin[0], chunk.start)
        else:
            start_s = _between_s(chunk.start, stretch.begun)
        ends = [*stretch.inside, (stretch.name, _between_s(stretch.begun, stretch.ended))]
        before_s = 0.0
        for name, end_s in ends:
            yield Part(name, stretch.lane, start_s + before_s, start_s + end_s)
            before_s = end_s

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
        self._chunks: list[list[Moment]] = []

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


def _now(on_gpu: bool) -> Moment:
    """The device's present: an event in its stream, or a reading of the clock."""
    if not on_gpu:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_s(before: Moment, after: Moment) -> float:
    if isinstance(before, float) and isinstance(after, float):
        return after - before
    assert isinstance(before, torch.cuda.Event)
    assert isinstance(after, torch.cuda.Event)
    return before.elapsed_time(after) / 1000
