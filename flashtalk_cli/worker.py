"""One rank's life: read a job, join the others, do the job, end with a documented exit code.

Started by launch.py as `python -m flashtalk_cli.worker JOB.json EVENTS_SOCKET`, or by torchrun once for
each GPU. What a job asks for is done in rendering.py and its neighbours; why it failed is said here, in an
`error` event, whichever rank it was: the parent prints it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from flashtalk_cli import log
from flashtalk_cli.bench.report import report
from flashtalk_cli.bench.timers import Timer
from flashtalk_cli.config import BenchJob, Job
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, FlashtalkError, WorkerError
from flashtalk_cli.events import Emitter, watch_parent
from flashtalk_cli.models.device import choose_device, out_of_memory
from flashtalk_cli.parallel.ranks import join, lost_peers
from flashtalk_cli.parallel.spatial import Tiles
from flashtalk_cli.pipeline.session import State, begin, prepare, step, to_bytes
from flashtalk_cli.rendering import Worker, render

ORPHAN_S = 10.0  # what a rank without a parent gets to close its file


def bench(worker: Worker, job: BenchJob, stop: threading.Event) -> int:
    """Time chunks and report; the exit code."""
    started_s = time.perf_counter()
    picture, text, image = worker.inputs()
    models = worker.load_models()
    hear = worker.hearing()
    loaded_s = time.perf_counter()
    conditions = prepare(models, picture, text, image)
    prepared_s = time.perf_counter()
    state = begin(conditions, job.preset.sampling.seed)
    timer = Timer(worker.device)
    n_chunks = job.warmup_chunks + job.chunks
    worker.emitter.emit("stage", name="measure", detail=f"{n_chunks} chunks")
    for index in range(n_chunks):
        if worker.ranks.any(stop.is_set()):
            worker.emitter.emit("interrupted", path=None, frames=0)
            return INTERRUPTED_EXIT_CODE
        timer.start()
        windows = hear(index)
        timer.mark("hear")
        pieces = step(models, conditions, state, windows, timer.mark)
        state = yield_to_host(pieces, models.tiles)
        worker.emitter.emit("progress", name="measure", done=index + 1, total=n_chunks, unit="chunks")
    once = {"load_s": loaded_s - started_s, "prepare_s": prepared_s - loaded_s}
    worker.emitter.emit("report", data=report(job, worker.device, timer.durations_s(), once))
    elapsed_s = time.perf_counter() - started_s
    frames = n_chunks * job.preset.sampling.new_frames
    duration_s = frames / job.preset.sampling.fps
    worker.emitter.emit("done", path=None, frames=frames, duration_s=duration_s, elapsed_s=elapsed_s)
    return 0


def yield_to_host(pieces: Generator[Tensor, None, State], tiles: Tiles) -> State:
    """Bring a chunk's frames to rank 0's host memory as bytes, as they come; the state after it."""
    while True:
        try:
            frames = tiles.collect(to_bytes(next(pieces)))
            if frames is not None:
                frames.cpu()
        except StopIteration as end:
            return end.value


def main(argv: Sequence[str]) -> int:
    """Run the job file argv[0], reporting to the socket argv[1]; the exit code."""
    log.setup(debug="--debug" in argv)
    # Standard output may be the video. Whatever else would be printed there goes to the log.
    stdout = os.dup(1)
    os.dup2(2, 1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    emitter = Emitter(Path(argv[1]))
    try:
        job = TypeAdapter[Job](Job).validate_json(Path(argv[0]).read_text(encoding="utf-8"))
        ranks = join(choose_device(job.preset.compute.device))
        log.setup(debug="--debug" in argv, rank=ranks.rank)
        watch_parent(lambda: end_alone(stop), emitter)
        worker = Worker(job, ranks, emitter if ranks.leads else Emitter(None))
        code = render(worker, job, stop, stdout) if job.kind == "render" else bench(worker, job, stop)
        ranks.leave()
        return code
    except torch.OutOfMemoryError as error:
        return _fail(emitter, out_of_memory(error))
    except Exception as error:
        return _fail(emitter, WorkerError(lost) if (lost := lost_peers(error)) else error)
    finally:
        emitter.close()


def end_alone(stop: threading.Event) -> None:
    """End without a parent: in order if that is possible, else (stuck in a collective) by force."""
    stop.set()
    time.sleep(ORPHAN_S)
    os._exit(WorkerError.exit_code)


def _fail(emitter: Emitter, error: Exception) -> int:
    emitter.error(error)
    return error.exit_code if isinstance(error, FlashtalkError) else FlashtalkError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
