"""What a training run is, as frozen values: presets of `presets/train/`, and the jobs made of them.

A train preset names a render preset (`render: mini`): canvas, chunk length, hearing and model are
that one's, so that what is trained is what will be used. No torch here: the command line reads it.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from flashtalk_cli.config import Frozen, Preset

Task = Literal["prepare", "people", "adapt", "distill", "eval", "export"]


class Data(Frozen):
    """How clips are cut into examples, and which are kept."""

    clip_chunks: int = Field(5, ge=1)  # longest run of chunks cut out of footage as one clip
    pictures: int = Field(3, ge=2)  # candidate pictures a clip
    shard_clips: int = Field(256, ge=1)
    # Buckets, each of about the canvas's area; a clip goes to the nearest.
    aspects: tuple[str, ...] = Field(("1:1",), strict=False, min_length=1)
    silent_share: float = Field(0.05, ge=0, le=1)  # generated clips in which nobody speaks
    max_background_motion: float = Field(2.0, gt=0)  # levels of 255 that a still background may flicker
    min_face_share: float = Field(0.15, ge=0, le=1)  # of the frame's height
    resident: Literal["auto", "always", "never"] = "auto"  # whether the examples lie on the device

    @field_validator("aspects")
    @classmethod
    def _are_ratios(cls, aspects: tuple[str, ...]) -> tuple[str, ...]:
        for aspect in aspects:
            if not re.fullmatch(r"[1-9]\d?:[1-9]\d?", aspect):
                raise ValueError(f"{aspect!r} is not a ratio such as 9:16")
        return aspects


class Network(Frozen):
    """How the network computes while it is trained."""

    init: Literal["random", "released"] = "released"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    recompute: bool = False  # activation checkpointing
    compile: bool = False
    shard: bool = True  # over several ranks; else each has the whole network, and gradients are averaged


class Optimiser(Frozen):
    """AdamW and the course of its learning rate: a linear rise, a plateau, a linear fall to zero.

    With `muon`, the matrices of the blocks are moved by Muon instead, at the same rate and decay.
    """

    muon: bool = False
    learning_rate: float = Field(2e-6, gt=0)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    warmup_steps: int = Field(50, ge=0)
    cooldown_share: float = Field(0.0, ge=0, le=1)  # of the steps, at their end
    clip_norm: float = Field(1.0, gt=0)


class Adapt(Frozen):
    """Stage 1: flow matching on clips of a chunk's length."""

    steps: int = Field(1000, ge=1)
    batch: int = Field(32, ge=1)  # examples a step, over all ranks
    micro_batch: int = Field(1, ge=1)  # examples that a rank computes at once
    optimiser: Optimiser = Optimiser()
    ema_decay: float = Field(0.999, ge=0, lt=1)
    shift: float = Field(5.0, gt=0)
    first_share: float = Field(0.25, ge=0, le=1)  # examples that begin a video: one latent is given, not two
    text_dropout: float = Field(0.1, ge=0, le=1)
    audio_dropout: float = Field(0.1, ge=0, le=1)
    wear: float = Field(0.0, ge=0)  # of given motion latents, in standard deviations: see `adapt.worn`
    face_weight: float = Field(1.0, ge=1)  # how much more an error inside the face's box counts
    temporal_weight: float = Field(0.0, ge=0)  # of the errors' change from latent to latent


class Distill(Frozen):
    """Stage 2: distribution matching on the student's own rollouts."""

    steps: int = Field(200, ge=1)  # student updates
    batch: int = Field(32, ge=1)
    micro_batch: int = Field(1, ge=1)
    student: Optimiser = Optimiser(learning_rate=2e-6, beta1=0.0)
    critic: Optimiser = Optimiser(learning_rate=4e-7, beta1=0.0)
    critic_updates: int = Field(5, ge=1)  # for each of the student's, from the same rollout
    critic_warmup: int = Field(0, ge=0)  # rollouts for the critic alone, before the student's first update
    ema_decay: float = Field(0.95, ge=0, lt=1)
    chunks: int = Field(5, ge=1)  # K: a rollout has 1..K chunks, the last is scored
    first_motion: Literal["picture", "real", "mixed"] = "picture"  # what a rollout's first chunk continues
    carry: float = Field(0.0, ge=0, lt=1)  # rollouts that go on where an earlier one had come to: see `dmd`
    clean_motion: bool = True  # teacher and critic see the motion latents clean, not noised
    align_motion: bool = True  # ... and the student's own, not those of the real clip
    mouth_weight: float = Field(0.0, ge=0)  # of the student's error around the mouth on real clips
    text_guidance: float = Field(3.0, ge=0)
    audio_guidance: float = Field(4.0, ge=0)


class Keeping(Frozen):
    """What is written while a run goes on."""

    save_every_s: float = Field(600.0, gt=0)
    checkpoints: int = Field(2, ge=1)  # kept; older ones are removed
    log_every_steps: int = Field(10, ge=1)


class Evaluation(Frozen):
    """What `train eval` measures."""

    people: int = Field(8, ge=1)
    short_chunks: int = Field(9, ge=1)  # rollouts on which lips and sound are compared: 10 s
    long_chunks: int = Field(270, ge=1)  # 5 minutes
    teacher_steps: int = Field(40, ge=2)
    window_s: float = Field(60.0, gt=0)  # first and last window of a long rollout that are compared


class TrainPreset(Frozen):
    """Everything about a training run except its folders: one YAML file under `presets/train/`."""

    name: str
    description: str
    render: str
    seed: int = Field(0, ge=0, lt=2**31)
    network: Network = Network()
    data: Data = Data()
    adapt: Adapt = Adapt()
    distill: Distill = Distill()
    keeping: Keeping = Keeping()
    evaluation: Evaluation = Evaluation()

    @model_validator(mode="after")
    def _rollouts_fit_clips(self) -> TrainPreset:
        if self.distill.chunks > self.data.clip_chunks:
            raise ValueError(
                f"distill.chunks {self.distill.chunks} is more than data.clip_chunks {self.data.clip_chunks}: "
                "a rollout hears one clip"
            )
        return self


class TrainJob(Frozen):
    """One command of `flashtalk train` for its worker; paths are absolute.

    data: the folder of examples. out: what the command writes. source: footage to prepare, the bank of
    speech, or the run that is exported. teacher, students: folders that stages 1 and 2 wrote.
    """

    task: Task
    preset: TrainPreset
    base: Preset
    out: Path
    data: Path | None = None
    source: Path | None = None
    teacher: Path | None = None
    students: tuple[Path, ...] = ()
    clips: int = Field(0, ge=0)
    held_out: bool = False
    max_seconds: float | None = Field(None, gt=0)
    resume: bool = True
