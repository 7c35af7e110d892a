"""What a worker tells its parent, and `--json` tells other programs: one JSON object a line.

Every line has `event`, one of the kinds below. Times are seconds; `fps` counts frames a
second of work; `realtime` is seconds of video made in a second of work.

    stage        name, detail             a new part of the work began: "picture", "weights", ...
    progress     name, done, total, unit  how far that part is; total is null when nobody knows
    chunk        index, chunks, frames_done, frames_total, fps, realtime, elapsed_s, eta_s
                                          a chunk was written; index counts from 0
    report       data, comparison         what a bench measured, see bench/report.py; against an old report
                                          bench/compare.py's Comparison, else null
    live         state, media_s, frames, chunks, realtime, latency, ahead_s, unspoken_s, repeated_frames,
                 jumps, silent_s, dropped_s, muted, source, position_s, restarts, sinks
                                          once a second of a live stream: live/status.py says what they are
    clip         line, output, state, type, message, frames, duration_s, elapsed_s, replica, tries
                                          a clip of a manifest ended: state is done, skipped (it was done
                                          before), failed (type and message say why) or interrupted
    warning      message                  worth knowing, and no reason to end
    done         path, frames, duration_s, elapsed_s
                                          the file is complete under its final name (null: stdout)
    interrupted  path, frames             ended on request; path is what was kept, null for nothing
    error        type, message, exit_code, traceback
                                          ended by that error class of errors.py; its one line

A run ends with exactly one of done, interrupted, error. Of a manifest, whatever a replica says has its
number in `replica`, and the manifest's line in `line` while it renders one. Numbers that are not finite are null.
The lines cross from the worker to the parent over a Unix socket; of several ranks only the first sends
anything but an error.
"""

from __future__ import annotations

import json
import math
import os
import select
import socket
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from flashtalk_cli.errors import FlashtalkError, WorkerError

Event = dict[str, Any]

KINDS = {
    "stage": {"name", "detail"},
    "progress": {"name", "done", "total", "unit"},
    "chunk": {"index", "chunks", "frames_done", "frames_total", "fps", "realtime", "elapsed_s", "eta_s"},
    "report": {"data", "comparison"},
    "live": {
        *("state", "media_s", "frames", "chunks", "realtime", "latency", "ahead_s", "unspoken_s"),
        *("repeated_frames", "jumps", "silent_s", "dropped_s", "muted", "source", "sinks"),
        *("position_s", "restarts"),
    },
    "clip": {
        *("line", "output", "state", "type", "message"),
        *("frames", "duration_s", "elapsed_s", "replica", "tries"),
    },
    "warning": {"message"},
    "done": {"path", "frames", "duration_s", "elapsed_s"},
    "interrupted": {"path", "frames"},
    "error": {"type", "message", "exit_code", "traceback"},
}
LAST = ("done", "interrupted", "error")

FLUSH_S = 2.0  # what a run's last word, and `close`, wait for a parent that does not read
MOST_WAITING = 10_000  # events kept for one; beyond these the oldest go
ROOM_BYTES = 1 << 20  # asked of the kernel for the last word; it gives what it allows
LOOK_UP_S = 0.2


def event(kind: str, /, **fields: Any) -> Event:
    """An event as a value. Fields are those that the module's docstring lists; some may be left out."""
    assert kind in KINDS, kind
    assert fields.keys() <= KINDS[kind], (kind, fields.keys() - KINDS[kind])
    return {"event": kind, **{name: _plain(value) for name, value in fields.items()}}


def error(problem: BaseException) -> Event:
    """The error event of an exception; one that is not in errors.py is an internal error, exit code 1."""
    trace = "".join(traceback.format_exception(type(problem), problem, problem.__traceback__))
    kind, text = type(problem).__name__, str(problem).strip()
    if isinstance(problem, FlashtalkError):
        return event("error", type=kind, message=text, exit_code=problem.exit_code, traceback=trace)
    first_line = f": {text.splitlines()[0]}" if text else ""
    message = f"internal error {kind}{first_line}"
    return event("error", type=kind, message=message, exit_code=FlashtalkError.exit_code, traceback=trace)


def to_line(happened: Event) -> str:
    """An event as its line of JSON, pure ASCII, without the newline."""
    return json.dumps(happened, allow_nan=False)


def _plain(value: Any) -> Any:
    """What JSON can say: null for what is no number, at any depth."""
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return os.fspath(value) if isinstance(value, os.PathLike) else value


class Emitter:
    """The worker's end: sends events to the parent's socket; with no path it sends nothing.

    Usable from several threads and from signal handlers. Nobody waits for a parent that does not read, one
    that was stopped by Ctrl-Z for example: what the socket does not take is kept, of `live` the newest only,
    and a thread sends it once the parent reads again. A run's last word waits until it is sent, FLUSH_S at
    most, for the process may end right after it.

    A parent that has gone away is no error here: `watch_parent` notices that and ends the worker.
    """

    def __init__(self, path: Path | None) -> None:
        self._lock = threading.RLock()  # re-entrant: a signal handler may emit in the middle of an emit
        self._sending = False  # such a handler then leaves its event to the emit that it interrupted
        self._rest = b""  # of the line that the socket took a part of
        self._waiting: deque[bytes] = deque(maxlen=MOST_WAITING)
        self._newest = b""  # `live` event that waits, after all others
        self._writer: threading.Thread | None = None  # while something waits
        self._socket: socket.socket | None = None
        if path is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                self._socket.connect(os.fspath(path))
            except OSError as problem:
                raise WorkerError(
                    f"nobody listens at {path} ({problem.strerror}): the parent is gone"
                ) from None

    def emit(self, kind: str, /, **fields: Any) -> None:
        """Send one event."""
        self.send(event(kind, **fields))

    def error(self, problem: BaseException) -> None:
        """Send the error event of an exception."""
        self.send(error(problem))

    def send(self, happened: Event) -> None:
        """Send an event that is already a value."""
        if self._socket is None:
            return
        line, is_last = to_line(happened).encode() + b"\n", happened["event"] in LAST
        with self._lock:
            if happened["event"] == "live":
                self._newest = line
            else:
                self._waiting.append(line)
            if is_last:
                self._newest = b""
                self._make_room()
            if not self._write() and not (self._writer and self._writer.is_alive()):
                self._writer = threading.Thread(target=self._write_on, name="events", daemon=True)
                self._writer.start()
        if is_last:
            self._flush()

    def parent_closed(self, wait_s: float) -> bool:
        """Whether the parent's end has closed, after waiting up to that long for it."""
        if (line := self._socket) is None:
            return threading.Event().wait(wait_s)
        try:
            readable, _, _ = select.select([line], [], [], wait_s)
            return bool(readable) and not line.recv(1)
        except (OSError, ValueError):  # reset by the parent, or closed by `close` meanwhile
            return self._socket is not None

    def close(self) -> None:
        """Close the socket; everything sent before it arrives, if the parent reads it within FLUSH_S."""
        self._flush()
        with self._lock:
            if self._socket is not None:
                line, self._socket = self._socket, None
                line.close()

    def _flush(self) -> None:
        if (writer := self._writer) is not None:
            writer.join(FLUSH_S)

    def _make_room(self) -> None:
        """For the last word behind all that the parent has not read: it finds both, even after we are gone."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, ROOM_BYTES)

    def _write(self) -> bool:
        """With the lock held, send what the socket takes at once: whether nothing is left."""
        try:
            while self._socket and not self._sending and (self._rest or self._waiting or self._newest):
                self._sending = True
                try:
                    self._rest = self._rest or self._next_line()
                    self._rest = self._rest[self._socket.send(self._rest, socket.MSG_DONTWAIT) :]
                finally:
                    self._sending = False
        except BlockingIOError:
            return False
        except OSError:  # the parent is gone
            self._rest = self._newest = b""
            self._waiting.clear()
        return True

    def _next_line(self) -> bytes:
        if self._waiting:
            return self._waiting.popleft()
        line, self._newest = self._newest, b""
        return line

    def _write_on(self) -> None:
        """In a thread: send on as the parent reads, until nothing is left."""
        while (line := self._socket) is not None:
            with suppress(OSError, ValueError):  # closed meanwhile
                select.select([], [line], [], LOOK_UP_S)
            with self._lock:
                if self._write():
                    self._writer = None
                    return


def watch_parent(callback: Callable[[], None], emitter: Emitter | None = None, every_s: float = 0.5) -> None:
    """Call `callback`, in a thread of its own, once the process that started this one has died.

    Notices a changed parent process (also of ranks that have no socket) and, given the emitter,
    a socket that the parent closed, however many processes stand between.
    """
    parent = os.getppid()
    line = emitter or Emitter(None)

    def watch() -> None:
        while not line.parent_closed(every_s):
            if os.getppid() != parent:
                break
        callback()

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


class Listener:
    """The parent's end: a socket at `path` that every process of one worker may connect to."""

    def __init__(self, path: Path) -> None:
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._server.bind(os.fspath(path))
        self._server.listen(64)
        self._rests: dict[socket.socket, bytes] = {}  # of each connection, the beginning of its next line
        self._connected = False

    @property
    def closed(self) -> bool:
        """Whether all that ever connected have closed, after all that they sent was read."""
        return self._connected and not self._rests

    def read(self, wait_s: float) -> list[Event]:
        """Events that have arrived, after waiting up to that long for something; [] for none."""
        readable, _, _ = select.select([self._server, *self._rests], [], [], wait_s)
        found: list[Event] = []
        for line in readable:
            if line is self._server:
                self._rests[self._server.accept()[0]] = b""
                self._connected = True
            else:
                found += self._receive(line)
        return found or (self.read(0.0) if self._server in readable else [])

    def _receive(self, line: socket.socket) -> list[Event]:
        try:
            data = line.recv(1 << 16)
        except ConnectionError:
            data = b""
        *lines, rest = (self._rests.pop(line) + data).split(b"\n")
        if data:
            self._rests[line] = rest
        else:
            line.close()
        return [found for text in lines if (found := _parse(text)) is not None]

    def drain(self) -> list[Event]:
        """What is still under way from a worker that has ended."""
        found: list[Event] = []
        give_up = time.monotonic() + 1.0  # a child of the worker may hold its socket open
        while time.monotonic() < give_up:
            batch = self.read(wait_s=0.05)
            found += batch
            if not batch and not self._rests:
                break
        return found

    def __enter__(self) -> Listener:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        for line in (*self._rests, self._server):
            line.close()


def _parse(line: bytes) -> Event | None:
    """An event from its line; None for anything else, such as half a line of a worker that was killed."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and found.get("event") in KINDS else None
