"""Where the sound of a stream comes from: files, pipes, microphones and addresses, however they fail, and what a user
may name."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
from stream_parts import FPS, running, timeline, wait_until

from flashtalk_cli.config import PcmFormat, SoundSource
from flashtalk_cli.errors import InputError, UsageError
from flashtalk_cli.live import sources
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.inputs import parse_pcm, parse_source
from flashtalk_cli.live.sources import Decoder, FfmpegSource, StdinSource, ffmpeg_input
from flashtalk_cli.live.timeline import RATE_HZ
from flashtalk_cli.media.ffmpeg import command


@pytest.mark.parametrize(
    "pcm", ["s16le:16000:1", "s16be:44100:2", "f32le:48000:1", "u8:8000:1", "s32le:24000:3"]
)
def test_raw_samples_cut_anywhere_are_the_sound_that_was_meant(pcm) -> None:
    """A tone in each format, in pieces of random lengths, is the tone at 48 kHz."""
    given_format = parse_pcm(pcm)
    rng = np.random.default_rng(1)
    n = given_format.rate_hz
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(n) / n)
    if given_format.encoding == "u8":
        raw = np.round(tone * 127 + 128).astype("u1")
    elif given_format.encoding == "f32le":
        raw = tone.astype("<f4")
    else:
        kind = {"s16le": "<i2", "s16be": ">i2", "s32le": "<i4"}[given_format.encoding]
        raw = np.round(tone * np.iinfo(kind).max).astype(kind)
    data = np.repeat(raw[:, None], given_format.channels, axis=1).tobytes()
    decoder, pieces, at = Decoder(given_format), [], 0
    while at < len(data):
        size = int(rng.integers(1, 4000))
        pieces.append(decoder.decode(data[at : at + size]))
        at += size
    found = np.concatenate([*pieces, decoder.finish()])
    assert abs(len(found) - RATE_HZ) <= 2
    wanted = 0.5 * np.sin(2 * np.pi * 440 * np.arange(len(found)) / RATE_HZ)
    assert np.abs(found - wanted)[2000:-2000].max() < 0.02


def test_samples_that_are_no_numbers_are_silence() -> None:
    odd = np.array([np.nan, np.inf, -np.inf, 1e30, 0.25], "<f4")
    found = Decoder(PcmFormat(encoding="f32le", rate_hz=RATE_HZ)).decode(odd.tobytes())
    np.testing.assert_array_equal(found, np.array([0, 0, 0, 8, 0.25], np.float32))


@pytest.mark.parametrize(
    "text", ["", "s16", "s24le:16000:1", "s16le:1:1", "s16le:16000:99", "s16le:16000:1:1", "x"]
)
def test_a_format_that_is_none_is_explained(text) -> None:
    with pytest.raises(UsageError, match="s16le:16000:1"):
        parse_pcm(text)


def write_tone(path: Path, seconds: float, rate_hz: int = 22_050) -> None:
    soundfile.write(path, 0.5 * np.sin(np.arange(round(seconds * rate_hz)) / 10), rate_hz)


def test_a_file_waits_for_room_and_is_read_whole(tmp_path) -> None:
    write_tone(tmp_path / "a.wav", 8.0)
    store = timeline(backlog_s=5.0)
    source = FfmpegSource(parse_source(str(tmp_path / "a.wav")), False, store, Clock(), pytest.fail)
    with running(source):
        wait_until(lambda: store.unspoken_s > 4.7)
        time.sleep(0.3)
        assert not store.ended
        assert store.dropped_samples == 0
        taken = 0.0
        while not (store.ended and not store.unspoken_s):
            taken += FPS / FPS - store.take(FPS).silent_samples / RATE_HZ
            time.sleep(0.01)
    assert taken == pytest.approx(8.0, abs=0.03)


def test_a_looped_file_never_ends(tmp_path) -> None:
    write_tone(tmp_path / "a.wav", 0.5)
    store = timeline(backlog_s=5.0)
    source = FfmpegSource(
        parse_source(str(tmp_path / "a.wav"), loop=True), False, store, Clock(), pytest.fail
    )
    with running(source):
        wait_until(lambda: store.unspoken_s > 4.7)
        assert not store.ended


def test_a_file_without_sound_ends_with_a_warning(tmp_path) -> None:
    (tmp_path / "no.wav").write_bytes(b"not a sound" * 10)
    store, warnings = timeline(), []
    with running(
        FfmpegSource(parse_source(str(tmp_path / "no.wav")), False, store, Clock(), warnings.append)
    ):
        wait_until(lambda: store.ended)
    assert len(warnings) == 1
    assert "no.wav" in warnings[0]


def test_a_microphone_that_is_not_there_is_tried_again() -> None:
    """In words: what ffmpeg says of a device that nobody has."""
    store, warnings = timeline(), []
    with running(FfmpegSource(parse_source("mic:no-such"), False, store, Clock(), warnings.append)) as source:
        wait_until(lambda: bool(warnings))
        assert source.paced
    assert warnings[0].startswith("no-such: no sound (")
    assert "***" not in warnings[0]


def test_a_playlist_from_outside_reads_no_file_here(tmp_path) -> None:
    """A playlist over http that names a local file: ffmpeg is given no protocol that could open it."""
    write_tone(tmp_path / "secret.wav", 1.0)
    playlist = tmp_path / "list.m3u8"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile://{tmp_path}/secret.wav\n#EXT-X-ENDLIST\n"
    )
    import functools
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    store, warnings = timeline(), []
    where = f"http://127.0.0.1:{server.server_port}/list.m3u8"
    with running(FfmpegSource(SoundSource(kind="url", where=where), False, store, Clock(), warnings.append)):
        wait_until(lambda: bool(warnings))
    server.shutdown()
    assert store.arrived_samples == 0
    options = command(ffmpeg_input(SoundSource(kind="url", where=where)).output("-"))
    assert "file" not in options[options.index("-protocol_whitelist") + 1].split(",")


@pytest.mark.parametrize(
    ("where", "of_4", "named"),
    [
        ("rtsp://h/a", False, "timeout"),
        ("rtsp://h/a", True, "stimeout"),  # there, `timeout` makes ffmpeg a server
        ("http://h/a", False, "rw_timeout"),
        ("rtmp://h/a/k", False, "rw_timeout"),
        ("udp://h:1", False, ""),
    ],
)
def test_a_connection_without_a_byte_is_given_up(monkeypatch, where, of_4, named) -> None:
    """Each protocol by the option that it follows: rtsp ignores rw_timeout."""
    monkeypatch.setattr(sources, "listed", lambda *what: {"-stimeout"} if of_4 else {"-timeout"})
    monkeypatch.setattr(sources, "reads_lists", lambda: False)
    words = command(ffmpeg_input(SoundSource(kind="url", where=where)).output("-"))
    limits = {word: words[at + 1] for at, word in enumerate(words) if word.endswith("timeout")}
    assert limits == ({f"-{named}": "15000000"} if named else {})


def test_standard_input_is_read_to_its_end() -> None:
    out, into = os.pipe()
    store = timeline()
    with running(StdinSource(out, PcmFormat(rate_hz=24_000), store, Clock(), pytest.fail)):
        os.write(into, np.full(24_000, 1000, "<i2").tobytes() + b"\x01")
        wait_until(lambda: store.unspoken_s > 0.9)
        os.close(into)
        wait_until(lambda: store.ended)
    os.close(out)
    assert store.unspoken_s == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(
    ("audio", "kind"),
    [
        ("-", "stdin"),
        ("mic", "microphone"),
        ("mic:hw:1,0", "microphone"),
        ("rtmp://h/a/k", "url"),
        ("https://h/x", "url"),
    ],
)
def test_what_a_user_names_as_sound_is_recognised(audio, kind) -> None:
    assert parse_source(audio).kind == kind


@pytest.mark.parametrize("audio", ["file:///etc/passwd", "concat://x", "data://x", "nowhere.wav", "/"])
def test_what_is_no_source_is_refused(audio) -> None:
    with pytest.raises((UsageError, InputError)):
        parse_source(audio)


def test_no_thread_of_a_source_lives_on() -> None:
    """All sources of this file have ended with their tests."""
    assert not [thread for thread in threading.enumerate() if thread.name in ("source", "listen")]
