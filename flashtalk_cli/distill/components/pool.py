"""Rendered clips of people, kept on the device and drawn from again and again.

Rendering a clip costs more than a step of training on it, so clips are made first, and while
training goes on the oldest are replaced by new ones. Frames are larger than what is trained on:
every draw cuts another piece in time and space. Faces are often large, so that eyes and mouths are
more than a few pixels.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flashtalk_cli.distill.people.backdrop import draw_backdrop
from flashtalk_cli.distill.people.bank import SpeechBank
from flashtalk_cli.distill.people.clips import Drawing, Plan, draw_plan, render_clips
from flashtalk_cli.distill.people.person import PersonSpec

CLOSE_SHARE = 0.67  # of the people; a face of a few pixels teaches little


def reframe(spec: PersonSpec, rng: np.random.Generator) -> PersonSpec:
    """The same person, usually nearer: a face of up to 1.3 times the frame's height."""
    face_height = float(np.clip(spec.face_height * np.exp(rng.uniform(-0.3, 0.95)), 0.25, 1.3))
    place = (float(rng.uniform(0.35, 0.65)), float(rng.uniform(0.32, 0.52)))
    return replace(spec, face_height=face_height, place=place)


def draw_close_plan(number: int, bank: SpeechBank, drawing: Drawing, close_share: float) -> Plan:
    """Clip `number`; that share of the people reframed, the others as the generator has them."""
    plan = draw_plan(number, bank, drawing)
    rng = np.random.default_rng((17, number, drawing.held_out))
    if rng.random() < 1 - close_share:
        return plan
    spec = reframe(plan.spec, rng)
    return replace(plan, spec=spec, backdrop=draw_backdrop(spec, drawing.height_px, drawing.width_px))


class _Plans(IterableDataset):
    """Batches of plans without end; worker w of W plans every W-th batch."""

    def __init__(self, bank: SpeechBank, drawing: Drawing, first: int, close_share: float) -> None:
        self.bank, self.drawing, self.first, self.close_share = bank, drawing, first, close_share

    def __iter__(self) -> Iterator[list[Plan]]:
        torch.set_num_threads(1)
        worker = get_worker_info()
        number, step = (worker.id, worker.num_workers) if worker else (0, 1)
        while True:
            start = self.first + number * self.drawing.batch
            numbers = range(start, start + self.drawing.batch)
            yield [draw_close_plan(clip, self.bank, self.drawing, self.close_share) for clip in numbers]
            number += step


class ClipPool:
    """Up to `capacity` clips, uint8 [capacity, T, S, S, 3] on the device, and who is in them.

    The processes that plan the clips start with the object; `close` ends them.
    """

    def __init__(
        self,
        bank: SpeechBank,
        drawing: Drawing,
        capacity: int,
        device: str,
        workers: int,
        first: int = 0,
        close_share: float = CLOSE_SHARE,
    ) -> None:
        self.drawing, self.device = drawing, device
        size = (capacity, drawing.n_frames, drawing.height_px, drawing.width_px, 3)
        self.frames = torch.empty(size, dtype=torch.uint8, device=device)
        self.specs: list[PersonSpec | None] = [None] * capacity
        self.count, self._next = 0, 0
        self.rendering_s = 0.0
        self._ready: queue.Queue[list[Plan]] = queue.Queue(maxsize=8)
        self._closed = threading.Event()
        self._loader = DataLoader(
            _Plans(bank, drawing, first, close_share), batch_size=None, num_workers=workers
        )
        self._thread = threading.Thread(target=self._collect, daemon=True)
        self._thread.start()

    def _collect(self) -> None:
        for plans in self._loader:
            while not self._closed.is_set():
                try:
                    self._ready.put(plans, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if self._closed.is_set():
                return

    def fill(self, until: int, deadline_s: float) -> None:
        """Render until there are that many clips, or until `time.monotonic()` passes the deadline."""
        until = min(until, len(self.frames))
        while self.count < until and (time.monotonic() < deadline_s or not self.count):
            self._render(self._ready.get())

    def refresh(self, share: float, since_s: float) -> None:
        """Replace the oldest clips if new ones are planned and rendering took less than a share of the time."""
        if self.rendering_s > share * (time.monotonic() - since_s):
            return
        try:
            self._render(self._ready.get_nowait())
        except queue.Empty:
            return

    def _render(self, plans: list[Plan]) -> None:
        began_s = time.monotonic()
        size_px = (self.drawing.height_px, self.drawing.width_px)
        clip = render_clips(
            [plan.spec for plan in plans], [plan.performance for plan in plans], size_px, self.device,
            backdrops=[plan.backdrop for plan in plans],
        )  # fmt: skip
        for frames, plan in zip(clip.frames, plans, strict=True):
            self.frames[self._next] = frames
            self.specs[self._next] = plan.spec
            self._next = (self._next + 1) % len(self.frames)
            self.count = min(self.count + 1, len(self.frames))
        if self.device != "cpu":
            torch.cuda.synchronize()
        self.rendering_s += time.monotonic() - began_s

    def draw(
        self, batch: int, n_frames: int, height_px: int, width_px: int, rng: np.random.Generator
    ) -> Tensor:
        """Random pieces of random clips, mirrored at times: float32 [B, 3, T, height, width] in [0, 1]."""
        _, length, rows, columns, _ = self.frames.shape
        pieces = []
        for _ in range(batch):
            which, at = rng.integers(self.count), rng.integers(length - n_frames + 1)
            top, left = rng.integers(rows - height_px + 1), rng.integers(columns - width_px + 1)
            piece = self.frames[which, at : at + n_frames, top : top + height_px, left : left + width_px]
            axes = [axis for axis in (0, 2) if rng.random() < 0.5]
            pieces.append(piece.flip(axes) if axes else piece)
        return rearrange(torch.stack(pieces), "b t h w c -> b c t h w").float() / 255

    def close(self) -> None:
        """End the planning."""
        self._closed.set()
        self._thread.join(timeout=5)
