"""A rank's exchanges with its peers: counted always, timed on wish."""

from __future__ import annotations

from typing import Protocol


class Timer(Protocol):
    """What is told where exchanges begin and end."""

    def begin(self) -> None:
        """What follows is an exchange."""

    def end(self) -> None:
        """The exchange is over, as far as this rank's device is concerned."""


class Traffic:
    """A context that every exchange runs in."""

    def __init__(self) -> None:
        self.begun = 0
        self.timer: Timer | None = None

    def __enter__(self) -> None:
        self.begun += 1
        if self.timer is not None:
            self.timer.begin()

    def __exit__(self, *_: object) -> None:
        if self.timer is not None:
            self.timer.end()
