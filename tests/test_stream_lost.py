"""Sources whose connection is lost: what is tried again and how often, what is the end of the sound, and what is told."""

from __future__ import annotations

import io
import socket
import struct
import threading
import time
import wave
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import soundfile
from stream_parts import running, timeline, wait_until

from flashtalk_cli.config import SoundSource
from flashtalk_cli.live import reading, sources
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.reading import LongReading
from flashtalk_cli.live.sources import FfmpegSource
from flashtalk_cli.live.timeline import RATE_HZ


def test_an_address_that_fails_is_tried_again_with_one_warning() -> None:
    store, warnings = timeline(), []
    source = FfmpegSource(
        SoundSource(kind="url", where="tcp://127.0.0.1:9"), False, store, Clock(), warnings.append
    )
    with running(source):
        wait_until(lambda: source.state == "waiting")
        time.sleep(1.5)
        assert not store.ended
    assert len(warnings) == 1


def sound_bytes(seconds: float, of_s: float) -> bytes:
    """The first seconds of a WAV file that says it is `of_s` long."""
    whole = io.BytesIO()
    with wave.open(whole, "wb") as file:
        file.setparams((1, 2, RATE_HZ, 0, "NONE", ""))
        file.writeframes(np.full(round(of_s * RATE_HZ), 3000, "<i2").tobytes())
    return whole.getvalue()[: 44 + 2 * round(seconds * RATE_HZ)]


def break_off(line: socket.socket) -> None:
    """End a connection as a machine does that died."""
    line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    line.close()


@contextmanager
def serving(serve: Callable[[socket.socket, int], None]) -> Iterator[tuple[str, list[float]]]:
    """A server of sound: its HOST:PORT, and when it was called. `serve` gets each line and its number."""
    calls: list[float] = []
    server = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        while True:
            try:
                line, _ = server.accept()
            except OSError:
                return
            calls.append(time.monotonic())
            threading.Thread(target=serve, args=(line, len(calls)), daemon=True).start()

    threading.Thread(target=run, daemon=True).start()
    try:
        yield f"127.0.0.1:{server.getsockname()[1]}", calls
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()


@pytest.mark.parametrize("how", ["broken off", "stalled"])
def test_a_connection_that_is_lost_is_no_end_of_the_sound(monkeypatch, how) -> None:
    """ffmpeg ends with status 0 in both cases; the sound that returns is taken, and its end is the end."""
    monkeypatch.setattr(sources, "STALLED_S", 1.0)
    held = []

    def serve(line: socket.socket, number: int) -> None:
        line.sendall(sound_bytes(1.0, of_s=1.0 if number == 2 else 60.0))
        if number == 2:
            line.close()
        elif how == "broken off":
            time.sleep(0.5)
            break_off(line)
        else:
            held.append(line)

    store, warnings = timeline(), []
    with serving(serve) as (place, calls):
        where = SoundSource(kind="url", where=f"tcp://{place}/")
        with running(FfmpegSource(where, False, store, Clock(), warnings.append)):
            wait_until(lambda: store.ended)
    for line in held:
        line.close()
    assert len(calls) == 2
    assert store.unspoken_s == pytest.approx(2.0, abs=0.2)
    assert len(warnings) == 1
    assert "trying to get it back" in warnings[0]
    assert "pipe:" not in warnings[0]
    assert "reset" in warnings[0] or "timed out" in warnings[0]


@pytest.mark.parametrize(("settled_s", "n_warnings"), [(10.0, 1), (0.0, 4)])
def test_a_source_that_comes_and_goes_is_tried_less_and_less(monkeypatch, settled_s, n_warnings) -> None:
    """With one warning; a new one only after it was there for a while."""
    monkeypatch.setattr(sources, "SETTLED_S", settled_s)

    def serve(line: socket.socket, number: int) -> None:
        line.sendall(sound_bytes(0.2, of_s=60.0))
        time.sleep(0.5)
        break_off(line)

    store, warnings = timeline(), []
    with serving(serve) as (place, calls):
        where = SoundSource(kind="url", where=f"tcp://{place}/")
        with running(FfmpegSource(where, True, store, Clock(), warnings.append)) as source:
            wait_until(lambda: store.unspoken_s > 0.7, 20)
            wait_until(lambda: source.state == "waiting")
    assert len(warnings) == n_warnings
    assert calls[3] - calls[2] > 0.5 + 4 * sources.FIRST_RETRY_S / 2
    assert store.unspoken_s == pytest.approx(0.8, abs=0.1)


def test_a_file_on_a_server_is_read_on_where_its_connection_broke() -> None:
    """And not spoken from its beginning again."""
    file = io.BytesIO()
    soundfile.write(file, np.full(4 * RATE_HZ, 0.1), RATE_HZ, format="AU")
    whole = file.getvalue()
    asked = []

    def serve(line: socket.socket, number: int) -> None:
        request = line.recv(4096).decode()
        at = int(request.partition("Range: bytes=")[2].partition("-")[0] or 0)
        asked.append(at)
        line.sendall(
            f"HTTP/1.1 206 Partial Content\r\nContent-Type: audio/basic\r\nContent-Length: {len(whole) - at}\r\n"
            f"Content-Range: bytes {at}-{len(whole) - 1}/{len(whole)}\r\nAccept-Ranges: bytes\r\n\r\n".encode()
        )
        line.sendall(whole[at : at + 200_000] if number == 1 else whole[at:])
        time.sleep(0.3)
        (break_off if number == 1 else socket.socket.close)(line)

    store, warnings = timeline(), []
    with serving(serve) as (place, _):
        where = SoundSource(kind="url", where=f"http://{place}/a.au")
        with running(FfmpegSource(where, False, store, Clock(), warnings.append)):
            wait_until(lambda: store.ended)
    assert asked[0] == 0
    assert 100_000 < asked[1] <= 200_000
    assert not warnings
    assert store.unspoken_s == pytest.approx(4.0, abs=0.05)


@pytest.mark.parametrize(("order", "kept"), [("{say}; {sound}", False), ("{sound}; {say}", True)])
def test_what_was_said_long_before_the_end_is_not_its_cause(monkeypatch, order, kept) -> None:
    """A part of a playlist that timed out an hour ago does not make the end of the sound a loss."""
    script = order.format(
        say="echo x: Connection timed out >&2; sleep 0.2", sound="head -c 2000000 /dev/zero"
    )
    monkeypatch.setattr(reading, "command", lambda stream: ["sh", "-c", script])
    with LongReading(None, b"", str) as ffmpeg:
        while ffmpeg.read(65_536):
            pass
        assert ffmpeg.outcome() == (0, ["x: Connection timed out"] if kept else [])
