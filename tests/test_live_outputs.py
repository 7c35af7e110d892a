"""Live outputs: recordings, segments, a pipe, datagrams, and runs of days.

Frame counts are exact, and sound and picture are within a frame of each other.
"""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from live_outputs import (
    CLAP_FRAMES,
    FPS,
    PER_FRAME,
    SIDE_PX,
    check_claps,
    claps,
    free_port,
    live,
    n_frames,
    quick,
    send_claps,
    times,
    wait_for,
)

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.media.live import encoder as encoder_module
from flashtalk_cli.media.live.encoder import LiveEncoder, check_targets
from flashtalk_cli.media.live.supervise import Sink
from flashtalk_cli.media.live.targets import parse_target
from flashtalk_cli.media.live.units import US_PER_S, frame_time_us, packet_time_us
from flashtalk_cli.media.probe import probe

N_FRAMES = 3 * CLAP_FRAMES + 7  # not a whole number of pieces, groups or packets


@contextmanager
def drained(path: Path) -> Iterator[int]:
    """The writing end of a pipe whose other end is copied to a file."""
    read_end, write_end = os.pipe()
    reader = threading.Thread(target=lambda: path.write_bytes(os.fdopen(read_end, "rb").read()))
    reader.start()
    try:
        yield write_end
    finally:
        os.close(write_end)
        reader.join()


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_recording_has_every_frame_with_its_sound(tmp_path, suffix):
    """It appears under its name only when whole, with its comment, the encoder's delay before 0."""
    output = tmp_path / f"strange name: 100%{suffix}"
    with live([parse_target("file", str(output))], comment="made by a test") as encoder:
        send_claps(encoder, 0, N_FRAMES)
        wait_for(lambda: encoder.frames_coded > CLAP_FRAMES)
        assert not output.exists()
        assert encoder.end(10)
        assert encoder.statistics()[0].state == "ended"
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    found = probe(output)
    assert found.video.n_frames == N_FRAMES
    assert found.video.start_s == pytest.approx(0, abs=0.001)
    assert found.audio.end_s == pytest.approx(N_FRAMES / FPS, abs=0.03)
    assert found.tags["comment"] == "made by a test"
    check_claps(output, 3)


def test_two_channels_stay_apart(tmp_path):
    frames, _ = claps(0, 25)
    samples = np.stack([np.zeros(25 * PER_FRAME), 0.5 * np.sin(np.arange(25 * PER_FRAME) * 0.1)], axis=1)
    with live([parse_target("file", str(tmp_path / "two.mkv"))], n_channels=2) as encoder:
        encoder.write(frames, samples.astype(np.float32))
        assert encoder.end(10)
    words = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "two.mkv"), "-f", "f32le", "-"]
    heard = np.frombuffer(subprocess.run(words, capture_output=True, check=True).stdout, "<f4").reshape(-1, 2)
    left, right = np.abs(heard).mean(axis=0)
    assert left < 0.01 < 0.2 < right


def test_segments_play_while_they_come_and_end_with_their_last(tmp_path):
    """The folder is made, an earlier run's playlist is gone, and the last line closes the list."""
    folder = tmp_path / "hls 100%"
    folder.mkdir()
    for name in ("index.m3u8", "segment-000099.ts", "mine.txt"):
        (folder / name).write_text("old")
    playlist = folder / "index.m3u8"
    with live([parse_target("hls", str(folder))]) as encoder:
        assert sorted(path.name for path in folder.iterdir()) == ["mine.txt"]
        send_claps(encoder, 0, 6 * CLAP_FRAMES)
        wait_for(playlist.exists)
        assert "ENDLIST" not in playlist.read_text()
        assert n_frames(folder / "segment-000000.ts") == 2 * FPS
        assert encoder.end(10)
    assert playlist.read_text().splitlines()[-1] == "#EXT-X-ENDLIST"
    check_claps(playlist, 6)


def test_standard_output_is_a_stream_that_plays_from_its_start(tmp_path):
    with drained(tmp_path / "out.ts") as pipe, live([parse_target("stdout", "-")], stdout=pipe) as encoder:
        send_claps(encoder, 0, N_FRAMES)
        assert encoder.end(10)
    assert n_frames(tmp_path / "out.ts") == N_FRAMES
    check_claps(tmp_path / "out.ts", 3)


def is_bound(port: int) -> bool:
    """Whether somebody takes datagrams at a port of this machine: none is lost from then on."""
    lines = Path("/proc/net/udp").read_text().splitlines()[1:]
    return any(line.split()[1].endswith(f":{port:04X}") for line in lines)


@pytest.mark.parametrize("scheme", ["srt", "udp"])
def test_datagrams_arrive(tmp_path, scheme):
    """SRT with a passphrase, MPEG-TS over UDP: played back by ffmpeg, in step."""
    port, output = free_port(), tmp_path / "arrived.mkv"
    secret = "passphrase=correct-horse-battery&" if scheme == "srt" else ""
    source = {
        "srt": f"srt://127.0.0.1:{port}?{secret}mode=listener",
        "udp": f"udp://127.0.0.1:{port}?timeout=5000000",
    }
    words = [find_ffmpeg(), "-v", "error", "-nostdin", "-analyzeduration", "1000000"]
    words += ["-i", source[scheme], "-c", "copy", str(output)]
    address = f"{scheme}://127.0.0.1:{port}" + (f"?{secret}latency=20" if secret else "")
    sent = 0

    def send(encoder: LiveEncoder) -> bool:
        nonlocal sent
        start = time.monotonic()
        assert encoder.write(*claps(sent, 5), limit_s=20)
        sent += 5
        time.sleep(max(0.0, start + 5 / FPS / 2 - time.monotonic()))  # SRT drops what comes too fast
        return True

    with live([parse_target(scheme, address)]) as encoder:
        receiver = subprocess.Popen(words, stderr=subprocess.DEVNULL)
        try:
            wait_for(lambda: is_bound(port))
            wait_for(lambda: send(encoder) and output.exists(), limit_s=60)  # it has what it looks at first
            before = sent
            while sent < before + 4 * CLAP_FRAMES:
                send(encoder)
            assert encoder.end(10)
            assert encoder.statistics()[0].reconnects <= 2
            receiver.wait(30)
        finally:
            receiver.kill()
            receiver.wait()
    assert n_frames(output) > 4 * CLAP_FRAMES
    shown, heard = times(output, "v"), times(output, "a")
    assert abs(shown[0] - heard[0]) < 0.1
    assert len(set(np.diff(shown).round(2))) == 1  # no picture is missing in between


@pytest.mark.parametrize(
    "wrap_s",
    [
        pytest.param(2**33 / 90_000, id="26.5h"),
        pytest.param(2**31 / 1000, id="24.8d"),
        pytest.param(2**32 / 1000, id="49.7d", marks=pytest.mark.slow),
    ],
)
def test_a_run_of_days_goes_on_over_the_wraps(tmp_path, monkeypatch, wrap_s):
    """Started two seconds before 33 bits of 90 kHz, or 31 and 32 bits of milliseconds, are full."""
    start_frame = round((wrap_s - 2) * FPS)
    ahead_us = frame_time_us(start_frame, FPS)
    monkeypatch.setattr(encoder_module, "frame_time_us", lambda n, fps: frame_time_us(n, fps) + ahead_us)
    monkeypatch.setattr(encoder_module, "packet_time_us", lambda n: packet_time_us(n) + ahead_us)
    monkeypatch.setattr(Sink, "_origin_us", lambda *_: 0)  # as if connected at the very start
    told: list[str] = []
    targets = [parse_target("file", str(tmp_path / f"long.{kind}")) for kind in ("mp4", "mkv")]
    targets += [parse_target("stdout", "-"), parse_target("hls", str(tmp_path / "hls"))]
    with drained(tmp_path / "long.ts") as pipe, live(targets, told, stdout=pipe) as encoder:
        send_claps(encoder, start_frame, 6 * CLAP_FRAMES)
        assert encoder.end(10), encoder.statistics()
    assert told == []
    for name in ("long.mp4", "long.mkv", "long.ts", "hls/index.m3u8"):
        shown, heard = times(tmp_path / name, "v"), times(tmp_path / name, "a")
        assert np.diff(shown) == pytest.approx(1 / FPS, abs=0.0011), name
        assert np.diff(heard) == pytest.approx(1024 / 48_000, abs=0.0011), name
        check_claps(tmp_path / name, 6)
    assert times(tmp_path / "long.mp4", "v")[-1] * US_PER_S == pytest.approx(ahead_us + 149 * 40_000, abs=1)


def test_what_cannot_be_written_is_said_before_anything_is_created(tmp_path):
    (tmp_path / "taken.mp4").touch()
    (tmp_path / "plain").touch()
    file = parse_target("file", str(tmp_path / "x.mp4"))
    for targets, encoding, word in (
        ([parse_target("file", str(tmp_path / "taken.mp4"))], Encoding(), "exists"),
        ([parse_target("file", str(tmp_path / "no" / "x.mp4"))], Encoding(), "does not exist"),
        ([parse_target("hls", str(tmp_path / "plain"))], Encoding(), "not a folder"),
        ([parse_target("hls", str(tmp_path / "no" / "hls"))], Encoding(), "does not exist"),
        ([file, file], Encoding(), "twice"),
        ([file], Encoding(codec="libx265"), "H.264"),
        ([file], Encoding(crf=60), "crf"),
    ):
        with pytest.raises(OutputError, match=word) as raised:
            check_targets(targets, encoding, SIDE_PX, SIDE_PX)
        assert "\n" not in str(raised.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "taken.mp4"]


def resident_mib(pid: int) -> float:
    """Memory of a process that is not shared with a file."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1024


@pytest.mark.slow
def test_ten_minutes_stay_in_step_and_cost_no_memory(tmp_path):
    """Sound and picture are as close at the end as at the start; no process has grown since the second minute."""
    targets = [parse_target("file", str(tmp_path / "long.mp4")), parse_target("hls", str(tmp_path / "hls"))]
    with live(targets, policy=quick(queue_s=6.0)) as encoder:
        sizes_mib = []
        for minute in range(10):
            send_claps(encoder, minute * 60 * FPS, 60 * FPS, piece=25)
            wait_for(lambda minute=minute: encoder.frames_coded > (minute + 1) * 60 * FPS - 50)
            pids = [os.getpid(), encoder.pid, *filter(None, encoder.sink_pids)]
            sizes_mib.append([resident_mib(pid) for pid in pids])
        assert encoder.end(30)
    assert np.max(np.subtract(sizes_mib[-1], sizes_mib[1])) < 10, sizes_mib
    check_claps(tmp_path / "long.mp4", 600)
