"""What waits for one sink: bounded, and always beginning where a decoder can begin.

A sink that is away or too slow loses whole groups of pictures, the oldest first, so that what it gets next
begins with a key frame and is recent. A recording loses nothing: the encoder waits for it instead, a while.
"""

from __future__ import annotations

import collections
import threading

from flashtalk_cli.media.live.units import US_PER_S, Unit


class UnitQueue:
    """Units between the encoder and one sink; all methods may be called from any thread.

    `limit_s` of media is held at most. With `lossless`, `put` waits for room and drops nothing.
    """

    def __init__(self, limit_s: float, *, lossless: bool = False) -> None:
        self._limit_us = round(limit_s * US_PER_S)
        self._lossless = lossless
        self._units: collections.deque[Unit] = collections.deque()
        self._changed = threading.Condition()
        self._attached = lossless  # whether a sink takes what is held
        self._whole = True  # whether the next picture follows on what the sink has or is held
        self._ended = False
        self._closed = False
        self.newest_us = 0
        self.frames_dropped = 0

    def put(self, unit: Unit, limit_s: float) -> bool:
        """Add a unit. False if a lossless queue had no room for `limit_s` seconds: nothing is added then."""
        with self._changed:
            if self._lossless and not self._changed.wait_for(self._has_room, limit_s):
                return False
            if self._closed:
                return True
            self.newest_us = max(self.newest_us, unit.time_us)
            self._whole |= unit.is_key
            if not self._whole:
                self.frames_dropped += unit.is_video
                return True
            self._units.append(unit)
            if not self._attached:
                self._to_newest_key()
            elif not self._lossless and not self._has_room():
                self._shorten()
            self._changed.notify_all()
            return True

    def take(self, limit_s: float) -> Unit | None:
        """The next unit; None when there was none for `limit_s` seconds, or will be none any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._units or self._ended, limit_s)
            if not self._units:
                return None
            self._changed.notify_all()
            return self._units.popleft()

    def wait_for_start(self) -> bool:
        """Wait until a sink can begin with what is held, and from then on keep it; False if it never can."""
        with self._changed:
            self._changed.wait_for(lambda: self._units or self._ended)
            self._attached = bool(self._units)
            return self._attached

    def interrupt(self) -> None:
        """The sink is away: hold only what a new one would begin with."""
        with self._changed:
            self._attached = False
            self._to_newest_key()

    def end(self) -> None:
        """No more units will come; those held can still be taken."""
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def close(self) -> None:
        """The sink is gone for good: what is held is dropped, and what comes."""
        with self._changed:
            self._closed = self._ended = True
            self._drop(len(self._units))
            self._changed.notify_all()

    @property
    def is_drained(self) -> bool:
        """Whether everything was taken and nothing will come."""
        with self._changed:
            return self._ended and not self._units

    def _has_room(self) -> bool:
        if self._closed or not self._units:
            return True
        return self._units[-1].time_us - self._units[0].time_us < self._limit_us

    def _shorten(self) -> None:
        """The sink is too slow: go on with the newest key frame, or the next that comes."""
        newest = self._newest_key()
        self._whole = newest > 0
        self._drop(newest if self._whole else len(self._units))

    def _to_newest_key(self) -> None:
        newest = self._newest_key()
        self._whole = newest >= 0
        self._drop(newest if self._whole else len(self._units))

    def _newest_key(self) -> int:
        return next((i for i in reversed(range(len(self._units))) if self._units[i].is_key), -1)

    def _drop(self, n_units: int) -> None:
        for _ in range(n_units):
            self.frames_dropped += self._units.popleft().is_video
