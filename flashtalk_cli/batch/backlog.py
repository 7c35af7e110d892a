"""Clips that wait for a replica: each is taken by one, and goes back at most once, behind all others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from flashtalk_cli.batch.clip import Clip

TRIES = 2  # a clip that ends two replicas would end a third


class Backlog:
    """A queue that several threads draw from, and that ends when nothing can come back to it.

    Whoever takes a clip must either `finish` it or `put_back` it.
    """

    def __init__(self, clips: Sequence[Clip]) -> None:
        self._waiting = deque(clips)
        self._under_way = 0
        self._tries: dict[int, int] = {}
        self._closed = False
        self._changed = threading.Condition()

    def take(self) -> Clip | None:
        """The next clip, after waiting for one that may come back; None when none can, or after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._waiting or not self._under_way)
            if self._closed or not self._waiting:
                return None
            clip = self._waiting.popleft()
            self._under_way += 1
            self._tries[clip.line] = self._tries.get(clip.line, 0) + 1
            return clip

    def tries(self, clip: Clip) -> int:
        """How often the clip was taken."""
        return self._tries[clip.line]

    def finish(self) -> None:
        """A clip that was taken has come to its end, whichever."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def put_back(self, clip: Clip, *, untried: bool = False) -> bool:
        """The clip's replica died: it shall be taken again, after all others. False when it had its tries.

        untried: nothing was done for it, so this time does not count, and it keeps its place in front.
        """
        with self._changed:
            again = untried or self._tries[clip.line] < TRIES
            if again:
                self._tries[clip.line] -= untried
                # What may end every replica waits at the back: a lone one gets all others done before.
                self._waiting.appendleft(clip) if untried else self._waiting.append(clip)
                self._under_way -= 1
                self._changed.notify_all()
            return again

    def close(self) -> list[Clip]:
        """Give out no more; the clips that wait, also those that came back."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            return list(self._waiting)
