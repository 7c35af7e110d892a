"""WebRTC: what the endpoint is offered, and what is told when it refuses. Needs an ffmpeg of 8 or later."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from live_outputs import claps, live, of_kind, wait_for

from flashtalk_cli.media.ffmpeg import candidates, listed
from flashtalk_cli.media.live.targets import parse_target

pytestmark = pytest.mark.skipif(
    not any("whip" in listed(program, "-muxers") for program in candidates()),
    reason="needs an ffmpeg with the whip muxer (pip install -U imageio-ffmpeg)",
)


class Refusing(BaseHTTPRequestHandler):
    """Takes an offer and answers 401."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        self.server.offers.append((self.path, self.headers.get("Authorization"), body))  # type: ignore[attr-defined]
        self.send_response(401)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Nothing on the tests' stderr."""


@pytest.fixture
def endpoint() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Refusing) as server:
        server.offers = []  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_offer_is_what_browsers_decode_and_a_refusal_is_told_once(endpoint):
    """Baseline H.264 and Opus, the token as a bearer; the path and the token are shown to nobody."""
    told: list[str] = []
    address = f"http://:TOKEN-SECRET@127.0.0.1:{endpoint.server_port}/whip/PATH-SECRET"
    with live([parse_target("whip", address)], told) as encoder:
        frames = itertools.count()
        wait_for(lambda: encoder.write(*claps(next(frames), 1)) and of_kind(encoder, "whip").reconnects >= 2)
        found = of_kind(encoder, "whip")
    assert len(told) == 1
    assert "trying again" in told[0]
    assert "SECRET" not in repr((told, found))
    path, authorization, offer = endpoint.offers[0]
    assert (path, authorization) == ("/whip/PATH-SECRET", "Bearer TOKEN-SECRET")
    assert "profile-level-id=42" in offer
    assert "opus/48000/2" in offer
