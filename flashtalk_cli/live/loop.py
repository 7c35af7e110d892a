"""The loop of a live stream: wait for a chunk's sound, have it performed, queue its frames; again."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.delivery import Batch, Delivery
from flashtalk_cli.live.pacing import Outlook, Rules, silence_before_s, skip_s, wait_s
from flashtalk_cli.live.timeline import Taken, Timeline

LOOK_UP_S = 0.2  # how often a waiting loop sees whether it was asked to stop
REMEMBERED_CHUNKS = 8  # the next one is expected to take as long as the slowest of them, one exception aside
DRAIN_S, DRAINED_S = 1.0, 30.0  # to send what is queued, after a request to stop and at the end of the sound
FIRST_GUESS = 0.5  # of a chunk's length: what its first frame is expected to take before any was seen


class Performer(Protocol):
    """What makes frames of sound: the model, or a stand-in for it."""

    def perform(self, sound: Taken, heard: np.ndarray) -> Generator[np.ndarray, None, None]:
        """Frames of the next chunk, uint8 [T, H, W, 3] a piece, as they are decoded.

        sound: the chunk's own; heard: float32, the past up to the chunk's end and the look-ahead, at the
        timeline's rate. Closed early when the stream is to end, or the chunk is not wanted any more.
        """
        ...

    def rewind(self) -> None:
        """Perform the next chunk in place of the last one, of which nothing was shown."""
        ...


@dataclass(frozen=True)
class Manners:
    """How the loop treats its source."""

    paced: bool  # whether sound arrives at its own pace and cannot be made to wait
    may_wait_s: float  # how long the source may take to begin before the person idles on air
    keep_alive: bool  # whether to idle after the source has ended
    knows_future: bool = False  # whether all sound is there when it is wanted, as in a file


class Loop:
    """Runs until the source has ended and all is said, or `stop` is set, or an output fails."""

    def __init__(
        self,
        rules: Rules,
        manners: Manners,
        timeline: Timeline,
        performer: Performer,
        delivery: Delivery,
        stop: threading.Event,
        clock: Clock,
        is_away: Callable[[], bool] = lambda: False,
    ) -> None:
        self.rules = rules
        self.manners = manners
        self.timeline = timeline
        self.performer = performer
        self.delivery = delivery
        self.stop = stop
        self.clock = clock
        self.is_away = is_away  # whether nobody takes the stream, and the person is to pause
        self.chunks = 0  # counts for ever
        self.skipped_s = 0.0
        self.speaking = False  # whether the last chunk had sound
        self._chunk_s: deque[float] = deque(maxlen=REMEMBERED_CHUNKS)  # what whole chunks took
        self._costs_s: deque[float] = deque(
            [FIRST_GUESS * rules.chunk_s], maxlen=REMEMBERED_CHUNKS
        )  # to a chunk's first frame
        self._lock = threading.Lock()
        self._take = 0  # an interruption begins a new one
        self._take_made = 0  # the take that the last chunk belongs to
        self._wait_until_s = math.inf

    def run(self) -> bool:
        """Perform chunk after chunk; whether all of it was sent. Raises what the performer or the outputs raise."""
        self._wait_until_s = self.clock.now_s() + self.manners.may_wait_s
        while (outlook := self._wait()) is not None:
            self._catch_up(outlook)
            self._chunk(outlook)
        return self.delivery.finish(DRAIN_S if self.stop.is_set() else DRAINED_S)

    @property
    def realtime(self) -> float | None:
        """Seconds of video made in a second of work, lately; None before the first chunk."""
        took_s = list(self._chunk_s)
        return len(took_s) * self.rules.chunk_s / sum(took_s) if took_s and sum(took_s) else None

    def interrupt(self) -> float:
        """Drop what is not yet spoken, and be silent at once; the seconds of sound dropped.

        The chunk on air goes on in silence. One made beyond it is made anew, with the mouth closed.
        """
        with self._lock:
            dropped_s = self.timeline.interrupt()
            self._take += 1
            self.delivery.hush()
        return dropped_s

    def mute(self, muted: bool) -> None:
        """Show a silent person whatever is said, from the next chunk on; the sound stops at once."""
        with self._lock:
            self.timeline.muted = muted
            if muted:
                self._take += 1
                self.delivery.hush()

    def _wait(self) -> Outlook | None:
        """Wait until a chunk is to begin: what is known then; None when no more is to be made."""
        while not self.stop.is_set() and self.delivery.failure is None:
            self._take_back()
            if self.delivery.on_air and self.is_away():
                self.delivery.held = True
                self.clock.wait_for(self.timeline.changed, lambda: False, LOOK_UP_S)
                continue
            outlook = self._outlook()
            if outlook.ended and not outlook.unspoken_s and not self.manners.keep_alive:
                return None
            seconds = wait_s(self.rules, outlook)
            if not seconds:
                return outlook
            arrived = self.timeline.arrived_samples
            ended = self.timeline.ended

            def news(arrived: int = arrived, ended: bool = ended) -> bool:
                return self.timeline.arrived_samples != arrived or self.timeline.ended != ended

            self.clock.wait_for(self.timeline.changed, news, min(seconds, LOOK_UP_S))
        return None

    def _outlook(self) -> Outlook:
        now_s = self.clock.now_s()
        return Outlook(
            unspoken_s=self.timeline.unspoken_s,
            ended=self.timeline.ended,
            ahead_s=self.delivery.ahead_s,
            queued_s=self.delivery.queued_s,
            first_frame_s=sorted(self._costs_s)[-2:][0],
            silent_before=self.timeline.silent_before,
            since_arrival_s=now_s - self.timeline.last_arrival_s,
            on_air=self.delivery.on_air,
            may_wait_s=self._wait_until_s - now_s,
        )

    def _catch_up(self, outlook: Outlook) -> None:
        """Bring the delay down to its target, as `late` says."""
        if not self.manners.paced and self.rules.late != "drop":
            return
        if self.manners.paced:
            head_s = self.timeline.head_arrived_s
            delay_s = self.clock.now_s() + max(outlook.ahead_s, outlook.first_frame_s) - head_s
        else:  # a sound that waits for us is late by what was repeated
            repeated_s = self.delivery.repeated_frames / self.rules.fps
            delay_s = self.rules.latency_target_s + repeated_s - self.skipped_s
        seconds = 0.0 if math.isnan(delay_s) else skip_s(self.rules, outlook, delay_s)
        if seconds > 0:
            self.skipped_s += self.timeline.skip(seconds, pauses_only=self.rules.late != "drop")

    def _chunk(self, outlook: Outlook) -> None:
        """Perform one chunk and queue its frames; of the last one, those that have sound."""
        fps = self.rules.fps
        n_frames = round(self.rules.chunk_s * fps)
        begun_s = self.clock.now_s()
        self._take_made = self._take
        last = outlook.ended and not self.manners.keep_alive
        wanted = min(n_frames, math.ceil(self.timeline.unspoken_s * fps - 1e-9)) if last else n_frames
        sound = self.timeline.take(n_frames, silence_before_s(self.rules, outlook))
        if self.manners.knows_future:  # it waited for us, not we for it
            sound = replace(sound, arrived_s=np.where(np.isfinite(sound.arrived_s), begun_s, np.nan))
        heard = self.timeline.heard(self.rules.lookahead_s)
        self.speaking = bool(np.isfinite(sound.arrived_s).any())
        self.chunks += 1
        done = 0
        with closing(self.performer.perform(sound, heard)) as pieces:
            for frames in pieces:
                if self.stop.is_set():
                    return
                ready_s = self.clock.now_s()
                if not done:
                    self._costs_s.append(ready_s - begun_s)
                if done < wanted:
                    self._put(sound, frames[: wanted - done], done, begun_s, ready_s)
                done += len(frames)
                if self._take_back():
                    return
        assert done == n_frames, (done, n_frames)
        self._chunk_s.append(self.clock.now_s() - begun_s)

    def _take_back(self) -> bool:
        """Undo the last chunk after an interruption, if none of its frames was sent; whether it was undone."""
        if self._take == self._take_made or not self.delivery.take_back(self.chunks):
            return False
        self._take_made = self._take
        self.timeline.forget()
        self.performer.rewind()
        return True

    def _put(self, sound: Taken, frames: np.ndarray, at: int, begun_s: float, ready_s: float) -> None:
        per_frame = self.timeline.rate_hz // self.rules.fps
        samples = sound.samples[at * per_frame : (at + len(frames)) * per_frame]
        arrived_s = sound.arrived_s[at : at + len(frames)]
        with self._lock:  # what is queued after an interruption is silent, what was queued before is hushed
            if self._take != self._take_made:
                samples, arrived_s = np.zeros_like(samples), arrived_s * np.nan
            self.delivery.put(Batch(self.chunks, frames, samples, arrived_s, begun_s, ready_s))
