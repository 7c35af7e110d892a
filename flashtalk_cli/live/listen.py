"""Sound from a voice agent, over a WebSocket: `--listen HOST:PORT`.

A client connects to ws://HOST:PORT/ (with a token, if there is one, as `Authorization: Bearer TOKEN` or
`?token=TOKEN`) and is told `{"type": "ready", "pcm": "s16le:16000:1"}`. Then it sends

    binary messages            samples in that format, cut anywhere, as fast as it likes
    {"type": "interrupt"}      drop what is not yet spoken; answered with {"type": "interrupted", ...}
    {"type": "end"}            no more sound will come at all: the stream ends, or idles with --keep-alive

It may go faster than the speech: what waits to be spoken is bounded, and a client beyond that bound finds
the connection slow. A client that leaves may come back; one at a time is served. Web pages are turned away
unless they show the token, for any page on this machine could reach a loopback address.
"""

from __future__ import annotations

import hmac
import http
import json
import threading
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from flashtalk_cli.config import PcmFormat
from flashtalk_cli.errors import UsageError
from flashtalk_cli.live.address import Address
from flashtalk_cli.live.sources import Decoder, Source

if TYPE_CHECKING:
    from websockets.http11 import Request, Response
    from websockets.sync.server import ServerConnection

MESSAGE_BYTES = 1 << 20  # a longer message is refused, and the connection closed
TEXT_CHARACTERS = 1000
BUSY, UNFIT = 1013, 1003  # codes that a WebSocket closes with


class ListenSource(Source):
    """A WebSocket server whose client speaks."""

    may_wait_s = 0.0

    def __init__(self, address: Address, pcm: PcmFormat, token: str | None, *rest: Any) -> None:
        from websockets.sync.server import serve

        super().__init__(*rest)
        self._pcm = pcm
        self._token = token
        self._busy = threading.Lock()
        self._done = threading.Event()
        try:
            self._server = serve(
                self._serve,
                address.host,
                address.port,
                max_size=MESSAGE_BYTES,
                process_request=self._refusal,
                compression=None,
            )
        except OSError as error:
            raise UsageError(
                f"--listen: cannot listen at {address} ({error.strerror}); choose another"
            ) from None
        self.address = Address(*self._server.socket.getsockname()[:2])
        self.state = "waiting"

    def read(self) -> None:
        """Serve until a client says that it was all, or `close`."""
        server = threading.Thread(target=self._server.serve_forever, name="listen", daemon=True)
        server.start()
        self._done.wait()
        self._server.shutdown()

    def close(self) -> None:
        """Turn the client away, and listen no more."""
        super().close()
        self._done.set()

    def _refusal(self, connection: ServerConnection, request: Request) -> Response | None:
        """None for a client that may come in, else what it is told."""
        if self._token is not None:
            shown = request.headers.get("Authorization", "").removeprefix("Bearer ").strip()
            shown = shown or parse_qs(urlsplit(request.path).query).get("token", [""])[0]
            if not hmac.compare_digest(shown.encode(), self._token.encode()):
                return connection.respond(http.HTTPStatus.UNAUTHORIZED, "show the token\n")
        elif request.headers.get("Origin") is not None:
            return connection.respond(http.HTTPStatus.FORBIDDEN, "web pages need a token\n")
        return None

    def _serve(self, connection: ServerConnection) -> None:
        if not self._busy.acquire(blocking=False):
            connection.close(BUSY, "another client is connected")
            return
        try:
            self._listen_to(connection)
        finally:
            self.state = "waiting"
            self._busy.release()

    def _listen_to(self, connection: ServerConnection) -> None:
        decoder = Decoder(self._pcm)
        format_name = f"{self._pcm.encoding}:{self._pcm.rate_hz}:{self._pcm.channels}"
        connection.send(json.dumps({"type": "ready", "pcm": format_name}))
        for message in connection:
            if self.closed.is_set():
                break
            if isinstance(message, bytes):
                self.add(decoder.decode(message))
            elif not self._obey(connection, message):
                connection.close(UNFIT, "unknown message")
                break
            if self._done.is_set():
                self.add(decoder.finish())
                break

    def _obey(self, connection: ServerConnection, text: str) -> bool:
        """Do what a text message says; False for one that says nothing known."""
        try:
            message = json.loads(text[:TEXT_CHARACTERS])
            kind = message["type"]
        except (ValueError, TypeError, KeyError):
            return False
        if kind == "interrupt":
            dropped_s = self.on_interrupt()
            connection.send(json.dumps({"type": "interrupted", "dropped_s": round(dropped_s, 3)}))
            return True
        if kind == "end":
            self._done.set()
            return True
        return False
