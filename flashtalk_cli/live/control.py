"""Control of a running stream: a Unix socket that only its owner can open, one JSON object a line.

{"command": "status"}                         -> {"ok": true, "state": "speaking", ...}
{"command": "interrupt"}                         drop what is not yet spoken, be silent at once
{"command": "mute"}, {"command": "unmute"}       stay silent whatever arrives; speak again
{"command": "prompt", "text": "..."}             from the next chunk on
{"command": "picture", "path": "/..."}           from the next chunk on
{"command": "stop"}                              finish and end
                                              -> {"ok": false, "error": "one line", "type": "InputError"}

`type` is a class of errors.py, whose exit code `flashtalk ctl` then ends with.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import socketserver
import stat
import tempfile
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flashtalk_cli.errors import FlashtalkError, UsageError, by_name

log = logging.getLogger(__name__)

LINE_BYTES = 1 << 16
IDLE_S = 60.0  # a connection that says nothing for so long is closed
POLL_S = 0.1  # how soon it ends when it is to end
ANSWER_S = 120.0  # an encoder of a prompt may have to be loaded first

Handler = Callable[[dict[str, Any]], dict[str, Any]]


def folder() -> Path:
    """Where the sockets of this user's streams lie; not created."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    if runtime and Path(runtime).is_dir():
        return Path(runtime, "flashtalk")
    return Path(tempfile.gettempdir(), f"flashtalk-{os.getuid()}")


def default_socket() -> Path:
    """The socket of the stream that this process starts. Makes the folder, for its owner alone.

    Raises `UsageError` when somebody else has made it.
    """
    place = folder()
    place.mkdir(mode=0o700, exist_ok=True)
    found = place.lstat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or not place.is_dir() or place.is_symlink():
        raise UsageError(f"{place} is not a folder of yours alone; name another socket with --control")
    return place / f"{os.getpid()}.sock"


def find_socket() -> Path:
    """The socket of the one stream that runs; `UsageError` when there is none or more than one."""
    place = folder()
    found = [path for path in sorted(place.glob("*.sock")) if _knock(path) is None] if place.is_dir() else []
    if not found:
        raise UsageError("no stream of yours is running; start one with flashtalk stream")
    if len(found) > 1:
        names = ", ".join(map(str, found))
        raise UsageError(f"{len(found)} streams are running; name one with --socket: {names}")
    return found[0]


def ask(path: Path, request: dict[str, Any]) -> dict[str, Any]:
    """Send a request and return its answer. `UsageError` when nobody answers; a refusal as its own class."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
            line.settimeout(ANSWER_S)
            line.connect(os.fspath(path))
            line.sendall(json.dumps(request).encode() + b"\n")
            with line.makefile("rb") as answers:
                answer = json.loads(answers.readline(LINE_BYTES * 16))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no answer"
        raise UsageError(
            f"{path}: no stream listens here ({reason}); flashtalk stream prints its socket"
        ) from None
    if not answer.pop("ok", False):
        raise by_name(str(answer.get("type")))(str(answer.get("error", "refused")))
    return dict(answer)


def check_control(path: Path) -> None:
    """`UsageError` when no control socket can be made at `path`. Nothing there is changed."""
    if is_left_over(path):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        try:
            line.bind(os.fspath(path))
            path.unlink()
        except OSError as error:
            raise _unfit(path, error) from None


def is_left_over(path: Path) -> bool:
    """Whether at `path` there is the socket of a stream that was killed; False when there is nothing.

    Raises `UsageError` for anything else: it is not ours to delete.
    """
    try:
        is_socket = stat.S_ISSOCK(path.lstat().st_mode)
    except OSError:
        return False
    if not is_socket:
        raise UsageError(f"{path}: is there and no socket, so it is left alone; name another with --control")
    problem = _knock(path)
    if isinstance(problem, ConnectionRefusedError):
        return True
    reason = problem.strerror if problem else "another stream listens there"
    raise UsageError(f"{path}: cannot be the control socket ({reason}); name another with --control")


class Control:
    """A server at `path`, a thread a connection; a context. Raises `UsageError` when it cannot be made."""

    def __init__(self, path: Path, handle: Handler) -> None:
        self.path = path
        left_over = is_left_over(path)
        before = os.umask(0o177)  # the socket has mode 0600 from its first moment
        try:
            if left_over:
                path.unlink()
            self._server = _Server(os.fspath(path), handle)
        except OSError as error:
            raise _unfit(path, error) from None
        finally:
            os.umask(before)
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="control", daemon=True
        )

    def __enter__(self) -> Control:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        with suppress(FileNotFoundError):
            self.path.unlink()


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    request_queue_size = 8

    def __init__(self, path: str, handle: Handler) -> None:
        self.handle = handle
        super().__init__(path, _Connection)


class _Connection(socketserver.StreamRequestHandler):
    timeout = IDLE_S

    def handle(self) -> None:
        with suppress(OSError):
            while line := self.rfile.readline(LINE_BYTES):
                self.wfile.write(json.dumps(self._answer(line)).encode() + b"\n")

    def _answer(self, line: bytes) -> dict[str, Any]:
        try:
            request = json.loads(line)
            if not isinstance(request, dict):
                raise ValueError
        except (ValueError, RecursionError):
            return _refusal(UsageError("not a line with a JSON object"))
        assert isinstance(self.server, _Server)
        try:
            return {"ok": True, **self.server.handle(request)}
        except FlashtalkError as error:
            return _refusal(error)
        except Exception as error:
            log.exception("a control command failed")
            return _refusal(FlashtalkError(f"internal error {type(error).__name__}: {error}"))


def _refusal(error: FlashtalkError) -> dict[str, Any]:
    return {"ok": False, "error": str(error), "type": type(error).__name__}


def _unfit(path: Path, error: OSError) -> UsageError:
    reason = error.strerror or error  # of a path that is too long there is only the text
    return UsageError(f"{path}: cannot be the control socket ({reason}); name another with --control")


def _knock(path: Path) -> OSError | None:
    """None when a process listens at a socket, else why it cannot be reached."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.settimeout(1.0)
        try:
            line.connect(os.fspath(path))
        except OSError as error:
            return error
        return None
