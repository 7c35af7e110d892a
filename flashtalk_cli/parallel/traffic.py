"""A rank's exchanges with its peers: counted always, timed on wish."""

from __future__ import annotations

from collections import deque
from contextlib import suppress
from typing import Protocol

import torch

UNDER_WAY = 1 << 14  # exchanges that a host may be ahead of its GPU by and still be counted one by one


class Timer(Protocol):
    """What is told where exchanges begin and end."""

    def begin(self) -> None:
        """What follows is an exchange."""

    def end(self) -> None:
        """The exchange is over, as far as this rank's device is concerned."""


class Traffic:
    """A context that every exchange runs in.

    A process asks its GPU for hundreds of exchanges ahead of time, so where it stands says nothing of a
    GPU that hangs. An event before each exchange does: it passes when the GPU comes there.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self.timer: Timer | None = None
        self._gpu = device if device is not None and device.type == "cuda" else None
        self._asked = 0
        self._reached = 0
        self._ahead: deque[tuple[int, torch.cuda.Event]] = deque(maxlen=UNDER_WAY)

    @property
    def begun(self) -> int:
        """How many exchanges this rank has begun, its GPU included; may be asked in any thread."""
        if self._gpu is None or not self._ahead:
            return self._asked
        with (
            torch.cuda.device(self._gpu),
            suppress(IndexError, RuntimeError),
        ):  # of a GPU that failed: it is told
            while self._ahead[0][1].query():
                self._reached, _ = self._ahead.popleft()
        return self._reached if self._ahead else self._asked

    def count(self) -> None:
        """What follows is an exchange, or a CUDA graph that holds some: it counts as one, and is not timed."""
        if self._gpu is not None and not self._recorded():
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self._gpu))
            self._ahead.append((self._asked + 1, event))
        self._asked += 1

    def __enter__(self) -> None:
        self.count()
        if self.timer is not None and not self._recorded():
            self.timer.begin()

    def __exit__(self, *_: object) -> None:
        if self.timer is not None and not self._recorded():
            self.timer.end()

    def _recorded(self) -> bool:
        """Whether what happens now goes into a CUDA graph, whose events nobody may ask."""
        return self._gpu is not None and torch.cuda.is_current_stream_capturing()
