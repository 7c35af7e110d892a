"""A worker whose rank 1 fails in its third chunk, for tests/test_faults.py; the preset's name says how."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterable

import torch
from rank_checks import StandIn
from torch import Tensor

from flashtalk_cli import rendering, worker
from flashtalk_cli.config import RenderJob
from flashtalk_cli.errors import ModelError
from flashtalk_cli.media.ffmpeg import candidates, encoders
from flashtalk_cli.pipeline import session
from flashtalk_cli.rendering import Worker

FAILS_IN_ROUND = 2
UNHARMED = "asked"


def fail(how: str) -> None:
    """Do what the preset's name says, in mid-chunk, while the others wait for this rank in self-attention."""
    if how == "raises":
        raise ModelError("rank 1 has its reason")
    if how == "memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")
    if how == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "sleeps":
        time.sleep(3600)
    if how == "spins":  # the GPU does, and its process goes on
        return torch.cuda._sleep(10**14)
    os.kill(os.getpid(), signal.SIGSTOP)


def counting(here: Worker, job: RenderJob, pieces: Iterable[Tensor], *_: object) -> int:
    """Write nothing, for machines without ffmpeg: count the chunks."""
    frames = 0
    for piece in pieces:
        frames += len(piece)
        if frames % job.preset.sampling.new_frames == 0:
            here.emitter.emit("chunk", index=frames // job.preset.sampling.new_frames - 1)
    here.emitter.emit("done", path=None, frames=frames)
    return 0


def loading(here: Worker) -> object:
    """Load the models, after saying the process ids of all ranks; a step of rank 1 fails once it is warm.

    Before the step and not inside: on a GPU it is recorded by then, and Python is not there when it runs.
    """
    pids = here.ranks.to_leader(os.getpid())
    here.emitter.emit("stage", name="ranks", detail=" ".join(map(str, [*pids, os.getppid()])))
    velocity, how = session._velocity, here.preset.name

    def failing(*arguments: object) -> Tensor:
        if here.ranks.rank == 1 and here.ranks.pulse.rounds == FAILS_IN_ROUND and how != UNHARMED:
            fail(how)
        return velocity(*arguments)

    session._velocity = failing
    if not any(map(encoders, candidates())):
        rendering.write = counting
    return load_models(here)


if __name__ == "__main__":
    load_models, Worker.load_models = Worker.load_models, loading
    Worker.inputs, Worker.hearing = StandIn.inputs, StandIn.hearing
    sys.exit(worker.main(sys.argv[1:]))
