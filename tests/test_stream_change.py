"""Another picture or prompt on air: the newest of both is what the person is shown by, whenever they were asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from flashtalk_cli.live import stage as stage_module
from flashtalk_cli.live.stage import Cue, Inputs, ModelPerformer
from flashtalk_cli.live.timeline import RATE_HZ, Taken
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.pipeline.chunks import Heard

SOUND = Taken(np.zeros(RATE_HZ // 25, np.float32), np.full(1, np.nan), 0)


class Stage:
    """Takes over what it is cued, at the end of its change as the real one does."""

    heard = Heard(start_sample=-16_000, stop_sample=0, n_frames=1, first_frame=0)

    def __init__(self) -> None:
        self.inputs = Inputs(torch.zeros(1), torch.zeros(1), torch.zeros(1))
        self.before_change: Callable[[], None] = lambda: None

    def play(self, cue: Cue) -> Iterator[np.ndarray]:
        """One frame."""
        self.before_change()
        self.inputs = cue.inputs or self.inputs
        yield np.zeros((1, 2, 2, 3), np.uint8)


class Worker:
    """Encodes a prompt as its length, a picture as its name's."""

    ranks = Ranks(torch.device("cpu"))
    preset = SimpleNamespace(hearing=SimpleNamespace(loudness_lufs=-23.0))

    def __init__(self) -> None:
        self.while_heard: Callable[[], None] = lambda: None

    def speech_encoder(self) -> Any:
        """Hears nothing, and lets something happen meanwhile."""

        def encode(samples: torch.Tensor, n_frames: int) -> torch.Tensor:
            self.while_heard()
            return torch.zeros(n_frames, 1, 1)

        return SimpleNamespace(encode=encode)

    def encode_prompt(self, prompt: str) -> torch.Tensor:
        """Its length."""
        return torch.tensor([float(len(prompt))])

    def encode_picture(self, path: Path) -> tuple[torch.Tensor, torch.Tensor]:
        """The length of its name."""
        return torch.tensor([float(len(path.name))]), torch.tensor([float(len(path.name))])


def played() -> tuple[Worker, Stage, ModelPerformer, Callable[[], tuple[float, float]]]:
    worker, stage = Worker(), Stage()
    performer = ModelPerformer(worker, stage)  # type: ignore[arg-type]

    def chunk() -> tuple[float, float]:
        """Play one: by which picture and which prompt."""
        assert len(list(performer.perform(SOUND, np.zeros(RATE_HZ, np.float32)))) == 1
        return stage.inputs.picture.item(), stage.inputs.text.item()

    return worker, stage, performer, chunk


def test_a_prompt_leaves_the_picture_and_a_picture_the_prompt() -> None:
    _, _, performer, chunk = played()
    assert chunk() == (0, 0)
    performer.change(picture=Path("b.png"))
    assert chunk() == (5, 0)
    performer.change(prompt="a prompt")
    assert chunk() == (5, 8)
    performer.change(picture=Path("cc.png"))
    performer.change(prompt="another prompt")
    assert chunk() == (6, 14)
    assert chunk() == (6, 14)


def test_a_prompt_asked_for_while_a_picture_is_taken_over_does_not_bring_the_old_one_back() -> None:
    """While the chunk's sound is encoded, and while its picture is prepared."""
    worker, stage, performer, chunk = played()
    performer.change(picture=Path("b.png"))
    worker.while_heard = lambda: performer.change(prompt="while heard")
    assert chunk() == (5, 0)
    worker.while_heard = lambda: None
    assert chunk() == (5, 11)
    performer.change(picture=Path("cc.png"))
    stage.before_change = lambda: performer.change(prompt="while prepared")
    assert chunk() == (6, 11)
    stage.before_change = lambda: None
    assert chunk() == (6, 14)


def test_a_change_is_given_the_time_of_a_first_chunk() -> None:
    """Contract: a prompt of another length compiles kernels, while no rank begins an exchange."""
    condition = SimpleNamespace(condition=lambda text, tokens: "context")
    conditions = stage_module.Conditions(torch.zeros(1), "before", torch.zeros(1), None)  # type: ignore[arg-type]
    own = stage_module.Stage.__new__(stage_module.Stage)
    own._ranks = Ranks(torch.device("cpu"))
    own._conditions = conditions
    own.models = SimpleNamespace(dit=condition, device=torch.device("cpu"))  # type: ignore[assignment]
    own._ranks.pulse.rounds = 9
    own._change(Inputs(torch.zeros(1), torch.zeros(1), torch.zeros(1)), new_picture=False)
    assert own._ranks.pulse.rounds == 0
    assert own._conditions.context == "context"
