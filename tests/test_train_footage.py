"""Real footage to examples: filtered, cut, in step with its sound, and going on where it ended."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from toy_training import write_presets
from train_commands import flashtalk

from flashtalk_cli.config import Canvas
from flashtalk_cli.distill import filters, footage
from flashtalk_cli.distill.shards import read_shard
from flashtalk_cli.media.ffmpeg import find_ffmpeg


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_presets(folder)
    return folder


def write_video(path: Path, *, still: bool, seconds: float = 2.0, sound: bool = True) -> None:
    source = "color=gray:size=96x64:rate=30" if still else "testsrc2=size=96x64:rate=30"
    streams = ["-f", "lavfi", "-i", source] + (["-f", "lavfi", "-i", "sine=300"] if sound else [])
    subprocess.run(
        [find_ffmpeg(), "-v", "error", "-y", *streams, "-t", str(seconds), "-pix_fmt", "yuv420p", str(path)],
        check=True,
    )


def test_footage_is_filtered_and_goes_on(toy: Path, tmp_path: Path) -> None:
    """Still clips are kept, moving ones and broken files are told of; files done are not done again."""
    videos, out = tmp_path / "videos", tmp_path / "out"
    videos.mkdir()
    write_video(videos / "still.mp4", still=True)
    write_video(videos / "moving.mp4", still=False)
    write_video(videos / "mute.mp4", still=True, sound=False)
    (videos / "junk.mp4").write_bytes(b"junk")
    arguments = [
        "prepare",
        videos,
        out,
        "--set",
        "data.min_face_share=0",
        "--set",
        'data.aspects=["1:1", "3:2"]',
    ]
    assert flashtalk(toy, *arguments) == 0
    journal = json.loads((out / "files.json").read_text())
    shards = sorted(out.glob("shard-*"))
    assert len(shards) == 1
    assert journal["still.mp4"] == {
        "kept": 2,
        "shard": shards[0].name,
    }  # 50 frames: 29 and the 21 that are left
    assert journal["moving.mp4"].keys() == {"moving background"}
    assert "no sound" in journal["mute.mp4"]["error"]
    assert "no video" in journal["junk.mp4"]["error"]
    height, width = read_shard(shards[0])["latents"].shape[-2:]
    assert width > height, "a wide video goes to the wide bucket"
    write_video(videos / "another.mp4", still=True, seconds=1.2)
    before = shards[0].read_bytes()
    assert flashtalk(toy, *arguments) == 0
    assert len(list(out.glob("shard-*"))) == 2
    assert shards[0].read_bytes() == before
    assert json.loads((out / "data.json").read_text())["clips"] == 3
    shards[0].unlink()  # as one does with a broken one: its files are done again, under another number
    kept = [path.read_bytes() for path in out.glob("shard-*")]
    assert flashtalk(toy, *arguments) == 0
    assert len(list(out.glob("shard-*"))) == 2
    assert kept[0] in [path.read_bytes() for path in out.glob("shard-*")]
    assert json.loads((out / "data.json").read_text())["clips"] == 3


def test_sound_and_frames_of_footage_share_their_zero(toy: Path, tmp_path: Path) -> None:
    """A flash and a beep at one second: the frame and the samples that have them are at the same time."""
    path = tmp_path / "late.mkv"
    flash = "color=black:size=64x64:rate=25,drawbox=color=white:t=fill:enable='between(t,1,1.1)'"
    beep = "sine=440,volume=0:enable='lt(t,1)'"
    subprocess.run(
        [find_ffmpeg(), "-v", "error", "-y", "-f", "lavfi", "-i", flash, "-itsoffset", "0.3", "-f", "lavfi", "-i", beep,
         "-t", "2.5", "-pix_fmt", "yuv420p", str(path)], check=True,
    )  # fmt: skip
    from flashtalk_cli.presets import load

    base = load(str(toy / "render.yaml"))
    with footage.FrameReading(path, Canvas(width_px=64, height_px=64), 25) as reading:
        bright = reading.frames(100).mean((1, 2, 3))
    loud = np.abs(footage._sound(path, base)) > 0.01
    assert int(np.argmax(bright > 100)) == 25
    assert np.argmax(loud) / 16000 == pytest.approx(1.3, abs=0.05)


def test_filters_of_footage() -> None:
    """Noise in the border is motion, motion in the middle is none; a cut is a cut, flicker is none; boxes cover."""
    rng = np.random.default_rng(0)
    still = np.repeat(rng.integers(0, 255, (1, 64, 64, 3), dtype=np.uint8), 20, 0)
    middle = still.copy()
    middle[:, 30:, 16:48] = rng.integers(0, 255, (20, 34, 32, 3))
    border = still.copy()
    border[:, :6] = rng.integers(0, 255, (20, 6, 64, 3))
    assert filters.background_motion(still) < 0.01
    assert filters.background_motion(middle) < 0.01
    assert filters.background_motion(border) > 10
    assert not filters.has_cut(still)
    assert not filters.has_cut(rng.integers(0, 255, (20, 64, 64, 3), dtype=np.uint8))
    assert filters.has_cut(np.concatenate([still, 255 - still]))
    one = filters.face_box(still, lambda frame: [(20.0, 20.0, 40.0, 44.0)], 0.2)
    assert one == pytest.approx((18.0, 17.6, 42.0, 46.4))
    assert filters.face_box(still, lambda frame: [(20.0, 20.0, 40.0, 44.0)], 0.5) is None
    assert filters.face_box(still, lambda frame: [], 0.2) is None
    assert (
        filters.face_box(still, lambda frame: [(0.0, 0.0, 20.0, 20.0), (30.0, 0.0, 50.0, 20.0)], 0.2) is None
    )
