"""A live stream in an invented world: its clock moves when somebody waits, so that days pass in seconds.

The stand-in for the model shows a white frame where there is a click in the frame's own sound, and a black
one elsewhere: what comes out shows whether picture and sound belong together.
"""

from __future__ import annotations

import heapq
import itertools
import math
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

import numpy as np

from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.delivery import Batch, Delivery
from flashtalk_cli.live.loop import Loop, Manners
from flashtalk_cli.live.pacing import Rules
from flashtalk_cli.live.timeline import Taken, Timeline

FPS, FRAMES, RATE_HZ = 25, 28, 1000
CLICK = 0.9
PER_FRAME = RATE_HZ // FPS


def rules(**changes: object) -> Rules:
    """Rules as the embedded preset has them."""
    given = {
        "fps": FPS,
        "chunk_s": FRAMES / FPS,
        "lookahead_s": 0.2,
        "start_buffer_s": 0.2,
        "latency_target_s": 3.0,
        "late": "repeat",
    }
    return Rules(**{**given, **changes})  # type: ignore[arg-type]


class SimulatedClock(Clock):
    """Time that passes only in `wait_for` and `sleep`, while what is scheduled happens."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self._now_s = now_s
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._ids = itertools.count()

    def now_s(self) -> float:
        """The invented time."""
        return self._now_s

    def at(self, time_s: float, action: Callable[[], None]) -> None:
        """Do something at a time."""
        heapq.heappush(self._events, (time_s, next(self._ids), action))

    def wait_for(
        self, changed: threading.Condition, ready: Callable[[], bool], timeout_s: float | None
    ) -> bool:
        """Let time pass until it is ready or the timeout is over."""
        end_s = math.inf if timeout_s is None else self._now_s + timeout_s
        while not ready():
            if not self._events or self._events[0][0] > end_s:
                assert end_s < math.inf, "nothing will ever happen"
                self._now_s = max(self._now_s, end_s)
                return False
            self._step()
        return True

    def sleep(self, seconds: float) -> None:
        """Let that much time pass."""
        end_s = self._now_s + seconds
        while self._events and self._events[0][0] <= end_s:
            self._step()
        self._now_s = max(self._now_s, end_s)

    def jump(self, seconds: float) -> None:
        """Stand still for so long: nothing happens meanwhile, as on a machine that sleeps."""
        self._now_s += seconds

    def _step(self) -> None:
        time_s, _, action = heapq.heappop(self._events)
        self._now_s = max(self._now_s, time_s)
        action()


class StandIn:
    """A performer whose frames are white where their sound has a click."""

    def __init__(self, clock: SimulatedClock, cost_s: Callable[[int], float]) -> None:
        self._clock = clock
        self._cost_s = cost_s
        self._chunk = 0

    def perform(self, sound: Taken, heard: np.ndarray) -> Generator[np.ndarray, None, None]:
        """A chunk: half of its cost before the first frames, the rest spread over the others."""
        cost_s = self._cost_s(self._chunk)
        self._chunk += 1
        loudest = np.abs(sound.samples).reshape(FRAMES, PER_FRAME).max(axis=1)
        frames = np.where(loudest > CLICK / 2, 255, 0).astype(np.uint8)[:, None, None, None].repeat(3, axis=3)
        self._clock.sleep(cost_s / 2)
        for start in range(0, FRAMES, 4):
            self._clock.sleep(cost_s / 2 / (FRAMES // 4))
            yield frames[start : start + 4]

    def rewind(self) -> None:
        """There is nothing to go back to."""


class SimulatedDelivery(Delivery):
    """A delivery that is polled by the simulated clock in place of a thread."""

    polling = False
    every_s = 0.0  # between polls at least; coarse ones send several frames at once, which is quicker

    def put(self, batch: Batch) -> None:
        """Queue, and poll."""
        super().put(batch)
        self._ahead_most_s = max(getattr(self, "_ahead_most_s", 0.0), self.ahead_s)
        if not self.polling:
            self.polling = True
            self._clock.at(self._clock.now_s(), self._tick)  # type: ignore[attr-defined]

    @property
    def ahead_most_s(self) -> float:
        """The most video that ever waited."""
        return self._ahead_most_s

    def _tick(self) -> None:
        try:
            until_s = self.poll()
        except Exception as error:
            self._failure = error
            return
        self.polling = until_s is not None
        if until_s is not None:
            self._clock.at(max(until_s, self._clock.now_s() + self.every_s), self._tick)  # type: ignore[attr-defined]


@dataclass
class World:
    """A stream and everything around it."""

    rules: Rules = field(default_factory=rules)
    cost_s: Callable[[int], float] = lambda chunk: 0.5
    paced: bool = True
    keep_alive: bool = False
    backlog_s: float = 30.0
    keep_output: bool = True

    def __post_init__(self) -> None:
        self.clock = SimulatedClock()
        self.began_s = self.clock.now_s()
        self.timeline = Timeline(past_s=2.0, backlog_s=self.backlog_s, fps=FPS, rate_hz=RATE_HZ)
        self.frames: list[np.ndarray] = []
        self.samples: list[np.ndarray] = []
        self.sent_s: list[float] = []
        self.mismatches = 0
        self.flashes = 0
        self.stop = threading.Event()
        self.delivery = SimulatedDelivery(self.rules, self._sink, self.clock, RATE_HZ, self.stop)
        self.loop = Loop(
            self.rules,
            Manners(self.paced, 0.0 if self.paced else 2.0, self.keep_alive),
            self.timeline,
            StandIn(self.clock, lambda chunk: self.cost_s(chunk)),
            self.delivery,
            self.stop,
            self.clock,
        )

    def _sink(self, frames: np.ndarray, samples: np.ndarray) -> None:
        assert len(samples) == len(frames) * PER_FRAME
        white = frames[:, 0, 0, 0] > 0
        click = np.abs(samples).reshape(len(frames), PER_FRAME).max(axis=1) > CLICK / 2
        self.mismatches += int((click & ~white).sum())
        self.flashes += int(white.sum())
        if self.keep_output:
            self.frames.append(white)
            self.samples.append(samples)
            self.sent_s += [self.clock.now_s() - self.began_s] * len(frames)

    def arrive(self, after_s: float, samples: np.ndarray) -> None:
        """Have sound arrive at a time after the beginning."""
        self.clock.at(self.began_s + after_s, lambda: self.timeline.add(samples, self.clock.now_s()))

    def speak(self, samples: np.ndarray, start_s: float = 0.0, block_s: float = 0.02) -> float:
        """Have sound arrive as it is spoken, in blocks; when it ends."""
        block = round(block_s * RATE_HZ)
        for at in range(0, len(samples), block):
            self.arrive(start_s + (at + block) / RATE_HZ, samples[at : at + block])
        return start_s + len(samples) / RATE_HZ

    def end_at(self, after_s: float) -> None:
        """Have the source end."""
        self.clock.at(self.began_s + after_s, self.timeline.end)

    def stop_at(self, after_s: float) -> None:
        """Ask the stream to end."""
        self.clock.at(self.began_s + after_s, self.stop.set)

    def run(self) -> World:
        """Stream until it ends."""
        self.loop.run()
        return self

    @property
    def sound(self) -> np.ndarray:
        """All sound that went out."""
        return np.concatenate(self.samples)

    @property
    def picture(self) -> np.ndarray:
        """Of every frame that went out, whether it was white."""
        return np.concatenate(self.frames)


def murmur(seconds: float, seed: int = 0) -> np.ndarray:
    """Something to say: low noise that is nowhere silent."""
    rng = np.random.default_rng(seed)
    n = round(seconds * RATE_HZ)
    return ((0.1 + 0.1 * rng.random(n)) * rng.choice([-1, 1], n)).astype(np.float32)


def with_clicks(samples: np.ndarray, every_s: float) -> np.ndarray:
    """The same with a click every so often."""
    clicked = samples.copy()
    clicked[round(every_s * RATE_HZ / 2) :: round(every_s * RATE_HZ)] = CLICK
    return clicked
