"""Live outputs into a real RTMP server: what it took, what a viewer sees, and every way in which it can fail."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from live_outputs import (
    CLAP_FRAMES,
    FPS,
    check_claps,
    claps,
    first_is_key,
    free_port,
    live,
    n_frames,
    needs_nginx,
    noise,
    of_kind,
    quick,
    rtmp_server,
    send_claps,
    times,
    wait_for,
)

from flashtalk_cli.media.ffmpeg import candidates, find_ffmpeg
from flashtalk_cli.media.live import commands
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.targets import parse_target

pytestmark = needs_nginx
KEY = "sk-7f3a-VERYSECRET?token=ALSOSECRET"


def send_in_time(
    encoder: LiveEncoder, frames: itertools.count, while_: threading.Event, speed: float
) -> None:
    """Claps at `speed` times real time until told to stop; a write may never wait long."""
    start, first = time.monotonic(), next(frames)
    encoder.write(*claps(first, 1))
    for at in frames:
        if while_.is_set():
            break
        time.sleep(max(0.0, start + (at - first) / FPS / speed - time.monotonic()))
        assert encoder.write(*claps(at, 1), limit_s=20)


@pytest.fixture
def server(tmp_path):
    with rtmp_server(tmp_path / "server") as running:
        yield running


def test_the_server_and_a_viewer_get_every_frame(server, tmp_path):
    """In step within a frame, on both sides; the key is in no process's arguments and in no line."""
    told: list[str] = []
    viewed = tmp_path / "viewed.flv"
    words = [find_ffmpeg(), "-v", "error", "-nostdin", "-i", f"{server.address}/sk-7f3a-VERYSECRET"]
    viewer = subprocess.Popen([*words, "-c", "copy", str(viewed)], stderr=subprocess.DEVNULL)
    try:
        wait_for(lambda: "play: name=" in server.log())
        with live([parse_target("rtmp", f"{server.address}/{KEY}")], told) as encoder:
            send_claps(encoder, 0, 4 * CLAP_FRAMES)
            wait_for(lambda: encoder.sink_pids)
            arguments = Path(f"/proc/{encoder.sink_pids[0]}/cmdline").read_bytes()
            assert encoder.end(10), encoder.statistics()
            found = of_kind(encoder, "rtmp")
        wait_for(server.has_passed_on)
        server.kill()  # else the viewer would wait for the next publisher
        assert viewer.wait(10) == 0
    finally:
        viewer.kill()
    assert (found.frames_sent, found.frames_dropped, found.reconnects) == (100, 0, 0)
    (taken,) = server.taken()
    assert n_frames(taken) == n_frames(viewed) == 100
    check_claps(taken, 4)
    check_claps(viewed, 4)
    if commands.reads_presets(find_ffmpeg()):
        assert b"SECRET" not in arguments
        assert told == []
    assert "args='token=ALSOSECRET'" in server.log()


def test_an_ffmpeg_that_takes_no_presets_sends_too_and_says_what_can_be_seen(server, tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "reads_presets", lambda program: False)
    told: list[str] = []
    with live([parse_target("rtmp", f"{server.address}/{KEY}")], on_warning=told.append) as encoder:
        send_claps(encoder, 0, 50)
        assert encoder.end(10)
    assert n_frames(server.taken()[0]) == 50
    assert len(told) == 1
    assert "other users of this machine" in told[0]
    assert "SECRET" not in told[0]


@pytest.mark.parametrize("program", sorted(set(candidates())))
def test_whether_presets_are_followed_is_found_by_trying(server, program, monkeypatch):
    """With each ffmpeg here: either the key reaches the server by preset, or it is known that it would not."""
    monkeypatch.setattr(commands, "find_ffmpeg", lambda: program)
    with live([parse_target("rtmp", f"{server.address}/{KEY}")]) as encoder:
        send_claps(encoder, 0, 50)
        assert encoder.end(10), encoder.statistics()
    assert "publish: name='sk-7f3a-VERYSECRET'" in server.log()


def test_five_deaths_of_the_server_cost_the_recording_nothing(server, tmp_path):
    """One line for each outage and one for each return; the server's every part begins with a key frame."""
    told: list[str] = []
    output = tmp_path / "kept.mp4"
    targets = [parse_target("file", str(output)), parse_target("rtmp", f"{server.address}/{KEY}")]
    frames, done = itertools.count(), threading.Event()
    with live(targets, told, policy=quick(queue_s=6.0)) as encoder:
        encoder._sinks[1]._backoff.wait_s = lambda live_s: 0.05  # its lives are too short to set it back
        sender = threading.Thread(target=send_in_time, args=(encoder, frames, done, 3.0))
        sender.start()
        try:
            for death in range(5):
                wait_for(lambda at=death: len(told) == 2 * at and of_kind(encoder, "rtmp").state == "live")
                sent = of_kind(encoder, "rtmp").frames_sent
                wait_for(lambda at=sent: of_kind(encoder, "rtmp").frames_sent > at + 20)
                server.kill()
                wait_for(lambda at=death: len(told) == 2 * at + 1)
                server.start()
            wait_for(lambda: len(told) == 10)
        finally:
            done.set()
            sender.join()
        n_written = next(frames) - 1
        assert encoder.end(10)
        found = of_kind(encoder, "rtmp")
    assert found.reconnects >= 5
    assert found.frames_sent + found.frames_dropped == n_written
    assert "SECRET" not in repr((told, found))
    assert [("trying again" in line, "back after" in line) for line in told] == [
        (True, False),
        (False, True),
    ] * 5
    assert times(output, "v") == pytest.approx([at / FPS for at in range(n_written)], abs=1e-6)
    check_claps(output, len([at for at in range(n_written) if at % CLAP_FRAMES == 10]))
    assert len(server.taken()) >= 6
    assert all(first_is_key(path) for path in server.taken())


def test_a_refused_connection_is_told_once_and_tried_again(tmp_path):
    told: list[str] = []
    output = tmp_path / "kept.mkv"
    dead = parse_target("rtmp", f"rtmp://user:PASSWORD@127.0.0.1:{free_port()}/live/{KEY}")
    with live([dead, parse_target("file", str(output))], told) as encoder:
        frames = itertools.count()
        wait_for(lambda: encoder.write(*claps(next(frames), 1)) and of_kind(encoder, "rtmp").reconnects >= 3)
        found = of_kind(encoder, "rtmp")
        start = time.monotonic()
        assert not encoder.end(5)
        assert time.monotonic() - start < 5.5
    assert len(told) == 1
    assert "refused" in told[0]
    assert "SECRET" not in repr((told, found))
    assert "PASSWORD" not in repr((told, found))
    assert n_frames(output) == next(frames)


def test_a_stalled_server_is_left_and_found_again(server, tmp_path):
    """It takes the connection and no data; nobody else waits for it."""
    told: list[str] = []
    targets = [
        parse_target("rtmp", f"{server.address}/{KEY}"),
        parse_target("file", str(tmp_path / "kept.mkv")),
    ]
    with live(targets, told, policy=quick(queue_s=6.0)) as encoder:
        stalled = encoder._sinks[0]
        stalled._patience_s = float("inf")  # it stays stalled until the others were looked at
        first = 0

        def send() -> bool:
            nonlocal first
            start = time.monotonic()
            assert encoder.write(*noise(first, 5), limit_s=20)
            first += 5
            time.sleep(max(0.0, start + 0.05 - time.monotonic()))
            return True

        wait_for(lambda: send() and of_kind(encoder, "rtmp").state == "live")
        server.signal(signal.SIGSTOP)
        wait_for(lambda: send() and of_kind(encoder, "rtmp").frames_dropped > 0, limit_s=40)
        wait_for(lambda: send() and of_kind(encoder, "file").behind_s < 5, limit_s=40)
        assert told == []
        stalled._patience_s = 2.0
        wait_for(lambda: send() and told, limit_s=40)
        server.signal(signal.SIGCONT)
        wait_for(lambda: send() and len(told) == 2, limit_s=40)
        assert encoder.end(10)
    assert "took nothing for 2 s" in told[0]
    assert n_frames(tmp_path / "kept.mkv") == first


def test_four_outputs_and_the_slow_one_alone_loses_frames(server, tmp_path):
    """The slow one skips to newer key frames; the others have everything, and no write waited for it."""
    read_end, write_end = os.pipe()
    done, slow = threading.Event(), tmp_path / "slow.ts"

    def read_slowly() -> None:
        with os.fdopen(read_end, "rb", buffering=0) as source, slow.open("wb") as file:
            while data := source.read(2 << 10 if not done.is_set() else 1 << 20):
                file.write(data)
                done.wait(0.1)

    targets = [
        parse_target("stdout", "-"),
        parse_target("file", str(tmp_path / "kept.mp4")),
        parse_target("hls", str(tmp_path / "hls")),
        parse_target("rtmp", f"{server.address}/{KEY}"),
    ]
    reader = threading.Thread(target=read_slowly)
    reader.start()
    longest_s = 0.0
    with live(targets, policy=quick(queue_s=6.0), stdout=write_end) as encoder:
        for at in range(0, 300, 5):
            start = time.monotonic()
            assert encoder.write(*noise(at, 5), limit_s=20)
            longest_s = max(longest_s, time.monotonic() - start)
            time.sleep(max(0.0, start + 5 / FPS / 3 - time.monotonic()))
        done.set()
        assert encoder.end(15), encoder.statistics()[0]
        found = {each.kind: each for each in encoder.statistics()}
    os.close(write_end)
    reader.join()
    assert found["stdout"].frames_dropped > 0
    assert all(found[kind].frames_dropped == 0 for kind in ("file", "hls", "rtmp"))
    assert longest_s < 2
    assert n_frames(tmp_path / "kept.mp4") == n_frames(server.taken()[0]) == 300
    assert n_frames(tmp_path / "hls" / "index.m3u8") == 300
    assert n_frames(slow) == found["stdout"].frames_sent < 300


@pytest.mark.slow
def test_ten_minutes_on_air_in_step(server):
    """Faster than it plays, every clap within a frame to the end."""
    with live([parse_target("rtmp", f"{server.address}/{KEY}")], policy=quick(queue_s=1000.0)) as encoder:
        send_claps(encoder, 0, 600 * FPS, piece=25)
        assert encoder.end(60)
    check_claps(server.taken()[0], 600)


def test_many_attempts_leave_nothing_behind(tmp_path):
    """Neither descriptors nor threads nor processes, and one line was told."""
    told: list[str] = []
    dead = parse_target("rtmp", f"rtmp://127.0.0.1:{free_port()}/live/{KEY}")
    frames = itertools.count()
    with live([dead], told, policy=quick(retry_s=0.001)) as encoder:
        before = None
        encoder._sinks[0]._backoff.wait_s = lambda live_s: 0.0
        while (attempts := of_kind(encoder, "rtmp").reconnects) < 12:
            assert encoder.write(*claps(next(frames), 1), limit_s=20)
            if attempts >= 3 and before is None:
                before = (len(os.listdir("/proc/self/fd")), threading.active_count())
            time.sleep(0.005)
        after = (len(os.listdir("/proc/self/fd")), threading.active_count())
    assert before is not None
    assert all(now <= then + 4 for now, then in zip(after, before, strict=True))  # of an attempt under way
    assert len(told) == 1


def test_nothing_goes_on_when_its_parent_is_killed(server, tmp_path):
    """Every ffmpeg ends by itself, and the recording's part plays."""
    script = (
        "import sys, time\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from live_outputs import claps, live\n"
        "from flashtalk_cli.media.live.targets import parse_target\n"
        "targets = [parse_target(*word.split('=', 1)) for word in sys.argv[1:]]\n"
        "with live(targets) as encoder:\n"
        "    for at in range(10**6):\n"
        "        encoder.write(*claps(at, 1))\n"
        "        time.sleep(0.01)\n"
        "        if at % 25 == 0 and all(one.state == 'live' for one in encoder.statistics()):\n"
        "            print(encoder.pid, *encoder.sink_pids, flush=True)\n"
    )
    words = [sys.executable, "-c", script, f"rtmp={server.address}/KEY", f"file={tmp_path}/kept.mkv"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        pids = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert len(pids) == 3
    wait_for(lambda: not any(Path(f"/proc/{pid}/cmdline").exists() for pid in pids))
    assert n_frames(tmp_path / "kept.mkv.part") > 25
