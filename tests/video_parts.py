"""What tests of video files share: noise, a sound, a file that is open, and what a whole one holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile

from flashtalk_cli.config import Encoding
from flashtalk_cli.media.probe import Probe
from flashtalk_cli.media.video_file import VideoFile

SIDE = 64
PACKET_S = 1024 / 44_100  # of AAC; Opus has 0.02 s


def tone(path: Path) -> Path:
    """4.03 s of stereo at 44.1 kHz, in a new file."""
    times = np.arange(int(4.03 * 44_100)) / 44_100
    soundfile.write(path, np.stack([np.sin(2 * np.pi * 440 * times) * 0.3] * 2, 1), 44_100)
    return path


def frames(n: int, first: int = 0, side: int = SIDE) -> np.ndarray:
    """Noise, which an encoder cannot make small: uint8 [n, side, side, 3]."""
    return np.random.default_rng(first).integers(0, 256, (n, side, side, 3), dtype=np.uint8)


def opened(
    output: Path | None, n_frames: int = 101, audio: Path | None = None, **changes: object
) -> VideoFile:
    settings: dict = {
        "width_px": SIDE,
        "height_px": SIDE,
        "fps": 25,
        "encoding": Encoding(),
        "comment": "synthetic",
    }
    return VideoFile(output, n_frames=n_frames, audio=audio, **(settings | changes))


def in_step(found: Probe, n_frames: int, fps: int = 25, slack_s: float = 0.0) -> None:
    """All frames are there, and picture and sound begin and end together, within a frame.

    Only a file that was copied at its end says exactly where the sound's last packet ends: `slack_s` for
    the others.
    """
    assert found.video is not None
    assert found.audio is not None
    assert found.video.n_frames == n_frames
    assert found.video.duration_s == pytest.approx(n_frames / fps, abs=0.003)
    assert abs(found.audio.end_s - found.video.end_s) <= 1 / fps + slack_s
    assert abs(found.audio.start_s - found.video.start_s) <= 1 / fps
