"""The parts of a stream around its loop, each held to alone: the bounded store of sound, sources of all kinds,
a voice agent's WebSocket, the control socket, the figures for Prometheus, latency and the running gain."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from flashtalk_cli.config import PcmFormat, SoundSource
from flashtalk_cli.errors import InputError, UsageError
from flashtalk_cli.live import control
from flashtalk_cli.live.address import Address, check_free, parse_address
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.control import Control, ask
from flashtalk_cli.live.inputs import parse_listen, parse_pcm, parse_source
from flashtalk_cli.live.latency import Latency
from flashtalk_cli.live.listen import BUSY, MESSAGE_BYTES, UNFIT, ListenSource
from flashtalk_cli.live.loudness import RunningGain
from flashtalk_cli.live.masking import masked
from flashtalk_cli.live.sources import Decoder, FfmpegSource, Source, StdinSource, ffmpeg_input
from flashtalk_cli.live.status import METRICS, prometheus
from flashtalk_cli.live.timeline import RATE_HZ, Timeline
from flashtalk_cli.live.web import Web
from flashtalk_cli.media.ffmpeg import command
from flashtalk_cli.media.loudness import normalise_loudness

FPS = 25


def timeline(backlog_s: float = 30.0, rate_hz: int = RATE_HZ) -> Timeline:
    return Timeline(past_s=1.0, backlog_s=backlog_s, fps=FPS, rate_hz=rate_hz)


def wait_until(true: Callable[[], bool], limit_s: float = 10.0) -> None:
    end_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < end_s, "it did not happen"
        time.sleep(0.01)


# The store of sound


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["add", "take", "skip", "pauses", "interrupt"]), st.integers(1, 900)))
)
def test_the_store_keeps_order_bounds_and_count(happenings) -> None:
    """Against a plain list: what is taken is what arrived, in order, less what is counted as dropped."""
    store = timeline(backlog_s=2.0, rate_hz=1000)
    next_value, taken, dropped_before = 1, [], 0
    for what, n in happenings:
        if what == "add":
            quiet = n % 3 == 0
            values = np.arange(next_value, next_value + n) * (1e-9 if quiet else 1.0)
            store.add(values.astype(np.float32), float(next_value))
            next_value += n
        elif what == "take":
            frames = 1 + n % 30
            got = store.take(frames, silence_before_s=(n % 5) / 100)
            assert len(got.samples) == frames * 40
            assert len(got.arrived_s) == frames
            sound = got.samples[got.samples != 0]
            assert len(sound) + got.silent_samples == len(got.samples)
            taken += [value if value >= 1 else value * 1e9 for value in sound.tolist()]
            n_past = min(1000, len(got.samples))
            np.testing.assert_array_equal(store.heard(0.0)[-n_past:], got.samples[-n_past:])
        elif what == "interrupt":
            store.interrupt()
            assert store.unspoken_s == 0
        else:
            store.skip(n / 1000, pauses_only=what == "pauses")
        assert store.unspoken_s <= 2.0 + 1e-9
        assert store.dropped_samples >= dropped_before
        dropped_before = store.dropped_samples
        assert len(taken) + store.dropped_samples + round(store.unspoken_s * 1000) == next_value - 1
    rounded = np.round(taken)
    assert (np.diff(rounded) > 0).all(), "in order, none twice"


def test_what_is_heard_ends_with_what_has_arrived_of_the_look_ahead() -> None:
    store = timeline(rate_hz=1000)
    store.add(np.arange(1, 101, dtype=np.float32), 0.0)
    store.take(2)
    heard = store.heard(0.05)
    assert len(heard) == 1050
    np.testing.assert_array_equal(heard[-130:], np.concatenate([np.arange(1, 101), np.zeros(30)])[-130:])


def test_a_pause_is_shortened_and_speech_is_not() -> None:
    store = timeline(rate_hz=1000)
    voice = np.concatenate([np.ones(500), np.full(1000, 1e-5), np.ones(500)]).astype(np.float32)
    store.add(voice, 0.0)
    assert store.skip(5.0, pauses_only=True) == pytest.approx(0.7, abs=0.05)
    left = store.take(100).samples
    assert (left == 1).sum() == 1000


def test_single_samples_do_not_make_a_piece_each() -> None:
    store = timeline()
    for index in range(3000):
        store.add(np.ones(1, np.float32), float(index))
    assert len(store._unspoken) < 10


# Sources


@contextmanager
def running(source: Source) -> Iterator[Source]:
    source.start()
    try:
        yield source
    finally:
        source.close()
        source._thread.join(5)
        assert not source._thread.is_alive()


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


@settings(max_examples=100, deadline=None)
@given(*[st.from_regex(r"[A-Za-z0-9]{8,20}", fullmatch=True) for _ in range(4)])
def test_an_address_is_shown_without_its_secrets(user, password, key, token) -> None:
    url = f"rtmp://{user}:{password}@media.example:1935/app/{key}?token={token}"
    text = masked(url, f"{url}: failed; stream {key} of {user} ({password}, {token})")
    for secret in (user, password, key, token):
        assert secret not in text.replace("media.example", "")
    assert "media.example:1935" in text


def test_the_address_of_a_source_that_fails_is_warned_of_without_its_key() -> None:
    store, warnings = timeline(), []
    where = "rtmp://127.0.0.1:9/live/sk-SECRET?token=ALSO"
    source = FfmpegSource(SoundSource(kind="url", where=where), False, store, Clock(), warnings.append)
    with running(source):
        wait_until(lambda: bool(warnings))
    assert "127.0.0.1:9" in warnings[0]
    assert "SECRET" not in warnings[0]
    assert "ALSO" not in warnings[0]


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


# A voice agent


@contextmanager
def listening(
    token: str | None = None, backlog_s: float = 30.0
) -> Iterator[tuple[ListenSource, str, Timeline]]:
    store = timeline(backlog_s)
    source = ListenSource(Address("127.0.0.1", 0), PcmFormat(), token, store, Clock(), lambda text: None)
    with running(source):
        yield source, f"ws://127.0.0.1:{source.address.port}/", store


def test_an_agent_speaks_interrupts_leaves_and_comes_back() -> None:
    with listening() as (source, url, store):
        source.on_interrupt = store.interrupt
        with connect(url) as agent:
            assert json.loads(agent.recv(timeout=5)) == {"type": "ready", "pcm": "s16le:16000:1"}
            agent.send(np.full(16_000, 8000, "<i2").tobytes())
            wait_until(lambda: store.unspoken_s > 0.9)
            agent.send(json.dumps({"type": "interrupt"}))
            told = json.loads(agent.recv(timeout=5))
            assert told["type"] == "interrupted"
            assert told["dropped_s"] > 0.9
            assert store.unspoken_s == 0
        wait_until(lambda: source.state == "waiting")
        with connect(url) as agent:
            agent.recv(timeout=5)
            agent.send(np.zeros(1600, "<i2").tobytes())
            agent.send(json.dumps({"type": "end"}))
            wait_until(lambda: store.ended)


def test_only_who_shows_the_token_may_speak() -> None:
    with listening("s3cret") as (_, url, _store):
        for attempt in (url, url + "?token=wrong"):
            with pytest.raises(InvalidStatus) as refused:
                connect(attempt).close()
            assert refused.value.response.status_code == 401
        connect(url + "?token=s3cret").close()
    with listening("s3cret") as (_, url, _store):
        connect(url, additional_headers={"Authorization": "Bearer s3cret"}).close()


def test_a_web_page_without_the_token_is_turned_away() -> None:
    with listening() as (_, url, _store), pytest.raises(InvalidStatus) as refused:
        connect(url, origin="https://evil.example").close()
    assert refused.value.response.status_code == 403


def code_after(agent: ClientConnection, message: str | bytes) -> int | None:
    """The code with which the connection is closed after a message."""
    with suppress(ConnectionClosed):
        agent.send(message)
        agent.recv(timeout=5)
    return agent.close_code


def test_a_second_client_nonsense_and_giant_messages_are_refused() -> None:
    with listening() as (source, url, _store):
        with connect(url) as first:
            first.recv(timeout=5)
            with connect(url) as second, pytest.raises(ConnectionClosed) as busy:
                second.recv(timeout=5)
            assert busy.value.rcvd.code == BUSY
        wait_until(lambda: source.state == "waiting")
        for message, code in (("{}", UNFIT), ("[1]", UNFIT), (b"\0" * (MESSAGE_BYTES + 2), 1009)):
            time.sleep(0.05)
            with connect(url) as agent:
                agent.recv(timeout=5)
                assert code_after(agent, message) == code


def test_an_agent_faster_than_speech_is_slowed_down_and_loses_nothing() -> None:
    with listening(backlog_s=5.0) as (_, url, store), connect(url) as agent:
        agent.recv(timeout=5)
        sender = threading.Thread(
            target=lambda: [agent.send(np.full(16_000, 500, "<i2").tobytes()) for _ in range(60)], daemon=True
        )
        sender.start()
        wait_until(lambda: store.unspoken_s > 4.5)
        time.sleep(0.3)
        assert store.unspoken_s <= 5.0
        taken = 0
        while taken < 60 * RATE_HZ * 0.99:
            got = store.take(FPS)
            taken += len(got.samples) - got.silent_samples
            time.sleep(0.005)
        assert store.dropped_samples == 0


def test_beyond_this_machine_a_token_is_needed() -> None:
    with pytest.raises(UsageError, match="token"):
        parse_listen("0.0.0.0:9000")
    assert parse_listen("0.0.0.0:9000", token="x").where == "0.0.0.0:9000"
    assert parse_listen("9000").where == "127.0.0.1:9000"


@pytest.mark.parametrize("text", ["", "host", "host:", "host:x", "host:70000", ":-1"])
def test_an_address_that_is_none_is_explained(text) -> None:
    with pytest.raises(UsageError, match="HOST:PORT"):
        parse_address("--metrics", text)


# Control


@pytest.fixture
def socket_path(tmp_path) -> Path:
    return tmp_path / "control.sock"


def refuse(request: dict) -> dict:
    if request.get("command") == "crash":
        raise RuntimeError("boom")
    if request.get("command") != "status":
        raise UsageError("commands are: status")
    return {"state": "idle"}


def test_the_control_socket_is_its_owners_alone_and_gone_afterwards(socket_path) -> None:
    with Control(socket_path, refuse):
        assert stat.S_IMODE(socket_path.stat().st_mode) == 0o600
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}
        with pytest.raises(UsageError, match="commands are"):
            ask(socket_path, {"command": "dance"})
        with pytest.raises(UsageError, match="internal error RuntimeError"):
            ask(socket_path, {"command": "crash"})
    assert not socket_path.exists()
    with pytest.raises(UsageError, match="no stream listens"):
        ask(socket_path, {"command": "status"})


def test_a_socket_left_by_a_killed_stream_is_taken_over_and_a_living_one_is_not(socket_path) -> None:
    import socket

    left = socket.socket(socket.AF_UNIX)
    left.bind(str(socket_path))
    left.close()
    with Control(socket_path, refuse):
        with pytest.raises(UsageError, match="--control"):
            Control(socket_path, refuse)
        assert ask(socket_path, {"command": "status"}) == {"state": "idle"}


def test_nonsense_on_the_control_socket_is_answered(socket_path) -> None:
    import socket

    with Control(socket_path, refuse), socket.socket(socket.AF_UNIX) as line:
        line.settimeout(5)
        line.connect(str(socket_path))
        answers = line.makefile("rb")
        for nonsense in (b"\xff\xfe\n", b"[]\n", b"7\n", b"{}\n", b'{"command": ["status"]}\n'):
            line.sendall(nonsense)
            assert json.loads(answers.readline())["ok"] is False
        line.sendall(b'{"command": "status"}\n')
        assert json.loads(answers.readline())["ok"] is True


def test_the_one_stream_that_runs_is_found(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(UsageError, match="no stream"):
        control.find_socket()
    path = control.default_socket()
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with Control(path, refuse):
        assert control.find_socket() == path
        with Control(path.with_name("other.sock"), refuse), pytest.raises(UsageError, match="2 streams"):
            control.find_socket()
    path.parent.chmod(0o755)
    with pytest.raises(UsageError, match="yours alone"):
        control.default_socket()


# Figures


STATUS = {
    **{key: 1.5 for _, key, _ in METRICS.values()},
    "state": "idle",
    "source": "live",
    "latency": {
        part: {"p50_s": 0.1, "p95_s": None, "p99_s": 0.3} for part in ("total", "fill", "compute", "delivery")
    },
    "sinks": [
        {
            **{
                "shown": 'rtmp://h/a/***"\\',
                "kind": "rtmp",
                "state": "live",
                "reconnects": 2,
                "last_error": "",
            },
            **{"bytes_sent": 10, "frames_sent": 5, "frames_dropped": 1, "behind_s": 0.5},
        }
    ],
}


def test_every_line_for_prometheus_is_well_formed() -> None:
    import re

    text = prometheus(STATUS)
    sample = re.compile(
        r'^flashtalk_[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? (-?[0-9.e+-]+|NaN)$'
    )
    families = set()
    for line in text.splitlines():
        if line.startswith("# TYPE"):
            families.add(line.split()[2])
        elif not line.startswith("# HELP"):
            assert sample.match(line), line
            assert re.match(r"[a-z_]+", line)[0] in families
    assert text.endswith("\n")
    assert 'quantile="0.95"} NaN' in text


def get(url: str, host: str | None = None) -> tuple[int, bytes]:
    request = urllib.request.Request(url, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


def free_port() -> int:
    import socket

    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        return int(line.getsockname()[1])


def test_the_web_server_serves_what_it_should_and_nothing_else(tmp_path) -> None:
    (tmp_path / "hls").mkdir()
    (tmp_path / "hls/index.m3u8").write_text("#EXTM3U\n")
    (tmp_path / "hls/key.txt").write_text("secret")
    (tmp_path / "other.ts").write_text("secret")
    port = free_port()
    with Web(f"127.0.0.1:{port}", lambda: STATUS, tmp_path / "hls"):
        base = f"http://127.0.0.1:{port}"
        assert get(base + "/metrics")[1].startswith(b"# HELP")
        assert b"<video" in get(base + "/")[1]
        assert json.loads(get(base + "/status")[1])["state"] == "idle"
        assert get(base + "/hls/index.m3u8") == (200, b"#EXTM3U\n")
        for path in (
            "/hls/key.txt",
            "/hls/../other.ts",
            "/hls/%2e%2e/other.ts",
            "/hls/.ts",
            "/nothing",
            "/hls/a.ts",
        ):
            assert get(base + path)[0] == 404, path
        assert get(base + "/status", host="evil.example")[0] == 403
        with pytest.raises(UsageError, match="cannot listen"):
            check_free("--metrics", Address("127.0.0.1", port))
    with Web(f"127.0.0.1:{(second := free_port())}", lambda: STATUS, None):
        assert get(f"http://127.0.0.1:{second}/metrics")[0] == 200
        assert get(f"http://127.0.0.1:{second}/")[0] == 404


def test_latency_is_of_the_last_frames_with_sound() -> None:
    seen = Latency(size=100)
    assert seen.summary()["total"]["p50_s"] is None
    for index in range(1000):
        seen.add(
            np.array([index, np.nan, index]),
            index + 0.5,
            index + 0.7,
            index + 0.8 if index > 900 else index + 9,
        )
    summary = seen.summary()
    assert summary["total"] == {"p50_s": 0.8, "p95_s": 0.8, "p99_s": 0.8}
    assert summary["fill"]["p50_s"] == 0.5
    assert summary["compute"]["p50_s"] == pytest.approx(0.2)
    assert summary["delivery"]["p50_s"] == pytest.approx(0.1)


@pytest.mark.parametrize("level", [0.003, 0.4])
def test_the_running_gain_is_the_one_of_the_whole_sound(level) -> None:
    """A voice of steady loudness: after seconds the gain is within 1 dB of what measuring it whole gives."""
    rng = np.random.default_rng(2)
    voice = (
        level * rng.standard_normal(12 * RATE_HZ) * np.repeat(rng.random(120) > 0.2, RATE_HZ // 10)
    ).astype(np.float32)
    gain = RunningGain(RATE_HZ, -23.0)
    for at in range(0, len(voice), RATE_HZ):
        factor = gain.add(voice[at : at + RATE_HZ])
    whole = np.abs(normalise_loudness(voice, -23.0, RATE_HZ)).max() / np.abs(voice).max()
    assert 20 * np.log10(factor / whole) == pytest.approx(0, abs=1.0)
    assert len(gain._blocks) <= 300


def test_noise_without_speech_is_heard_as_silence_and_speech_is_not() -> None:
    rng = np.random.default_rng(3)
    gain = RunningGain(RATE_HZ, -23.0)
    speech = 0.05 * rng.standard_normal(4 * RATE_HZ)
    noise = 3e-4 * rng.standard_normal(8 * RATE_HZ)
    gain.add(speech)
    gain.add(noise)
    assert not gain.hear(noise).any()
    assert gain.hear(speech).any()
    with_both = np.concatenate([speech, noise])
    np.testing.assert_allclose(gain.hear(with_both), with_both * gain.factor, rtol=1e-5)


def test_no_thread_of_a_source_lives_on() -> None:
    """All sources of this file have ended with their tests."""
    assert not [thread for thread in threading.enumerate() if thread.name in ("source", "listen")]
