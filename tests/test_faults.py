"""Two ranks of which one fails in mid-chunk, and what ends them from outside (fault tests, on gloo).

Held for each: the run is over within 10 s, with one line that names rank, host, cause and log; no process
is left; what was rendered before plays. All runs are started side by side, each once."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from fault_parent import SIZES

from flashtalk_cli.media.ffmpeg import candidates, encoders
from flashtalk_cli.media.probe import probe

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests"
LIMIT_S = 10.0  # from the fault to the end of the run
OVERDUE_S = 60.0  # from the start of a run
LAST_CHUNK = {"cpu": 1, "cuda": 0}  # told just before the fault in chunk 2: a GPU's frames come a piece late
AT_ONCE = 3
ROUND_FRAMES = 8
HOST = socket.gethostname()

# What rank 1 does, or what happens to the run from outside; torchrun and its parent are
# killed while rank 1 is stopped, which is the hardest case: it cannot see that they are gone.
INSIDE = ("raises", "killed", "sleeps", "stopped", "memory")
OUTSIDE = {"parent": "parent", "torchrun": "torchrun", "asked": "parent"}  # fault: who gets the signal
SLOW = ("memory", "stopped", "torchrun", "asked")  # in no way special, but each costs three starts of torch


@dataclass
class Ended:
    """A run that is over."""

    lines: list[dict[str, Any]]
    took_s: float  # from the fault, at the earliest, to the end of its last process; -inf: no fault came
    left: list[int]  # processes that outlived it
    part: Path

    @property
    def error(self) -> tuple[str, str]:
        """Class and text of the error."""
        return self.lines[-1]["error"], self.lines[-1]["text"]


def alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def readers_of(path: Path) -> list[int]:
    """Processes whose command line names a file: the encoder's, which is no child of the parent."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and str(path).encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def run(folder: Path, how: str, device: str = "cpu", warm: threading.Event | None = None) -> Ended:
    """Run it, do to it from outside what `how` says just before the third chunk, and wait for its end.

    `warm` is set when it comes that far, or ends before.
    """
    search = os.pathsep.join([str(ROOT), str(TESTS), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen(
        [sys.executable, str(TESTS / "fault_parent.py"), str(folder), how, device],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )
    assert parent.stdout
    overdue = threading.Timer(OVERDUE_S, parent.kill)  # of a run that never comes to its fault
    overdue.start()
    lines: list[dict[str, Any]] = []
    pids: list[int] = []
    fault_s = float("inf")
    for line in parent.stdout:
        lines.append(json.loads(line))
        if lines[-1].get("name") == "ranks":
            pids = [int(pid) for pid in lines[-1]["detail"].split()]
        if lines[-1].get("event") == "chunk" and lines[-1]["index"] == LAST_CHUNK[device]:
            fault_s = time.monotonic()
            if warm:
                warm.set()
            if how in OUTSIDE:
                time.sleep(0.5)  # rank 1 stops itself before
                number = signal.SIGTERM if how == "asked" else signal.SIGKILL
                os.kill(parent.pid if OUTSIDE[how] == "parent" else pids[-1], number)
    parent.wait()
    overdue.cancel()
    if warm:
        warm.set()
    output = folder / f"{how}.mp4"
    pids += readers_of(output)
    waited_s = min(fault_s, time.monotonic()) + 2 * LIMIT_S
    while any(map(alive, pids)) and time.monotonic() < waited_s:
        time.sleep(0.05)
    return Ended(
        lines,
        time.monotonic() - fault_s,
        [pid for pid in pids if alive(pid)],
        output.with_name(f"{how}.mp4.part"),
    )


def cases(*names: str) -> list[Any]:
    """Parameters of a test, the slow ones marked."""
    return [pytest.param(how, marks=pytest.mark.slow) if how in SLOW else how for how in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model's sizes and ten seconds of sound; videos come into it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(SIZES))
    soundfile.write(folder / "s.wav", 0.2 * np.sin(np.arange(160_000) / 30), 16_000)
    return folder


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, folder: Path) -> Iterator[dict[str, Future[Ended]]]:
    """The run of every fault that some selected test asks for, a few at a time."""
    selected = [item for item in request.session.items if item.path == Path(__file__)]
    params = [item.callspec.params for item in selected if "runs" in item.fixturenames]
    wanted = dict.fromkeys(given["how"] for given in params)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {how: pool.submit(run, folder, how) for how in wanted}


@pytest.mark.parametrize("how", cases(*INSIDE, *OUTSIDE))
def test_nothing_is_left_of_a_run_that_failed_but_what_plays(
    how: str, runs: dict[str, Future[Ended]]
) -> None:
    """Within ten seconds, whoever failed and whoever was killed."""
    ended = runs[how].result()
    assert 0 < ended.took_s < LIMIT_S, ended.lines[-3:]  # below 0: it never came to its fault
    assert not ended.left
    video = probe(ended.part).video
    assert video
    assert video.n_frames >= ROUND_FRAMES
    assert not [line for line in ended.lines if "Traceback" in line.get("log", "")]


SAID = {
    "raises": ("ModelError", "rank 1 on HOST: rank 1 has its reason; its log: LOG"),
    "memory": ("DeviceError", "rank 1 on HOST: out of memory: CUDA out of memory.*--offload.*; its log: LOG"),
    "killed": ("WorkerError", r"rank 1 on HOST, process \d+, died of SIGKILL: most likely .*; its log: LOG"),
    "spins": ("WorkerError", r"rank 1 on HOST hangs: the others have waited \d s for it; its log: LOG"),
    "sleeps": ("WorkerError", r"rank 1 on HOST hangs: the others have waited \d s for it; its log: LOG"),
    "stopped": ("WorkerError", r"rank 1 on HOST gave no sign of life for \d s: .*; its log: LOG"),
}


@pytest.mark.parametrize("how", cases(*INSIDE))
def test_one_line_names_rank_host_cause_and_log(how: str, runs: dict[str, Future[Ended]]) -> None:
    """The rank that failed, not the one that missed it; and its log is there."""
    said_of(how, runs[how].result())


def said_of(how: str, ended: Ended) -> None:
    """Assert that a run's error is that of its fault."""
    kind, text = ended.error
    expected, pattern = SAID[how]
    assert kind == expected
    named = pattern.replace("HOST", re.escape(HOST)).replace("LOG", r"(\S+/rank-1\.log)")
    found = re.fullmatch(named, text)
    assert found, text
    log = Path(found[1])
    assert log.exists()
    if how == "sleeps":
        assert "in fail" in log.read_text()  # where it hangs


@pytest.mark.parametrize("how", cases("asked"))
def test_whoever_asks_for_the_end_gets_it_in_order(how: str, runs: dict[str, Future[Ended]]) -> None:
    """SIGTERM ends all ranks after the same piece: exit code 130, and no error."""
    assert runs[how].result().lines[-1]["code"] == 130


@pytest.mark.parametrize("how", cases("torchrun"))
def test_the_death_of_torchrun_is_told(how: str, runs: dict[str, Future[Ended]]) -> None:
    """Its ranks die with it, the stopped one too."""
    kind, text = runs[how].result().error
    assert kind == "WorkerError"
    assert "SIGKILL" in text


OVER_NCCL = ("killed", "sleeps", "spins", "stopped", "memory")


@pytest.fixture(scope="module")
def gpu_runs(folder: Path) -> Iterator[dict[str, Future[Ended]]]:
    """The same on two GPUs: the first compiles for all, which start at once when it comes to its fault."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    first, *others = OVER_NCCL
    warm = threading.Event()
    with ThreadPoolExecutor(len(OVER_NCCL)) as pool:
        found = {first: pool.submit(run, folder, first, "cuda", warm)}
        warm.wait(OVERDUE_S)
        yield found | {how: pool.submit(run, folder, how, "cuda") for how in others}


@pytest.mark.gpu
@pytest.mark.parametrize("how", OVER_NCCL)
def test_ranks_over_nccl_end_as_soon(how: str, gpu_runs: dict[str, Future[Ended]]) -> None:
    """Where the libraries notice nothing: ten seconds, one line, no process left, and what was written plays."""
    ended = gpu_runs[how].result()
    tell(how, ended)
    assert 0 < ended.took_s < LIMIT_S, ended.lines[-3:]  # below 0: it never came to its fault
    assert not ended.left
    said_of(how, ended)
    if any(map(encoders, candidates())):  # else the chunks were only counted
        video = probe(ended.part).video
        assert video
        assert video.n_frames >= ROUND_FRAMES


def tell(how: str, ended: Ended) -> None:
    """Print how a run ended, and add it to the file that the environment's FAULTS names."""
    found = {"took_s": round(ended.took_s, 2), "left": ended.left, "end": ended.lines[-1]}
    print(f"{how}: {found}")
    if "FAULTS" in os.environ:
        path = Path(os.environ["FAULTS"])
        before = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**before, how: found}, indent=1) + "\n")
