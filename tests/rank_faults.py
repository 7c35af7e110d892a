"""A worker whose rank 1 fails while rank 0 waits for it; the preset's name says how (for tests/test_parallel.py)."""

from __future__ import annotations

import os
import signal
import sys
import threading

from flashtalk_cli import worker
from flashtalk_cli.config import RenderJob
from flashtalk_cli.errors import ModelError


def failing(here: worker.Worker, job: RenderJob, stop: threading.Event, stdout: int) -> int:
    if here.ranks.rank == 1:
        if job.preset.name == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ModelError("rank 1 has its reason")
    here.ranks.wait()
    return 0


if __name__ == "__main__":
    worker.render = failing
    sys.exit(worker.main(sys.argv[1:]))
