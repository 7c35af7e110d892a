"""Checkpoints: all that a run needs to go on bit for bit, and the weights that it is for.

OUT/checkpoint-00000500/rank-0.pt ...    one file a rank; renamed into place when all are written
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

    Raises OutputError when it cannot be written; what was there before stays.
    """
    path = out / f"{PREFIX}{step:08d}"
    part = path.with_name(f"{path.name}.part")
    if ranks.leads:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    ranks.wait()
    try:
        torch.save({**state, "world": ranks.size}, part / f"rank-{ranks.rank}.pt")
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).splitlines()[0]
        raise OutputError(f"{part} cannot be written ({reason}); {keep} checkpoints are kept there") from None
    ranks.wait()
    if ranks.leads:
        shutil.rmtree(path, ignore_errors=True)
        os.replace(part, path)
        for old in found_in(out)[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    ranks.wait()
    return path


def load(path: Path, ranks: Ranks) -> dict[str, Any]:
    """This rank's part of a checkpoint, on its device.

    Raises InputError when it is broken, or was written by another number of ranks.
    """
    n_ranks = len(list(path.glob("rank-*.pt")))
    if n_ranks != ranks.size:
        raise InputError(
            f"{path} was written by {n_ranks} ranks, this run has {ranks.size}: use --gpus {n_ranks}, or "
            "begin in another folder with --no-resume"
        )
    try:
        return torch.load(path / f"rank-{ranks.rank}.pt", map_location=ranks.device, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise InputError(f"{path} is broken ({reason}): remove it to go on from the one before") from None


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
