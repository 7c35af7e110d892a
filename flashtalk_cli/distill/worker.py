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
from flashtalk_cli.errors import DeviceError
from flashtalk_cli.events import Emitter, watch_parent
from flashtalk_cli.failing import fail, reason
from flashtalk_cli.models.device import choose_device
from flashtalk_cli.parallel.ranks import UNWATCHED_S, Ranks, join

UNEVEN_TASKS = ("people", "eval")  # whose ranks work by themselves, some much longer than others
UNEVEN_S = 7 * 24 * 3600.0


def main(argv: Sequence[str]) -> int:
    """Run the job file argv[0], reporting to the socket argv[1]; the exit code."""
    log.setup(debug="--debug" in argv)
    os.dup2(2, 1)  # what libraries print goes to the log
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    emitter = Emitter(Path(argv[1]))
    ranks = Ranks(torch.device("cpu"))
    try:
        job = TrainJob.model_validate_json(Path(argv[0]).read_text(encoding="utf-8"))
        patience_s = UNEVEN_S if job.task in UNEVEN_TASKS else UNWATCHED_S
        ranks = join(choose_device(job.base.compute.device), patience_s=patience_s)
        log.setup(debug="--debug" in argv, rank=ranks.rank)
        watch_parent(stop.set, emitter)
        code = tasks.run(Work(job, ranks, emitter if ranks.leads else Emitter(None), stop))
        ranks.leave()
        return code if ranks.leads else 0  # another's, if not 0, would end rank 0 while it reports
    except torch.OutOfMemoryError as error:
        first = str(error).splitlines()[0]
        return fail(emitter, DeviceError(f"out of memory: {first}; lower micro_batch with --set"), ranks)
    except Exception as error:
        return fail(emitter, reason(error, ranks, stop), ranks)
    finally:
        emitter.close()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
