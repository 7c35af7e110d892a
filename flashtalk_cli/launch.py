"""Start the process that does the work, pass on what it says, and leave nothing behind.

The worker runs in a session of its own, so that a Ctrl-C in the terminal reaches only this
process, which then decides: the first Ctrl-C (or SIGTERM, or a closed terminal) asks the
worker's whole process group to end and gives it ten seconds to close the file; the second
kills it at once. Should this process itself be killed, the worker sees its socket close.

A worker of several ranks is torchrun, whose ranks die with it. The first rank that fails ends them
all: the others have DYING_S to close what they can. Each rank writes its own log, kept if the run fails.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any

from flashtalk_cli import events
from flashtalk_cli.config import Frozen, RenderJob
from flashtalk_cli.errors import (
    INTERRUPTED_EXIT_CODE,
    FlashtalkError,
    OutputError,
    PeerLost,
    WorkerError,
    by_name,
)
from flashtalk_cli.media.part_file import PartFile, part_path
from flashtalk_cli.placement import Hosts, Share

log = logging.getLogger(__name__)

CLEAN_END_S = 10.0  # what a worker gets to close its file after being asked to end
DYING_S = 3.0  # what is left of a worker gets after the first error
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KEPT_LINES = 50
SOCKET_PATH_BYTES = 100  # the kernel's limit is 108 on Linux, 104 on macOS

# How long GNU OpenMP's threads spin for each other before they sleep: about a millisecond. A fifth of its own
# default leaves ffmpeg its turn; a twentieth of this costs a fifth more time a chunk on two cores. Where others
# use the cores as well it is the number of threads that gives way, see pipeline/cores.py.
#
# And how much freed memory glibc keeps instead of giving it back: a chunk on a CPU frees and asks for the same
# few megabytes thousands of times, and every page that was given back costs a fault.
#
# And that GPUs' shared memory is set up without multicast, which is not used: there are hosts where it cannot be.
#
# And that torch's store says nothing, for seventeen lines, of a host that has left: that host tells why.
#
# And that MKL adds up in one order whatever the number of threads: without AVX-512, products of few rows differ.
ENVIRONMENT = {
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "TORCH_CPP_LOG_LEVEL": "ERROR",
    "MKL_CBWR": "AUTO,STRICT",
    "GOMP_SPINCOUNT": "50000",
    "MALLOC_TRIM_THRESHOLD_": "268435456",
    "MALLOC_MMAP_THRESHOLD_": "268435456",
}

Command = Callable[[Path, Path, bool], list[str]]


class WorkerTraceback(Exception):
    """The traceback of an error in the worker, as text: the cause of the error raised here."""

    def __str__(self) -> str:
        return "in the worker\n" + self.args[0]


def worker_command(
    job_path: Path,
    socket_path: Path,
    debug: bool,
    processes: int = 1,
    hosts: Hosts = Hosts(),
    logs: Path | None = None,
) -> list[str]:
    """The command line of the worker, or of torchrun that starts so many of them on each host."""
    command = ["flashtalk_cli.worker", str(job_path), str(socket_path)]
    if processes > 1 or hosts.count > 1:
        command = ["flashtalk_cli.torchrun", str(processes), *command]
        command += [f"--rank-logs={logs}"] if logs else []
        command += ["--hosts", str(hosts.count), str(hosts.index), hosts.endpoint] if hosts.count > 1 else []
    return [sys.executable, "-m", *command, *(["--debug"] if debug else ())]


def run(
    job: Frozen,
    on_event: Callable[[events.Event], None],
    *,
    debug: bool = False,
    stdin: int = subprocess.DEVNULL,
    stdout: bool = False,
    on_log: Callable[[str], None] | None = None,
    processes: int = 1,
    hosts: Hosts = Hosts(),
    share: Share = Share(),
    requests: list[int] | None = None,
    command: Command | None = None,
    clean_end_s: float = CLEAN_END_S,
) -> int:
    """Run a job in a worker, of one or several processes on each host, until it ends.

    Returns 0 when it is done, 130 when it was asked to end.

    on_event gets every event but the error; on_log gets each line of the worker's stderr, in
    another thread (default: our stderr). Only with `stdout` may the worker write to our standard
    output; else what it prints there counts as log. `stdin` is what it may read. `command` makes the
    worker's command line, which gets `clean_end_s` to end after it was asked.

    Of several workers, each run in a thread, each has its `share` of the machine, and all look at the same
    `requests`, which `stop_requests` makes and which grows when they are to end (default: one of its own).

    Raises the worker's own error, of its class in errors.py, with the worker's traceback as
    its cause; `WorkerError` when the worker dies without a word.
    """
    several = command is None and (processes > 1 or hosts.count > 1)
    with (
        _log_folder(several) as logs,
        tempfile.TemporaryDirectory(prefix="flashtalk-", dir=_short_folder()) as name,
    ):
        job_path, socket_path = Path(name, "job.json"), Path(name, "events.sock")
        job_path.write_text(job.model_dump_json(), encoding="utf-8")
        own = stop_requests() if requests is None else nullcontext(requests)
        with events.Listener(socket_path) as listener, own as requests:
            arguments = (
                command(job_path, socket_path, debug)
                if command
                else worker_command(job_path, socket_path, debug, processes, hosts, logs)
            )
            environment = share.environment(processes)
            worker = _Worker(arguments, stdin, stdout, on_log or _to_stderr, environment)
            written = _Written(on_event)
            try:
                last = _follow(worker, listener, requests, written.note, clean_end_s)
            finally:
                worker.kill()
            if last is None and requests:
                on_event(written.left_of(job))
                return INTERRUPTED_EXIT_CODE
            return _outcome(worker, last, hosts, logs)


class _Worker:
    """A worker's process group, and the thread that reads its stderr."""

    def __init__(
        self,
        command: Sequence[str],
        stdin: int,
        stdout: bool,
        on_log: Callable[[str], None],
        environment: Mapping[str, str],
    ) -> None:
        log_out, log_in = os.pipe()
        try:
            self.process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=None if stdout else log_in,
                stderr=log_in,
                start_new_session=True,
                env={**ENVIRONMENT, **os.environ, **environment},
            )
        except OSError as error:
            os.close(log_out)
            raise WorkerError(f"cannot start {command[0]}: {error.strerror}") from None
        finally:
            os.close(log_in)
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        self._reader = threading.Thread(target=self._read, args=(log_out, on_log), daemon=True)
        self._reader.start()

    def _read(self, log_out: int, on_log: Callable[[str], None]) -> None:
        # Universal newlines also end the lines of progress bars that libraries draw with \r.
        with open(log_out, encoding="utf-8", errors="replace") as log:
            for line in log:
                if text := line.rstrip():
                    self.lines.append(text)
                    with suppress(OSError):  # our stderr is gone: keep reading, or the worker would block
                        on_log(text)

    def signal_group(self, number: signal.Signals) -> None:
        """Send a signal to every process of the group that is left."""
        with suppress(ProcessLookupError, PermissionError):  # macOS answers EPERM for a group of zombies
            os.killpg(self.process.pid, number)

    def kill(self) -> None:
        """End what is left of the group, reap the worker, and read its last lines."""
        self.signal_group(signal.SIGKILL)
        try:
            self.process.wait(timeout=CLEAN_END_S)
        except subprocess.TimeoutExpired:  # stuck inside a driver
            raise WorkerError(f"the worker, process {self.process.pid}, cannot be killed") from None
        self._reader.join(timeout=2.0)


def _follow(
    worker: _Worker,
    listener: events.Listener,
    requests: Sequence[int],
    on_event: Callable[[events.Event], None],
    clean_end_s: float,
) -> events.Event | None:
    """Pass events on until the worker has ended; the last word it said, if it said one."""
    last: events.Event | None = None
    asked = False
    deadline_s = float("inf")
    while True:
        ended = worker.process.poll() is not None
        for happened in listener.drain() if ended else listener.read(wait_s=0.1):
            if happened["event"] in events.LAST:
                last = happened if last is None or _is_effect(last) else last
                ending_s = DYING_S if happened["event"] == "error" else CLEAN_END_S
                deadline_s = min(deadline_s, time.monotonic() + ending_s)
            if happened["event"] != "error":
                on_event(happened)
        if ended:
            return last
        if requests and not asked:
            asked = True
            deadline_s = min(deadline_s, time.monotonic() + clean_end_s)
            worker.signal_group(signal.SIGTERM)
        if len(requests) > 1 or time.monotonic() > deadline_s:
            worker.kill()


class _Written:
    """Passes a worker's events on, and knows what it left should it be killed before it says so."""

    def __init__(self, pass_on: Callable[[events.Event], None]) -> None:
        self._pass_on = pass_on
        self._n_frames = 0

    def note(self, happened: events.Event) -> None:
        """Take an event."""
        self._n_frames = happened.get("frames_done") or self._n_frames
        self._pass_on(happened)

    def left_of(self, job: Frozen) -> events.Event:
        """What the killed worker left of a job, as the event that it would have sent."""
        if not isinstance(job, RenderJob) or job.output is None:
            return events.event("interrupted", path=None, frames=self._n_frames)
        path = part_path(job.output)
        if not path.exists() or _is_useless(job) or not self._n_frames:
            return events.event("interrupted", path=None, frames=0)
        from flashtalk_cli.media.video_file import readable  # takes its time to load

        # Frames that waited for the encoder died with the worker, so what was reported may not be there.
        return events.event("interrupted", path=path, frames=readable(path)[0])


def _is_useless(job: RenderJob) -> bool:
    """Whether there is nothing in the job's part file, which is then removed. Waits for ffmpeg to end it."""
    assert job.output is not None
    try:
        part = PartFile(job.output, job.overwrite, keep=True)
    except OutputError as error:  # ffmpeg is still at it, or another run is
        log.debug("%s", error)
        return False
    is_empty = part.is_empty()
    part.discard() if is_empty else part.release()
    return is_empty


def _outcome(worker: _Worker, last: events.Event | None, hosts: Hosts, logs: Path | None) -> int:
    """The exit code of a run, or the error that it ended with."""
    if last is None and hosts.index > 0 and worker.process.returncode == 0:
        return 0  # host 0 says what came of it
    if last is None:
        text = _death(worker.process.returncode, worker.lines)
        raise WorkerError(f"{text}; logs of its ranks: {logs}" if logs else text)
    if last["event"] == "error":
        raise _error_of(last)
    return 0 if last["event"] == "done" else INTERRUPTED_EXIT_CODE


def _death(returncode: int, lines: Sequence[str]) -> str:
    """What killed a worker that said nothing, in one line."""
    if returncode == -signal.SIGKILL:
        text = "the worker was killed by SIGKILL: most likely the machine ran out of memory"
    elif returncode < 0:
        text = f"the worker died of {signal.Signals(-returncode).name}"
    else:
        text = f"the worker ended with exit code {returncode} and no result"
    return f"{text}; its last line: {lines[-1]}" if lines else text


def _is_effect(happened: events.Event) -> bool:
    """Whether it is the effect of another rank's error: that one is the one to show."""
    return happened["event"] == "error" and happened["type"] == PeerLost.__name__


def _error_of(happened: events.Event) -> FlashtalkError:
    error = by_name(happened["type"])(happened["message"])
    error.__cause__ = WorkerTraceback(happened.get("traceback") or "no traceback came with it")
    return error


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that grows with every signal that asks this process to end; not for SIGHUP under `nohup`, which ignores it."""
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        requests.append(number)

    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        yield requests
        return
    ignored = {signal.SIGHUP} if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else set()
    heeded = [number for number in STOP_SIGNALS if number not in ignored]
    before: dict[signal.Signals, Any] = {number: signal.signal(number, note) for number in heeded}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _log_folder(several: bool) -> Iterator[Path | None]:
    """A folder for the logs of several ranks, which stays when the run fails; None for one process."""
    if not several:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="flashtalk-logs-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _short_folder() -> str | None:
    """Where the temporary folder goes: the usual place, or /tmp where a socket's path would be too long."""
    return None if len(os.fsencode(tempfile.gettempdir())) + 40 < SOCKET_PATH_BYTES else "/tmp"


def _to_stderr(line: str) -> None:
    sys.stderr.write(line + "\n")
