"""`flashtalk train` in this process, in place of a worker: to start Python and torch takes longer than a toy's tasks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from thread_ranks import Table, ThreadRanks, on_ranks

from flashtalk_cli import launch
from flashtalk_cli.cli.app import run
from flashtalk_cli.config import RenderJob
from flashtalk_cli.distill import tasks
from flashtalk_cli.distill.config import TrainJob
from flashtalk_cli.distill.work import Work
from flashtalk_cli.events import Emitter, Event
from flashtalk_cli.rendering import Worker, render
from flashtalk_cli.serving import NOWHERE

RANKS_S = 120.0  # what a rank waits for another


class Telling(Emitter):
    """Gives events to a function instead of a socket."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        super().__init__(None)
        self._tell = tell

    def send(self, happened: Event) -> None:
        self._tell(happened)


def work_here(
    job: TrainJob | RenderJob, on_event: Callable[[Event], None], *, processes: int = 1, **_: object
) -> int:
    """In place of `launch.run`: the task itself, whose errors are those that a worker would send."""
    table, stop = Table(processes, RANKS_S), threading.Event()

    def work(rank: int) -> int:
        emitter = Telling(on_event) if rank == 0 else Emitter(None)
        ranks = ThreadRanks(torch.device("cpu"), processes, rank, table=table)
        if isinstance(job, RenderJob):
            return render(Worker(job, ranks, emitter), job, stop, NOWHERE)
        return tasks.run(Work(job, ranks, emitter, stop))

    return on_ranks(processes, work)[0]


def run_here(*arguments: object) -> int:
    """`flashtalk` with these arguments, and no other process: its ranks are threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", work_here)
        return run(list(map(str, arguments)))


def flashtalk(toy: Path, *arguments: object, apart: bool = False) -> int:
    """`flashtalk train` with these arguments; `apart`: in processes of its own."""
    line = ["train", *map(str, arguments), "--preset", str(toy / "train.yaml"), "--device", "cpu"]
    return run(line) if apart else run_here(*line)
