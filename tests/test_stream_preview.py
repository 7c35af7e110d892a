"""The preview page in a real browser: it plays the stream, with the figures beside it."""

from __future__ import annotations

import io
import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import Browser, find_browser
from live_outputs import FPS, claps, free_port, live
from PIL import Image
from stream_parts import STATUS

from flashtalk_cli.live.web import Web
from flashtalk_cli.media.live.targets import parse_target

pytestmark = [
    pytest.mark.skipif(find_browser() is None, reason="needs Chromium (apt install chromium)"),
    pytest.mark.slow,
]


@pytest.fixture
def playlist(tmp_path: Path) -> Iterator[Path]:
    """A folder into which claps are streamed as HLS, in real time."""
    over = threading.Event()
    with live([parse_target("hls", str(tmp_path / "hls"))]) as encoder:

        def send() -> None:
            start_s = time.monotonic()
            for at in itertools.count():
                if over.wait(max(0.0, start_s + at / FPS - time.monotonic())):
                    return
                encoder.write(*claps(at, 1))

        sender = threading.Thread(target=send)
        sender.start()
        yield tmp_path / "hls"
        over.set()
        sender.join()


def test_a_browser_plays_the_stream_and_shows_its_figures(playlist) -> None:
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: {**STATUS, "frames": 1234}, playlist):
        with Browser(f"http://127.0.0.1:{port}/") as page:
            if not page.value("document.createElement('video').canPlayType('application/vnd.apple.mpegurl')"):
                pytest.skip("this browser plays no HLS")
            assert page.wait_for("document.getElementById('video').currentTime > 2", 40)
            assert page.value("document.getElementById('video').videoWidth") == 64
            assert page.wait_for("document.getElementById('figures').textContent.includes('1234 frames')", 5)
            shown = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("L"))
            assert page.value(
                "performance.getEntriesByType('resource').every(e => e.name.startsWith(location.origin))"
            )
        assert shown.std() > 5, "something is to be seen"
