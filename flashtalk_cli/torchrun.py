"""Start the ranks of a worker: `python -m flashtalk_cli.torchrun N MODULE JOB.json EVENTS_SOCKET [OPTIONS]`.

    --patient                      ranks that are asked to end may take their time
    --rank-logs=FOLDER             passed on, with --debug: where each rank writes its log
    --hosts COUNT INDEX ENDPOINT   this is one of several hosts with N ranks each

This is torchrun, of torch's own agent, with its words made ours: it stays silent where a rank has
already said what happened, and speaks for a rank that can no longer speak for itself.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed import DistError, TCPStore
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, PeerLost, WorkerError
from flashtalk_cli.events import Emitter, watch_parent
from flashtalk_cli.parallel.pulse import FIRST_S, SILENT_S, keys_of, observe

OBSERVED_S = 2.0  # what ranks get to tell themselves what the observer saw, and a run to end in order
ORPHANS_S = 9.0  # after the parent's death, what ranks get to end in order before they die with this process


def main(argv: Sequence[str]) -> int:
    """Run MODULE in so many processes until all have ended; 0, or the exit code of the first that failed."""
    given = _parser().parse_args(argv)
    if not given.debug:
        logging.disable(logging.ERROR)  # the agent tells of every signal that it passes on
    emitter = Emitter(given.socket)
    if given.patient:
        _leave_stopping_to_ranks()
    watch_parent(_outlive_ranks, emitter)
    if given.hosts:
        threading.Thread(target=_observe, args=(given, emitter), name="observe", daemon=True).start()
    try:
        torchrun.run(torchrun.parse_args(_agent_options(given)))
    except SignalException:
        return INTERRUPTED_EXIT_CODE
    except DistError as error:
        emitter.error(WorkerError(_apart(given, error)))
        return WorkerError.exit_code
    except ChildFailedError as error:
        rank, failure = cause(error.failures)
        if failure.exitcode < 0:
            emitter.error(WorkerError(death(rank, failure, given.rank_logs)))
        return abs(failure.exitcode)
    finally:
        emitter.close()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flashtalk_cli.torchrun")
    parser.add_argument("processes")
    parser.add_argument("module")
    parser.add_argument("job")
    parser.add_argument("socket", type=Path)
    parser.add_argument("--patient", action="store_true")
    parser.add_argument("--rank-logs", type=Path)
    parser.add_argument("--hosts", nargs=3, metavar=("COUNT", "INDEX", "ENDPOINT"))
    parser.add_argument("--debug", action="store_true")
    return parser


def _agent_options(given: argparse.Namespace) -> list[str]:
    """The command line of torchrun itself. Ranks are numbered by hosts, so rank 0 is on host 0."""
    if given.hosts:
        count, index, endpoint = given.hosts
        options = [f"--nnodes={count}", f"--node-rank={index}", f"--rdzv-endpoint={endpoint}"]
    else:
        options = ["--standalone", "--local-addr=127.0.0.1"]
    worker = ["-m", given.module, given.job, str(given.socket)]
    worker += [f"--rank-logs={given.rank_logs}"] if given.rank_logs else []
    worker += ["--debug"] if given.debug else []
    options += ["--signals-to-handle=SIGQUIT"] if given.patient else []
    return [*options, f"--nproc-per-node={given.processes}", *worker]


def _leave_stopping_to_ranks() -> None:
    """Pass SIGTERM on to the ranks, which have sessions of their own; the agent would kill them 30 s later."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        for rank in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                rank.terminate()

    signal.signal(signal.SIGTERM, pass_on)


def _outlive_ranks() -> None:
    """End some time after the parent died: ranks see that themselves, but one that is stopped does not."""
    time.sleep(ORPHANS_S)
    os._exit(WorkerError.exit_code)


def _observe(given: argparse.Namespace, emitter: Emitter) -> None:
    """End when ranks on other hosts cannot go on, should those of this host be in no state to tell."""
    count, index, endpoint = given.hosts
    host, _, port = endpoint.rpartition(":")
    try:
        store = TCPStore(
            host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=FIRST_S)
        )
        keys = keys_of(int(count) * int(given.processes))
        store.multi_get(keys)  # returns when all ranks have begun
        store.set_timeout(timedelta(seconds=SILENT_S))
    except RuntimeError:
        return  # the agent, which needs the store too, tells
    verdict = observe(store, keys, f"host {index}, {socket.gethostname()},", threading.Event())
    assert verdict is not None
    time.sleep(OBSERVED_S)
    emitter.error(PeerLost(verdict.text) if verdict.told else WorkerError(verdict.text))
    os._exit(WorkerError.exit_code)  # and with it its ranks


def _apart(given: argparse.Namespace, error: Exception) -> str:
    """Why hosts did not meet, in one line."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    where = f"{given.hosts[0]} hosts do not meet at {given.hosts[2]}" if given.hosts else "ranks do not meet"
    return f"{where}: {first}; is the port free on host 0, and reached from all?"


def cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that failed first: a killed one before those that missed it or that the agent ended for it."""

    def order(rank: int) -> tuple[bool, int]:
        failure = failures[rank]
        return failure.exitcode >= 0 or failure.exitcode == -signal.SIGTERM, failure.timestamp

    first = min(failures, key=order)
    return first, failures[first]


def death(rank: int, failure: ProcessFailure, logs: Path | None) -> str:
    """What killed a rank, in one line."""
    number = -failure.exitcode
    text = (
        f"rank {rank} on {socket.gethostname()}, process {failure.pid}, died of {signal.Signals(number).name}"
    )
    if number == signal.SIGKILL:
        text += ": most likely the machine ran out of memory"
    return f"{text}; its log: {logs / f'rank-{rank}.log'}" if logs else text


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
