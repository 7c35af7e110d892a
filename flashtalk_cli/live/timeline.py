"""The sound of a live stream between its arrival and its being spoken: bounded, and put in order by counts.

Sound arrives in pieces, as it will, and leaves in whole chunks, exactly as long as the frames that show
it. Where there is too little, silence takes its place; where there is too much of a sound that cannot
wait, the oldest goes. What was spoken is kept for as long as the model hears back.

    | heard: the last `past_s` seconds | unspoken: arrived, waiting, `backlog_s` at most |
                                       ^ the next chunk begins here

Every position is relative to that border, so nothing counts up that could overflow or lose precision.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np

RATE_HZ = 48_000  # what goes out; hearing makes its 16 kHz of it
PIECE_S = 0.02  # sound is kept, measured and left out in pieces of at most this length
QUIET_POWER = 10 ** (-45 / 10)  # mean square of a piece in a pause: 45 dB below full scale
SHORTEST_PAUSE_S = 0.3  # what is left of a pause that is shortened


@dataclass(frozen=True)
class Piece:
    """A stretch of sound that arrived at one time."""

    samples: np.ndarray  # float32 [n]
    arrived_s: float
    quiet: bool


@dataclass(frozen=True)
class Taken:
    """The sound of a chunk: float32 [n], when each of its frames' first samples arrived, and what was made up."""

    samples: np.ndarray
    arrived_s: np.ndarray  # float64 [frames]: monotonic time; NaN where there is silence in place of sound
    silent_samples: int


class Timeline:
    """A bounded store of mono sound at 48 kHz. Readers of sources add to it, the loop takes from it."""

    def __init__(self, *, past_s: float, backlog_s: float, fps: int, rate_hz: int = RATE_HZ) -> None:
        assert rate_hz % fps == 0
        self.rate_hz = rate_hz
        self.changed = threading.Condition()
        self._frame_samples = rate_hz // fps
        self._piece_samples = max(1, round(PIECE_S * rate_hz))
        self._backlog_samples = round(backlog_s * rate_hz)
        self._past = np.zeros(round(past_s * rate_hz), np.float32)
        self._past_before = self._past  # as it was before the last chunk was taken
        self._unspoken: deque[Piece] = deque()
        self._n_unspoken = 0
        self._ended = False
        self.last_arrival_s = -math.inf
        self.silent_before = True  # whether the last sample taken was silence in place of sound
        self.muted = False
        self.arrived_samples = 0  # these three count for ever
        self.silent_samples = 0
        self.dropped_samples = 0

    # Arriving

    def add(self, samples: np.ndarray, now_s: float) -> None:
        """Append float32 [n], which arrived now. Beyond the backlog the oldest unspoken sound is dropped."""
        with self.changed:
            self._append(samples, now_s)
            excess = self._n_unspoken - self._backlog_samples
            if excess > 0:
                self._drop_first(excess)
            self.changed.notify_all()

    def has_room(self, n: int) -> bool:
        """Whether n more samples would displace none; a source that can wait asks before it adds."""
        return self._n_unspoken + n <= self._backlog_samples or not self._n_unspoken

    def end(self) -> None:
        """No more sound will come."""
        with self.changed:
            self._ended = True
            self.changed.notify_all()

    @property
    def ended(self) -> bool:
        """Whether `end` was called."""
        return self._ended

    @property
    def unspoken_s(self) -> float:
        """Seconds of sound that arrived and wait."""
        return self._n_unspoken / self.rate_hz

    @property
    def head_arrived_s(self) -> float:
        """When the next sound to be spoken arrived; NaN when there is none."""
        with self.changed:
            return self._unspoken[0].arrived_s if self._unspoken else math.nan

    # Leaving

    def take(self, n_frames: int, silence_before_s: float = 0.0) -> Taken:
        """The sound of the next n_frames frames; it counts as heard from now on.

        `silence_before_s` of silence comes first, in whole frames; where sound is missing, silence ends it.
        """
        with self.changed:
            before = min(n_frames, math.ceil(silence_before_s * self.rate_hz / self._frame_samples - 1e-9))
            wanted = (n_frames - before) * self._frame_samples
            pieces = self._take_first(wanted)
            n_sound = sum(len(piece.samples) for piece in pieces)
            lead = np.zeros(before * self._frame_samples, np.float32)
            tail = np.zeros(wanted - n_sound, np.float32)
            samples = np.concatenate([lead, *(piece.samples for piece in pieces), tail])
            arrived_s = self._arrivals(pieces, before, n_frames)
            if self.muted:
                samples = np.zeros_like(samples)
            self.silent_before = not n_sound or len(tail) > 0
            self.silent_samples += len(lead) + len(tail)
            self._remember(samples)
            self.changed.notify_all()
            return Taken(samples, arrived_s, len(lead) + len(tail))

    def forget(self) -> None:
        """Of the sound taken last nothing was spoken, and none of it will be: it was never heard."""
        with self.changed:
            self._past = self._past_before
            self.silent_before = True

    def heard(self, lookahead_s: float) -> np.ndarray:
        """The past and what follows, float32 [past + look-ahead]: silence where nothing has arrived yet."""
        with self.changed:
            ahead = np.zeros(round(lookahead_s * self.rate_hz), np.float32)
            at = 0
            for piece in () if self.muted else self._unspoken:
                if at >= len(ahead):
                    break
                n = min(len(piece.samples), len(ahead) - at)
                ahead[at : at + n] = piece.samples[:n]
                at += n
            return np.concatenate([self._past, ahead])

    def interrupt(self) -> float:
        """Drop all unspoken sound; how many seconds that was."""
        with self.changed:
            dropped_s = self.unspoken_s
            self._drop_first(self._n_unspoken)
            self.changed.notify_all()
            return dropped_s

    def skip(self, seconds: float, *, pauses_only: bool) -> float:
        """Leave out up to that much unspoken sound, the oldest or only of pauses; the seconds left out."""
        before = self.dropped_samples
        with self.changed:
            n = min(round(seconds * self.rate_hz), self._n_unspoken)
            if not pauses_only:
                self._drop_first(n)
            elif n > 0:
                self._shorten_pauses(n)
            self.changed.notify_all()
        return (self.dropped_samples - before) / self.rate_hz

    # Inside, with the lock held

    def _append(self, samples: np.ndarray, now_s: float) -> None:
        self.last_arrival_s = now_s
        self.arrived_samples += len(samples)
        self._n_unspoken += len(samples)
        if self._unspoken and len(self._unspoken[-1].samples) + len(samples) <= self._piece_samples:
            last = self._unspoken.pop()  # a source of single samples must not make a million pieces
            samples, now_s = np.concatenate([last.samples, samples]), last.arrived_s
        for start in range(0, len(samples), self._piece_samples):
            part = samples[start : start + self._piece_samples]
            self._unspoken.append(Piece(part, now_s, float(np.dot(part, part)) < QUIET_POWER * len(part)))

    def _take_first(self, n: int) -> list[Piece]:
        """Remove up to n samples from the front, cutting the last piece where it must be."""
        pieces = []
        while n > 0 and self._unspoken:
            piece = self._unspoken.popleft()
            if len(piece.samples) > n:
                self._unspoken.appendleft(Piece(piece.samples[n:], piece.arrived_s, piece.quiet))
                piece = Piece(piece.samples[:n], piece.arrived_s, piece.quiet)
            pieces.append(piece)
            n -= len(piece.samples)
            self._n_unspoken -= len(piece.samples)
        return pieces

    def _drop_first(self, n: int) -> None:
        self.dropped_samples += sum(len(piece.samples) for piece in self._take_first(n))

    def _shorten_pauses(self, n: int) -> None:
        """Drop up to n samples out of pauses, of each all but its first and last parts."""
        kept: deque[Piece] = deque()
        pause: list[Piece] = []
        edge = max(1, round(SHORTEST_PAUSE_S / 2 / PIECE_S))
        for piece in (*self._unspoken, None):
            if piece is not None and piece.quiet:
                pause.append(piece)
                continue
            inner = pause[edge:-edge]
            while inner and len(inner[-1].samples) <= n:
                n -= len(gone := inner.pop().samples)
                self.dropped_samples += len(gone)
                self._n_unspoken -= len(gone)
            kept += [*pause[:edge], *inner, *pause[max(edge, len(pause) - edge) :]]
            pause = []
            if piece is not None:
                kept.append(piece)
        self._unspoken = kept

    def _arrivals(self, pieces: list[Piece], before: int, n_frames: int) -> np.ndarray:
        """When the first sample of each frame arrived; NaN for frames that begin in silence or are muted."""
        found = np.full(n_frames, np.nan)
        if not pieces or self.muted:
            return found
        ends = np.cumsum([len(piece.samples) for piece in pieces])
        starts = np.arange(n_frames - before) * self._frame_samples
        index = np.searchsorted(ends, starts, side="right")
        with_sound = index < len(pieces)
        times = np.array([piece.arrived_s for piece in pieces])
        found[before:][with_sound] = times[index[with_sound]]
        return found

    def _remember(self, samples: np.ndarray) -> None:
        """Shift the past on by what was spoken."""
        n = min(len(samples), len(self._past))
        self._past_before = self._past
        self._past = np.concatenate([self._past[n:], samples[len(samples) - n :]])
