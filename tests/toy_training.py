"""A training run small enough for a test: a tiny model, a bank of invented speech, short chunks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tiny_model
import yaml

from flashtalk_cli import presets
from flashtalk_cli.config import SAMPLE_RATE_HZ, Preset
from flashtalk_cli.distill.config import TrainPreset

SIDE_PX = 64
RENDER: dict[str, Any] = {
    "name": "toy",
    "description": "as small as it gets",
    "canvas": {"width_px": SIDE_PX, "height_px": SIDE_PX},
    "sampling": {"chunk_frames": 13, "motion_frames": 5, "prompt": "A person."},
    "hearing": {"context_s": 2.0, "lookahead_s": 0.12},
    "precision": {"dit": "float32", "vae": "float32"},
    "compute": {"device": "cpu"},
}
OPTIMISER = {"learning_rate": 3e-3, "beta2": 0.99, "warmup_steps": 2}
TRAIN: dict[str, Any] = {
    "name": "toy",
    "description": "as small as it gets",
    "network": {"init": "random", "dtype": "float32"},
    "data": {"clip_chunks": 3, "pictures": 2, "shard_clips": 2},
    "adapt": {
        "steps": 6,
        "batch": 4,
        "micro_batch": 2,
        "optimiser": {**OPTIMISER, "muon": True},
        "face_weight": 2.0,
    },
    "distill": {
        "steps": 2,
        "batch": 2,
        "micro_batch": 1,
        "chunks": 2,
        "critic_updates": 2,
        "mouth_weight": 1.0,
        "student": OPTIMISER,
        "critic": OPTIMISER,
    },
    "keeping": {"log_every_steps": 1},
    "evaluation": {"people": 1, "short_chunks": 2, "long_chunks": 3, "teacher_steps": 2, "window_s": 0.32},
}


def write_bank(folder: Path, seconds: int = 12) -> None:
    """A bank of speech that says nothing: tones and noise, with sounds told at regular times."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    n = seconds * SAMPLE_RATE_HZ
    for split in ("train", "held_out"):
        tone = 0.1 * np.sin(np.arange(n) * 0.05) * (np.sin(np.arange(n) * 0.0008) > 0)
        samples = tone + 0.02 * rng.normal(size=n)
        soundfile.write(
            folder / f"{split}.opus", samples.astype(np.float32), SAMPLE_RATE_HZ, format="OGG", subtype="OPUS"
        )
        times_ms = np.arange(2 * seconds) * 500
        np.savez_compressed(
            folder / f"{split}.npz",
            starts=np.asarray([0]),
            lengths=np.asarray([n]),
            counts=np.asarray([len(times_ms)]),
            groups=np.asarray([0]),
            sounds=(np.arange(len(times_ms)) % 5 + 1).astype(np.uint8),
            times_ms=np.stack([times_ms, times_ms + 400], 1).astype(np.uint16),
            texts=np.asarray(["nothing"]),
            voices=np.asarray(["nobody"]),
        )


def write_presets(folder: Path, **changes: dict[str, Any]) -> Path:
    """Files of the render and the train preset; `changes` go into sections of the latter. Its path."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model.write(folder / "model")
    render = folder / "render.yaml"
    render.write_text(yaml.safe_dump(RENDER | {"model": {"name": str(folder / "model")}}))
    train = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value
        for key, value in TRAIN.items()
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(train | {"render": str(render)}))
    return path


def load_presets(path: Path) -> tuple[TrainPreset, Preset]:
    """What `write_presets` wrote."""
    preset = presets.load(str(path), (), presets.Kind(TrainPreset, "train"))
    return preset, presets.load(preset.render)
