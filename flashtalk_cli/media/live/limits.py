"""How long is waited for live outputs, and how much is kept for them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class LivePolicy:
    """What an output may cost the others: nothing beyond these."""

    queue_s: float = 6.0  # media that may wait for one output before it skips to a newer key frame
    stall_s: float = 10.0  # without progress, until an output or the encoder is started again
    retry_s: float = 0.5  # the first wait before an output is tried again; it doubles up to 30 s
    max_kbps: int = 6000  # of video; what public services accept


@dataclass(frozen=True)
class SinkLimits:
    """`queue_s` of media may wait for the output; `stall_s` seconds without progress end an attempt, and the
    first wait for the next is `retry_s`.
    """

    queue_s: float
    stall_s: float
    retry_s: float
