"""What was trained into a model folder of the released layout, so that `flashtalk render --model` takes it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flashtalk_cli.distill.checkpoint import WEIGHTS
from flashtalk_cli.distill.shards import ENCODERS, fingerprint
from flashtalk_cli.errors import InputError, ModelError, OutputError
from flashtalk_cli.models.export import write_component, write_config
from flashtalk_cli.models.folder import DIT_STEM, SPEECH_FOLDER, STEMS, ModelFolder
from flashtalk_cli.models.tensors import open_files
from flashtalk_cli.models.weights import plan_of

SHARD_BYTES = 10_000_000_000


def weights_of(run: Path) -> Path:
    """The weights that a run of stage 1 or 2 wrote. Raises InputError when there are none."""
    path = run / WEIGHTS
    if not path.is_file():
        raise InputError(
            f"{run} has no {WEIGHTS}: its training has not ended, or it is no run of this program"
        )
    return path


def export(run: Path, out: Path, model: ModelFolder) -> list[Path]:
    """Write a run's weights into the folder `out`, beside the encoders that they were trained with.

    Encoders of another model that lie there are replaced by those of `model`; what else lies there stays.
    The weights are bfloat16. Returns the files of the diffusion transformer. Raises InputError or ModelError when
    run and model do not fit each other, OutputError when the folder cannot be written: its weights stay then.
    """
    path = weights_of(run)
    tensors = open_files([path])
    plan = plan_of(model, "dit", random=True)
    expected = plan.layout.shapes(plan.module)
    if dict(tensors.shapes) != expected:
        raise ModelError(f"{path} does not fit {model.path}: it was trained with another model")
    try:
        with _encoders(out, model):
            n_bytes = path.stat().st_size
            read = {key: tensors.read(key).to(torch.bfloat16) for key in expected}
            files = write_component(out, "dit", read, shards=1 + n_bytes // SHARD_BYTES)
        config = {key: value for key, value in model.config().items() if key != "_notice"}
        write_config(out, config)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error})") from None
    return files


@contextmanager
def _encoders(out: Path, model: ModelFolder) -> Iterator[None]:
    """Bring a model's encoders, and what else the folder lacks, beside what the block writes there.

    All are copied before the block and renamed into place after it, so that a full disk leaves the folder's
    own encoders and network together.
    """
    copies, outdated = _differing(out, model)
    parts = {target: target.with_name(f"{target.name}.part") for target in copies}
    try:
        for target, source in copies.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, parts[target])
        yield
        for target, part in parts.items():
            os.replace(part, target)
        for old in outdated - copies.keys():
            old.unlink()
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def _differing(out: Path, model: ModelFolder) -> tuple[dict[Path, Path], set[Path]]:
    """Files to copy to `out`, by their place there, and what lies there of other encoders."""
    if out.resolve() == model.path.resolve():
        return {}, set()
    speech = out / SPEECH_FOLDER
    there = ModelFolder(out.name, out, speech)
    outdated: set[Path] = set()
    for component in ENCODERS:
        old = there.files(component)
        if old and fingerprint(old) != fingerprint(model.files(component)):
            # what describes a speech encoder lies beside it
            found = speech.rglob("*") if component == "speech" else out.glob(f"{STEMS[component]}.*")
            outdated |= {path for path in found if path.is_file()}
    sources = {
        out / source.relative_to(model.path): source
        for source in model.path.rglob("*")
        if not source.name.startswith(DIT_STEM) and model.path / SPEECH_FOLDER not in source.parents
    }
    sources |= {
        speech / source.relative_to(model.speech_path): source for source in model.speech_path.rglob("*")
    }
    copies = {
        target: source
        for target, source in sources.items()
        if source.is_file() and (target in outdated or not target.exists())
    }
    return copies, outdated


def note_of(run: Path) -> dict[str, str]:
    """What a run wrote of itself beside its weights: stage, preset, step, settings."""
    path = weights_of(run)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is broken or cut off ({error})") from None
