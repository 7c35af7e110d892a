"""The whole of `flashtalk train` on a toy: people, both stages, a run interrupted and resumed, evaluation,
export, and `flashtalk render` with what came out (contract); several ranks compute what one does (parity);
what cannot work is told in one line (faults).

Starting Python and torch takes longer than any of these tasks, so most run in this process, in place of a worker;
in processes of their own, as a user's, run people on two ranks and the training that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from toy_training import TRAIN, write_bank, write_presets
from train_commands import flashtalk, run_here

from flashtalk_cli.distill.shards import read_shard
from flashtalk_cli.errors import DeviceError, InputError

ASSETS = Path(__file__).parent.parent / "flashtalk_cli" / "assets"
RANK_CHECK = Path(__file__).with_name("train_ranks.py")


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train")
    write_bank(folder / "bank")
    write_presets(folder)
    return folder


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
    both, voices = (out / "eval.md").read_text().split("\n\n")
    assert len(both.splitlines()) == 4 + len(names)
    assert [line.split("|")[1].strip() for line in voices.splitlines()[2:]] == [
        "truth",
        "truth through the VAE",
        *names,
    ]
    truth, through_vae = found["yardsticks"]
    assert [truth["name"], through_vae["name"]] == ["truth", "truth through the VAE"]
    assert truth["seen"]["likeness"] > through_vae["seen"]["likeness"]
    assert len(list(out.glob("strip-*.png"))) == len(list(out.glob("talk-*.png"))) == len(names)


@pytest.mark.parametrize("gpus", [1, 2])
def test_ctrl_c_saves_and_exits_130(trained: Path, tmp_path: Path, gpus: int) -> None:
    """A run that is interrupted has a checkpoint, and the same command goes on from it.

    Saving takes as long as it takes: torchrun's agent, which would end ranks at once here, leaves them alone.
    """
    command = [
        sys.executable, "-m", "flashtalk_cli", "train", "adapt", str(trained / "data"), str(tmp_path / "run"),
        "--preset", str(trained / "train.yaml"), "--device", "cpu", "--gpus", str(gpus),
    ]  # fmt: skip
    endless = [*command, "--set", "adapt.steps=100000"]
    hasty = os.environ | {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"}
    process = subprocess.Popen(endless, stderr=subprocess.PIPE, start_new_session=True, env=hasty)
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
    assert (tmp_path / "run" / "weights.safetensors").exists()
    if gpus > 1:
        return  # going on is the same with any number
    step = int(saved[0].rpartition("-")[2])
    assert subprocess.run([*command, "--set", f"adapt.steps={step + 2}"], check=False).returncode == 0
    assert (tmp_path / "run" / f"checkpoint-{step + 2:08d}").is_dir()


def test_what_a_worker_finds_out_is_told(trained: Path, tmp_path: Path) -> None:
    """Also before its rank is known."""
    data, out = trained / "data", tmp_path / "run"
    command = ["train", "adapt", data, out, "--preset", trained / "train.yaml", "--device", "cuda"]
    ended = subprocess.run(
        [sys.executable, "-m", "flashtalk_cli", *map(str, command)], capture_output=True, text=True,
        timeout=120, check=False, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert ended.returncode == DeviceError.exit_code
    assert "no CUDA device" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_examples_of_other_kinds_do_not_mix(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People held out of training are not trained on, nor put among the others; nor shards of another size."""
    data, more = trained / "data", ["--speech", trained / "bank", "--clips", 4]
    kept = trained / "kept"
    assert flashtalk(trained, "people", kept, *more[:3], 1, "--held-out") == 0
    cases = [
        ("are held out of training", ["adapt", kept, trained / "never"]),
        ("are not held out of training", ["people", data, *more, "--held-out"]),
        ("was made with shard_clips 2, now it is 3", ["people", data, *more, "--set", "data.shard_clips=3"]),
    ]
    for cause, arguments in cases:
        assert flashtalk(trained, *arguments) == InputError.exit_code, arguments
        assert cause in capsys.readouterr().err


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


def test_shards_are_read_from_a_clean_tensor_format(trained: Path) -> None:
    """Number formats as documented."""
    shard = read_shard(sorted((trained / "data").glob("shard-*"))[0])
    assert {name for name, tensor in shard.items() if tensor.dtype == torch.float16} == {
        "latents", "heard", "picture", "tokens"
    }  # fmt: skip
    assert shard["colour"].dtype == shard["box"].dtype == torch.float32
