"""`--restart`: a stream whose worker died is started again, later each time, and goes on where it was.

What can be kept is kept: a file is spoken on from where it had come to, HLS segments count on, a recording
goes on in a file of its own (talk.mp4, talk-2.mp4), for one that was cut off cannot be written on. What a pipe
or an agent had sent and nobody had spoken is lost. Outputs elsewhere connect again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flashtalk_cli import events
from flashtalk_cli.config import StreamJob
from flashtalk_cli.errors import (
    ConfigError,
    FlashtalkError,
    InputError,
    ModelError,
    OutputError,
    UsageError,
)
from flashtalk_cli.media.files import shown
from flashtalk_cli.media.live.backoff import Backoff
from flashtalk_cli.media.live.recording import next_name
from flashtalk_cli.media.part_file import PartFile, part_path

MOST_IN_A_ROW = 5
FIRST_WAIT_S = 1.0
SETTLED_S = 60.0  # on air for so long, a death begins a new row
LOOK_UP_S = 0.1
FOR_GOOD = (UsageError, ConfigError, InputError, ModelError, OutputError)  # would come again at once

Start = Callable[[StreamJob, Callable[[events.Event], None]], int]
"""Runs a job in a worker, passing its events on; the exit code, or the error that it ended with."""


@dataclass
class Attempt:
    """One life of a worker: passes its events on, and remembers what the next one has to know."""

    pass_on: Callable[[events.Event], None]
    last: events.Event = field(default_factory=dict)  # its newest status
    since_s: float | None = None  # monotonic time of its first frame

    def note(self, happened: events.Event) -> None:
        """Take an event."""
        if happened["event"] == "live":
            self.last = happened
            if self.since_s is None and happened["frames"]:
                self.since_s = time.monotonic()
        self.pass_on(happened)

    @property
    def on_air_s(self) -> float:
        """For how long it was on air."""
        return 0.0 if self.since_s is None else time.monotonic() - self.since_s


def run(job: StreamJob, start: Start, show: Callable[[events.Event], None], requests: Sequence[int]) -> int:
    """Run a job until it ends, starting it again when its worker dies on air; the exit code.

    `requests` grows when it is to end. Raises what `start` raised before the stream was ever on air, what no
    new start would mend, and what came `MOST_IN_A_ROW` times in a row.
    """
    backoff = Backoff(random.Random(), FIRST_WAIT_S)
    in_a_row, n_frames = 0, 0
    while True:
        attempt = Attempt(show)
        try:
            return start(job, attempt.note)
        except FlashtalkError as error:
            n_frames += attempt.last.get("frames", 0)
            in_a_row = 1 if attempt.on_air_s >= SETTLED_S else in_a_row + 1
            if isinstance(error, FOR_GOOD) or not n_frames or in_a_row > MOST_IN_A_ROW or requests:
                raise
            wait_s = backoff.wait_s(attempt.on_air_s)
            kept = [shown(path) for path in _publish(job)]
            rest = f", recorded so far: {', '.join(kept)}" if kept else ""
            text = f"{error}; it is started again in {wait_s:.0f} s ({in_a_row} of {MOST_IN_A_ROW}){rest}"
            show(events.event("warning", message=text))
        end_s = time.monotonic() + wait_s
        while time.monotonic() < end_s and not requests:
            time.sleep(LOOK_UP_S)
        if requests:
            duration_s = n_frames / job.preset.sampling.fps
            there = next((path for path in _recordings(job) if path.is_file()), None)
            show(events.event("done", path=there, frames=n_frames, duration_s=duration_s))
            return 0
        job = resumed(job, attempt.last)


def resumed(job: StreamJob, last: events.Event) -> StreamJob:
    """The job that goes on after this one, whose last status is given ({}: it had none)."""
    source = job.source
    if source.kind == "file" and not source.loop and last:
        spoken_s = last["position_s"] - max(0.0, last["ahead_s"])
        source = source.model_copy(update={"start_s": source.start_s + max(0.0, spoken_s)})
    targets = tuple((kind, _next(place) if kind == "file" else place) for kind, place in job.targets)
    return job.model_copy(update={"source": source, "targets": targets, "restarts": job.restarts + 1})


def _recordings(job: StreamJob) -> Iterator[Path]:
    return (Path(place).absolute() for kind, place in job.targets if kind == "file")


def _publish(job: StreamJob) -> list[Path]:
    """Give recordings that a dead worker left their names: those that have one now."""
    found = []
    for path in _recordings(job):
        try:
            part = PartFile(path, job.overwrite, keep=True)
            if part.is_empty():
                part.discard()
                continue
            part.publish(part.path)
        except OutputError:  # it stays as its part file, and plays
            path = part_path(path)
        found.append(path)
    return found


def _next(place: str) -> str:
    """Where a recording goes on: under its own name when nothing was recorded under that."""
    recording = Path(place)
    taken = recording.exists() or part_path(recording).exists()
    return str(next_name(recording)) if taken else place
