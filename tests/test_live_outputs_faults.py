"""Live outputs when something fails: a reader that leaves, a writer or the encoder that dies, a full disk, an abort.

Nothing that happens to one output or to the encoder costs another output a frame, and no file looks whole
that is not.
"""

from __future__ import annotations

import os
import signal
import threading

import numpy as np
import pytest
from live_outputs import (
    FPS,
    check_claps,
    claps,
    live,
    n_frames,
    noise,
    of_kind,
    quick,
    send_claps,
    send_until,
    times,
    wait_for,
)

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.live import supervise
from flashtalk_cli.media.live.commands import Sending
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.sink_process import SinkProcess
from flashtalk_cli.media.live.targets import parse_target
from flashtalk_cli.media.part_file import part_path


def send_for_ever(encoder: LiveEncoder) -> None:
    while True:
        encoder.write(*noise(0, 5))


def test_segments_go_on_when_their_writer_is_killed(tmp_path):
    told: list[str] = []
    playlist = tmp_path / "hls" / "index.m3u8"
    with live([parse_target("hls", str(playlist.parent))], told) as encoder:
        sent = send_until(encoder, 0, lambda: of_kind(encoder, "hls").state == "live" and playlist.exists())
        os.kill(encoder.sink_pids[0], signal.SIGKILL)
        sent = send_until(encoder, sent, lambda: of_kind(encoder, "hls").reconnects == 1)
        sent = send_until(encoder, sent, lambda: of_kind(encoder, "hls").state == "live")
        send_claps(encoder, sent, 125)
        assert encoder.end(10)
    text = playlist.read_text()
    assert text.count("DISCONTINUITY\n") == 1
    assert text.count("segment-") == len(set(line for line in text.splitlines() if "segment-" in line)) >= 4
    assert len(told) == 2
    assert "SIGKILL" in told[0]
    assert "back after" in told[1]


def test_segments_wait_for_room_on_a_full_disk(tmp_path, monkeypatch):
    """Instead of empty segments that ffmpeg makes without a word: one line, and one when there is room again."""
    told: list[str] = []
    full = threading.Event()
    monkeypatch.setattr(supervise, "disk_is_full", lambda place: full.is_set())
    with live([parse_target("hls", str(tmp_path / "hls"))], told) as encoder:
        sent = send_until(encoder, 0, lambda: of_kind(encoder, "hls").state == "live")
        full.set()
        sent = send_until(encoder, sent, lambda: of_kind(encoder, "hls").reconnects > 1)
        assert of_kind(encoder, "hls").state != "live"
        full.clear()
        sent = send_until(encoder, sent, lambda: of_kind(encoder, "hls").state == "live")
        assert encoder.end(10)
    assert len(told) == 2
    assert "No space left on device; trying again" in told[0]
    assert "back after" in told[1]
    assert n_frames(tmp_path / "hls" / "index.m3u8") > 0


def test_a_reader_that_goes_away_ends_only_its_output(tmp_path):
    read_end, write_end = os.pipe()
    targets = [parse_target("stdout", "-"), parse_target("file", str(tmp_path / "kept.mkv"))]
    told: list[str] = []
    with live(targets, told, stdout=write_end) as encoder:
        encoder.write(*claps(0, 25))
        assert os.read(read_end, 1) == b"G"  # an MPEG-TS packet's first byte
        os.close(read_end)
        for first in range(25, 500, 25):
            encoder.write(*noise(first, 25))
        wait_for(lambda: of_kind(encoder, "stdout").state == "failed")
        assert not encoder.end(10)
    os.close(write_end)
    assert n_frames(tmp_path / "kept.mkv") == 500
    assert len(told) == 1
    assert "standard output" in told[0]


def test_no_output_left_is_an_error():
    read_end, write_end = os.pipe()
    os.close(read_end)
    with (
        live([parse_target("stdout", "-")], stdout=write_end) as encoder,
        pytest.raises(OutputError, match="no output is left"),
    ):
        send_for_ever(encoder)
    os.close(write_end)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_the_encoder_is_started_again_and_nothing_is_lost(tmp_path, number):
    """Times go on where they were: the recording has every frame and every clap in its place."""
    told: list[str] = []
    targets = [parse_target("file", str(tmp_path / "kept.mp4")), parse_target("hls", str(tmp_path / "hls"))]
    n_times = 1 if number == signal.SIGSTOP else 2
    stall_s = 3.0 if number == signal.SIGSTOP else 10.0
    with live(targets, told, policy=quick(stall_s=stall_s)) as encoder:
        for sink in encoder._sinks:
            sink._patience_s = 60.0  # it is the encoder that is to be found wanting
        send_claps(encoder, 0, 60)
        for at in range(n_times):
            before = encoder.encoder_restarts
            os.kill(encoder.pid, number)
            send_claps(encoder, 60 + 60 * at, 60)
            wait_for(lambda before=before: encoder.encoder_restarts > before)
        assert encoder.end(30), (told, encoder.statistics())
    assert len(told) == encoder.encoder_restarts >= n_times
    assert all("encoder ended" in line for line in told)
    shown = times(tmp_path / "kept.mp4", "v")
    assert shown == pytest.approx([at / FPS for at in range(60 + 60 * n_times)], abs=1e-6)
    heard = times(tmp_path / "kept.mp4", "a")
    assert np.diff(heard) == pytest.approx(1024 / 48_000, abs=1e-6)
    n_claps = 5 if number == signal.SIGSTOP else 7
    check_claps(tmp_path / "kept.mp4", n_claps)
    check_claps(tmp_path / "hls" / "index.m3u8", n_claps)


def test_a_recording_whose_writer_is_killed_goes_on_in_another_file(tmp_path):
    """Both play, from the second's first frame on in step; what lies between is counted; nobody else is concerned."""
    told: list[str] = []
    output = tmp_path / "kept.mp4"
    targets = [parse_target("file", str(output)), parse_target("hls", str(tmp_path / "hls"))]
    with live(targets, told) as encoder:
        send_claps(encoder, 0, 125)
        wait_for(
            lambda: of_kind(encoder, "file").frames_sent > 100 and part_path(output).stat().st_size > 2000
        )
        killed = encoder.sink_pids[0]
        os.kill(killed, signal.SIGKILL)
        send_claps(encoder, 125, 5)
        wait_for(lambda: of_kind(encoder, "file").reconnects == 1)
        send_claps(encoder, 130, 40)  # a key frame among them begins the next file
        wait_for(lambda: encoder.sink_pids[0] not in (killed, None))
        send_claps(encoder, 170, 130)
        assert encoder.end(10), encoder.statistics()
        found = of_kind(encoder, "file")
    assert len(told) == 1
    assert "SIGKILL" in told[0]
    assert "kept-2.mp4" in told[0]
    first, second = n_frames(tmp_path / "kept.mp4"), n_frames(tmp_path / "kept-2.mp4")
    assert first >= 50, "all but what lay in pipes and in the last fragment"
    assert second >= 300 - 130 - 2 * FPS, "from the next key frame on"
    assert found.frames_sent + found.frames_dropped == 300
    assert times(tmp_path / "kept-2.mp4", "v")[0] == 0
    check_claps(tmp_path / "kept-2.mp4", second // 25 + (second % 25 > 10))
    assert n_frames(tmp_path / "hls" / "index.m3u8") == 300
    assert {path.name for path in tmp_path.iterdir()} == {"kept.mp4", "kept-2.mp4", "hls"}


def test_a_writer_that_dies_slowly_was_killed_all_the_same():
    """Pipes close before the status can be read; what was killed in between is not taken for a fault."""
    dying = Sending(("/bin/sh", "-c", "exec 0<&-; sleep 0.3; kill -KILL $$"))
    process = SinkProcess(dying, str)
    wait_for(lambda: not process.write(b"x", lambda: True))
    assert process.runs()
    assert process.was_killed()
    process.kill()


def test_an_encoder_that_never_works_is_an_error(tmp_path, monkeypatch):
    broken = tmp_path / "ffmpeg"
    broken.write_text("#!/bin/sh\necho 'no such luck' >&2\nexit 3\n")
    broken.chmod(0o755)
    output = tmp_path / "x.mp4"
    monkeypatch.setattr("flashtalk_cli.media.live.commands.find_ffmpeg", lambda: str(broken))
    with live([parse_target("file", str(output))]) as encoder, pytest.raises(OutputError) as raised:
        send_for_ever(encoder)
    assert "no such luck" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list(tmp_path.glob("x.mp4*"))


def test_what_is_aborted_stays_as_a_part_that_plays(tmp_path):
    output = tmp_path / "cut.mp4"
    with live([parse_target("file", str(output))]) as encoder:
        send_claps(encoder, 0, 200)
        wait_for(lambda: part_path(output).stat().st_size > 2000)
    assert not output.exists()
    assert n_frames(part_path(output)) >= 50
    with pytest.raises(OutputError):
        encoder.write(*claps(0, 1))


def test_a_run_without_a_frame_leaves_nothing(tmp_path):
    with live([parse_target("file", str(tmp_path / "x.mp4"))]):
        pass
    with live([parse_target("file", str(tmp_path / "y.mp4"))]) as encoder:
        encoder.end(5)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_recording_and_nothing_else(tmp_path):
    """The writer's file size limit stands for the disk; what was written stays and plays."""
    from resource import RLIM_INFINITY, RLIMIT_FSIZE, prlimit

    told: list[str] = []
    targets = [parse_target("file", str(tmp_path / "big.mkv")), parse_target("hls", str(tmp_path / "hls"))]
    with live(targets, told) as encoder:
        for first in range(0, 750, 25):
            if first == 100:
                wait_for(lambda: encoder.sink_pids[0] is not None)
                prlimit(encoder.sink_pids[0], RLIMIT_FSIZE, (1_000_000, RLIM_INFINITY))
            assert encoder.write(*noise(first, 25), limit_s=10)
        wait_for(lambda: of_kind(encoder, "file").state == "failed")
        assert not encoder.end(10)
        assert of_kind(encoder, "hls").state == "ended"
    assert not (tmp_path / "big.mkv").exists()
    assert n_frames(tmp_path / "big.mkv.part") > 25
    assert len(told) == 1
    assert "big.mkv.part" in told[0]


def test_an_end_can_be_hurried_while_an_output_takes_nothing(tmp_path):
    """A reader that paused gets no more; the recording is as whole as ever."""
    read_end, write_end = os.pipe()
    targets = [parse_target("stdout", "-"), parse_target("file", str(tmp_path / "kept.mkv"))]
    ended: list[bool] = []
    with live(targets, stdout=write_end) as encoder:
        for at in range(0, 250, 25):
            encoder.write(*noise(at, 25))
        ender = threading.Thread(target=lambda: ended.append(encoder.end(200)))
        ender.start()
        wait_for((tmp_path / "kept.mkv").exists)
        assert ender.is_alive()
        encoder.hurry(0.2)
        ender.join(30)
        assert ended == [False]
        assert [sink.state for sink in encoder.statistics()] == ["failed", "ended"]
    os.close(read_end)
    os.close(write_end)
    assert n_frames(tmp_path / "kept.mkv") == 250


def test_an_end_can_be_hurried_while_the_encoder_is_stuck(tmp_path):
    ended: list[bool] = []
    with live([parse_target("file", str(tmp_path / "x.mkv"))], policy=quick(stall_s=200.0)) as encoder:
        send_claps(encoder, 0, 50)
        wait_for(lambda: encoder.frames_coded > 10)
        os.kill(encoder.pid, signal.SIGSTOP)
        ender = threading.Thread(target=lambda: ended.append(encoder.end(200)))
        ender.start()
        encoder.hurry(0.2)
        ender.join(30)
        assert ended == [False]
    assert not (tmp_path / "x.mkv").exists()


def test_samples_that_are_no_numbers_are_silence(tmp_path):
    frames, samples = claps(0, 50)
    samples[100:5000] = np.nan
    samples[40_000:41_000] = np.inf
    told: list[str] = []
    with live([parse_target("file", str(tmp_path / "x.mkv"))], told) as encoder:
        assert encoder.write(frames, samples)
        assert encoder.write(frames[:0], samples[:0])
        assert encoder.end(10)
    assert told == []
    assert n_frames(tmp_path / "x.mkv") == 50


def test_no_room_is_said_within_the_limit_and_nothing_is_taken(tmp_path):
    with live([parse_target("file", str(tmp_path / "x.mkv"))]) as encoder:
        os.kill(encoder.pid, signal.SIGSTOP)
        taken = at = 0
        while encoder.write(*claps(at, 5), limit_s=0.2):
            taken, at = taken + 5, at + 5
            assert taken < 100, "not bounded"
        os.kill(encoder.pid, signal.SIGCONT)
        assert encoder.end(10)
    assert n_frames(tmp_path / "x.mkv") == taken
