"""The whole of `flashtalk train` on a toy: people, both stages, a run interrupted and resumed, evaluation,
export, and `flashtalk render` with what came out (contract); footage is filtered and goes on where it
ended; several ranks compute what one does (parity); what cannot work is told in one line (faults).

Starting Python and torch takes longer than any of these tasks, so most run in this process, in place of a worker;
in processes of their own, as a user's, run people on two ranks and the training that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from thread_ranks import Table, ThreadRanks, on_ranks
from toy_training import TRAIN, write_bank, write_presets

from flashtalk_cli import launch
from flashtalk_cli.cli.app import run
from flashtalk_cli.config import Canvas, RenderJob
from flashtalk_cli.distill import filters, footage, tasks
from flashtalk_cli.distill.config import TrainJob
from flashtalk_cli.distill.shards import read_shard
from flashtalk_cli.distill.work import Work
from flashtalk_cli.events import Emitter, Event
from flashtalk_cli.rendering import Worker, render
from flashtalk_cli.serving import NOWHERE

ASSETS = Path(__file__).parent.parent / "flashtalk_cli" / "assets"
RANKS_S = 120.0  # what a rank waits for another
RANK_CHECK = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_bank(folder / "bank")
    write_presets(folder)
    return folder


class Telling(Emitter):
    """Gives events to a function instead of a socket."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        super().__init__(None)
        self._tell = tell

    def send(self, happened: Event) -> None:
        self._tell(happened)


def work_here(
    job: TrainJob | RenderJob, on_event: Callable[[Event], None], *, processes: int = 1, **_: object
) -> int:
    """In place of `launch.run`: the task itself, whose errors are those that a worker would send."""
    table, stop = Table(processes, RANKS_S), threading.Event()

    def work(rank: int) -> int:
        emitter = Telling(on_event) if rank == 0 else Emitter(None)
        ranks = ThreadRanks(torch.device("cpu"), processes, rank, table=table)
        if isinstance(job, RenderJob):
            return render(Worker(job, ranks, emitter), job, stop, NOWHERE)
        return tasks.run(Work(job, ranks, emitter, stop))

    return on_ranks(processes, work)[0]


def run_here(*arguments: object) -> int:
    """`flashtalk` with these arguments, and no other process: its ranks are threads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "run", work_here)
        return run(list(map(str, arguments)))


def flashtalk(toy: Path, *arguments: object, apart: bool = False) -> int:
    """`flashtalk train` with these arguments; `apart`: in processes of its own."""
    line = ["train", *map(str, arguments), "--preset", str(toy / "train.yaml"), "--device", "cpu"]
    return run(line) if apart else run_here(*line)


@pytest.fixture(scope="module")
def trained(toy: Path) -> Path:
    """Examples, teacher and student."""
    assert flashtalk(toy, "people", toy / "data", "--speech", toy / "bank", "--clips", 3) == 0
    assert flashtalk(toy, "adapt", toy / "data", toy / "teacher") == 0
    assert flashtalk(toy, "distill", toy / "data", toy / "student", "--teacher", toy / "teacher") == 0
    return toy


def test_losses_fall_and_are_written(trained: Path) -> None:
    """A row a step, the last loss below the first."""
    for name, column in (("teacher", "loss"), ("student", "critic_loss")):
        head, *rows = (line.split(",") for line in (trained / name / "metrics.csv").read_text().splitlines())
        losses = [float(row[head.index(column)]) for row in rows]
        assert len(losses) == {"teacher": TRAIN["adapt"], "student": TRAIN["distill"]}[name]["steps"]
        assert all(np.isfinite(losses))
        if name == "teacher":
            assert losses[-1] < losses[0]


def test_people_go_on_where_they_ended(trained: Path) -> None:
    """A whole shard stays as it is; one that is short of a clip is made again, with the clips it had."""
    made = trained / "data"
    before = {path.name: read_shard(path) for path in sorted(made.glob("shard-*"))}
    times = {path.name: path.stat().st_mtime_ns for path in made.glob("shard-*")}
    arguments = ["people", made, "--speech", trained / "bank", "--clips", 4]
    assert flashtalk(trained, *arguments, "--gpus", 2, apart=True) == 0
    whole, short = sorted(made.glob("shard-*"))
    assert whole.stat().st_mtime_ns == times[whole.name]
    after = read_shard(short)
    for name, kept in before[short.name].items():
        torch.testing.assert_close(after[name][: len(kept)], kept)
    assert int(after["picture_clip"].max()) == 1
    assert json.loads((made / "data.json").read_text())["clips"] == 4


def test_what_was_trained_renders(trained: Path, tmp_path: Path) -> None:
    """Exported, a folder verifies, and renders the packaged portrait with the preset it was trained by."""
    if not (ASSETS / "portraits" / "maya.png").exists():
        pytest.skip("no packaged portrait")
    export = ["train", "export", trained / "student", tmp_path / "model"]
    assert run_here(*export, "--preset", trained / "train.yaml") == 0
    assert run_here("models", "verify", tmp_path / "model") == 0
    picture, speech = ASSETS / "portraits" / "maya.png", tmp_path / "speech.wav"
    samples, rate_hz = soundfile.read(ASSETS / "speech" / "welcome.wav", frames=16_000)
    soundfile.write(speech, samples, rate_hz)
    options = ["--preset", trained / "render.yaml", "--model", tmp_path / "model"]
    assert run_here("render", picture, speech, "-o", tmp_path / "toy.mp4", *options) == 0
    assert (tmp_path / "toy.mp4").stat().st_size > 1000


def test_evaluation_writes_a_table_and_pictures(trained: Path) -> None:
    """Every candidate has its row, its strip, and figures over time."""
    out = trained / "eval"
    arguments = [
        "--speech",
        trained / "bank",
        "--teacher",
        trained / "teacher",
        "--student",
        trained / "student",
    ]
    assert flashtalk(trained, "eval", out, *arguments, "--gpus", 2) == 0
    found = json.loads((out / "eval.json").read_text())
    names = [result["name"] for result in found["results"]]
    assert names == [
        "teacher, 2 steps",
        "teacher, 4 steps, not distilled",
        "student, 4 steps",
        "student, 2 steps",
    ]
    assert [result["evaluations"] for result in found["results"]] == [6, 4, 4, 2]
    assert len((out / "eval.md").read_text().splitlines()) == 3 + len(names)
    assert len(list(out.glob("strip-*.png"))) == len(list(out.glob("talk-*.png"))) == len(names)


def test_ctrl_c_saves_and_exits_130(trained: Path, tmp_path: Path) -> None:
    """A run that is interrupted has a checkpoint, and the same command goes on from it."""
    command = [
        sys.executable, "-m", "flashtalk_cli", "train", "adapt", str(trained / "data"), str(tmp_path / "run"),
        "--preset", str(trained / "train.yaml"), "--device", "cpu",
    ]  # fmt: skip
    endless = [*command, "--set", "adapt.steps=100000"]
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, start_new_session=True)
    metrics = tmp_path / "run" / "metrics.csv"
    deadline_s = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3) and time.monotonic() < deadline_s:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130, told
    assert b"interrupted" in told
    saved = [path.name for path in (tmp_path / "run").glob("checkpoint-*")]
    assert len(saved) == 1
    step = int(saved[0].rpartition("-")[2])
    assert subprocess.run([*command, "--set", f"adapt.steps={step + 2}"], check=False).returncode == 0
    assert (tmp_path / "run" / f"checkpoint-{step + 2:08d}").is_dir()


def test_two_ranks_compute_what_one_does() -> None:
    """Gradients of sharded networks equal those of a whole one, through rollouts and recomputation too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    ended = subprocess.run(
        [*command, str(RANK_CHECK)], capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert 0 <= float(ended.stdout.split()[-1]) < 1e-5


def test_faults_are_told_in_one_line(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A missing folder, a teacher without weights, too long rollouts, wrong keys: exit code and cause."""
    data, teacher = trained / "data", trained / "teacher"
    cases = [
        (4, "is no folder", ["adapt", tmp_path / "none", tmp_path / "out"]),
        (4, "no folder of examples", ["adapt", tmp_path, tmp_path / "out"]),
        (4, "has no weights.safetensors", ["distill", data, tmp_path / "out", "--teacher", data]),
        (4, "rollouts need 4", ["distill", data, tmp_path / "out", "--teacher", teacher,
                                "--set", "distill.chunks=4", "--set", "data.clip_chunks=4"]),
        (3, "distill.chunks 5 is more than data.clip_chunks 3",
         ["distill", data, tmp_path / "out", "--teacher", teacher, "--set", "distill.chunks=5"]),
        (3, "unknown key 'adapt.stpes'", ["adapt", data, tmp_path / "out", "--set", "adapt.stpes=5"]),
        (4, "nothing to evaluate", ["eval", tmp_path / "out", "--speech", trained / "bank"]),
        (4, "has no videos", ["prepare", tmp_path, tmp_path / "out", "--set", "data.min_face_share=0"]),
        (5, "no model", ["adapt", data, tmp_path / "out", "--model", tmp_path / "nowhere"]),
    ]  # fmt: skip
    for exit_code, cause, arguments in cases:
        assert flashtalk(trained, *arguments) == exit_code, arguments
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(told) == 1
        assert cause in told[0]


def write_video(path: Path, *, still: bool, seconds: float = 2.0, sound: bool = True) -> None:
    source = "color=gray:size=96x64:rate=30" if still else "testsrc2=size=96x64:rate=30"
    streams = ["-f", "lavfi", "-i", source] + (["-f", "lavfi", "-i", "sine=300"] if sound else [])
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", *streams, "-t", str(seconds), "-pix_fmt", "yuv420p", str(path)],
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
    assert journal["still.mp4"] == {"kept": 2}  # 50 frames: 29 and the 21 that are left
    assert journal["moving.mp4"].keys() == {"moving background"}
    assert "no sound" in journal["mute.mp4"]["error"]
    assert "no video" in journal["junk.mp4"]["error"]
    shards = sorted(out.glob("shard-*"))
    assert len(shards) == 1
    height, width = read_shard(shards[0])["latents"].shape[-2:]
    assert width > height, "a wide video goes to the wide bucket"
    write_video(videos / "another.mp4", still=True, seconds=1.2)
    before = shards[0].read_bytes()
    assert flashtalk(toy, *arguments) == 0
    assert len(list(out.glob("shard-*"))) == 2
    assert shards[0].read_bytes() == before
    assert json.loads((out / "data.json").read_text())["clips"] == 3


def test_sound_and_frames_of_footage_share_their_zero(toy: Path, tmp_path: Path) -> None:
    """A flash and a beep at one second: the frame and the samples that have them are at the same time."""
    path = tmp_path / "late.mkv"
    flash = "color=black:size=64x64:rate=25,drawbox=color=white:t=fill:enable='between(t,1,1.1)'"
    beep = "sine=440,volume=0:enable='lt(t,1)'"
    subprocess.run(
        ["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", flash, "-itsoffset", "0.3", "-f", "lavfi", "-i", beep,
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


def test_shards_are_read_from_a_clean_tensor_format(trained: Path) -> None:
    """Number formats as documented."""
    shard = read_shard(sorted((trained / "data").glob("shard-*"))[0])
    assert {name for name, tensor in shard.items() if tensor.dtype == torch.float16} == {
        "latents", "heard", "picture", "tokens"
    }  # fmt: skip
    assert shard["colour"].dtype == shard["box"].dtype == torch.float32
