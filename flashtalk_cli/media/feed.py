"""A running ffmpeg that is fed frames and sound, and that cannot make us wait for ever.

Several parties, so that none waits for another: a thread hands frames to ffmpeg's stdin (the
caller goes on rendering while the encoder works), one hands it the sound, one drains its
stderr (a full pipe would stop it), and ffmpeg lives in a session of its own (the terminal's
Ctrl-C ends us, and we end ffmpeg, after it wrote its last frames). One that is slow is waited
for; one that makes no progress at all is killed.
"""

from __future__ import annotations

import collections
import logging
import os
import queue
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flashtalk_cli.media.ffmpeg import cause
from flashtalk_cli.media.soundtrack import Soundtrack

log = logging.getLogger(__name__)

QUEUED_BYTES = 32 << 20  # of frames that wait for the encoder, a chunk at 768 x 448; then the caller waits
KEPT_LINES = 50
DYING_S = 5.0  # from a broken pipe to the end of the process
STALL_S = 60.0  # without progress, after which ffmpeg is killed
ABORT_S = 5.0  # for ffmpeg to write what it holds once the run is to end: less than launch.CLEAN_END_S
LOOK_UP_S = 0.2


class FfmpegFeed:
    """ffmpeg with a stdin that takes uint8 arrays [T, ...] of frames, in order.

    `stdout` is a file descriptor for what ffmpeg writes there; `inherit` are descriptors that stay open in
    it (a lock lives as long as either process). The soundtrack, if any, is kept in step and closed. Once
    `stop` is set, nothing is waited for any more for longer than `ABORT_S` without progress.
    """

    def __init__(
        self,
        command: list[str],
        stdout: int = subprocess.DEVNULL,
        inherit: tuple[int, ...] = (),
        soundtrack: Soundtrack | None = None,
        stop: threading.Event | None = None,
    ) -> None:
        self._stop = stop or threading.Event()
        # Who reads what it writes may pause for as long as he likes.
        self._patience_s = STALL_S if stdout == subprocess.DEVNULL else float("inf")
        self._stalled_s = 0.0  # without progress when it was killed for that
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=stdout,
            stderr=subprocess.PIPE,
            start_new_session=True,
            pass_fds=inherit if soundtrack is None else (*inherit, soundtrack.read_end),
        )
        self._soundtrack = soundtrack
        if soundtrack is not None:
            soundtrack.start()
        self._lines: collections.deque[str] = collections.deque(maxlen=KEPT_LINES)
        self._queue: queue.SimpleQueue[np.ndarray | None] = queue.SimpleQueue()
        self._queued_frames = self._taken_frames = self._waiting_bytes = 0
        self._room = threading.Condition()  # for more bytes, or none because ffmpeg is gone
        self._input_ended = False
        self._broken = threading.Event()
        self._feeder = threading.Thread(target=self._feed, name="ffmpeg-stdin", daemon=True)
        self._drainer = threading.Thread(target=self._drain, name="ffmpeg-stderr", daemon=True)
        self._feeder.start()
        self._drainer.start()

    @property
    def pid(self) -> int:
        """Process id of ffmpeg."""
        return self._process.pid

    def broken(self) -> bool:
        """Whether ffmpeg stopped taking frames although more may come."""
        return self._broken.is_set() or (not self._input_ended and self._process.poll() is not None)

    def took_everything(self) -> bool:
        """Whether every array queued so far that left the queue reached ffmpeg."""
        return not self._broken.is_set()

    def write(self, piece: np.ndarray) -> bool:
        """Queue an array, not to be changed afterwards; waits when the encoder is behind, until `stop`.

        False when ffmpeg takes no more: then `cause` tells why.
        """
        assert not self._input_ended
        if self.broken() or not self._in_time(self._wait_for_room):
            return False
        with self._room:
            self._waiting_bytes += piece.nbytes
        self._queue.put(np.ascontiguousarray(piece))
        self._queued_frames += len(piece)
        self._let_sound_follow()
        return True

    def end(self, limit_s: float | None = None) -> int | None:
        """Hand over what is queued, close stdin, and wait for ffmpeg: its exit status.

        None when it was not done within `limit_s`; it is then still running. Without a limit it gets as long
        as it makes progress, and is killed when it makes none.
        """
        if not self._input_ended:
            self._queue.put(None)
            self._input_ended = True
        if limit_s is None:
            self._in_time(lambda: self._has_ended(LOOK_UP_S))
        if not self._has_ended(DYING_S if limit_s is None else limit_s):
            return None
        self._feeder.join(DYING_S)
        self._drainer.join(DYING_S)
        if self._soundtrack is not None:
            self._soundtrack.close()
        return self._process.returncode

    def abort(self) -> bool:
        """Let ffmpeg write what it holds, for `ABORT_S`; False when it was not done then, and was killed."""
        if self.end(ABORT_S) is not None:
            return True
        log.warning("ffmpeg did not end within %.0f s and was killed", ABORT_S)
        self.kill()
        return False

    def kill(self) -> None:
        """End ffmpeg at once; what it wrote stays."""
        self._process.kill()
        self.end(DYING_S)

    def cause(self) -> str:
        """Why ffmpeg ended, in a few words. It is ended here if it only closed its stdin."""
        if not self._has_ended(DYING_S):
            self._process.kill()
        self.end(DYING_S)
        if self._stalled_s:
            return f"no progress for {self._stalled_s:.0f} s, and then killed"
        return cause(self._process.returncode, self._lines)

    def _in_time(self, done: Callable[[], bool]) -> bool:
        """Call `done`, which waits `LOOK_UP_S`, until it is so; False when ffmpeg stalled, and was killed."""
        before, still_s = self._progress(), 0.0
        while not done():
            # Looks are counted, not seconds: who was stopped together with ffmpeg finds that nobody is late.
            now = self._progress()
            still_s = still_s + LOOK_UP_S if now == before else 0.0
            before = now
            if still_s >= (min(ABORT_S, self._patience_s) if self._stop.is_set() else self._patience_s):
                self._stalled_s = still_s
                self._process.kill()
                return False
        return True

    def _progress(self) -> tuple[int, float]:
        """What changes while ffmpeg does anything."""
        return self._taken_frames, _processor_time(self.pid)

    def _wait_for_room(self) -> bool:
        def has_room() -> bool:
            return self._waiting_bytes < QUEUED_BYTES or self._broken.is_set() or self._stop.is_set()

        with self._room:
            return self._room.wait_for(has_room, LOOK_UP_S)

    def _has_ended(self, limit_s: float) -> bool:
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _feed(self) -> None:
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            while (piece := self._queue.get()) is not None:
                for frame in piece:
                    if self._broken.is_set():
                        break  # and keep taking pieces, or the caller would wait at a full queue
                    self._hand_over(stdin.fileno(), frame)
        if self._soundtrack is not None:
            self._soundtrack.end()

    def _hand_over(self, descriptor: int, frame: np.ndarray) -> None:
        try:
            rest = memoryview(frame.data).cast("B")
            while len(rest):
                rest = rest[os.write(descriptor, rest) :]
        except OSError as error:
            log.debug("ffmpeg takes no more frames: %s", error)
            self._broken.set()
        self._taken_frames += 1
        with self._room:
            self._waiting_bytes -= frame.nbytes
            self._room.notify()
        self._let_sound_follow()

    def _let_sound_follow(self) -> None:
        """The sound may go ahead of the frames that ffmpeg took, but not beyond those that there are."""
        if self._soundtrack is not None:
            ahead = self._taken_frames + self._soundtrack.lead_frames
            self._soundtrack.allow(min(self._queued_frames, ahead))

    def _drain(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stderr:
            for line in stderr:
                text = line.decode(errors="replace").rstrip()
                log.debug("ffmpeg: %s", text)
                self._lines.append(text)


def _processor_time(pid: int) -> float:
    """How long a process has computed, in ticks; where the system does not tell, it counts as at work."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return time.monotonic()
    return float(words[11]) + float(words[12])
