"""How many threads a CPU's arithmetic takes: as many as there are cores that other programs leave free.

The threads of one computation wait for each other a thousand times a second. One whose core somebody else
uses too holds all of them up: on two cores beside one busy program a chunk of the embedded model took 12 s
with two threads and 1.3 s with one. What is computed is the same, bit for bit, with one or two threads (up to three on
an AMD EPYC with AVX-512); with more, the libraries choose other ways of computing a convolution or a product.
OMP_NUM_THREADS, which torch reads, is how many there are at most.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass

import psutil
import torch

LEAST_S = 0.5  # of time between two looks, for counters that tick a hundred times a second
TOLERATED = 0.4  # of a core, used by others, before a thread gives way: ffmpeg and its like take turns


def threads_beside(others: float, n_cores: int, most: int) -> int:
    """Threads to use, from 1 to `most`, where others use so many of the cores."""
    in_use = int(others + 1 - TOLERATED)
    return max(1, min(most, n_cores - in_use))


@dataclass(frozen=True)
class Reading:
    """Counters of one moment, in seconds: the clock, the work of all on these cores, and this process's work."""

    now_s: float
    all_s: float
    ours_s: float

    @staticmethod
    def of(cores: set[int]) -> Reading:
        """Read them now. Time that a virtual machine was not given counts as the work of others."""
        now_s = time.monotonic()
        each = psutil.cpu_times(percpu=True)
        idle_s = sum(
            core.idle + getattr(core, "iowait", 0.0) for index, core in enumerate(each) if index in cores
        )
        return Reading(now_s, len(cores) * now_s - idle_s, time.process_time())

    def others_since(self, before: Reading) -> float:
        """How many cores others used since then, on average."""
        used_s = (self.all_s - before.all_s) - (self.ours_s - before.ours_s)
        return max(0.0, used_s / (self.now_s - before.now_s))


class FreeCores:
    """Call `fit` from the thread that computes, now and then: the number of threads is that thread's own."""

    def __init__(self) -> None:
        self._cores = _allowed()
        self._most = torch.get_num_threads()
        self._before = Reading.of(self._cores)

    def fit(self) -> None:
        """Set torch's threads by what others used since the last call."""
        reading = Reading.of(self._cores)
        if reading.now_s - self._before.now_s < LEAST_S:
            return
        others = reading.others_since(self._before)
        self._before = reading
        torch.set_num_threads(threads_beside(others, len(self._cores), self._most))


def free_cores(device: torch.device) -> FreeCores | None:
    """What fits threads to the machine, up to the number that torch was started with; None on a GPU."""
    return FreeCores() if device.type == "cpu" else None


def _allowed() -> set[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))
