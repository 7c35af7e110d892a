"""The main job through the real command line and the real worker, on a tiny seeded model: what the file holds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny_model
from PIL import Image

from flashtalk_cli.config import Preset, RenderJob
from flashtalk_cli.media.audio import prepare_speech
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.media.probe import Probe, probe

ROOT = Path(__file__).resolve().parent.parent
SMALL = (
    "--size",
    "64x64",
    "--steps",
    "1",
    "--set",
    "sampling.chunk_frames=9",
    "--set",
    "hearing.context_s=2",
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture, and sounds of several kinds."""
    folder = tmp_path_factory.mktemp("render")
    tiny_model.write(folder / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(folder / "p.png")
    speech = np.sin(np.arange(44_100 * 2) / 30) * rng.uniform(0, 0.3, 44_100 * 2)
    soundfile.write(folder / "speech.wav", speech[: int(44_100 * 1.23)], 44_100)
    soundfile.write(folder / "sample.wav", speech[:1], 44_100)
    soundfile.write(folder / "silence.flac", np.zeros(8_000), 16_000)
    return folder


def flashtalk(place: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    """Run the command line as a user would, in the folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "flashtalk_cli", *arguments]
    return subprocess.run(command, cwd=place, env=environment, capture_output=True, timeout=120)


def rendered(place: Path, speech: str, output: str, *options: str) -> Probe:
    done = flashtalk(place, "render", "p.png", speech, "-o", output, "--model", "model", *SMALL, *options)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(place.glob("*.part*"))
    return probe(place / output)


@pytest.mark.parametrize(
    ("speech", "seconds"), [("speech.wav", 1.23), ("sample.wav", 0.0), ("silence.flac", 0.5)]
)
def test_a_video_is_as_long_as_its_sound(place: Path, speech: str, seconds: float) -> None:
    """Rounded up to a whole frame; picture and sound end within a frame of each other; it says what it is."""
    found = rendered(place, speech, f"{speech}.mp4", "--seed", "7")
    assert found.video
    assert found.audio
    assert found.video.n_frames == max(1, math.ceil(seconds * 25))
    assert abs(found.video.duration_s - found.audio.duration_s) <= 1 / 25 + 1e-6
    assert "Synthetic media" in found.tags["comment"]
    assert "seed 7" in found.tags["comment"]


def test_a_seed_is_a_video(place: Path) -> None:
    """The same seed gives the same frames in another run, another seed does not."""

    def checksums(name: str, seed: str) -> bytes:
        rendered(place, "speech.wav", name, "--seed", seed)
        command = [find_ffmpeg(), "-v", "error", "-i", name, "-map", "0:v", "-f", "framemd5", "-"]
        return subprocess.run(command, cwd=place, capture_output=True, check=True).stdout

    first, again, other = (
        checksums(name, seed) for name, seed in (("1.mkv", "1"), ("2.mkv", "1"), ("3.mkv", "2"))
    )
    assert len(first.splitlines()) > 31
    assert first == again
    assert first != other


def test_standard_output_is_the_video(place: Path) -> None:
    """`-o -` writes nothing but the video there, and with --json the events go to stderr."""
    done = flashtalk(place, "render", "p.png", "speech.wav", "-o", "-", "--json", "--model", "model", *SMALL)
    assert done.returncode == 0
    (place / "out.mp4").write_bytes(done.stdout)
    video = probe(place / "out.mp4").video
    assert video
    assert video.n_frames == 31
    events = [json.loads(line) for line in done.stderr.decode().splitlines() if line.startswith("{")]
    assert events[-1]["event"] == "done"


def test_random_weights_say_so(place: Path) -> None:
    """Loudly, and in the file."""
    found = rendered(place, "sample.wav", "random.mp4", "--weights", "random")
    assert "random weights" in found.tags["comment"]


def peak_memory_mib(place: Path, seconds: float) -> float:
    """Peak resident memory of a worker that renders so much sound."""
    sound = place / f"{seconds}.wav"
    soundfile.write(sound, np.random.default_rng(1).uniform(-0.1, 0.1, int(16_000 * seconds)), 16_000)
    overrides = {"canvas": {"width_px": 64, "height_px": 64}, "hearing": {"context_s": 2}}
    overrides |= {"sampling": {"steps": 1, "chunk_frames": 33}, "model": {"name": str(place / "model")}}
    overrides |= {"precision": {"dit": "float32", "vae": "float32"}, "compute": {"device": "cpu"}}
    preset = Preset.model_validate({"name": "memory", "description": "", **overrides})
    work = place / f"work-{seconds}"
    work.mkdir()
    job = RenderJob(
        preset=preset,
        picture=place / "p.png",
        audio=sound,
        speech=prepare_speech(sound, work),
        output=place / f"{seconds}.mp4",
    )
    (work / "job.json").write_text(job.model_dump_json())
    code = (
        "import resource, sys; from flashtalk_cli import worker, events\n"
        "class Silent(events.Emitter):\n"
        "    def __init__(self, path): super().__init__(None)\n"
        "worker.Emitter = Silent\n"
        "assert worker.main(sys.argv[1:]) == 0\n"
        "sys.stderr.write(f'peak={resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(work / "job.json"), "unused"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()
    return int(done.stderr.decode().rpartition("peak=")[2]) / 1024


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_video(place: Path) -> None:
    """Ten times the frames, at most a tenth more memory."""
    short, long = peak_memory_mib(place, 6), peak_memory_mib(place, 60)
    assert long < 1.1 * short, f"{short:.0f} MiB for 6 s, {long:.0f} MiB for 60 s"
