"""Streams through the real command line and the real worker, on a tiny seeded model: what comes out, how they
are steered, how they end; and what the command line says of requests that make no sense."""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from stream_process import SMALL, Stream, furnish
from websockets.sync.client import connect

from flashtalk_cli.cli.app import run
from flashtalk_cli.media.probe import probe

END_S = 5.0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, two pictures, and a sound."""
    return furnish(tmp_path_factory.mktemp("stream"))


@pytest.fixture
def streams() -> Iterator[list[Stream]]:
    started: list[Stream] = []
    yield started
    for stream in started:
        stream.close()


def test_a_file_becomes_a_recording_of_its_length(place, streams) -> None:
    """To the frame, with its sound, marked as what it is; the events say so; the socket is gone."""
    streams.append(stream := Stream(place, "--audio", "speech.wav", "-o", "out.mp4"))
    assert stream.end() == 0, stream.process.stderr.read()
    found = probe(place / "out.mp4")
    done = stream.events[-1]
    repeated = max((e["repeated_frames"] for e in stream.events if e["event"] == "live"), default=0)
    assert done["event"] == "done"
    assert done["path"] == str(place / "out.mp4")
    assert found.video.n_frames == done["frames"] >= 63
    assert done["frames"] - 63 <= repeated + 25
    assert abs(found.video.duration_s - found.audio.duration_s) <= 1 / 25 + 1e-6
    assert "Synthetic media" in found.tags["comment"]
    assert not stream.control.exists()
    assert not list(place.glob("*.part*"))


def feed(pipe: IO[bytes], data: bytes) -> None:
    with suppress(BrokenPipeError):
        while True:
            pipe.write(data)


def test_a_live_voice_is_steered_and_ended(place, streams) -> None:
    """Raw PCM on stdin that never ends: status, interrupt, mute, prompt, picture; SIGTERM ends it in order."""
    streams.append(
        stream := Stream(place, "--audio", "-", "--pcm", "f32le:24000", "-o", "live.mkv", "--hls", "hls")
    )
    assert stream.process.stdin
    tone = (0.2 * np.sin(np.arange(240_000) / 20)).astype("<f4").tobytes()
    threading.Thread(target=feed, args=(stream.process.stdin, tone), daemon=True).start()
    stream.wait_for(lambda e: e["state"] == "speaking" and e["media_s"] > 1)
    assert stream.ask(command="status")["source"] == "live"
    assert stream.ask(command="interrupt")["dropped_s"] > 1
    assert stream.ask(command="mute") == {}
    assert stream.ask(command="status")["muted"] is True
    assert stream.ask(command="unmute") == {}
    assert stream.ask(command="prompt", text="A person sings.") == {}
    assert stream.ask(command="picture", path=str(place / "other.png")) == {}
    with pytest.raises(Exception, match="no such file"):
        stream.ask(command="picture", path=str(place / "none.png"))
    with pytest.raises(Exception, match="commands are"):
        stream.ask(command="picture")
    before = stream.ask(command="status")["chunks"]
    stream.wait_for(lambda e: e["chunks"] > before + 2)
    asked_s = time.monotonic()
    stream.process.send_signal(signal.SIGTERM)
    assert stream.end() == 0
    assert time.monotonic() - asked_s < END_S
    assert stream.events[-1]["event"] == "done"
    assert probe(place / "live.mkv").video.n_frames > 25
    assert (place / "hls/index.m3u8").read_text().rstrip().endswith("#EXT-X-ENDLIST")


@pytest.mark.slow
def test_an_agent_speaks_through_two_ranks_and_ends_the_stream(place, streams) -> None:
    """A WebSocket for sound, before and after which the person idles; both ranks end with it."""
    import socket

    with socket.socket() as line:
        line.bind(("127.0.0.1", 0))
        port = line.getsockname()[1]
    token = place / "token.txt"
    token.write_text("s3cret\n")
    options = ["--listen", str(port), "--token", f"@{token}", "--device", "cpu", "--gpus", "2"]
    streams.append(stream := Stream(place, *options, "-o", "agent.mp4"))
    stream.wait_for(lambda e: e["state"] == "idle" and e["chunks"] > 0)
    with connect(f"ws://127.0.0.1:{port}/?token=s3cret") as agent:
        agent.recv(timeout=5)
        agent.send((3000 * np.sin(np.arange(24_000) / 9)).astype("<i2").tobytes())
        stream.wait_for(lambda e: e["state"] == "speaking")
        agent.send(json.dumps({"type": "end"}))
        assert stream.end() == 0
    assert stream.events[-1]["event"] == "done"
    assert "s3cret" not in json.dumps(stream.events)


def complaint(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(arguments)
    return code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--audio SOURCE or --listen"),
        (["--audio", "speech.wav", "--listen", "9000"], "--audio SOURCE or --listen"),
        (["--audio", "speech.wav"], "no output"),
        (["--audio", "speech.wav", "--pcm", "s16le"], "--pcm"),
        (["--audio", "speech.wav", "--token", "x"], "--token goes with --listen"),
        (["--audio", "mic", "--loop", "-o", "x.mp4"], "--loop repeats a file"),
        (["--listen", "0.0.0.0:9000", "-o", "x.mp4"], "give a --token"),
        (["--audio", "speech.wav", "-o", "speech.wav"], "mp4"),
        (["--audio", "speech.wav", "-o", "x.mp4", "--late", "never"], "repeat, drop, fail"),
        (["--audio", "speech.wav", "-o", "x.mp4", "--metrics", "nowhere"], "HOST:PORT"),
        (["--audio", "speech.wav", "--rtmp", "http://h/a/k"], "rtmp://"),
        (["--audio", "ftp://x", "-o", "x.mp4"], "no sound is read from ftp://"),
        (["--audio", "rtmp://[", "-o", "x.mp4"], "the address cannot be understood"),
        (["--audio", "speech.wav", "-o", "x.mp4", "--control", "p.png"], "p.png: is there and no socket"),
        (["--audio", "none.wav", "-o", "x.mp4"], "none.wav: no such file"),
        (["--audio", "p.png", "-o", "x.mp4"], "p.png: no sound"),
        (["--audio", "env:NO_SUCH_NAME", "-o", "x.mp4"], "NO_SUCH_NAME"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_line(place, monkeypatch, capsys, arguments, said) -> None:
    monkeypatch.chdir(place)
    code, text = complaint(["stream", "p.png", *SMALL, *arguments], capsys)
    assert code in (2, 3, 4, 6)
    assert said in text
    assert len(text.strip().splitlines()) <= 3, "an error, after a stage or two"


@pytest.mark.parametrize(
    "arguments", [["dance"], ["prompt"], ["stop", "now"], ["status", "--socket", "none.sock"]]
)
def test_a_command_that_makes_no_sense_is_one_line(place, monkeypatch, capsys, arguments) -> None:
    monkeypatch.chdir(place)
    code, text = complaint(["ctl", *arguments], capsys)
    assert code == 2
    assert len(text.strip().splitlines()) == 1
