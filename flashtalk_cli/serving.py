"""A warm worker: its networks are loaded once, and clips come one after another from the parent.

Clips are lines of JSON on rank 0's standard input; its end means that no more will come. Rank 0 tells the
others, and reports `stage` ready and then one `clip` for each. A clip that fails is reported and the next
one is taken, where one process renders alone; of several, the others would be left in the middle of it, so
its error ends them all, and the parent starts anew.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from flashtalk_cli import events
from flashtalk_cli.config import RenderJob, ServeJob
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE
from flashtalk_cli.events import Emitter, Event
from flashtalk_cli.models.device import out_of_memory
from flashtalk_cli.models.image import ImageEncoder
from flashtalk_cli.models.speech import SpeechEncoder
from flashtalk_cli.parallel.mesh import make_tiles
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.pipeline.session import Models
from flashtalk_cli.rendering import Worker, render

log = logging.getLogger(__name__)

LISTEN_S = 1.0  # how long rank 0 waits for a clip before it tells the others that there is none yet
NOWHERE = -1  # a clip is never written to standard output
READY = "ready"


class WarmWorker(Worker):
    """A worker that keeps its networks from one clip to the next, and the rows of every prompt."""

    def __init__(self, job: ServeJob, ranks: Ranks, emitter: Emitter) -> None:
        super().__init__(job, ranks, emitter)
        self._rows = super().encode_prompts(job.prompts) if ranks.leads else {}
        self._image_encoder = super().image_encoder() if ranks.leads else None
        self._speech_encoder = super().speech_encoder() if ranks.leads else None
        self._models = super().load_models()

    def take(self, job: RenderJob) -> None:
        """Make this clip next. Its preset may differ from the first one's in what needs no other network."""
        self.job, self.preset = job, job.preset

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Rows that were encoded before the first clip."""
        return {prompt: self._rows[prompt] for prompt in prompts}

    def image_encoder(self) -> ImageEncoder:
        """The kept one, on rank 0."""
        assert self._image_encoder is not None
        return self._image_encoder

    def speech_encoder(self) -> SpeechEncoder:
        """The kept one, on rank 0."""
        assert self._speech_encoder is not None
        return self._speech_encoder

    def load_models(self) -> Models:
        """The kept networks, spread as this clip's canvas needs it."""
        return replace(
            self._models, sampling=self.preset.sampling, tiles=make_tiles(self.ranks, self.split())
        )


class ClipEmitter(Emitter):
    """Passes on what a clip reports, but keeps its last word: the worker goes on."""

    def __init__(self, line: Emitter) -> None:
        super().__init__(None)
        self._line = line
        self.last: Event | None = None

    def send(self, happened: Event) -> None:
        """Pass an event on, or keep it."""
        if happened["event"] in events.LAST:
            self.last = happened
        else:
            self._line.send(happened)


class Orders:
    """Lines from a descriptor, with a limit to the wait."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._rest = b""
        self._ended = False

    def next(self, wait_s: float, stop: threading.Event) -> bytes | None:
        """The next line; b"" when none will come or `stop` is set; None when there is none yet."""
        give_up = time.monotonic() + wait_s
        while b"\n" not in self._rest and not self._ended and not stop.is_set():
            left_s = give_up - time.monotonic()
            if left_s <= 0:
                return None
            if select.select([self._descriptor], [], [], min(left_s, 0.2))[0]:
                data = os.read(self._descriptor, 1 << 16)
                self._rest, self._ended = self._rest + data, not data
        if stop.is_set() or b"\n" not in self._rest:
            return b""
        line, self._rest = self._rest.split(b"\n", 1)
        return line


def serve(job: ServeJob, ranks: Ranks, emitter: Emitter, stop: threading.Event) -> int:
    """Render clips until no more come; the exit code."""
    started_s = time.perf_counter()
    line = ClipEmitter(emitter)
    worker = WarmWorker(job, ranks, line)
    orders = Orders(0) if ranks.leads else None
    emitter.emit("stage", name=READY, detail=f"{worker.folder.path} on {worker.device}")
    n_frames = 0
    while (clip := _next_clip(orders, ranks, stop)) is not None:
        worker.take(clip)
        line.last = None
        last = _attempt(worker, clip, stop) or line.last
        if ranks.leads:
            assert last is not None
            emitter.send(_clip_event(last))
            n_frames += last.get("frames") or 0
    if stop.is_set():
        emitter.emit("interrupted", path=None, frames=n_frames)
        return INTERRUPTED_EXIT_CODE
    elapsed_s = time.perf_counter() - started_s
    emitter.emit("done", path=None, frames=n_frames, elapsed_s=elapsed_s)
    return 0


def _next_clip(orders: Orders | None, ranks: Ranks, stop: threading.Event) -> RenderJob | None:
    """The next clip, on every rank; None when no more will come. Ranks hear from each other all the while."""
    while True:
        (text,) = ranks.from_leader((orders.next(LISTEN_S, stop),) if orders else None)
        if text is not None:
            return RenderJob.model_validate_json(text) if text else None


def _attempt(worker: WarmWorker, clip: RenderJob, stop: threading.Event) -> Event | None:
    """Render a clip; its error event when that failed. The error itself would keep the clip's tensors alive.

    Of several ranks, the error is raised: the others are in the middle of the clip.
    """
    try:
        render(worker, clip, stop, NOWHERE)
    except Exception as error:
        if worker.ranks.size > 1:
            raise
        log.debug("the clip failed", exc_info=True)
        return events.error(out_of_memory(error) if isinstance(error, torch.OutOfMemoryError) else error)
    return None


def _clip_event(last: Event) -> Event:
    """A clip's last word as the worker's word on that clip."""
    state = {"done": "done", "interrupted": "interrupted", "error": "failed"}[last["event"]]
    kept = {
        name: last[name] for name in ("type", "message", "frames", "duration_s", "elapsed_s") if name in last
    }
    return events.event("clip", state=state, **kept)
