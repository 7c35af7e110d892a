"""Checkpoints of runs that were killed: only whole ones go by a checkpoint's name, and what is left is cleared
(properties); broken ones, and a device without room, are told apart (faults)."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from flashtalk_cli.distill import checkpoint
from flashtalk_cli.errors import InputError
from flashtalk_cli.parallel.ranks import Ranks

ALONE = Ranks(torch.device("cpu"))


class Killed(BaseException):
    """As kill -9 would have it: nobody catches it, nothing is cleaned up."""


def save(out: Path, step: int, value: float = 0.0, keep: int = 2) -> Path:
    return checkpoint.save(out, step, {"x": torch.full((3,), value)}, ALONE, keep)


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.iterdir())


def test_what_was_killed_while_it_was_written_is_cleared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no checkpoint, and the next save of whatever step removes it."""
    save(tmp_path, 5)

    def half(state: object, path: Path) -> NoReturn:
        path.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half)
        with pytest.raises(Killed):
            save(tmp_path, 7)
    assert [path.name for path in checkpoint.found_in(tmp_path)] == ["checkpoint-00000005"]
    assert "checkpoint-00000007.part" in names(tmp_path)
    save(tmp_path, 8)
    assert names(tmp_path) == ["checkpoint-00000005", "checkpoint-00000008"]


def test_a_complete_checkpoint_is_not_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not touched either: whenever the second run is killed, the first one's is there."""
    path = save(tmp_path, 5, 1.0)

    def killed(*_: object, **__: object) -> NoReturn:
        raise Killed

    monkeypatch.setattr(torch, "save", killed)
    monkeypatch.setattr(shutil, "rmtree", killed)
    assert save(tmp_path, 5, 2.0) == path
    assert checkpoint.load(path, ALONE)["x"].tolist() == [1.0] * 3


def test_one_of_that_step_that_is_not_complete_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-00000005"
    path.mkdir()
    (path / "rank-1.pt").write_bytes(b"of two ranks once")
    (path / "rank-0.pt").write_bytes(b"")
    save(tmp_path, 5, 2.0)
    assert names(path) == ["rank-0.pt"]
    assert checkpoint.load(path, ALONE)["x"].tolist() == [2.0] * 3


def test_a_checkpoint_is_removed_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the middle of it, no folder with a checkpoint's name is left without its files."""
    save(tmp_path, 5)

    def half(path: Path, **_: object) -> NoReturn:
        (path / "rank-0.pt").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", half)
        with pytest.raises(Killed):
            save(tmp_path, 6, keep=1)
    assert [path.name for path in checkpoint.found_in(tmp_path)] == ["checkpoint-00000006"]
    checkpoint.load(tmp_path / "checkpoint-00000006", ALONE)
    save(tmp_path, 7)
    assert names(tmp_path) == ["checkpoint-00000006", "checkpoint-00000007"]


def test_half_of_a_checkpoint_is_broken_and_of_no_other_number_of_ranks(tmp_path: Path) -> None:
    """Without files, or with those of some ranks: broken, with the numbers. Whole: the number of GPUs that goes on."""
    path = save(tmp_path, 5)
    with pytest.raises(InputError, match=r"written by 1 ranks, this run has 2: use --gpus 1"):
        checkpoint.load(path, Ranks(torch.device("cpu"), 2, 0))
    torch.save({"world": 3}, path / "rank-0.pt")
    torch.save({"world": 3}, path / "rank-2.pt")
    for ranks in (ALONE, Ranks(torch.device("cpu"), 3, 1)):
        with pytest.raises(InputError, match=r"is broken \(files of 2 ranks out of 3 are there\): remove it"):
            checkpoint.load(path, ranks)
    for file in path.iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"is broken \(no rank's file is there\): remove it"):
        checkpoint.load(path, ALONE)


@pytest.mark.parametrize("content", [b"", b"cut off"])
def test_a_file_that_is_no_checkpoint_is_broken(tmp_path: Path, content: bytes) -> None:
    path = save(tmp_path, 5)
    (path / "rank-0.pt").write_bytes(content)
    with pytest.raises(InputError, match="is broken"):
        checkpoint.load(path, ALONE)


def test_a_checkpoint_needs_no_room_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is mapped from its file, whatever the device; and where room is short, no checkpoint is called broken."""
    path = save(tmp_path, 5, 3.0)
    loaded = checkpoint.load(path, Ranks(torch.device("meta")))
    assert loaded["x"].device.type == "cpu"
    assert loaded["x"].tolist() == [3.0] * 3
    given: dict[str, Any] = {}

    def full(*_: object, **options: object) -> NoReturn:
        given.update(options)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(torch, "load", full)
    with pytest.raises(torch.OutOfMemoryError):
        checkpoint.load(path, ALONE)
    assert given["mmap"]
