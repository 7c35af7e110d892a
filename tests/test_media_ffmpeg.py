"""ffmpeg as a program: found or missed in one line, fed without a deadlock, asked for its reasons; no torch."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashtalk_cli.errors import OutputError
from flashtalk_cli.media import feed as feed_module
from flashtalk_cli.media import ffmpeg
from flashtalk_cli.media.feed import FfmpegFeed

ROOT = Path(__file__).parents[1]


@pytest.fixture
def search(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty PATH of one folder, and nothing remembered of an earlier search."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    for remembered in (ffmpeg.find_ffmpeg, ffmpeg.encoders):
        remembered.cache_clear()
    yield folder
    for remembered in (ffmpeg.find_ffmpeg, ffmpeg.encoders):
        remembered.cache_clear()


def program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


LISTS_X264 = 'printf " ------\\n V..... libx264 H.264\\n A..... aac AAC\\n"'
LISTS_LITTLE = 'printf " ------\\n V..... mpeg4 MPEG-4\\n"'


def test_the_system_ffmpeg_comes_first(search: Path) -> None:
    """Contract: one on the PATH that has libx264 is used, and its encoders are its own."""
    program(search / "ffmpeg", LISTS_X264)
    assert ffmpeg.find_ffmpeg() == str(search / "ffmpeg")
    assert ffmpeg.encoders() == {"libx264", "aac"}


@pytest.mark.parametrize("script", [None, "exit 1", LISTS_LITTLE, "echo rubbish"])
def test_the_packaged_ffmpeg_stands_in(search: Path, script: str | None) -> None:
    """Fault: with none on the PATH, a broken one or one without libx264, imageio-ffmpeg's is used."""
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    if script is not None:
        program(search / "ffmpeg", script)
    assert ffmpeg.find_ffmpeg() == imageio_ffmpeg.get_ffmpeg_exe()
    assert "libx264" in ffmpeg.encoders()
    assert ffmpeg.version()[0].isalnum()


def test_little_is_better_than_nothing(search: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an ffmpeg without libx264 is still used when it is the only one; with none the mend is said."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(OutputError, match="pip install imageio-ffmpeg"):
        ffmpeg.find_ffmpeg()
    program(search / "ffmpeg", LISTS_LITTLE)
    ffmpeg.encoders.cache_clear()
    assert ffmpeg.find_ffmpeg() == str(search / "ffmpeg")
    assert ffmpeg.version() == "unknown"


@pytest.mark.parametrize(
    ("status", "lines", "told"),
    [
        (-9, ["something earlier"], "killed by SIGKILL"),
        (1, [], "exit status 1, no message"),
        (1, ["[mp4 @ 0x55ced3fb] No space left on device", "Conversion failed!"], "No space left on device"),
        (
            1,
            ["[out#0/mp4 @ 0x1a2b] [mux @ 0x3] Broken pipe", "Task finished with error code: -32"],
            "Broken pipe",
        ),
        (1, ["file:/a b/c: d.wav: Invalid data found"], "Invalid data found"),
    ],
)
def test_the_cause_is_the_line_that_tells_something(status: int, lines: list[str], told: str) -> None:
    """Golden: of ffmpeg's last words those are kept that a user can do something with."""
    assert ffmpeg.cause(status, lines) == told


def fed(code: str) -> FfmpegFeed:
    """A feed whose ffmpeg is a few lines of Python."""
    return FfmpegFeed([sys.executable, "-c", "import sys, os, time\n" + code])


def test_a_flood_of_complaints_blocks_nobody() -> None:
    """Fault: megabytes on stderr while frames come: all are taken, and the last complaint is the cause."""
    feed = fed(
        "n = 0\n"
        "while data := sys.stdin.buffer.read(100_000):\n"
        "    n += len(data); sys.stderr.write('complaint\\n' * 20_000)\n"
        "sys.stderr.write(f'took {n}\\n'); sys.exit(3)"
    )
    for _ in range(12):
        assert feed.write(np.zeros((2, 50_000), np.uint8))
    assert feed.end() == 3
    assert feed.took_everything()
    assert feed.cause() == "took 1200000"


def test_frames_arrive_in_order_and_whole(tmp_path: Path) -> None:
    """Contract: what is written arrives unchanged, also from arrays that are not contiguous."""
    target = tmp_path / "taken"
    feed = fed(f"open({str(target)!r}, 'wb').write(sys.stdin.buffer.read())")
    frames = np.random.default_rng(0).integers(0, 256, (9, 70, 30, 3), dtype=np.uint8)
    feed.write(frames[:4].transpose(0, 2, 1, 3).copy().transpose(0, 2, 1, 3))
    feed.write(frames[4:])
    assert feed.end() == 0
    assert target.read_bytes() == frames.tobytes()


def test_one_that_dies_is_noticed() -> None:
    """Fault: after the death writing says so instead of waiting, however many pieces come."""
    feed = fed("sys.stderr.write('no such codec\\n'); sys.exit(1)")
    deadline = time.monotonic() + 20
    while feed.write(np.zeros((1, 1_000_000), np.uint8)):
        assert time.monotonic() < deadline
    assert feed.cause() == "no such codec"


def test_one_that_closes_its_input_and_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: one that takes no more frames but lives on is ended, not waited for."""
    monkeypatch.setattr(feed_module, "DYING_S", 0.5)
    feed = fed("os.close(0); time.sleep(600)")
    deadline = time.monotonic() + 20
    while feed.write(np.zeros((1, 1_000_000), np.uint8)):
        assert time.monotonic() < deadline
    started = time.monotonic()
    assert "SIGKILL" in feed.cause()
    assert time.monotonic() - started < 15
    assert not feed.took_everything()


def test_a_slow_one_makes_the_caller_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: no more than so many bytes are held, so memory cannot grow while the encoder is behind."""
    monkeypatch.setattr(feed_module, "QUEUED_BYTES", 3_000_000)
    feed = fed("time.sleep(1.5); sys.stdin.buffer.read()")
    started = time.monotonic()
    for _ in range(3):
        feed.write(np.zeros((1, 1_000_000), np.uint8))
    assert time.monotonic() - started < 1.0
    for _ in range(2):
        feed.write(np.zeros((1, 1_000_000), np.uint8))
    assert time.monotonic() - started > 1.0
    assert feed.end() == 0


def test_an_end_that_does_not_come_is_limited() -> None:
    """Fault: waiting with a limit returns, and killing then works."""
    feed = fed("time.sleep(600)")
    feed.write(np.zeros((1, 1_000_000), np.uint8))
    started = time.monotonic()
    assert feed.end(0.3) is None
    feed.kill()
    assert time.monotonic() - started < 10
    assert "SIGKILL" in feed.cause()


def test_media_needs_no_torch_and_loads_lazily() -> None:
    """Contract: importing all of media loads neither torch nor the slow sound and picture libraries."""
    modules = [
        f"flashtalk_cli.media.{path.stem}" for path in (ROOT / "flashtalk_cli/media").glob("[a-z]*.py")
    ]
    assert len(modules) > 8
    code = (
        "import importlib, sys\n"
        f"for name in {modules}: importlib.import_module(name)\n"
        "print([m for m in ('torch', 'scipy', 'librosa', 'soundfile', 'soxr', 'PIL', 'pyloudnorm') if m in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert told.stdout.strip() == "[]"
