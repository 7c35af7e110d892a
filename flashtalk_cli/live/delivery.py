"""Frames that wait to be sent, and the thread that sends each when it is due.

Bounded by the loop, which begins a chunk only when little video is ahead: two chunks at most lie here, or one and the
start buffer where that is longer, and one more while the outputs take nothing.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from flashtalk_cli.errors import WorkerError
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.latency import Latency
from flashtalk_cli.live.pacing import Air, Fail, Repeat, Rules, Send, Wait, decide

Sink = Callable[[np.ndarray, np.ndarray], None]
"""Takes uint8 frames [T, H, W, 3] and their sound, float32 [T * samples per frame]."""


@dataclass(frozen=True)
class Batch:
    """Frames that were decoded together, with their sound."""

    chunk: int
    frames: np.ndarray  # uint8 [T, H, W, 3]
    samples: np.ndarray  # float32 [T * samples per frame]
    arrived_s: np.ndarray  # float64 [T]: when each frame's first sample arrived, NaN for silence
    begun_s: float  # when their chunk began
    ready_s: float  # when they were decoded

    def split(self, n: int) -> tuple[Batch, Batch]:
        """The first n frames, and the rest."""
        cut = n * (len(self.samples) // len(self.frames))
        first = replace(
            self, frames=self.frames[:n], samples=self.samples[:cut], arrived_s=self.arrived_s[:n]
        )
        rest = replace(self, frames=self.frames[n:], samples=self.samples[cut:], arrived_s=self.arrived_s[n:])
        return first, rest


class Delivery:
    """The queue in front of the outputs. `poll` sends what is due; `start` makes a thread that polls."""

    def __init__(
        self, rules: Rules, sink: Sink, clock: Clock, rate_hz: int, stop: threading.Event | None = None
    ) -> None:
        self.rules = rules
        self.latency = Latency()
        self.sent_frames = 0  # these count for ever
        self.repeated_frames = 0
        self.held = False  # set while nothing is to be made: until the next frame comes none is late
        self.held_frames = 0  # repeated meanwhile; these count for ever too
        self.first_sent_s: float | None = None
        self._sink = sink
        self._clock = clock
        self._stop = stop or threading.Event()  # once set, no frame is repeated for those that never come
        self._frame_samples = rate_hz // rules.fps
        self._changed = threading.Condition()
        self._stirred = False
        self._queue: deque[Batch] = deque()
        self._queued_frames = 0
        self._last: np.ndarray | None = None
        self._last_chunk = 0  # of the last frame sent; chunks count from 1
        self._air = Air()
        self._ending = False
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="delivery", daemon=True)

    # For the loop

    def start(self) -> None:
        """Begin to send, in a thread of its own."""
        self._thread.start()

    def put(self, batch: Batch) -> None:
        """Queue frames. Raises what the outputs raised, if they did."""
        if self._failure is not None:
            raise self._failure
        with self._changed:
            self.held = False
            self._queue.append(batch)
            self._queued_frames += len(batch.frames)
            self._stir()

    def hush(self) -> None:
        """Send what is queued without its sound."""
        with self._changed:
            silent = [
                replace(batch, samples=np.zeros_like(batch.samples), arrived_s=batch.arrived_s * np.nan)
                for batch in self._queue
            ]
            self._queue = deque(silent)

    def take_back(self, chunk: int) -> bool:
        """Remove a chunk's frames if none of them was sent; whether that is so."""
        with self._changed:
            if self._last_chunk >= chunk:
                return False
            self._queue = deque(batch for batch in self._queue if batch.chunk != chunk)
            self._queued_frames = sum(len(batch.frames) for batch in self._queue)
            return True

    @property
    def on_air(self) -> bool:
        """Whether the first frame was sent."""
        return self._air.anchor_s is not None

    @property
    def queued_s(self) -> float:
        """Video that waits, however much of it is overdue."""
        return self._queued_frames / self.rules.fps

    @property
    def ahead_s(self) -> float:
        """Video that waits, less by what is overdue."""
        with self._changed:
            air, now_s = self._air, self._clock.now_s()
            due_s = 0.0 if air.anchor_s is None else air.anchor_s + air.sent_frames / self.rules.fps - now_s
            return self._queued_frames / self.rules.fps + due_s

    @property
    def jumps(self) -> int:
        """How often the schedule began anew after a stall."""
        return self._air.jumps

    @property
    def failure(self) -> Exception | None:
        """What ended the sending, if something did."""
        return self._failure

    def finish(self, limit_s: float) -> bool:
        """No more frames will come: send what is queued, at its pace; False when that takes longer."""
        with self._changed:
            self._ending = True
            self._stir()
        drained = self._clock.wait_for(self._changed, self._over, limit_s)
        with self._changed:
            self._queue.clear()
            self._queued_frames = 0
            self._stir()
        if self._thread.is_alive():
            self._thread.join(limit_s)
        if self._failure is not None:
            raise self._failure
        return drained

    # For the thread

    def poll(self) -> float | None:
        """Send what is due, and say when to come again; None: when something is queued."""
        while True:
            now_s = self._clock.now_s()
            with self._changed:
                ending = self._ending or self._stop.is_set()
                rules = replace(self.rules, late="repeat") if self.held else self.rules
                decision, self._air = decide(rules, self._air, self._queued_frames, ending, now_s)
                due = self._pop(decision.frames) if isinstance(decision, Send) else []
            match decision:
                case Wait(until_s):
                    return until_s
                case Repeat():
                    self._repeat()
                case Fail(late_s):
                    raise WorkerError(
                        f"the stream fell behind: no new frame for {late_s:.1f} s, and --late is fail; "
                        "use fewer --steps, a smaller --size, or --late repeat"
                    )
            for batch in due:
                self._send(batch, now_s)

    def _send(self, batch: Batch, now_s: float) -> None:
        self.first_sent_s = now_s if self.first_sent_s is None else self.first_sent_s
        self._sink(batch.frames, batch.samples)
        self._last = batch.frames[-1:]
        self.latency.add(batch.arrived_s, batch.begun_s, batch.ready_s, now_s)
        self.sent_frames += len(batch.frames)

    def _repeat(self) -> None:
        assert self._last is not None
        self._sink(self._last, np.zeros(self._frame_samples, np.float32))
        self.sent_frames += 1
        if self.held:
            self.held_frames += 1
        else:
            self.repeated_frames += 1

    def _pop(self, n: int) -> list[Batch]:
        found = []
        self._queued_frames -= n
        while n:
            batch = self._queue.popleft()
            if len(batch.frames) > n:
                batch, rest = batch.split(n)
                self._queue.appendleft(rest)
            found.append(batch)
            self._last_chunk = batch.chunk
            n -= len(batch.frames)
        return found

    def _run(self) -> None:
        try:
            while not self._over():
                with self._changed:
                    self._stirred = False
                until_s = self.poll()
                timeout_s = None if until_s is None else max(0.0, until_s - self._clock.now_s())
                self._clock.wait_for(self._changed, lambda: self._stirred or self._over(), timeout_s)
        except Exception as error:  # whatever it is, the loop must end and raise it
            self._failure = error
        with self._changed:
            self._changed.notify_all()

    def _over(self) -> bool:
        return self._failure is not None or (self._ending and not self._queued_frames)

    def _stir(self) -> None:
        self._stirred = True
        self._changed.notify_all()
