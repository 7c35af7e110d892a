"""A request to stream, from the command line's words to the end of the stream.

As for a render, everything that can be wrong is looked at in the order of what it costs to know, before any
weight is loaded.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashtalk_cli import events, launch, log
from flashtalk_cli.cli import restart, title
from flashtalk_cli.cli.display import Display
from flashtalk_cli.cli.live_display import choose
from flashtalk_cli.cli.machine import cautions, check_machine, processes_of
from flashtalk_cli.cli.request import preset_of
from flashtalk_cli.config import Preset, SoundSource, StreamJob
from flashtalk_cli.errors import OutputError, UsageError
from flashtalk_cli.live.address import check_free, parse_address
from flashtalk_cli.live.control import check_control, default_socket
from flashtalk_cli.live.inputs import check_readable, parse_listen, parse_source
from flashtalk_cli.media.image import load_picture, picture_size
from flashtalk_cli.media.live.encoder import check_targets
from flashtalk_cli.media.live.targets import Target, parse_target, resolve_secret
from flashtalk_cli.models.folder import resolve

STDIN = 0
PCM = "s16le:16000:1"


@dataclass(frozen=True)
class LiveRequest:
    """What a command line asks for, as it was typed."""

    picture: Path
    audio: str | None
    listen: str | None
    token: str | None
    pcm: str | None
    loop: bool
    keep_alive: bool
    targets: Sequence[tuple[str, str]]  # kind, place
    overwrite: bool
    preview: str | None
    metrics: str | None
    control: Path | None
    restart: bool
    preset: str
    sets: Sequence[str]
    options: dict[str, tuple[str, Any]]  # option: (dotted key of the preset, value)
    size: str | None

    @property
    def to_stdout(self) -> bool:
        """Whether standard output is the video."""
        return ("file", "-") in self.targets


def fulfil(request: LiveRequest, *, json: bool, debug: bool) -> int:
    """Check a request and stream until it ends; the exit code."""
    log.setup(debug=debug)
    title.hide(request.targets, request.audio, request.token)
    with choose(json=json, video_on_stdout=request.to_stdout) as display, ExitStack() as stack:
        job = check(request, stack, display)
        display.stage("control", f"flashtalk ctl --socket {job.control} status")
        processes = processes_of(job.preset.compute)
        for text in cautions(job.preset, processes):
            display.show(events.event("warning", message=text))

        def start(job: StreamJob, on_event: Callable[[events.Event], None]) -> int:
            display.stage("start", "loading torch")
            return launch.run(
                job,
                on_event,
                debug=debug,
                stdin=STDIN if job.source.kind == "stdin" else subprocess.DEVNULL,
                stdout=request.to_stdout,
                on_log=display.log,
                processes=processes,
                requests=requests,
            )

        requests = stack.enter_context(launch.stop_requests())
        return (
            restart.run(job, start, display.show, requests) if request.restart else start(job, display.show)
        )


def check(request: LiveRequest, stack: ExitStack, display: Display) -> StreamJob:
    """The job, after everything that can be wrong with it was looked at; no weight is loaded here.

    `stack` ends what must live as long as the job.
    """
    source = source_of(request)
    preset = preset_of(request.preset, request.sets, request.options, request.size)
    width_px, height_px = picture_size(request.picture)
    load_picture(request.picture, preset.canvas)
    if request.size == "auto":
        preset = preset.model_copy(update={"canvas": preset.canvas.of_aspect(width_px, height_px)})
    preset = _with_lookahead(preset, source)
    check_machine(preset)
    if request.restart and preset.live.late == "fail":
        raise UsageError("--restart would start again what --late fail ends: give one of them")
    canvas = preset.canvas
    display.stage(
        "picture", f"{request.picture} {width_px}x{height_px}, shown at {canvas.width_px}x{canvas.height_px}"
    )
    targets, preview = _targets(request, stack)
    parsed = tuple(parse_target(kind, place) for kind, place in targets)  # type: ignore[arg-type]
    check_targets(parsed, preset.encoding, canvas.width_px, canvas.height_px, request.overwrite)
    _check_outputs(request, parsed)
    metrics = _address("--metrics", request.metrics)
    if source.kind == "listen":
        check_free("--listen", parse_address("--listen", source.where))
    control = request.control.absolute() if request.control else default_socket()
    check_control(control)
    model = preset.model
    found = resolve(model.name, model.speech_encoder, random=model.weights == "random")
    display.stage("model", str(found.path))
    if preview:
        display.stage("preview", f"http://{preview}/")
    return StreamJob(
        preset=preset,
        picture=request.picture.absolute(),
        source=source,
        targets=targets,
        overwrite=request.overwrite,
        keep_alive=request.keep_alive,
        control=control,
        metrics=metrics,
        preview=preview,
    )


def source_of(request: LiveRequest) -> SoundSource:
    """Where the sound comes from. Raises `UsageError` for options that contradict each other."""
    raw = request.listen is not None or request.audio == "-"
    if (request.audio is None) == (request.listen is None):
        raise UsageError("give either --audio SOURCE or --listen HOST:PORT")
    if request.pcm is not None and not raw:
        raise UsageError("--pcm says how raw samples look: it goes with --audio - or --listen")
    if request.token is not None and request.listen is None:
        raise UsageError("--token goes with --listen")
    pcm = request.pcm or PCM
    if request.listen is not None:
        token = None if request.token is None else resolve_secret("--token", request.token)
        found = parse_listen(request.listen, pcm=pcm, token=token)
    else:
        assert request.audio is not None
        secret = request.audio.startswith(("@", "env:"))
        audio = resolve_secret("--audio", request.audio) if secret else request.audio
        found = parse_source(audio, pcm=pcm, loop=request.loop)
    if request.loop and found.kind != "file":
        raise UsageError("--loop repeats a file; this --audio is none")
    if found.kind == "stdin" and sys.stdin.isatty():
        raise UsageError("standard input is a terminal; pipe raw PCM into --audio -")
    if found.kind == "file":
        check_readable(found)
    return found


def _with_lookahead(preset: Preset, source: SoundSource) -> Preset:
    """Sound that is made as it is heard is waited for no longer than the preset's live section says."""
    if source.kind == "file":
        return preset
    lookahead_s = min(preset.hearing.lookahead_s, preset.live.lookahead_s)
    return preset.model_copy(
        update={"hearing": preset.hearing.model_copy(update={"lookahead_s": lookahead_s})}
    )


def _targets(request: LiveRequest, stack: ExitStack) -> tuple[tuple[tuple[str, str], ...], str | None]:
    """All outputs, and the preview's address; a preview without --hls gets a folder of its own."""
    targets = [("stdout", "") if target == ("file", "-") else target for target in request.targets]
    preview = _address("--preview", request.preview)
    if preview and not any(kind == "hls" for kind, _ in targets):
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="flashtalk-preview-"))
        targets.append(("hls", folder))
    if not targets:
        raise UsageError("no output: give --rtmp, --srt, --whip, --udp, --hls, --preview or -o")
    return tuple(targets), preview


def _address(option: str, text: str | None) -> str | None:
    if text is None:
        return None
    address = parse_address(option, text)
    check_free(option, address)
    return str(address)


def _check_outputs(request: LiveRequest, targets: Sequence[Target]) -> None:
    if request.to_stdout and sys.stdout.isatty():
        raise OutputError("standard output is a terminal; pipe the video to a program: -o - | mpv -")
    inputs = [request.picture.absolute(), *([Path(request.audio).absolute()] if request.audio else [])]
    for target in targets:
        if target.kind == "file" and target.path in inputs:
            raise OutputError(
                f"{target.shown}: is an input too and would be lost; choose another name with -o"
            )
