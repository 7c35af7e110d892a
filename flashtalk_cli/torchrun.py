"""Start the ranks of a worker: `python -m flashtalk_cli.torchrun N MODULE JOB.json EVENTS_SOCKET [--debug]`.

This is torchrun, of torch's own agent, with its words made ours: it stays silent where a rank has
already said what happened, and speaks for a rank that can no longer speak for itself.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, WorkerError
from flashtalk_cli.events import Emitter


def main(argv: Sequence[str]) -> int:
    """Run MODULE in so many processes until all have ended; 0, or the exit code of the first that failed."""
    count, module, job_path, socket_path, *options = argv
    if "--debug" not in options:
        logging.disable(logging.ERROR)  # the agent tells of every signal that it passes on
    ranks = ["--standalone", "--local-addr=127.0.0.1", f"--nproc-per-node={count}"]
    try:
        torchrun.run(torchrun.parse_args([*ranks, "-m", module, job_path, socket_path, *options]))
    except SignalException:
        return INTERRUPTED_EXIT_CODE
    except ChildFailedError as error:
        rank, failure = cause(error.failures)
        if failure.exitcode < 0:
            emitter = Emitter(Path(socket_path))
            emitter.error(WorkerError(death(rank, failure)))
            emitter.close()
        return abs(failure.exitcode)
    return 0


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first: a killed one before those that missed it or that the agent ended for it."""

    def order(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        return failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM, failure.timestamp

    first = min(failures, key=order)
    return first, failures[first]


def death(rank: int, failure: ProcessFailure) -> str:
    """What killed a rank, in one line."""
    number = -failure.exitcode
    text = f"rank {rank}, process {failure.pid}, died of {signal.Signals(number).name}"
    return f"{text}: most likely the machine ran out of memory" if number == signal.SIGKILL else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
