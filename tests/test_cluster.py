"""A manifest on a Ray cluster, held to: the same files and records as without it, also when an actor is killed
(fault, slow, with a cluster of this machine); and what is missing is said in one line (contract)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import tiny_model
from PIL import Image
from test_batch import OPTIONS, ROOT, clip_of

from flashtalk_cli.batch import cluster
from flashtalk_cli.batch.clip import Setup
from flashtalk_cli.cli.app import run
from flashtalk_cli.media.probe import probe

START_S = 60.0


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """A cluster of this machine alone, as long as the tests run."""
    pytest.importorskip("ray", reason="Ray is not installed")
    found = f"127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2"]
    command += [f"--port={found.rpartition(':')[2]}", "--include-dashboard=false", "--disable-usage-stats"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [*command, "--object-store-memory=100000000"],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        until = time.monotonic() + START_S
        for line in process.stdout:
            if "ray.init" in line or "runtime started" in line:
                break
            assert time.monotonic() < until, "Ray does not start"
        yield found
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    tiny_model.write(tmp_path / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(tmp_path / "p.png")
    soundfile.write(tmp_path / "s.wav", rng.uniform(-0.2, 0.2, 24_000), 16_000)
    clips = [{"picture": "p.png", "speech": "s.wav", "output": f"{i}.mp4"} for i in range(1, 6)]
    clips[2]["speech"] = "none.wav"
    (tmp_path / "clips.jsonl").write_text("\n".join(map(json.dumps, clips)))
    return tmp_path


def actors_at_work() -> list[int]:
    """Process ids of actors that render: Ray gives its processes the name of what they do."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if name.startswith("ray::") and "Host.render" in name:
            found.append(int(folder.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
def test_a_cluster_renders_a_manifest_though_an_actor_is_killed(address: str, place: Path) -> None:
    """Fault: all files, the bad line named, the lost actor's clip tried twice."""
    command = [
        sys.executable,
        "-m",
        "flashtalk_cli",
        "render",
        "--manifest",
        "clips.jsonl",
        "--replicas",
        "2",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    process = subprocess.Popen(
        [*command, "--ray", address, *OPTIONS],
        cwd=place,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (working := actors_at_work()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(working[0], signal.SIGKILL)
    out, errors = process.communicate(timeout=200)
    assert process.returncode == 9, errors
    ends: dict[int, Any] = {e["line"]: e for e in map(json.loads, out.splitlines()) if e["event"] == "clip"}
    assert {line: end["state"] for line, end in ends.items()} == {
        line: "failed" if line == 3 else "done" for line in range(1, 6)
    }
    assert sorted(end.get("tries", 0) for end in ends.values()) == [0, 1, 1, 1, 2]
    for line in (1, 2, 4, 5):
        video = probe(place / f"{line}.mp4").video
        assert video
        assert video.n_frames == 38


def test_without_ray_it_says_what_to_install(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["render", "--manifest", str(place / "clips.jsonl"), "--ray", "auto"]
    assert run([*arguments, "--model", str(place / "model"), "--size", "64x64"]) == 2
    assert "pip install 'flashtalk[ray]'" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [("cpu", 8, (3, 0)), ("auto", 0, (3, 0)), ("auto", 8, (1, 3)), ("cuda", 0, (1, 3))],
)
def test_what_an_actor_asks_for(device: str, gpus: int, expected: tuple[int, int]) -> None:
    """Contract: GPUs where the cluster has some, or where they are asked for: then it waits for them."""
    clip = clip_of(1)
    preset = clip.preset.model_copy(
        update={"compute": clip.preset.compute.model_copy(update={"device": device})}
    )
    setup = Setup.of([clip.model_copy(update={"preset": preset})], processes=3, debug=False)
    asked = cluster._resources(setup, {"GPU": gpus} if gpus else {})
    assert (asked["num_cpus"], asked["num_gpus"]) == expected
