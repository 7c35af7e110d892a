"""What was trained into a model folder of the released layout, so that `flashtalk render --model` takes it."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from flashtalk_cli.distill.checkpoint import WEIGHTS
from flashtalk_cli.distill.shards import ENCODERS, fingerprint
from flashtalk_cli.errors import InputError, ModelError, OutputError
from flashtalk_cli.models.export import write_component, write_config
from flashtalk_cli.models.folder import DIT_STEM, SPEECH_FOLDER, ModelFolder
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
    The weights are bfloat16. Returns the files of the diffusion transformer. Raises InputError or ModelError when run and model do not fit each
    other, OutputError when the folder cannot be written.
    """
    path = weights_of(run)
    tensors = open_files([path])
    plan = plan_of(model, "dit", random=True)
    expected = plan.layout.shapes(plan.module)
    if dict(tensors.shapes) != expected:
        raise ModelError(f"{path} does not fit {model.path}: it was trained with another model")
    try:
        _complete(out, model)
        n_bytes = path.stat().st_size
        read = {key: tensors.read(key).to(torch.bfloat16) for key in expected}
        files = write_component(out, "dit", read, shards=1 + n_bytes // SHARD_BYTES)
        config = {key: value for key, value in model.config().items() if key != "_notice"}
        write_config(out, config)
    except OSError as error:
        raise OutputError(f"{out} cannot be written ({error.strerror or error})") from None
    return files


def _complete(out: Path, model: ModelFolder) -> None:
    """Copy a model's encoders, and what else a folder needs where it is not there."""
    out.mkdir(parents=True, exist_ok=True)
    if out.resolve() == model.path.resolve():
        return
    speech = out / SPEECH_FOLDER
    there = ModelFolder(out.name, out, speech)
    for component in ENCODERS:
        old = there.files(component)
        if old and fingerprint(old) != fingerprint(model.files(component)):
            if component == "speech":  # its sizes lie beside it
                shutil.rmtree(speech)
            else:
                old[0].unlink()
    for source in model.path.rglob("*"):
        target = out / source.relative_to(model.path)
        if source.is_file() and not target.exists() and not source.name.startswith(DIT_STEM):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    if not speech.exists() and model.speech_path.is_dir():
        shutil.copytree(model.speech_path, speech)


def note_of(run: Path) -> dict[str, str]:
    """What a run wrote of itself beside its weights: stage, preset, step, settings."""
    path = weights_of(run)
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is broken or cut off ({error})") from None
