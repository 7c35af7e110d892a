"""One rank of `flashtalk train`: read a job, do its task, report.

Started by launch.py as `python -m flashtalk_cli.distill.worker JOB.json EVENTS_SOCKET`, or by torchrun on
several GPUs; ends with a documented exit code, and says why in an `error` event.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from flashtalk_cli import log
from flashtalk_cli.distill import tasks
from flashtalk_cli.distill.config import TrainJob
from flashtalk_cli.distill.work import Work
from flashtalk_cli.errors import DeviceError, FlashtalkError
from flashtalk_cli.events import Emitter, watch_parent
from flashtalk_cli.models.device import choose_device
from flashtalk_cli.parallel.ranks import join


def main(argv: Sequence[str]) -> int:
    """Run the job file argv[0], reporting to the socket argv[1]; the exit code."""
    log.setup(debug="--debug" in argv)
    os.dup2(2, 1)  # what libraries print goes to the log
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    emitter = Emitter(None)
    try:
        job = TrainJob.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
        ranks = join(choose_device(job.base.compute.device))
        if ranks.leads:
            emitter = Emitter(Path(argv[1]))
        log.setup(debug="--debug" in argv, rank=ranks.rank)
        watch_parent(stop.set, emitter)
        try:
            return tasks.run(Work(job, ranks, emitter, stop))
        finally:
            ranks.leave()
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        return _fail(emitter, DeviceError(f"out of memory: {first}; lower micro_batch with --set"))
    except Exception as error:
        return _fail(emitter, error)
    finally:
        emitter.close()


def _fail(emitter: Emitter, error: Exception) -> int:
    emitter.error(error)
    return error.exit_code if isinstance(error, FlashtalkError) else FlashtalkError.exit_code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
