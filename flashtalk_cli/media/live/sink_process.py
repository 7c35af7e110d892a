"""One sink's ffmpeg: fed without ever waiting for it blindly, its progress and last words read."""

from __future__ import annotations

import collections
import logging
import os
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable

from flashtalk_cli.media.ffmpeg import cause, resize
from flashtalk_cli.media.live.commands import Sending
from flashtalk_cli.media.live.units import US_PER_S

log = logging.getLogger(__name__)

PROGRESS = re.compile(
    r"(frame|fps|stream_\w+|bitrate|total_size|out_time\w*|dup_frames|drop_frames|speed|progress)=(.*)"
)
KEPT_LINES = 20
TICK_MS = 100
DYING_S = 5.0
KILLED = tuple(-number for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT))
PIPE_BYTES = 16 << 10  # little, so that a stall shows soon
HELD_BACK_S = 1.0  # of media that a healthy ffmpeg may hold, to order sound and pictures


class SinkProcess:
    """ffmpeg with Matroska on its stdin. `masked` takes the secrets out of what it says."""

    def __init__(
        self,
        sending: Sending,
        masked: Callable[[str], str],
        stdout: int = subprocess.DEVNULL,
        inherit: tuple[int, ...] = (),
    ) -> None:
        self._masked = masked
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._process = _start(sending, stdout, inherit)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin.fileno()
        os.set_blocking(self._stdin, False)
        resize(self._stdin, PIPE_BYTES)
        self.taken_us = 0  # when the newest picture that ffmpeg wrote is shown
        self._n_taken = 0
        self._lock = threading.Lock()
        self._times_us: collections.deque[int] = collections.deque()  # of pictures given and not taken
        self._blocked = False
        self._moved_at = time.monotonic()
        self._drainer = threading.Thread(target=self._drain, name="sink-stderr", daemon=True)
        self._drainer.start()

    @property
    def pid(self) -> int:
        """Process id of ffmpeg."""
        return self._process.pid

    @property
    def is_live(self) -> bool:
        """Whether a picture went out: it is connected."""
        return self._n_taken > 0

    def runs(self) -> bool:
        """Whether ffmpeg has not ended."""
        return self._process.poll() is None

    def was_killed(self) -> bool:
        """Whether a signal from outside ended it, or a crash, and nothing that it met while writing.

        Its pipes close some time before its status can be read, so a process that runs on is waited for.
        """
        try:
            return self._process.wait(DYING_S) in KILLED
        except subprocess.TimeoutExpired:
            return False

    def stalled_s(self) -> float:
        """For how long it has taken nothing although there is something to take; else 0."""
        return time.monotonic() - self._moved_at if self._owes() else 0.0

    def write(self, data: bytes, gives_up: Callable[[], bool]) -> bool:
        """Hand over all of the data; False when ffmpeg is gone or `gives_up`, asked ten times a second."""
        poll = select.poll()
        poll.register(self._stdin, select.POLLOUT)
        rest = memoryview(data)
        while len(rest):
            self._blocked = not poll.poll(TICK_MS)
            if self._blocked:
                if gives_up():
                    return False
                continue
            try:
                rest = rest[os.write(self._stdin, rest) :]
            except BlockingIOError:
                continue
            except OSError:
                return False
        return True

    def note_given(self, time_us: int) -> None:
        """A picture was handed over. The clock for stalls starts when there is something to take."""
        if not self._owes():
            self._moved_at = time.monotonic()
        with self._lock:
            self._times_us.append(time_us)

    def note_idle(self) -> None:
        """There is nothing to hand over: ffmpeg waits for us, and older ones then report no progress."""
        self._moved_at = time.monotonic()

    def end(self, gives_up: Callable[[], bool]) -> bool:
        """Let ffmpeg write its end: whether it did so without a fault. It is killed once `gives_up` says so."""
        self._close_stdin()
        while True:
            try:
                return self._process.wait(TICK_MS / 1000) == 0
            except subprocess.TimeoutExpired:
                if gives_up():
                    self.kill()
                    return False

    def kill(self) -> None:
        """End it at once; one that hangs in the kernel, on a dead disk, is left behind."""
        self._process.kill()
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            log.debug("ffmpeg %d does not die", self._process.pid)
        self._close_stdin()

    def cause(self) -> str:
        """Why it ended, in a few words without secrets; it is ended here if it still runs."""
        try:
            self._process.wait(DYING_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self._drainer.join(DYING_S)
        self._close_stdin()
        status = self._process.poll()
        told = self._masked(cause(-signal.SIGKILL if status is None else status, list(self._lines)))
        return told.rpartition(": ")[2] if "://" in told else told  # the address is known

    def _owes(self) -> bool:
        with self._lock:
            owed_us = self._times_us[-1] - self._times_us[0] if self._times_us else 0
        return self._blocked or owed_us > HELD_BACK_S * US_PER_S

    def _close_stdin(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.close()
        except OSError as error:
            log.debug("a sink's pipe: %s", error)

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for raw in stderr:
                line = raw.decode(errors="replace").strip()
                told = PROGRESS.fullmatch(line)
                if told is None:
                    line = self._masked(line)
                    log.debug("ffmpeg: %s", line)
                    self._lines.append(line)
                elif told[1] == "frame" and told[2].strip().isdigit():
                    self._note_taken(int(told[2]))

    def _note_taken(self, n_frames: int) -> None:
        """The count is what ffmpeg wrote; its times would begin anew where it begins."""
        with self._lock:
            for _ in range(min(n_frames - self._n_taken, len(self._times_us))):
                self.taken_us = self._times_us.popleft()
                self._n_taken += 1
                self._moved_at = time.monotonic()


def _start(sending: Sending, stdout: int, inherit: tuple[int, ...]) -> subprocess.Popen[bytes]:
    """In a session of its own: the terminal's Ctrl-C ends us, and we end it."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, sending.preset)
        os.close(write_end)
        command = [f"/dev/fd/{read_end}" if word == "{preset}" else word for word in sending.command]
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=(*inherit, read_end),
            cwd=sending.folder,
        )
    finally:
        os.close(read_end)
