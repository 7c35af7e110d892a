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
from flashtalk_cli.media.probe import probe

ROOT = Path(__file__).resolve().parent.parent
SECONDS = {"speech.wav": 1.23, "sample.wav": 0.0, "silence.flac": 0.5}
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


OPTIONS = ("--model", "model", *SMALL)


def pictures(video: Path) -> bytes:
    """A checksum of the decoded frames."""
    command = [find_ffmpeg(), "-v", "error", "-i", video, "-map", "0:v", "-f", "md5", "-"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.fixture(scope="module")
def clips(place: Path) -> Path:
    """The folder, with videos that one run made: of each sound with seed 7, and of the speech with seed 8 too."""
    wanted = [(speech, 7, f"{speech}.mp4") for speech in SECONDS] + [("speech.wav", 8, "other.mp4")]
    lines = [
        {"picture": "p.png", "speech": speech, "seed": seed, "output": output}
        for speech, seed, output in wanted
    ]
    (place / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = flashtalk(place, "render", "--manifest", "clips.jsonl", *OPTIONS)
    assert done.returncode == 0, done.stderr.decode()
    assert not list(place.glob("*.part*"))
    return place


@pytest.fixture(scope="module")
def piped(place: Path) -> tuple[Path, str]:
    """What a run with `-o -` and --json wrote to standard output, as a file, and to standard error."""
    line = ("render", "p.png", "speech.wav", "-o", "-", "--json", "--seed", "7", *OPTIONS)
    done = flashtalk(place, *line)
    assert done.returncode == 0, done.stderr.decode()
    (place / "out.mp4").write_bytes(done.stdout)
    return place / "out.mp4", done.stderr.decode()


@pytest.mark.parametrize("speech", SECONDS)
def test_a_video_is_as_long_as_its_sound(clips: Path, speech: str) -> None:
    """Rounded up to a whole frame; picture and sound end within a frame of each other; it says what it is."""
    found = probe(clips / f"{speech}.mp4")
    assert found.video
    assert found.audio
    assert found.video.n_frames == max(1, math.ceil(SECONDS[speech] * 25))
    assert abs(found.video.duration_s - found.audio.duration_s) <= 1 / 25 + 1e-6
    assert "Synthetic media" in found.tags["comment"]
    assert "seed 7" in found.tags["comment"]


def test_a_seed_is_a_video(clips: Path, piped: tuple[Path, str]) -> None:
    """The same seed gives the same frames in another run, another seed does not."""
    video, _ = piped
    assert pictures(video) == pictures(clips / "speech.wav.mp4")
    assert pictures(video) != pictures(clips / "other.mp4")


def test_standard_output_is_the_video(piped: tuple[Path, str]) -> None:
    """`-o -` writes nothing but the video there, and with --json the events go to stderr."""
    path, told = piped
    video = probe(path).video
    assert video
    assert video.n_frames == 31
    events = [json.loads(line) for line in told.splitlines() if line.startswith("{")]
    assert events[-1]["event"] == "done"


def test_random_weights_say_so(place: Path) -> None:
    """Loudly, and in the file."""
    line = ("render", "p.png", "sample.wav", "-o", "random.mp4", "--weights", "random")
    done = flashtalk(place, *line, *OPTIONS)
    assert done.returncode == 0, done.stderr.decode()
    assert b"random weights" in done.stderr
    found = probe(place / "random.mp4")
    assert "random weights" in found.tags["comment"]
    assert found.video
    assert found.video.n_frames == 1


RENDER_ALL = """
import resource, sys, threading
from pathlib import Path
import torch
from flashtalk_cli.config import RenderJob
from flashtalk_cli.events import Emitter
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.rendering import Worker, render
for path in sys.argv[1:]:
    job = RenderJob.model_validate_json(Path(path).read_text())
    worker = Worker(job, Ranks(torch.device("cpu")), Emitter(None))
    assert render(worker, job, threading.Event(), -1) == 0
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


# One thread, since libraries keep memory for each number of threads; and what is freed is given back at once.
ONLY_WHAT_LIVES = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}


def memory_job(place: Path, name: str, seconds: float) -> Path:
    """A job for so much sound, as a file."""
    sound = place / f"{name}.wav"
    soundfile.write(sound, np.random.default_rng(1).uniform(-0.1, 0.1, int(16_000 * seconds)), 16_000)
    overrides = {"canvas": {"width_px": 64, "height_px": 64}, "hearing": {"context_s": 2}}
    overrides |= {"sampling": {"steps": 1, "chunk_frames": 33}, "model": {"name": str(place / "model")}}
    overrides |= {"precision": {"dit": "float32", "vae": "float32"}, "compute": {"device": "cpu"}}
    work = place / f"work-{name}"
    work.mkdir()
    job = RenderJob(
        preset=Preset.model_validate({"name": "memory", "description": "", **overrides}),
        picture=place / "p.png",
        audio=sound,
        speech=prepare_speech(sound, work),
        output=place / f"{name}.mp4",
    )
    (work / "job.json").write_text(job.model_dump_json())
    return work / "job.json"


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux")
def test_memory_does_not_grow_with_the_video(place: Path) -> None:
    """Five times the frames in the same process: the peak of memory is higher by less than those frames are."""
    jobs = [memory_job(place, name, seconds) for name, seconds in (("warm", 4), ("short", 4), ("long", 20))]
    done = subprocess.run(
        [sys.executable, "-c", RENDER_ALL, *jobs],
        env={**os.environ, "PYTHONPATH": str(ROOT), **ONLY_WHAT_LIVES},
        capture_output=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr.decode()
    _, short_mib, long_mib = map(float, done.stdout.split())
    more_mib = 16 * 25 * 64 * 64 * 3 / 2**20  # as bytes; as float32 four times that
    assert long_mib - short_mib < more_mib, f"{short_mib:.1f} MiB for 4 s, {long_mib:.1f} MiB for 20 s"
