"""Sound from a voice agent, over a WebSocket: `--listen HOST:PORT`.

A client connects to ws://HOST:PORT/ (with a token, if there is one, as `Authorization: Bearer TOKEN` or
`?token=TOKEN`) and is told `{"type": "ready", "pcm": "s16le:16000:1"}`. Then it sends

    binary messages            samples in that format, cut anywhere, as fast as it likes
    {"type": "interrupt"}      drop what is not yet spoken; answered with {"type": "interrupted", ...}; what
                               follows begins with a whole sample
    {"type": "end"}            no more sound will come at all: the stream ends, or idles with --keep-alive

It may go faster than the speech: what it says is read at once and kept until there is room for it, so that an
interrupt is obeyed at once. What is kept is bounded, and a client beyond that bound finds the connection slow.
A client that leaves may come back, and what it sent is spoken; one at a time is served. Web pages are turned
away unless they show the token, for any page on this machine could reach a loopback address.
"""

from __future__ import annotations

import hmac
import http
import json
import logging
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

import numpy as np

from flashtalk_cli.config import PcmFormat
from flashtalk_cli.errors import UsageError
from flashtalk_cli.live.address import Address
from flashtalk_cli.live.sources import ROOM_S, Decoder, Source

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.sync.server import ServerConnection

log = logging.getLogger(__name__)

MESSAGE_BYTES = 1 << 20  # a longer message is refused, and the connection closed
TEXT_CHARACTERS = 1000
AHEAD_BYTES = 64 << 20  # of sound that waits for room: 349 s, or a single message if that is longer
MOST_CONNECTIONS = 16  # at once, two threads each; most of them have not shown a token yet
CLOSING_S = 1.0  # what a client gets to answer when its connection is closed
BUSY, UNFIT = 1013, 1003  # codes that a WebSocket closes with
# An agent whose machine is gone is found out in 40 s, by the system: an answer to a ping of ours would wait
# behind the sound of one that is far ahead.
KEEPALIVE = {"TCP_KEEPIDLE": 20, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 40_000}


class Ahead:
    """Sound that came before there was room for it, in order and bounded. Threads may share it."""

    def __init__(self, limit_bytes: int) -> None:
        self.changed = threading.Condition()
        self._limit_bytes = limit_bytes
        self._sound = bytearray()  # float32; a list of pieces would be large where each is a single sample

    def put(self, samples: np.ndarray, gives_up: Callable[[], bool]) -> None:
        """Append float32 [n]; while there is no room for it, wait until `gives_up`, asked five times a second."""
        with self.changed:
            while self._sound and len(self._sound) + samples.nbytes > self._limit_bytes and not gives_up():
                self.changed.wait(ROOM_S)
            self._sound += samples.tobytes()
            self.changed.notify_all()

    def pass_on(self, n: int, to: Callable[[np.ndarray], None]) -> bool:
        """Hand the first n samples at most to `to`, which no `clear` comes between; False when none come in 0.2 s."""
        with self.changed:
            if not self._sound:
                self.changed.wait(ROOM_S)
            samples = np.frombuffer(bytes(self._sound[: 4 * n]), np.float32)
            del self._sound[: 4 * n]
            if len(samples):
                to(samples)
                self.changed.notify_all()
            return len(samples) > 0

    def clear(self) -> int:
        """Drop all; how many samples that was."""
        with self.changed:
            n = len(self._sound) // 4
            self._sound.clear()
            self.changed.notify_all()
            return n


class ListenSource(Source):
    """A WebSocket server whose client speaks. Raises `UsageError` when it cannot listen at the address."""

    may_wait_s = 0.0

    def __init__(self, address: Address, pcm: PcmFormat, token: str | None, *rest: Any) -> None:
        from websockets.sync.server import serve

        super().__init__(*rest)
        self._pcm = pcm
        self._token = token
        self._busy = threading.Lock()
        self._done = threading.Event()
        self._ahead = Ahead(AHEAD_BYTES)
        self._server = serve(
            self._serve,
            sock=_listen_at(address),
            max_size=MESSAGE_BYTES,
            process_request=self._refusal,
            compression=None,
            ping_interval=None,
            close_timeout=CLOSING_S,
            logger=_silent_logger(),
        )
        self._agent: socket.socket | None = None  # who was let in last
        self._server.handler = self._door = _Door(MOST_CONNECTIONS, self._server.handler)
        self.address = Address(*self._server.socket.getsockname()[:2])
        self.state = "waiting"

    def read(self) -> None:
        """Serve until a client says that it was all and all is handed on, or `close`."""
        threads = [threading.Thread(target=self._server.serve_forever, name="listen", daemon=True)]
        threads += [threading.Thread(target=self._leave_when_done, name="listen", daemon=True)]
        for thread in threads:
            thread.start()
        try:
            self._hand_on()
        finally:
            self._done.set()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        """Turn the client away, and listen no more."""
        super().close()
        self._done.set()

    def interrupt(self) -> float:
        """Drop all sound that is not yet spoken, what waits here too; how many seconds that was."""
        with self._ahead.changed:  # nothing is handed on in between
            dropped_s = self._ahead.clear() / self.timeline.rate_hz
            return dropped_s + self.on_interrupt()

    def _leave_when_done(self) -> None:
        self._done.wait()
        self._door.shut(self._agent)
        self._server.shutdown()

    def _hand_on(self) -> None:
        """Hand sound to the timeline as that has room for it, until no more will come."""
        block = round(ROOM_S * self.timeline.rate_hz)
        while not self.closed.is_set():
            is_done = self._done.is_set()  # if so, all sound is there by now
            if not self.timeline.has_room(block):
                with self.timeline.changed:
                    self.timeline.changed.wait(ROOM_S)
            elif not self._ahead.pass_on(block, self._hand_over) and is_done:
                return

    def _hand_over(self, samples: np.ndarray) -> None:
        self.timeline.add(samples, self.clock.now_s())

    def _refusal(self, connection: ServerConnection, request: Request) -> Response | None:
        """None for a client that may come in, else what it is told."""
        if self._token is not None:
            wanted = self._token.encode(errors="surrogateescape")
            if not hmac.compare_digest(_token_of(request), wanted):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "show the token\n")
        elif request.headers.get_all("Origin"):
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages need a token\n")
        return None

    def _serve(self, connection: ServerConnection) -> None:
        from websockets.exceptions import ConnectionClosed

        if not self._busy.acquire(blocking=False):
            connection.close(BUSY, "another client is connected")
            return
        self._agent = connection.socket
        try:
            self._listen_to(connection)
        except ConnectionClosed as error:  # it died, or broke the rules
            log.debug("an agent is gone: %s", error)
        except Exception:
            log.exception("listening to an agent failed")
        finally:
            self.state = "waiting"
            self._busy.release()

    def _listen_to(self, connection: ServerConnection) -> None:
        decoder = Decoder(self._pcm)
        format_name = f"{self._pcm.encoding}:{self._pcm.rate_hz}:{self._pcm.channels}"
        connection.send(json.dumps({"type": "ready", "pcm": format_name}))
        for message in connection:
            if self.closed.is_set():
                return
            if isinstance(message, bytes):
                self.state = "live"
                self._ahead.put(decoder.decode(message), self.closed.is_set)
                continue
            kind = _kind_of(message)
            if kind == "interrupt":
                dropped_s = self.interrupt()
                decoder = Decoder(self._pcm)  # part of a sample may be left of what was dropped
                connection.send(json.dumps({"type": "interrupted", "dropped_s": round(dropped_s, 3)}))
            elif kind == "end":
                self._ahead.put(decoder.finish(), self.closed.is_set)
                self._done.set()
                return
            else:
                connection.close(UNFIT, "unknown message")
                return


def _listen_at(address: Address) -> socket.socket:
    try:
        line = socket.create_server((address.host, address.port), family=address.family)
    except OSError as error:
        raise UsageError(f"--listen: cannot listen at {address} ({error.strerror}); choose another") from None
    line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # connections inherit these
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):
            line.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return line


def _silent_logger() -> logging.Logger:
    """For the library: it tells of every stranger with a traceback, and of headers with what is in them."""
    silent = logging.getLogger(f"{__name__}.websockets")
    silent.setLevel(logging.CRITICAL + 1)
    return silent


class _Door:
    """What handles connections: so many at once, and those beyond them are closed."""

    def __init__(self, n: int, handle: Callable[[socket.socket, Any], None]) -> None:
        self._n = n
        self._handle = handle
        self._lock = threading.Lock()
        self._lines: set[socket.socket] = set()

    def __call__(self, line: socket.socket, where: Any) -> None:
        """Handle a connection to its end."""
        with self._lock:
            if len(self._lines) < self._n:
                self._lines.add(line)
            else:
                line.close()  # the server finds it so, and forgets it
        try:
            self._handle(line, where)
        finally:
            with self._lock:
                self._lines.discard(line)

    def shut(self, agent: socket.socket | None) -> None:
        """Cut everybody off but the agent, and let nobody in: strangers would be waited for until they leave."""
        with self._lock:
            self._n = 0
            for line in self._lines - {agent}:
                with suppress(OSError):  # it has just left
                    line.shutdown(socket.SHUT_RDWR)


def _token_of(request: Request) -> bytes:
    """The token that a client shows, byte for byte; b"" when it shows none."""
    for value in request.headers.get_all("Authorization"):
        if shown := value.removeprefix("Bearer ").strip():
            return shown.encode("latin-1", "surrogateescape")
    query = request.path.partition("?")[2]
    return parse_qs(query).get("token", [""])[0].encode(errors="surrogateescape")


def _kind_of(text: str) -> Any:
    """What a text message asks for; None for nonsense."""
    try:
        return json.loads(text[:TEXT_CHARACTERS])["type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
