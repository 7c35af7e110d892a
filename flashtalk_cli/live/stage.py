"""The model on stage: what every rank holds of a live stream, and rank 0's side that hears and cues.

Rank 0 has the sound, the outputs and the control; the other ranks follow it chunk by chunk.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from collections.abc import Generator as Yields
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import soxr
import torch
from torch import Tensor

from flashtalk_cli.config import SAMPLE_RATE_HZ, Sampling
from flashtalk_cli.live.loudness import RunningGain
from flashtalk_cli.live.timeline import RATE_HZ, Taken
from flashtalk_cli.pipeline import chunks
from flashtalk_cli.pipeline.session import Conditions, Models, State, begin, prepare, step, to_bytes

if TYPE_CHECKING:  # it dispatches to this module
    from flashtalk_cli.rendering import Worker


@dataclass(frozen=True)
class Inputs:
    """What the person is shown by, on the CPU: see `pipeline.session.prepare`."""

    picture: Tensor  # [3, H, W] in [-1, 1]
    text: Tensor  # [L, text_dim]
    tokens: Tensor  # [1, n, image_dim]


@dataclass(frozen=True)
class Cue:
    """What rank 0 tells the others of a chunk."""

    features: Tensor  # [n_frames, layers, dim]: what is heard
    inputs: Inputs | None = None  # from this chunk on
    new_picture: bool = False  # whether their picture is another, and not only the prompt
    rewind: bool = False  # whether this chunk takes the place of the last one


class Stage:
    """What every rank holds of a stream: the models, the person, and the state between chunks."""

    def __init__(self, worker: Worker) -> None:
        self._ranks = worker.ranks
        self.inputs = Inputs(*worker.inputs())
        self.models: Models = worker.load_models()
        self.heard = chunks.heard_by(0, worker.preset.sampling, worker.preset.hearing)
        self._conditions = self._prepare(self.inputs)
        self._state: State = begin(self._conditions, worker.preset.sampling.seed)
        self._before = self._state

    @property
    def sampling(self) -> Sampling:
        """How frames are drawn."""
        return self.models.sampling

    def play(self, cue: Cue) -> Iterator[np.ndarray | None]:
        """One chunk, on all ranks together: frames uint8 [T, H, W, 3] as they decode, None on all but rank 0."""
        if cue.rewind:
            self._state = self._before
        if cue.inputs is not None:
            self._change(cue.inputs, cue.new_picture)
        self._before = self._state
        windows = chunks.windows(cue.features, self.heard, self.sampling.chunk_frames)
        self._state = yield from self._frames(windows)
        self._ranks.pulse.round()

    def warm_up(self) -> None:
        """Compute a chunk that nobody sees: the first one on a device is slow."""
        layers, dim = self.models.dit.params.audio_layers, self.models.dit.params.audio_dim
        silence = torch.zeros(1, self.sampling.chunk_frames, chunks.WINDOW_FRAMES, layers, dim)
        for _ in self._frames(silence):
            pass

    def follow(self) -> None:
        """On the other ranks: play what rank 0 cues, until it cues no more."""
        nothing: Cue | None = None
        while (cue := self._ranks.from_leader(nothing)) is not None:
            for _ in self.play(cue):
                pass

    def _frames(self, windows: Tensor) -> Yields[np.ndarray | None, None, State]:
        pieces: Generator[Tensor, None, State] = step(self.models, self._conditions, self._state, windows)
        while True:
            try:
                frames = self.models.tiles.collect(to_bytes(next(pieces)))
            except StopIteration as end:
                return end.value
            yield None if frames is None else frames.cpu().numpy()

    def _prepare(self, inputs: Inputs) -> Conditions:
        return prepare(self.models, inputs.picture, inputs.text, inputs.tokens)

    def _change(self, inputs: Inputs, new_picture: bool) -> None:
        """Another picture begins as a stream begins; another prompt leaves the motion as it is."""
        self._ranks.pulse.anew()  # a prompt of another length may compile kernels
        if not new_picture:
            context = self.models.dit.condition(
                inputs.text.to(self.models.device), inputs.tokens.to(self.models.device)
            )
            self._conditions = replace(self._conditions, context=context)
        else:
            self._conditions = self._prepare(inputs)
            self._state = replace(self._state, motion=self._conditions.picture_latent)
        self.inputs = inputs


class ModelPerformer:
    """Rank 0's side of a stage: hears sound, and plays what it hears on all ranks."""

    def __init__(self, worker: Worker, stage: Stage) -> None:
        self._worker = worker
        self._ranks = worker.ranks
        self._stage = stage
        self._encoder = worker.speech_encoder()
        silence = torch.zeros(stage.heard.stop_sample - stage.heard.start_sample)
        for _ in range(2):  # slow the first time, and on a GPU recorded the second
            self._encoder.encode(silence, stage.heard.n_frames)
        self._gain = RunningGain(RATE_HZ, worker.preset.hearing.loudness_lufs)
        self._lock = threading.Lock()
        self._chosen = stage.inputs  # what a change goes on from: the stage has the newest only a chunk later
        self._next: Inputs | None = None  # the same until a chunk takes them over
        self._rewind = False
        self._rest = ExitStack()
        self._rest.enter_context(self._ranks.pulse.resting())

    def perform(self, sound: Taken, heard: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Frames of the next chunk, as they decode."""
        self._rest.close()
        with self._lock:
            inputs, self._next = self._next, None
        self._gain.add(sound.samples)
        new_picture = inputs is not None and inputs.picture is not self._stage.inputs.picture
        cue = Cue(self._features(heard), inputs, new_picture, self._rewind)
        self._rewind = False
        pieces = self._stage.play(self._ranks.from_leader(cue))
        try:
            for frames in pieces:
                assert frames is not None
                yield frames
        finally:
            if self._ranks.size > 1:
                for _ in pieces:  # closed early: the other ranks are in the middle of it
                    pass
            self._rest.enter_context(self._ranks.pulse.resting())  # until the sound of the next one is there

    def rewind(self) -> None:
        """Perform the next chunk in place of the last one, of which nothing was shown."""
        self._rewind = True

    def end(self) -> None:
        """Let the other ranks go."""
        if self._ranks.size > 1:
            self._ranks.from_leader(None)

    def change(self, *, picture: Path | None = None, prompt: str | None = None) -> None:
        """Encode another picture or prompt, in the caller's thread; it is taken over at the next chunk.

        Raises `InputError` for a picture that cannot be used.
        """
        text = None if prompt is None else self._worker.encode_prompt(prompt)
        pixels, tokens = (None, None) if picture is None else self._worker.encode_picture(picture)
        with self._lock:
            if text is not None:
                self._chosen = replace(self._chosen, text=text)
            if pixels is not None and tokens is not None:
                self._chosen = replace(self._chosen, picture=pixels, tokens=tokens)
            self._next = self._chosen

    def _features(self, heard: np.ndarray) -> Tensor:
        """Feature rows [n_frames, layers, dim] of sound at 48 kHz that ends where the look-ahead does."""
        at_16_khz = soxr.resample(self._gain.hear(heard), RATE_HZ, SAMPLE_RATE_HZ, quality="HQ")
        rows = self._encoder.encode(torch.from_numpy(at_16_khz), self._stage.heard.n_frames)
        return rows if self._ranks.size == 1 else rows.cpu()
