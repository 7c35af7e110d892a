"""Where a worker's ranks run: on which of several hosts, and on which part of this one."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Hosts:
    """Which of `count` hosts this is, all of which run the same command; host 0 listens at HOST:PORT."""

    count: int = 1
    index: int = 0
    endpoint: str = ""


@dataclass(frozen=True)
class Share:
    """One of `of` equal parts of this machine, for workers that run side by side: its cores and its GPUs."""

    index: int = 0
    of: int = 1

    def environment(self, processes: int) -> dict[str, str]:
        """What tells a worker of so many processes of its part; empty when it has the machine to itself."""
        found = {}
        if processes * self.of > 1:
            threads = max(1, _cores() // (processes * self.of))
            found["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(threads))
        if self.of > 1:
            given = os.environ.get("CUDA_VISIBLE_DEVICES")
            every = map(str, range(processes * self.of))
            ids = list(every) if given is None else given.split(",")  # empty: no GPU is to be used
            found["CUDA_VISIBLE_DEVICES"] = ",".join(
                ids[self.index * processes : (self.index + 1) * processes]
            )
        return found


def _cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
