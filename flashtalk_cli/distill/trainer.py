"""The loop of both stages: update, measure, report, save; end when done, out of time, or asked to."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Generator, Tensor

from flashtalk_cli.distill import checkpoint
from flashtalk_cli.distill.config import Keeping
from flashtalk_cli.distill.metrics import Journal, Running
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, OutputError
from flashtalk_cli.events import Emitter
from flashtalk_cli.parallel.ranks import Ranks


class Stage(Protocol):
    """A way to train; the generators are those that all its draws come from."""

    name: str
    shared: Generator
    own: Generator

    @property
    def steps(self) -> int:
        """Updates of a whole run."""
        ...

    @property
    def step_count(self) -> int:
        """Updates done."""
        ...

    def step(self) -> dict[str, Tensor]:
        """One update; what to log, on the device."""
        ...

    def probe(self) -> dict[str, Tensor]:
        """What is only worth measuring when a line is logged; draws nothing that training draws from."""
        ...

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """From a checkpoint."""
        ...

    def weights(self) -> tuple[list[str], list[Tensor]]:
        """What the stage is for: names and tensors."""
        ...


@dataclass(frozen=True)
class Course:
    """Where a run writes, how long it may take, and how it is asked to end."""

    out: Path
    keeping: Keeping
    ranks: Ranks
    emitter: Emitter
    stop: threading.Event
    max_seconds: float | None
    resume: bool
    note: dict[str, str]
    identity: dict[str, str]  # what a checkpoint must agree in to be gone on with


def train(stage: Stage, course: Course) -> int:
    """Run a stage to its end or its time; the exit code. What it has learned is saved in any case."""
    started_s = time.monotonic()
    ranks, keeping = course.ranks, course.keeping
    _begin(stage, course)
    resumed = stage.step_count
    journal = Journal(course.out, resumed) if ranks.leads else None
    running = Running()
    saved_s = logged_s = time.monotonic()
    logged_step, interrupted = resumed, False
    while stage.step_count < stage.steps:
        running.add(stage.step())
        step, now_s = stage.step_count, time.monotonic()
        if step % keeping.log_every_steps and step < stage.steps and ranks.size > 1:
            continue  # the ranks agree on ending at steps that are logged
        interrupted = ranks.any(course.stop.is_set())
        late = course.max_seconds is not None and now_s - started_s > course.max_seconds
        ending = interrupted or ranks.any(late)
        if step % keeping.log_every_steps == 0 or ending or step == stage.steps:
            running.add(stage.probe())
            found = running.flush(ranks, step)
            now_s = time.monotonic()
            found["steps_per_s"] = (step - logged_step) / max(1e-9, now_s - logged_s)
            logged_s, logged_step = now_s, step
            if journal is not None and found:
                journal.write(step, {**found, "elapsed_s": now_s - started_s})
            _report(course, stage, found)
            if ranks.any(now_s - saved_s > keeping.save_every_s) and not ending:
                _save(stage, course)  # what was just looked at, so that no checkpoint has diverged
                saved_s = time.monotonic()
        if ending:
            break
    if journal is not None:
        journal.close()
    if interrupted:
        course.emitter.emit("stage", name="save", detail="what was learned; once more ends it at once")
    _save(stage, course)
    path = checkpoint.save_weights(
        course.out, *stage.weights(), ranks, course.note | {"step": str(stage.step_count)}
    )
    if interrupted:
        course.emitter.emit("interrupted", path=path)
        return INTERRUPTED_EXIT_CODE
    course.emitter.emit("done", path=path, elapsed_s=time.monotonic() - started_s)
    return 0


def _begin(stage: Stage, course: Course) -> None:
    """Make the folder, and go on from its last checkpoint."""
    try:
        course.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{course.out} cannot be made ({error.strerror}): choose another") from None
    found = checkpoint.found_in(course.out)
    if found and not course.resume:
        raise OutputError(
            f"{course.out} holds a run of {len(found)} checkpoints, the last {found[-1].name}: remove it, choose "
            "another folder, or leave out --no-resume to go on"
        )
    course.ranks.wait()
    if not found:
        return
    state = checkpoint.load(found[-1], course.ranks)
    checkpoint.check_identity(found[-1], state.get("identity", {}), course.identity)
    stage.load(state["stage"])
    checkpoint.load_generators({"shared": stage.shared, "own": stage.own}, state["generators"])
    course.emitter.emit("stage", name="resume", detail=f"{found[-1].name} of {course.out}")


def _save(stage: Stage, course: Course) -> None:
    state = {
        "identity": course.identity,
        "stage": stage.state(),
        "generators": checkpoint.generators_state({"shared": stage.shared, "own": stage.own}),
    }
    checkpoint.save(course.out, stage.step_count, state, course.ranks, course.keeping.checkpoints)


def _report(course: Course, stage: Stage, found: dict[str, float]) -> None:
    words = [
        f"{name.replace('_', ' ')} {value:.4g}" for name, value in found.items() if name != "steps_per_s"
    ]
    speed = f"{found['steps_per_s']:.2f} a second"
    course.emitter.emit(
        "progress",
        name=stage.name,
        done=stage.step_count,
        total=stage.steps,
        unit=f"steps, {', '.join([*words, speed])}",
    )
