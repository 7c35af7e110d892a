"""Checkpoints: all that a run needs to go on bit for bit, and the weights that it is for.

OUT/checkpoint-00000500/rank-0.pt ...    one file a rank; renamed into place when all are written
OUT/checkpoint-00000500.part             one that is being written or removed; the next save clears what was left
OUT/weights.safetensors                  the moving average, in the released names
"""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Generator, Tensor

from flashtalk_cli.distill.networks import whole_tensors
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.models.export import save_tensors
from flashtalk_cli.parallel.ranks import Ranks

PREFIX, WEIGHTS = "checkpoint-", "weights.safetensors"


def found_in(out: Path) -> list[Path]:
    """Complete checkpoints of a folder, oldest first."""
    return sorted(path for path in out.glob(f"{PREFIX}*") if path.is_dir() and path.suffix != ".part")


def save(out: Path, step: int, state: dict[str, Any], ranks: Ranks, keep: int) -> Path:
    """Write a checkpoint, all ranks together, and remove all but the newest `keep`.

    A complete one of that step stays as it is: it is the same. Raises OutputError when it cannot be
    written; what was there before stays.
    """
    path = out / f"{PREFIX}{step:08d}"
    part = path.with_name(f"{path.name}.part")
    if ranks.any(ranks.leads and len(_files(path)) == ranks.size):
        return path
    if ranks.leads:
        for left in out.glob(f"{PREFIX}*.part"):  # by a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        _remove(path)
        part.mkdir(parents=True)
    ranks.wait()
    try:
        torch.save({**state, "world": ranks.size}, part / f"rank-{ranks.rank}.pt")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        raise OutputError(f"{part} cannot be written ({reason}); {keep} checkpoints are kept there") from None
    ranks.wait()
    if ranks.leads:
        os.replace(part, path)
        for old in found_in(out)[:-keep]:
            _remove(old)
    ranks.wait()
    return path


def _files(path: Path) -> list[Path]:
    """Those of a checkpoint's ranks that are there."""
    return sorted(path.glob("rank-*.pt"))


def _remove(path: Path) -> None:
    """Remove a checkpoint; a kill meanwhile leaves no half of it under a checkpoint's name."""
    if path.is_dir():
        part = path.with_name(f"{path.name}.part")
        os.replace(path, part)
        shutil.rmtree(part, ignore_errors=True)


def load(path: Path, ranks: Ranks) -> dict[str, Any]:
    """This rank's part of a checkpoint, mapped from its file: a device need not hold it beside the networks.

    Raises InputError when it is broken, or was written by another number of ranks.
    """
    files, own = _files(path), path / f"rank-{ranks.rank}.pt"
    if not files:
        raise _broken(path, "no rank's file is there")
    try:
        readable = own if own in files else files[0]
        state: dict[str, Any] = torch.load(readable, map_location="cpu", mmap=True, weights_only=True)
        world = int(state["world"])
    except torch.OutOfMemoryError:  # a RuntimeError too, which says nothing of the file
        raise
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise _broken(path, reason[:120]) from None
    if len(files) != world:
        raise _broken(path, f"files of {len(files)} ranks out of {world} are there")
    if world != ranks.size:
        raise InputError(
            f"{path} was written by {world} ranks, this run has {ranks.size}: use --gpus {world}, or "
            "begin in another folder with --no-resume"
        )
    return state


def _broken(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is broken ({reason}): remove it to go on from the one before")


def check_identity(path: Path, found: dict[str, str], wanted: dict[str, str]) -> None:
    """Hold a checkpoint to the run that would go on with it; InputError names what differs."""
    differing = [name for name in wanted if found.get(name) != wanted[name]]
    if differing:
        raise InputError(
            f"{path} is of another run: {', '.join(differing)} differ; choose another folder, or remove that one"
        )


def generators_state(generators: dict[str, Generator]) -> dict[str, Tensor]:
    """States of random generators, to be kept."""
    return {name: generator.get_state() for name, generator in generators.items()}


def load_generators(generators: dict[str, Generator], states: dict[str, Tensor]) -> None:
    """The way back."""
    for name, generator in generators.items():
        generator.set_state(states[name].cpu())


def save_weights(
    out: Path, names: list[str], tensors: list[Tensor], ranks: Ranks, note: dict[str, str]
) -> Path:
    """Write OUT/weights.safetensors in bfloat16, complete or not at all; all ranks must call it."""
    path = out / WEIGHTS
    whole = whole_tensors(names, tensors, torch.bfloat16)
    if not ranks.leads:
        for _ in whole:  # gathered together, kept by one
            pass
    else:
        try:
            save_tensors(path, dict(whole), note)
        except OSError as error:
            raise OutputError(f"{path} cannot be written ({error.strerror or error})") from None
    ranks.wait()
    return path
