"""The mean of several runs' weights (properties), and what has none (faults)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtalk_cli.distill.average import average
from flashtalk_cli.distill.checkpoint import WEIGHTS
from flashtalk_cli.distill.export import note_of
from flashtalk_cli.errors import InputError, ModelError


def a_run(folder: Path, seed: int, rows: int = 3) -> Path:
    draw = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(rows, 4, generator=draw).bfloat16() for name in ("blocks.0.a", "head.b")}
    folder.mkdir()
    save_file(tensors, folder / WEIGHTS, {"stage": "distill", "step": str(seed)})
    return folder


def weights(run: Path) -> dict[str, Tensor]:
    return load_file(run / WEIGHTS)


def test_a_mean_is_one_whatever_the_order(tmp_path: Path) -> None:
    """Of three runs, to bfloat16's last bit; of one run, or of one twice, that run."""
    runs = [a_run(tmp_path / str(seed), seed) for seed in range(3)]
    average(tmp_path / "mean", runs)
    average(tmp_path / "reversed", runs[::-1])
    for name, found in weights(tmp_path / "mean").items():
        wanted = sum(weights(run)[name].double() for run in runs) / 3
        torch.testing.assert_close(found.double(), wanted, rtol=2**-8, atol=1e-3)
        torch.testing.assert_close(weights(tmp_path / "reversed")[name], found, rtol=2**-7, atol=1e-3)
    for out, same in (("one", runs[:1]), ("twice", [runs[0], runs[0]])):
        average(tmp_path / out, same)
        assert all(torch.equal(weights(tmp_path / out)[name], x) for name, x in weights(runs[0]).items())


def test_a_mean_says_what_it_is_of(tmp_path: Path) -> None:
    runs = [a_run(tmp_path / str(seed), seed) for seed in (40, 60)]
    assert note_of(average(tmp_path / "mean", runs).parent) == {"stage": "average", "step": "40+60"}


def test_what_has_no_mean_is_told_and_nothing_is_written(tmp_path: Path) -> None:
    run, other = a_run(tmp_path / "run", 0), a_run(tmp_path / "other", 1, rows=5)
    with pytest.raises(ModelError, match=r"other is a network of other sizes than .*run"):
        average(tmp_path / "mean", [run, other])
    with pytest.raises(InputError, match=r"none has no weights.safetensors"):
        average(tmp_path / "mean", [run, tmp_path / "none"])
    assert not (tmp_path / "mean").exists()
    before = (run / WEIGHTS).read_bytes()
    with pytest.raises(InputError, match="is there already"):
        average(run, [run])
    assert (run / WEIGHTS).read_bytes() == before
