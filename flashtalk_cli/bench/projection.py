"""What a count of GPUs that nobody measured would give, from the parts of a report that was measured.

Parts of the DiT and of the VAE are shared by all ranks, so their time is divided by the count; all else
stays. Exchanges are known only of a report of several ranks: their time goes with what a rank sends,
(N - 1) / N^2 of all keys, queries and values. From a report of one rank nothing is known of them, and the
projection, which leaves them out, is an upper bound. It is never a result, and is shown as none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flashtalk_cli.bench.parts import MAIN

SHARED = ("step", "prime", "decode", "colour", "motion", "bytes")
COUNTS = (1, 2, 4, 8)


@dataclass(frozen=True)
class Point:
    """Frames a second of so many ranks."""

    ranks: int
    fps: float


def measured(reports: Sequence[Mapping[str, Any]]) -> list[Point]:
    """What was measured, by count of ranks; of several reports of a count the last."""
    found = {report["setting"]["ranks"]: report["speed"]["fps"] for report in reports}
    return [Point(ranks, found[ranks]) for ranks in sorted(found)]


def project(report: Mapping[str, Any], counts: Sequence[int] = COUNTS) -> list[Point]:
    """Frames a second of other counts, from the parts of this report; its own count gives what its parts sum to."""
    base, new_frames = report["setting"]["ranks"], report["setting"]["new_frames"]
    own_s = {part["name"]: part["time"]["p50_s"] for part in report["parts"] if part["lane"] == MAIN}
    exchange_s = max(rank["exchange"]["p50_s"] for rank in report["ranks"]) if base > 1 else 0.0
    shared_s = max(0.0, sum(own_s.get(name, 0.0) for name in SHARED) - exchange_s) * base
    alone_s = sum(seconds for name, seconds in own_s.items() if name not in SHARED)
    return [
        Point(n, new_frames / (shared_s / n + alone_s + exchange_s * _sent(n) / (_sent(base) or 1.0)))
        for n in sorted({*counts, base})
    ]


def counts_exchanges(report: Mapping[str, Any]) -> bool:
    """Whether a projection from this report knows what exchanges cost."""
    return bool(report["setting"]["ranks"] > 1)


def _sent(ranks: int) -> float:
    """What a rank sends, as a share of all."""
    return (ranks - 1) / ranks**2
