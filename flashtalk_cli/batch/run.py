"""Draw clips from a backlog on several replicas at once, until all have come to an end, and record each.

Every replica has a thread. A replica that dies is started anew, its clip goes back once, to the end of the queue;
one that cannot be started, or dies again and again, is given up, and the run with the last.
"""

from __future__ import annotations

import fcntl
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from flashtalk_cli import events
from flashtalk_cli.batch.backlog import Backlog
from flashtalk_cli.batch.clip import Clip
from flashtalk_cli.batch.replica import Replica
from flashtalk_cli.errors import FlashtalkError, OutputError, WorkerError
from flashtalk_cli.events import Event

log = logging.getLogger(__name__)

DEATHS = 3  # in a row, each of a clip's first try: something is wrong with the place, not with a clip


class Record:
    """What became of each clip: shown, and written as a line of JSON to a file. Usable from several threads."""

    def __init__(self, path: Path, show: Callable[[Event], None], n_clips: int) -> None:
        self.path = path
        self._n_clips = n_clips
        self.clips: list[Event] = []
        self._show = show
        self._lock = threading.Lock()
        try:
            self._file: TextIO = path.open("a", encoding="utf-8")
            with _without_locks_too():
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._file.truncate(0)
        except BlockingIOError:
            raise OutputError(
                f"{path}: another run renders this manifest; wait for it, or make a manifest of the other clips"
            ) from None
        except OSError as error:
            raise OutputError(
                f"{path}: the results cannot be written ({error.strerror}); move the manifest to a folder of yours"
            ) from None

    def add(self, happened: Event) -> None:
        """A clip's end."""
        with self._lock:
            self.clips.append(happened)
            self._file.write(events.to_line(happened) + "\n")
            self._file.flush()
            self._show(happened)
            done = len(self.clips)
            self._show(events.event("progress", name="clips", done=done, total=self._n_clips, unit="clips"))

    def show(self, happened: Event) -> None:
        """Anything else."""
        with self._lock:
            self._show(happened)

    def of(self, *states: str) -> list[Event]:
        """The clips that ended so, in the manifest's order."""
        return sorted((c for c in self.clips if c["state"] in states), key=lambda c: c["line"])

    @property
    def n_left(self) -> int:
        """Clips that have not come to an end."""
        return self._n_clips - len(self.clips)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextmanager
def _without_locks_too() -> Iterator[None]:
    """Go on where a file system has no locks."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        log.debug("no lock: %s", error)


def clip_event(clip: Clip, state: str, problem: FlashtalkError | None = None, **fields: Any) -> Event:
    """A `clip` event."""
    if problem is not None:
        fields = {"type": type(problem).__name__, "message": str(problem), **fields}
    return events.event("clip", line=clip.line, output=clip.output, state=state, **fields)


class Crew:
    """Replicas at work on a backlog, until `requests` to end are there (a list that may grow meanwhile)."""

    def __init__(
        self, replicas: Sequence[Replica], clips: Sequence[Clip], record: Record, requests: Sequence[int]
    ) -> None:
        self._replicas = replicas
        self._backlog = Backlog(clips)
        self._record = record
        self._requests = requests
        self._hands = len(replicas)
        self._lock = threading.Lock()
        self._failure: BaseException | None = None
        self._deaths: dict[int, Event] = {}  # by line: what a clip's last try came to

    def run(self) -> list[Clip]:
        """Work until every clip has come to an end; those that no replica took, because of a request to end.

        Raises the last replica's error when none is left to work, after recording what was tried as failed.
        """
        threads = [
            threading.Thread(target=self._work, args=(number, replica), daemon=True)
            for number, replica in enumerate(self._replicas)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.1)
                if self._requests:
                    self._backlog.close()
        left = self._backlog.close()
        if self._failure is not None:
            for clip in left:
                if clip.line in self._deaths:
                    self._record.add(self._deaths[clip.line])
            raise self._failure
        return left

    def _work(self, number: int, replica: Replica) -> None:
        """A replica's thread."""
        deaths = 0
        try:
            while not self._requests and (clip := self._backlog.take()) is not None:
                try:
                    if not replica.alive:
                        replica.start()
                except FlashtalkError as error:
                    self._backlog.put_back(clip, untried=True)
                    return self._give_up(number, error)
                first_try = self._backlog.tries(clip) == 1
                deaths = 0 if self._render(number, replica, clip) else deaths + first_try
                if deaths == DEATHS:
                    return self._give_up(number, self._died_too_often(clip))
        except BaseException as error:  # a fault of ours: the run ends with it, when the others are done
            self._failure = error
            self._backlog.close()
        finally:
            replica.close()

    def _render(self, number: int, replica: Replica, clip: Clip) -> bool:
        """Render a clip, and record or put back what came of it; False when the replica died."""
        known: dict[str, Any] = {"replica": number, "tries": self._backlog.tries(clip)}
        if known["tries"] > 1 and not clip.overwrite and clip.output.is_file():  # died after its last frame
            self._record.add(clip_event(clip, "skipped", **known))
            self._backlog.finish()
            return True
        try:
            ended = {**clip_event(clip, "done", **known), **replica.render(clip), "line": clip.line}
        except WorkerError as error:
            if self._requests:
                ended = clip_event(clip, "interrupted", **known)
            else:
                ended = self._deaths[clip.line] = clip_event(clip, "failed", error, **known)
                if self._backlog.put_back(clip):
                    again = f"line {clip.line} goes back to the queue, replica {number} is lost: {error}"
                    self._record.show({**events.event("warning", message=again), "replica": number})
                    return False
            alive = False
        except FlashtalkError as error:
            ended, alive = clip_event(clip, "failed", error, **known), True
        else:
            alive = True
        self._record.add(ended)
        self._backlog.finish()
        return alive

    def _died_too_often(self, last: Clip) -> WorkerError:
        """The error of a replica that is given up for its deaths."""
        return WorkerError(
            f"it died {DEATHS} times in a row, the last at line {last.line}; ask `flashtalk doctor`, "
            f"or take the lines out that {self._record.path} calls failed"
        )

    def _give_up(self, number: int, error: FlashtalkError) -> None:
        """Go on without a replica; without the last, end."""
        if self._requests:
            return
        with self._lock:
            self._hands -= 1
            if self._hands:
                text = f"replica {number} is given up, {self._hands} go on: {error}"
                self._record.show({**events.event("warning", message=text), "replica": number})
            else:
                self._failure = error
                self._backlog.close()
