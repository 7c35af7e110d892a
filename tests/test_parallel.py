"""Several processes make what one makes: DiT, VAE, colours and whole chunks on gloo (parity, 1 to 4 ranks);
every token and pixel is somebody's, once (property); and the command line with two ranks (contract)."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rank_checks
import soundfile
import tiny_model
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.nn import functional as F

from flashtalk_cli import launch
from flashtalk_cli.config import Compute, RenderJob, Speech
from flashtalk_cli.errors import ConfigError, ModelError, WorkerError
from flashtalk_cli.media.ffmpeg import find_ffmpeg
from flashtalk_cli.parallel.mesh import choose_sequence
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import run_length, span, ulysses_degree
from flashtalk_cli.parallel.spatial import Grid, choose_grid
from flashtalk_cli.presets import Override, load
from flashtalk_cli.torchrun import cause, death

ROOT = Path(__file__).resolve().parent.parent
SPAWN_S = 120
TOLERANCE = 1e-5

Results = Callable[..., list[dict[str, Tensor]]]


def rank_main(rank: int, size: int, kind: str, folder: Path) -> None:
    """A process of a group: join, do everything, write down what came out."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device(kind, rank) if kind == "cuda" else torch.device(kind)
    if size > 1:
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        store = f"file://{folder / f'store-{kind}-{size}'}"
        dist.init_process_group(backend, store, timedelta(seconds=60), size, rank)
    if kind == "cuda":
        torch.cuda.set_device(device)
    ranks = Ranks(device, size, rank)
    torch.save(rank_checks.everything(ranks), folder / f"{kind}-{size}-{rank}.pt")
    ranks.leave()


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What each rank of a group of so many came to, on a kind of device; every group is started once."""
    folder = tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank_checks"])

    @cache
    def of(size: int, kind: str = "cpu") -> list[dict[str, Tensor]]:
        processes = [
            context.Process(target=rank_main, args=(rank, size, kind, folder)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(SPAWN_S)
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        assert codes == [0] * size
        return [torch.load(folder / f"{kind}-{size}-{rank}.pt") for rank in range(size)]

    return of


def relative(found: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value."""
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


# Together, what one computes


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("part", ["dit", "vae", "session"])
def test_ranks_make_what_one_makes(size: int, part: str, results: Results) -> None:
    """Parity: on every rank, for every canvas, head count and degree, within float32's rounding."""
    same(results(size), results(1)[0], part, TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("size", [2, 4])
def test_gpus_make_what_one_makes(size: int, results: Results) -> None:
    """Parity: the same over NCCL; convolutions of another size may take another algorithm there."""
    if torch.cuda.device_count() < size:
        pytest.skip(f"needs {size} GPUs")
    same(results(size, "cuda"), results(1, "cuda")[0], "", 10 * TOLERANCE)


def same(ranks: list[dict[str, Tensor]], alone: dict[str, Tensor], part: str, tolerance: float) -> None:
    """Assert that the results whose names begin with `part` are there on each rank, and are one process's."""
    for rank, found in enumerate(ranks):
        found = {name: x for name, x in found.items() if name.startswith(part)}
        names = {name.partition(" ulysses")[0] for name in found}
        expected = {name for name in alone if name.startswith(part)}
        assert names == {name for name in expected if rank == 0 or not name.endswith("frames")}
        for name, x in found.items():
            one = alone[name.partition(" ulysses")[0]]
            if x.dtype == torch.uint8:
                assert (x.int() - one.int()).abs().max() <= 1, name  # a rounding may fall the other way
                assert (x != one).float().mean() < 1e-3, name
            else:
                assert relative(x, one) < tolerance, name


@pytest.mark.parametrize("size", [2, 3, 4])
def test_ranks_agree_to_the_bit(size: int, results: Results) -> None:
    """Contract: what is whole on every rank is the same there, so ranks cannot drift apart."""
    first, *others = results(size)
    for found in others:
        for name, x in found.items():
            assert torch.equal(x, first[name]), name


def test_what_one_makes_is_worth_comparing(results: Results) -> None:
    """Contract: no result of one process is flat, or too large or small to tell anything."""
    for name, x in results(1)[0].items():
        assert x.isfinite().all()
        if not name.startswith("dit") and "mean" not in name and "std" not in name:
            assert x.float().std() > 1e-3, name


# Every token and pixel is somebody's, once


@settings(deadline=None)
@given(st.integers(1, 500), st.integers(1, 64))
def test_every_token_is_held_once(length: int, size: int) -> None:
    """Property: spans are neighbouring runs in rank order, none longer than what all hold."""
    spans = [span(length, size, rank) for rank in range(size)]
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(length))
    assert max(stop - start for start, stop in spans) == run_length(length, size)


@settings(deadline=None)
@given(st.integers(1, 64), st.integers(1, 64))
def test_ulysses_takes_all_that_divides(size: int, heads: int) -> None:
    """Property: the chosen degree divides ranks and heads, and no larger one does."""
    degrees = [n for n in range(1, size + 1) if size % n == 0 and heads % n == 0]
    assert ulysses_degree(size, heads) == max(degrees)


sides = st.integers(1, 40)


@settings(deadline=None)
@given(st.integers(1, 16), sides, sides, st.sampled_from([1, 8]))
def test_every_pixel_is_in_one_tile(size: int, height: int, width: int, scale: int) -> None:
    """Property: a chosen grid covers the picture once, no tile empty; else it says why it cannot."""
    if not any(size % n == 0 and n <= height and size // n <= width for n in range(1, size + 1)):
        with pytest.raises(ConfigError, match=f"^{size} GPUs cannot share a picture of {width} x {height} "):
            choose_grid(size, height, width)
        return
    grid = choose_grid(size, height, width)
    covered = torch.zeros(scale * height, scale * width, dtype=torch.int)
    for rank in range(size):
        tile = covered[grid.place(rank, scale)]
        assert tile.numel() > 0
        tile += 1
    assert grid.size == size
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("size", "shape"), [(2, (1, 2)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4)), (7, (7, 1)), (1, (1, 1))]
)
def test_tiles_are_square_where_they_can_be(size: int, shape: tuple[int, int]) -> None:
    """Golden: the grids of a wide picture, and of the same one upright."""
    wide, tall = choose_grid(size, 56, 96), choose_grid(size, 96, 56)
    assert (len(wide.heights), len(wide.widths)) == shape
    assert (len(tall.widths), len(tall.heights)) == shape


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_halos_are_the_neighbours_pixels(data: st.DataObject) -> None:
    """Property: for any cut, what is sent is what is awaited, and it is the picture around the tile."""
    heights, widths = (tuple(data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))) for _ in "hw")
    before, after = data.draw(st.sampled_from([(1, 1), (0, 1), (1, 0)]))
    grid = Grid(heights, widths)
    picture = torch.arange(1.0, 1 + sum(heights) * sum(widths)).view(sum(heights), sum(widths))
    padded = F.pad(picture, (before, after, before, after))
    mail: dict[tuple[int, int], Tensor] = {}
    for rank in range(grid.size):
        tile = picture[grid.place(rank)]
        for other in grid.neighbours(rank, *tile.shape, before, after):
            mail[rank, other.rank] = tile[other.sends]
    for rank in range(grid.size):
        rows, columns = grid.place(rank)
        tile = picture[rows, columns]
        surrounded = F.pad(tile, (before, after, before, after))
        for other in grid.neighbours(rank, *tile.shape, before, after):
            surrounded[other.fills] = mail.pop((other.rank, rank))
        expected = padded[
            rows.start : rows.stop + before + after, columns.start : columns.stop + before + after
        ]
        assert torch.equal(surrounded, expected)
    assert not mail


def test_a_degree_that_does_not_divide_is_refused() -> None:
    """Contract: one line with the numbers, before any group is made."""
    with pytest.raises(ConfigError, match=r"^compute.ulysses 3 does not divide 4 GPUs and 6 heads; 2 does$"):
        choose_sequence(Ranks(torch.device("cpu"), 4, 0), 6, 3)


# Through the command line and torchrun


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, a picture of little contrast, which amplifies nothing, and 0.64 s of sound."""
    folder = tmp_path_factory.mktemp("render")
    tiny_model.write(folder / "model")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(120, 136, (64, 80, 3), dtype=np.uint8)).save(folder / "p.png")
    soundfile.write(folder / "s.wav", 0.2 * np.sin(np.arange(10_240) / 30), 16_000)
    return folder


def frames_of(place: Path, gpus: int) -> np.ndarray:
    """Decoded frames [T, H, W, 3] of the video that so many processes render, losslessly coded."""
    output = f"{gpus}.mp4"
    command = [
        "render",
        "p.png",
        "s.wav",
        "-o",
        output,
        "--model",
        "model",
        "--size",
        "80x64",
        "--steps",
        "2",
    ]
    command += ["--set", "sampling.chunk_frames=13", "--set", "hearing.context_s=2", "--crf", "0"]
    command += ["--set", "precision.dit=float32", "--set", "precision.vae=float32"]
    command += ["--device", "cpu", "--gpus", str(gpus)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-m", "flashtalk_cli", *command], cwd=place, env=environment, check=True)
    raw = [find_ffmpeg(), "-v", "error", "-i", place / output, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"]
    data = subprocess.run(raw, check=True, capture_output=True).stdout
    return np.frombuffer(data, np.uint8).reshape(-1, 64, 80, 3).astype(int)


def test_two_processes_render_the_same_video(place: Path) -> None:
    """Contract: `--gpus 2` on the CPU, by torchrun and gloo, writes the frames of `--gpus 1`."""
    one, two = frames_of(place, 1), frames_of(place, 2)
    assert one.shape == two.shape == (16, 64, 80, 3)
    assert one.std() > 1
    assert abs(one - two).max() <= 3  # a level in brightness is up to three in a colour
    assert (one != two).mean() < 0.01


@pytest.mark.parametrize(
    ("fault", "kind", "said"),
    [
        ("raises", ModelError, r"^rank 1 has its reason$"),
        ("killed", WorkerError, r"^rank 1, process \d+, died of SIGKILL: most likely"),
    ],
)
def test_a_rank_that_fails_ends_the_run_with_its_own_error(
    fault: str, kind: type[Exception], said: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: not with that of the rank that waited for it; and soon."""
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    preset = load("mini", [Override("model.name", str(place / "model"), ""), Override("name", fault, "")])
    job = RenderJob(
        preset=preset.model_copy(update={"compute": Compute(device="cpu", gpus=2)}),
        picture=place / "p.png",
        speech=Speech(samples_path=place / "s.wav", n_samples=1, loudness_lufs=None),
        audio=place / "s.wav",
        output=None,
    )

    def command(job_path: Path, socket_path: Path, debug: bool) -> list[str]:
        arguments = ["flashtalk_cli.torchrun", "2", "rank_faults", str(job_path), str(socket_path)]
        return [sys.executable, "-m", *arguments]

    lines: list[str] = []
    with pytest.raises(kind, match=said):
        launch.run(job, lambda happened: None, command=command, on_log=lines.append)
    assert not [line for line in lines if "Traceback" in line or "Signal" in line]


def test_the_killed_rank_is_the_cause() -> None:
    """Golden: not the peer that lost it, nor one that the agent ended for it, in whatever order they fell."""
    failures = {
        0: ProcessFailure(0, 10, WorkerError.exit_code, "none"),
        1: ProcessFailure(1, 11, -signal.SIGTERM, "none"),
        2: ProcessFailure(2, 12, -signal.SIGKILL, "none"),
    }
    rank, failure = cause(failures)
    assert death(rank, failure).startswith("rank 2, process 12, died of SIGKILL")
