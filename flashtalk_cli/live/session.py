"""One live stream in the worker, from its job to its last frame: all its parts, tied together."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flashtalk_cli.config import StreamJob
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, UsageError
from flashtalk_cli.events import Emitter
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.control import Control
from flashtalk_cli.live.delivery import Delivery
from flashtalk_cli.live.ending import Ending, heard_at_once, on_request, outlived
from flashtalk_cli.live.inputs import open_source
from flashtalk_cli.live.loop import DRAIN_S, Loop, Manners
from flashtalk_cli.live.microphone import check_microphone
from flashtalk_cli.live.outcome import SERVERS, are_late, failure, where_it_went
from flashtalk_cli.live.pacing import Rules
from flashtalk_cli.live.sources import Source
from flashtalk_cli.live.stage import ModelPerformer, Stage
from flashtalk_cli.live.status import status_of
from flashtalk_cli.live.timeline import RATE_HZ, Timeline
from flashtalk_cli.live.web import Web
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.recording import check_folder
from flashtalk_cli.media.live.targets import Target, parse_target

if TYPE_CHECKING:  # it dispatches to this module
    from flashtalk_cli.rendering import Worker

log = logging.getLogger(__name__)

STATUS_EVERY_S = 1.0
BLOCKED_S = 0.5  # how often a write that waits for the encoder looks whether the stream is to end
STOP_S, END_S = 1.5, 30.0  # what the outputs get to end, when asked to stop and at the end of the sound


def stream(worker: Worker, job: StreamJob, stop: threading.Event, stdout: int) -> int:
    """Stream until the sound ends or `stop` is set; the exit code. All ranks."""

    def not_yet_on_air() -> int:
        worker.emitter.emit("interrupted", path=None, frames=0)
        return INTERRUPTED_EXIT_CODE

    with heard_at_once(stop):
        with outlived(stop, 0.0, not_yet_on_air):
            if worker.ranks.leads and not job.restarts:
                check_first_start(job)
            stage = Stage(worker)
            _warm_up(worker, stage)
            performer = ModelPerformer(worker, stage) if worker.ranks.leads else None
        if performer is None:
            stage.follow()
            return 0
        code = lead(worker, job, performer, stop, stdout)
    performer.end()  # after an error there is no telling what the other ranks wait for: the worker ends them
    return code


def check_first_start(job: StreamJob) -> None:
    """What holds for a stream that begins, and not for one that goes on, before any weight is loaded.

    `OutputError` for a folder with another stream in it, unless it is to be overwritten; `InputError` for a
    microphone that is not there. One that goes away later is waited for.
    """
    for kind, place in job.targets:
        if kind == "hls":
            check_folder(Path(place), job.overwrite)
    if job.source.kind == "microphone":
        check_microphone(job.source.where)


def _warm_up(worker: Worker, stage: Stage) -> None:
    """Make what is slow the first time, and time it the second."""
    worker.emitter.emit("stage", name="warm", detail="two chunks, which nobody sees")
    stage.warm_up()
    began_s = time.perf_counter()
    stage.warm_up()
    took_s, lasts_s = time.perf_counter() - began_s, worker.preset.sampling.new_s
    if took_s > lasts_s:
        worker.emitter.emit("warning", message=slow(took_s, lasts_s, worker.device.type == "cuda"))


def slow(took_s: float, lasts_s: float, on_gpus: bool) -> str:
    """What to say of a chunk that took longer to make than to show: one is no measure of those to come."""
    mend = (
        "fewer --steps, a smaller --size or more --gpus" if on_gpus else "fewer --steps or a smaller --size"
    )
    return (
        f"a chunk of {lasts_s:.2f} s took {took_s:.2f} s to make beforehand: "
        f"if that goes on, frames are shown twice; {mend} would help"
    )


def rules_of(job: StreamJob) -> Rules:
    """The rules of pacing that a job's preset gives."""
    sampling, live = job.preset.sampling, job.preset.live
    return Rules(
        fps=sampling.fps,
        chunk_s=sampling.new_s,
        lookahead_s=round(job.preset.hearing.lookahead_s * sampling.fps) / sampling.fps,
        start_buffer_s=live.start_buffer_s,
        latency_target_s=live.latency_target_s,
        late=live.late,
    )


def lead(
    worker: Worker, job: StreamJob, performer: ModelPerformer, stop: threading.Event, stdout: int
) -> int:
    """The stream on rank 0, once the model is warm."""
    emitter, clock, rules = worker.emitter, Clock(), rules_of(job)

    def warn(message: str) -> None:
        emitter.emit("warning", message=message)

    targets = tuple(parse_target(kind, text) for kind, text in job.targets)  # type: ignore[arg-type]
    timeline = Timeline(
        past_s=job.preset.hearing.context_s - rules.lookahead_s,
        backlog_s=job.preset.live.backlog_s,
        fps=rules.fps,
    )
    with ExitStack() as stack:
        encoder = stack.enter_context(_encoder(worker, job, targets, warn, stdout))
        source = open_source(job, timeline, clock, warn)
        manners = Manners(source.paced, source.may_wait_s, job.keep_alive, source.knows_future)
        delivery = Delivery(rules, _sink(encoder, stop), clock, RATE_HZ, stop)
        is_away = partial(_is_away, encoder) if job.preset.live.away == "pause" else lambda: False
        loop = Loop(rules, manners, timeline, performer, delivery, stop, clock, is_away)

        def status() -> dict[str, Any]:
            return status_of(loop, source.state, encoder.statistics(), job.restarts)

        def end(late: bool) -> int:
            if late:
                source.close()
                delivery.finish(DRAIN_S)
            before = encoder.statistics()
            with on_request(stop, lambda over: encoder.hurry(STOP_S)):
                encoder.end(STOP_S if stop.is_set() else END_S)
            sinks = encoder.statistics()
            if are_late(before, sinks) or not (stop.is_set() or sent):
                limit_s = STOP_S if stop.is_set() else END_S
                warn(f"not every output was done within {limit_s:.0f} s; what was not sent is lost")
            stack.close()
            emitter.emit("stage", name="sent", detail=where_it_went(sinks, delivery.repeated_frames))
            if delivery.sent_frames and (problem := failure(sinks)):
                emitter.error(problem)
                return problem.exit_code
            emitter.emit(
                "done",
                path=next(iter(encoder.recordings), None),
                frames=delivery.sent_frames,
                duration_s=delivery.sent_frames / rules.fps,
                elapsed_s=None,  # as long as it lasts: a rate of it would count the start and the tail
            )
            return 0

        sent = False
        handler = Commands(loop, source, performer, status)
        source.on_interrupt = loop.interrupt
        stack.enter_context(Control(job.control, handler))
        hls = next((target.path for target in targets if target.kind == "hls"), None)
        for address in filter(None, (job.metrics, job.preview)):
            stack.enter_context(Web(address, status, hls if address == job.preview else None))
        stack.enter_context(_reported(emitter, status))
        emitter.emit("stage", name="live", detail=", ".join(target.shown for target in targets))
        stack.callback(source.close)
        source.start()
        delivery.start()
        ending = Ending(stop, end)
        with ending.watched():
            sent = loop.run()
        if source.failure is not None and not delivery.sent_frames:
            raise source.failure
        return ending()


class Commands:
    """What a control socket's requests do to a stream."""

    def __init__(self, loop: Loop, source: Source, performer: ModelPerformer, status: Any) -> None:
        self._loop = loop
        self._source = source
        self._performer = performer
        self._status = status

    def __call__(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what a request asks; its answer. Raises `UsageError` for one that makes no sense."""
        match request:
            case {"command": "status"}:
                return dict(self._status())
            case {"command": "interrupt"}:
                return {"dropped_s": self._source.interrupt()}
            case {"command": "mute" | "unmute" as word}:
                self._loop.mute(word == "mute")
            case {"command": "prompt", "text": str(text)}:
                self._performer.change(prompt=text)
            case {"command": "picture", "path": str(path)}:
                self._performer.change(picture=Path(path))
            case {"command": "stop"}:
                self._loop.stop.set()
            case _:
                raise UsageError(
                    "commands are status, interrupt, mute, unmute, prompt with a text, picture with a path, stop"
                )
        return {}


def _encoder(
    worker: Worker, job: StreamJob, targets: tuple[Target, ...], warn: Any, stdout: int
) -> LiveEncoder:
    canvas = job.preset.canvas
    return LiveEncoder(
        targets,
        width_px=canvas.width_px,
        height_px=canvas.height_px,
        fps=job.preset.sampling.fps,
        encoding=job.preset.encoding,
        comment=worker.comment(),
        on_warning=warn,
        overwrite=job.overwrite,
        stdout=stdout,
        resumed=job.restarts > 0,
    )


def _is_away(encoder: LiveEncoder) -> bool:
    """Whether there are servers to send to, and every one was found to be away."""
    servers = [sink for sink in encoder.statistics() if sink.kind in SERVERS]
    return bool(servers) and all(
        sink.state in ("waiting", "failed") or (sink.state == "connecting" and sink.reconnects > 0)
        for sink in servers
    )


def _sink(encoder: LiveEncoder, stop: threading.Event) -> Any:
    """Writes to the encoder; when that is stuck, only as long as the stream is to go on."""

    def write(frames: np.ndarray, samples: np.ndarray) -> None:
        while not encoder.write(frames, samples, limit_s=BLOCKED_S):
            if stop.is_set():
                return

    return write


@contextmanager
def _reported(emitter: Emitter, status: Any) -> Iterator[None]:
    """Send the status once a second."""
    over = threading.Event()

    def report() -> None:
        while not over.wait(STATUS_EVERY_S):
            emitter.emit("live", **status())

    reporter = threading.Thread(target=report, name="status", daemon=True)
    reporter.start()
    try:
        yield
    finally:
        over.set()
        reporter.join()
