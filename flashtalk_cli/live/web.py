"""A small server for this machine: /metrics for Prometheus, and the preview page with its stream."""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flashtalk_cli.errors import UsageError
from flashtalk_cli.live.address import LOOPBACK, Address, parse_address
from flashtalk_cli.live.status import prometheus

log = logging.getLogger(__name__)

REQUEST_S = 10.0
MOST_CONNECTIONS = 32  # at once, a thread each; a browser opens six
POLL_S = 0.1  # how soon it ends when it is to end
HLS_TYPES = {
    ".m3u8": "application/vnd.apple.mpegurl",
    ".mp4": "video/mp4",
    ".m4s": "video/iso.segment",
    ".ts": "video/mp2t",
}


class Web:
    """Serves at HOST:PORT while its context is open. With `hls`, the folder of a stream, also the preview."""

    def __init__(self, address: str, status: Callable[[], dict[str, Any]], hls: Path | None) -> None:
        where = parse_address("address", address)
        handler = partial(_Request, status, hls, where.is_loopback)
        try:
            self._server = _Server(where, handler)
        except OSError as error:
            raise UsageError(f"cannot listen at {where} ({error.strerror}); choose another") from None
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(POLL_S,), name="web", daemon=True
        )

    def __enter__(self) -> Web:
        self._thread.start()
        return self

    def __exit__(self, *problem: object) -> None:
        self._server.shutdown()
        self._server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, where: Address, handler: Callable[..., BaseHTTPRequestHandler]) -> None:
        self.address_family = where.family
        self._places = threading.BoundedSemaphore(MOST_CONNECTIONS)
        super().__init__((where.host, where.port), handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether it gets a thread; else it is closed."""
        return self._places.acquire(blocking=False)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer it, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """That a client left before it had its answer is no news; anything else is a fault of ours."""
        left = isinstance(sys.exc_info()[1], OSError)
        log.log(logging.DEBUG if left else logging.ERROR, "a request failed", exc_info=True)


class _Request(BaseHTTPRequestHandler):
    timeout = REQUEST_S

    def __init__(
        self, status: Callable[[], dict[str, Any]], hls: Path | None, local: bool, *rest: Any
    ) -> None:
        self._status = status
        self._hls = hls
        self._local = local
        super().__init__(*rest)

    def do_GET(self) -> None:
        """Answer a request."""
        try:
            host = urlsplit(f"//{self.headers.get('Host', '')}").hostname
            path = urlsplit(self.path).path
        except ValueError:
            self.send_error(HTTPStatus.BAD_REQUEST)
            return
        if self._local and host not in LOOPBACK:  # a page elsewhere whose name was made to mean this machine
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        if path == "/metrics":
            self._send(prometheus(self._status()).encode(), "text/plain; version=0.0.4; charset=utf-8")
        elif self._hls is not None and path == "/":
            page = resources.files("flashtalk_cli.live").joinpath("preview.html").read_bytes()
            self._send(page, "text/html; charset=utf-8")
        elif self._hls is not None and path == "/status":
            self._send(json.dumps(self._status()).encode(), "application/json")
        elif self._hls is not None and path.startswith("/hls/"):
            self._send_segment(self._hls, path.removeprefix("/hls/"))
        else:
            self.send_error(HTTPStatus.NOT_FOUND)

    def _send_segment(self, folder: Path, name: str) -> None:
        kind = HLS_TYPES.get(Path(name).suffix)
        if kind is None or "/" in name or name.startswith("."):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            data = (folder / name).read_bytes()
        except (OSError, ValueError):  # not yet, or no more; or no name of a file
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        self._send(data, kind)

    def _send(self, body: bytes, kind: str) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing: a scrape every few seconds is no news."""
