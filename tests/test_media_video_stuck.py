"""An ffmpeg that is stuck while it writes a video: it is found out, killed, and told of; one that is slow is not."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import soundfile
from video_parts import SIDE, frames, in_step, opened, tone

from flashtalk_cli import launch
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media import feed
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.media.part_file import PartFile
from flashtalk_cli.media.probe import probe
from flashtalk_cli.media.video_file import VideoFile

MANY = 4000


def stopped(video: VideoFile) -> int:
    """Stop the ffmpeg of a video; its process id."""
    assert video.pid is not None
    os.kill(video.pid, signal.SIGSTOP)
    return video.pid


def is_gone(output: Path, pid: int) -> bool:
    """Whether the process has ended, and nobody holds the lock of the part."""
    PartFile(output, overwrite=False, keep=True).release()
    return not Path(f"/proc/{pid}").exists()


def in_background(do: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for, and room for few frames."""
    monkeypatch.setattr(feed, "ABORT_S", 0.6)
    monkeypatch.setattr(feed, "STALL_S", 1.0)
    monkeypatch.setattr(feed, "QUEUED_BYTES", 20 * SIDE * SIDE * 3)


def test_an_abort_is_over_before_the_worker_is_killed() -> None:
    """Contract: whoever kills the worker leaves no ffmpeg behind, which would hold the lock."""
    assert feed.ABORT_S + 2 * feed.LOOK_UP_S < launch.CLEAN_END_S - 2


def test_a_stuck_ffmpeg_is_killed_on_abort(tmp_path: Path, short: None) -> None:
    """Fault: an encoder that neither reads nor ends cannot make us wait for ever; frames it lost do not count."""
    with opened(tmp_path / "a.mp4", MANY) as video:
        pid = stopped(video)
        video.write(frames(10))
        began_s = time.monotonic()
        assert video.abort() is None, "nothing was written"
    assert time.monotonic() - began_s < 5
    assert is_gone(tmp_path / "a.mp4", pid)
    assert not (tmp_path / "a.mp4").exists()


def test_frames_that_died_with_ffmpeg_do_not_count(tmp_path: Path, short: None) -> None:
    with opened(tmp_path / "a.mp4", MANY) as video:
        for first in range(20):
            video.write(frames(10, first))
        while (tmp_path / "a.mp4.part").stat().st_size < 100_000:
            time.sleep(0.02)
        stopped(video)
        kept = video.abort()
        assert kept is not None
        found = probe(kept).video
        assert found is not None
        assert video.frames_written == found.n_frames < 200


@pytest.mark.parametrize("where", ["write", "finish"])
def test_a_stuck_ffmpeg_ends_the_run(tmp_path: Path, short: None, where: str) -> None:
    """Fault: without progress for so long ffmpeg is killed, in whatever we wait for it, and that is said."""
    output = tmp_path / "a.mp4"
    began_s = time.monotonic()
    with opened(output, 10 if where == "finish" else MANY) as video:
        pid = stopped(video)

        def go_on() -> None:
            while where == "write":
                video.write(frames(10))
            video.write(frames(10))
            video.finish()

        with pytest.raises(OutputError, match=r"a\.mp4: ffmpeg ended after .*no progress for 1 s.*run again"):
            go_on()
        assert 0.8 < time.monotonic() - began_s < 8
    assert is_gone(output, pid)
    assert not output.exists()


def test_an_abort_during_the_finish_gets_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: from another thread as well, and with the usual patience."""
    monkeypatch.setattr(feed, "ABORT_S", 0.4)
    told = []

    def finish() -> None:
        try:
            video.finish()
        except OutputError as error:
            told.append(str(error))

    with opened(tmp_path / "a.mp4", 10) as video:
        pid = stopped(video)
        video.write(frames(10))
        finishing = in_background(finish)
        time.sleep(0.3)
        video.abort()
        finishing.join(5)
        assert not finishing.is_alive()
    assert len(told) == 1
    assert is_gone(tmp_path / "a.mp4", pid)


@pytest.mark.parametrize("where", ["write", "finish"])
def test_a_request_to_end_gets_through_a_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Contract: with `stop` set a write waits no more, and a finish no longer than an abort would."""
    monkeypatch.setattr(feed, "ABORT_S", 0.4)
    monkeypatch.setattr(feed, "QUEUED_BYTES", 20 * SIDE * SIDE * 3)
    output, stop = tmp_path / "a.mp4", threading.Event()
    with opened(output, 10 if where == "finish" else MANY, stop=stop) as video:
        pid = stopped(video)
        threading.Timer(0.3, stop.set).start()
        began_s = time.monotonic()
        while where == "write" and not stop.is_set():
            video.write(frames(10))
        if where == "finish":
            video.write(frames(10))
            with pytest.raises(OutputError, match="no progress"):
                video.finish()
        video.abort()
    assert 0.2 < time.monotonic() - began_s < 5
    assert is_gone(output, pid)


def test_a_slow_encoder_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: one that computes is not stuck, however long a frame takes it: it sleeps most of the time here."""
    monkeypatch.setattr(feed, "STALL_S", 1.0)
    sound, output = tone(tmp_path / "sound.wav"), tmp_path / "a.mp4"
    with opened(output, 50, sound, width_px=320, height_px=320) as video:
        pid = stopped(video)

        def crawl() -> None:
            with suppress(ProcessLookupError):
                for _ in range(7):
                    time.sleep(0.3)
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.03)
                    os.kill(pid, signal.SIGSTOP)
                os.kill(pid, signal.SIGCONT)

        began_s = time.monotonic()
        in_background(crawl)
        video.write(frames(50, side=320))
        assert video.finish() == output
    assert time.monotonic() - began_s > 1.5 * feed.STALL_S
    in_step(probe(output), 50)


def test_who_reads_standard_output_may_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: a player that is paused is no stuck ffmpeg."""
    monkeypatch.setattr(feed, "STALL_S", 0.5)
    read_end, write_end = os.pipe()
    with opened(None, 100, stdout=write_end) as video:
        os.close(write_end)
        video.write(frames(100))
        threading.Timer(1.5, lambda: in_background(lambda: os.fdopen(read_end, "rb").read())).start()
        video.finish()


@pytest.mark.parametrize("peak", [1e9, 1e30, np.nan, np.inf])
def test_sound_far_over_full_scale_is_cut_to_it(tmp_path: Path, peak: float) -> None:
    """Fault: encoders refuse such samples, or hang."""
    times = np.arange(44_100) / 44_100
    samples = np.where(np.sin(2 * np.pi * 440 * times) > 0, peak, -peak).astype("f4")
    soundfile.write(tmp_path / "loud.wav", samples, 44_100, subtype="FLOAT")
    with opened(tmp_path / "a.mp4", 25, tmp_path / "loud.wav") as video:
        video.write(frames(25))
        video.finish()
    in_step(probe(tmp_path / "a.mp4"), 25)
    words = [find_ffmpeg(), "-v", "error", "-i", str(tmp_path / "a.mp4"), "-f", "f32le", "-"]
    heard = np.frombuffer(subprocess.run(words, capture_output=True, check=True).stdout, "<f4")
    loudest = np.abs(heard[4000:-4000]).max()
    assert loudest > 0.9 if np.isfinite(peak) else loudest < 1.5
