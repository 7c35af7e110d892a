"""What is known of an output while it runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["connecting", "live", "waiting", "failed", "ended"]


@dataclass(frozen=True)
class SinkStatistics:
    """One output at one moment; nothing in it is secret.

    `waiting` is between two attempts; `failed` and `ended` are for good. Frames sent went over a connection;
    frames dropped did not, for the output was away, or too slow. `behind_s` is media that is encoded and that
    it has not yet taken.
    """

    shown: str
    kind: str
    state: State
    reconnects: int
    bytes_sent: int
    frames_sent: int
    frames_dropped: int
    last_error: str
    behind_s: float
