"""One output kept alive: a process that is started, watched, and started again when the far end went away.

Whatever happens to a sink is its own affair: it has its queue, its thread and its process. An outage is told
in one line when it begins and one when it is over, however many attempts lie between.
"""

from __future__ import annotations

import errno
import logging
import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.files import disk_is_full, shown
from flashtalk_cli.media.live.backoff import Backoff
from flashtalk_cli.media.live.commands import Sending, after_restart
from flashtalk_cli.media.live.limits import SinkLimits
from flashtalk_cli.media.live.matroska import PADDING_US, cluster, header
from flashtalk_cli.media.live.recording import Recording
from flashtalk_cli.media.live.sink_process import SinkProcess
from flashtalk_cli.media.live.statistics import SinkStatistics, State
from flashtalk_cli.media.live.targets import Target
from flashtalk_cli.media.live.unit_queue import UnitQueue
from flashtalk_cli.media.live.units import US_PER_S, StreamFormat, Unit

log = logging.getLogger(__name__)

TICK_S = 0.1
Tell = Callable[[str], None]
Follow = Callable[[Target], tuple[Target, Sending, Recording]]
"""Opens the recording that follows one that was cut off."""


class Sink:
    """An output with its thread. `begin` it once the stream's format is known, `put` units, then `end`."""

    def __init__(
        self,
        target: Target,
        sending: Sending,
        limits: SinkLimits,
        tell: Tell,
        *,
        recording: Recording | None = None,
        follow: Follow | None = None,
        stdout: int = subprocess.DEVNULL,
        rng: random.Random | None = None,
    ) -> None:
        self.target = target
        self._sending = sending
        self._limits = limits
        self._tell = tell
        self._recording = recording
        self._follow = follow
        self._follows = False  # whether the recording is not the first
        self._stdout = stdout
        # Who reads standard output may pause for as long as he likes: he skips what he missed.
        self._patience_s = float("inf") if target.kind == "stdout" else limits.stall_s
        # Longer than a disk may hang: on air, it is given up before anybody would wait for it.
        queue_s = 2 * limits.stall_s + limits.queue_s if recording else limits.queue_s
        self._queue = UnitQueue(queue_s, lossless=recording is not None)
        self._backoff = Backoff(rng or random.Random(), limits.retry_s)
        self._thread = threading.Thread(target=self._run, name=f"sink-{target.kind}", daemon=True)
        self._process: SinkProcess | None = None
        self._form: StreamFormat | None = None
        self._ending = threading.Event()  # no more units will come
        self._failed = threading.Event()  # for good, whatever else happens
        self._deadline = float("inf")  # for everything to be written; monotonic
        self._state: State = "connecting"
        self._reconnects = self._bytes_sent = self._frames_sent = self._cut_frames = 0
        # Given to a process of which it is not known that it is connected.
        self._given_frames = self._given_bytes = 0
        self.recorded: list[Path] = []  # recordings that have their names
        self._sent_us = 0
        self._last_error = ""
        self._outage_at: float | None = None
        self._lost_before = 0

    def begin(self, form: StreamFormat) -> None:
        """Start to send; units may have been put before."""
        self._form = form
        self._thread.start()

    def put(self, unit: Unit) -> None:
        """Send a unit, or drop it as the queue's rule says. Only a recording makes the caller wait, and fails
        when its disk took nothing for so long that the others would suffer.
        """
        if not self._queue.put(unit, self._limits.stall_s):
            self._fail(f"the disk took nothing for {self._limits.stall_s:.0f} s")

    def end(self, deadline: float) -> None:
        """No more units: write what is held until `deadline` (monotonic seconds). Returns at once."""
        self.hurry(deadline)
        self._queue.end()
        self._ending.set()

    def hurry(self, deadline: float) -> None:
        """Give up at `deadline` what is not written then, unless an earlier one was set."""
        self._deadline = min(self._deadline, deadline)

    def abort(self) -> None:
        """Stop at once; a recording stays as its part file."""
        if self._state != "ended":
            self._failed.set()
        self._queue.close()
        self.end(0.0)

    def join(self, limit_s: float | None = None) -> bool:
        """Wait for the thread: whether the output was ended as it should be."""
        if self._form is not None:
            self._thread.join(limit_s)
        elif self._recording is not None:
            self._recording.leave()
        return self._state == "ended" and not self.has_failed

    @property
    def has_failed(self) -> bool:
        """Whether it is gone for good."""
        return self._failed.is_set()

    @property
    def pid(self) -> int | None:
        """Process id of its ffmpeg while there is one."""
        process = self._process
        return process.pid if process is not None else None

    def statistics(self) -> SinkStatistics:
        """What is known of it now."""
        state: State = "failed" if self.has_failed else self._state
        behind_us = 0 if state in ("ended", "failed") else max(0, self._queue.newest_us - self._sent_us)
        return SinkStatistics(
            shown=self.target.shown,
            kind=self.target.kind,
            state=state,
            reconnects=self._reconnects,
            bytes_sent=self._bytes_sent,
            frames_sent=self._frames_sent,
            frames_dropped=self._queue.frames_dropped + self._cut_frames,
            last_error=self._last_error,
            behind_s=behind_us / US_PER_S,
        )

    def _run(self) -> None:
        try:
            while self._queue.wait_for_start():
                live_s = self._attempt()
                if self._state == "ended" or self.has_failed or self._ending.is_set():
                    break
                self._state = "waiting"
                self._queue.interrupt()
                self._ending.wait(self._backoff.wait_s(live_s))
                self._state = "connecting"
                self._sending = after_restart(self._sending)
                self._reconnects += 1
        except Exception as error:  # nothing of one output may end the others
            log.debug("a sink's thread", exc_info=True)
            self._fail(self.target.masked(f"{type(error).__name__}: {error}"))
        finally:
            self._finish()

    def _attempt(self) -> float:
        """One process from its start to its end: for how many seconds it was live."""
        inherit = (self._recording.descriptor,) if self._recording else ()
        try:
            process = SinkProcess(self._sending, self.target.masked, self._stdout, inherit)
        except OSError as error:
            self._note_outage(f"ffmpeg does not start ({error.strerror})")
            return 0.0
        self._process = process
        live_at: list[float] = []
        try:
            if self._pump(process, live_at) and process.end(self._out_of_time):
                self._state = "ended"
                self._count_given()
            elif self.has_failed:
                log.debug("%s: stopped", self.target.shown)
            elif self._has_no_room():
                process.kill()
                self._note_outage(os.strerror(errno.ENOSPC))
            elif self._out_of_time():
                self._last_error = self._last_error or "was not done when time was up"
            elif process.stalled_s() >= self._patience_s:
                process.kill()
                self._note_outage(f"took nothing for {self._patience_s:.0f} s")
            elif self._follow is not None and process.was_killed():
                self._go_on(self._follow, process.cause())
            else:
                self._note_outage(process.cause())
        finally:
            self._process = None
            process.kill()
            self._count_given(has_arrived=process.is_live)
        return time.monotonic() - live_at[0] if live_at else 0.0

    def _pump(self, process: SinkProcess, live_at: list[float]) -> bool:
        """Units into the process until there are no more; False when it must be given up."""
        assert self._form is not None
        head, origin_us = header(self._form), None

        def gives_up() -> bool:
            if process.is_live and not live_at:
                live_at.append(time.monotonic())
                self._note_live()
            if process.is_live or not self.target.is_network:
                self._count_given()
            late = process.stalled_s() >= self._patience_s or self._out_of_time()
            return late or self.has_failed or not process.runs()

        while not gives_up():
            unit = self._queue.take(TICK_S)
            if unit is None:
                if self._queue.is_drained:
                    return not self.has_failed
                process.note_idle()
                continue
            if unit.is_key and self._has_no_room():
                return False
            if origin_us is None:
                origin_us = self._origin_us(unit)
            data = head + cluster(unit, origin_us) if unit.time_us >= origin_us - PADDING_US else b""
            head = b"" if data else head
            if not process.write(data, gives_up):
                self._cut_frames += unit.is_video
                return False
            self._given_bytes += len(data)
            if unit.is_video:
                self._given_frames += 1
                process.note_given(unit.time_us)
            if process.is_live:
                self._sent_us = process.taken_us
        return False

    def _count_given(self, has_arrived: bool = True) -> None:
        """What the process was given has reached the output or is on its way over a connection; or it is lost."""
        self._frames_sent += self._given_frames * has_arrived
        self._bytes_sent += self._given_bytes * has_arrived
        self._cut_frames += self._given_frames * (not has_arrived)
        self._given_frames = self._given_bytes = 0

    def _origin_us(self, first: Unit) -> int:
        """Where a process's times begin: a recording's at the stream's start, others' where they join."""
        return 0 if self._recording and not self._follows else first.time_us

    def _out_of_time(self) -> bool:
        return time.monotonic() >= self._deadline

    def _has_no_room(self) -> bool:
        """Whether segments have nowhere to go: ffmpeg would make empty ones, and say nothing."""
        return self.target.kind == "hls" and self.target.path is not None and disk_is_full(self.target.path)

    def _go_on(self, follow: Follow, why: str) -> None:
        """A recording whose writer was killed gets its name, and plays; from the next key frame on another goes on."""
        assert self._recording is not None
        before = self.target.shown
        if self._recording.is_empty:
            self._recording.leave()
        else:
            self.recorded.append(self._recording.publish())
        self.target, self._sending, self._recording = follow(self.target)
        self._follows = True
        self._last_error = why
        self._tell(f"{before}: {why}; what was written plays, and it goes on in {self.target.shown}")

    def _note_outage(self, why: str) -> None:
        """Tell once; a sink that cannot come back has failed."""
        if not self.target.is_network and self.target.kind != "hls":
            self._fail(why)
            return
        self._last_error = why
        if self._outage_at is None:
            self._outage_at = time.monotonic()
            self._lost_before = self._queue.frames_dropped
            self._tell(f"{self.target.shown}: {why}; trying again until it is back")
        else:
            log.debug("%s: %s", self.target.shown, why)

    def _note_live(self) -> None:
        self._state = "live"
        if self._outage_at is not None:
            away_s = time.monotonic() - self._outage_at
            lost = self._queue.frames_dropped - self._lost_before
            self._outage_at = None
            self._tell(f"{self.target.shown}: back after {away_s:.1f} s, {lost} frames were not sent")

    def _fail(self, why: str) -> None:
        """Gone for good: told once, and nothing more is held for it."""
        if not self.has_failed:
            self._failed.set()
            self._last_error = why
            self._queue.close()
            part = self._recording
            rest = f"; what was written plays, in {shown(part.path)}" if part and not part.is_empty else ""
            self._tell(f"{self.target.shown}: {why}; it gets no more{rest}")

    def _finish(self) -> None:
        """Publish a whole recording, leave any other; whoever never got through has failed."""
        if self._recording is not None:
            try:
                if self._state == "ended" and not self.has_failed:
                    self.recorded.append(self._recording.publish())
                else:
                    self._recording.leave()
            except OutputError as error:
                self._fail(str(error))
        if self._state != "ended":
            self._failed.set()
        self._queue.close()
