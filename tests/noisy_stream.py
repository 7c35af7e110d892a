"""A stream in this process whose performer is a stand-in: noise that lasts a second and a half."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import numpy as np
import soundfile

from flashtalk_cli.config import SoundSource, StreamJob
from flashtalk_cli.events import Emitter, Event
from flashtalk_cli.live.timeline import Taken
from flashtalk_cli.presets import Override, load


class Noisy:
    """A performer of 28 frames a chunk that fill buffers, for they do not compress."""

    def perform(self, sound: Taken, heard: np.ndarray) -> Generator[np.ndarray, None, None]:
        yield np.random.default_rng(0).integers(0, 256, (28, 64, 64, 3), np.uint8)

    def rewind(self) -> None:
        """There is nothing to go back to."""


class Told(Emitter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.events: list[Event] = []

    def send(self, happened: Event) -> None:
        self.events.append(happened)


def job_in(folder: Path, *targets: tuple[str, str]) -> StreamJob:
    """A job with 1.5 s of sound, at 64 x 64."""
    soundfile.write(folder / "s.wav", np.zeros(24_000), 16_000)
    return StreamJob(
        preset=load("mini", [Override(f"canvas.{side}_px", 64, "--size") for side in ("width", "height")]),
        picture=folder / "p.png",
        source=SoundSource(kind="file", where=str(folder / "s.wav")),
        targets=targets,
        control=folder / "c.sock",
    )
