"""One rank's life: read a job, join the others, do the job, end with a documented exit code.

Started by launch.py as `python -m flashtalk_cli.worker JOB.json EVENTS_SOCKET`, or by torchrun once for
each GPU. What a job asks for is done in rendering.py and its neighbours; why it failed is said here, in an
`error` event, whichever rank it was: the parent prints it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO, cast

import torch
from pydantic import TypeAdapter

from flashtalk_cli import log
from flashtalk_cli.bench.measure import bench
from flashtalk_cli.config import BenchJob, Job, RenderJob, ServeJob, StreamJob
from flashtalk_cli.errors import PeerLost, WorkerError
from flashtalk_cli.events import Emitter, watch_parent
from flashtalk_cli.failing import fail, reason
from flashtalk_cli.live.ending import leave
from flashtalk_cli.live.session import stream
from flashtalk_cli.models.device import choose_device, out_of_memory
from flashtalk_cli.parallel.pulse import Verdict
from flashtalk_cli.parallel.ranks import WATCHED_S, Ranks, join
from flashtalk_cli.rendering import Worker, render
from flashtalk_cli.serving import serve

ORPHAN_S = 8.0  # what a rank without a parent gets to close its file
LAST_S = 1.5  # what rank 0 gets to close its file when the run cannot go on


def main(argv: Sequence[str]) -> int:
    """Run the job file argv[0], reporting to the socket argv[1]; the exit code."""
    debug = "--debug" in argv
    rank_log, console = _own_log(argv)
    log.setup(debug=debug, console=console)
    # Standard output may be the video. Whatever else would be printed there goes to the log.
    stdout = os.dup(1)
    os.dup2(2, 1)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    emitter = Emitter(Path(argv[1]))
    ranks = Ranks(torch.device("cpu"))
    try:
        job: Job = TypeAdapter[Job](Job).validate_json(Path(argv[0]).read_text(encoding="utf-8"))
        ranks = join(choose_device(job.preset.compute.device), rank_log, WATCHED_S)
        log.setup(debug=debug, rank=ranks.rank, console=console)
        watch_parent(lambda: end_alone(stop), emitter)
        ranks.pulse.start(lambda verdict: give_up(verdict, ranks, emitter))
        job = cast("Job", ranks.from_leader(job if ranks.leads else None))  # other hosts' may differ
        code = do(job, ranks, emitter if ranks.leads else Emitter(None), stop, stdout)
        ranks.leave()
        return code
    except torch.OutOfMemoryError as error:
        return fail(emitter, out_of_memory(error), ranks, rank_log)
    except Exception as error:
        return fail(emitter, reason(error, ranks, stop), ranks, rank_log)
    finally:
        emitter.close()


def do(job: Job, ranks: Ranks, emitter: Emitter, stop: threading.Event, stdout: int) -> int:
    """Do a job of any kind; the exit code."""
    if isinstance(job, ServeJob):
        return serve(job, ranks, emitter, stop)
    worker = Worker(job, ranks, emitter)
    if isinstance(job, RenderJob):
        return render(worker, job, stop, stdout)
    if isinstance(job, StreamJob):
        return stream(worker, job, stop, stdout)
    assert isinstance(job, BenchJob)
    return bench(worker, job, stop)


def _own_log(argv: Sequence[str]) -> tuple[Path | None, TextIO | None]:
    """With `--rank-logs=FOLDER`, have this rank's stderr in a file there: the file, and what stderr was before."""
    folders = [option.removeprefix("--rank-logs=") for option in argv if option.startswith("--rank-logs=")]
    if not folders:
        return None, None
    path = Path(folders[0], f"rank-{os.environ['RANK']}.log")
    console = log.divert_stderr(path)
    faulthandler.enable()
    return path, console


def end_alone(stop: threading.Event) -> None:
    """End without a parent: in order if that is possible, else (stuck in a collective) by force."""
    stop.set()
    time.sleep(ORPHAN_S)
    os._exit(WorkerError.exit_code)


def give_up(verdict: Verdict, ranks: Ranks, emitter: Emitter) -> None:
    """End because other ranks cannot go on, from the thread that found out; what hangs here shows in the log."""
    emitter.error(PeerLost(verdict.text) if verdict.told else WorkerError(verdict.text))
    faulthandler.dump_traceback()
    if ranks.leads:
        time.sleep(LAST_S)
    os._exit(WorkerError.exit_code)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
