"""A request to render, from the command line's words to a finished run.

Everything that can be wrong is looked at in the order of what it costs to know, before any
weight is loaded: preset, output, picture, machine, sound, model. Then the job goes to a worker.
"""

from __future__ import annotations

import math
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flashtalk_cli import launch, log
from flashtalk_cli.cli.display import Display, choose
from flashtalk_cli.cli.hosts import check_split
from flashtalk_cli.cli.machine import cautions, check_cpu, check_machine, processes_of
from flashtalk_cli.config import LEAST_PX, MOST_PX, PATCH_PX, SAMPLE_RATE_HZ, Canvas, Preset, RenderJob
from flashtalk_cli.errors import ConfigError, OutputError
from flashtalk_cli.events import event
from flashtalk_cli.media.audio import prepare_speech
from flashtalk_cli.media.image import load_picture, picture_size
from flashtalk_cli.media.video_file import check_output
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.presets import Override, load, parse_set

PROGRESS_EVERY_S = 1.0
BYTES_PER_SECOND = 4 * SAMPLE_RATE_HZ  # of prepared sound


@dataclass(frozen=True)
class Request:
    """What a command line asks for, as it was typed."""

    picture: Path
    speech: Path
    output: str | None  # None: named after the inputs; "-": standard output
    preset: str
    sets: Sequence[str]
    options: dict[str, tuple[str, Any]]  # option: (dotted key of the preset, value)
    size: str | None
    overwrite: bool
    hosts: launch.Hosts = field(default_factory=launch.Hosts)

    @property
    def to_stdout(self) -> bool:
        """Whether standard output is the video."""
        return self.output == "-"


def fulfil(request: Request, *, json: bool, debug: bool) -> int:
    """Check a request and run it to its end; the exit code. Errors are raised, and shown as events."""
    log.setup(debug=debug)
    with (
        choose(json=json, video_on_stdout=request.to_stdout) as display,
        tempfile.TemporaryDirectory(prefix="flashtalk-") as folder,
    ):
        job = check(request, Path(folder), display)
        hosts, processes = request.hosts, processes_of(job.preset.compute)
        check_split(job.preset, processes * hosts.count)
        for text in cautions(job.preset, processes):
            display.show(event("warning", message=text))
        if hosts.index:
            display.stage("host", f"{hosts.index}, and host 0 of {hosts.count} writes the video and reports")
        display.stage("start", "loading torch")
        return launch.run(
            job,
            display.show,
            debug=debug,
            stdout=request.to_stdout,
            on_log=display.log,
            processes=processes,
            hosts=hosts,
        )


def check(request: Request, folder: Path, display: Display) -> RenderJob:
    """The job, after everything that can be wrong with it was looked at; no weight is loaded here.

    `folder` is where the prepared sound goes; it must live as long as the job.
    """
    seen = look(request)
    width_px, height_px = seen.picture_px
    preset = seen.preset
    check_machine(preset)
    display.stage("picture", f"{request.picture} {width_px}x{height_px}, shown at {_canvas(preset.canvas)}")
    display.stage("sound", str(request.speech))
    with _growth_shown(folder, display):
        speech = prepare_speech(request.speech, folder)
    model = preset.model
    found = resolve(model.name, model.speech_encoder, random=model.weights == "random")
    display.stage("model", str(found.path))
    return RenderJob(
        preset=preset,
        picture=request.picture.absolute(),
        audio=request.speech.absolute(),
        speech=speech,
        output=seen.output,
        overwrite=request.overwrite,
    )


@dataclass(frozen=True)
class Seen:
    """What a look at a request found."""

    preset: Preset
    output: Path | None
    picture_px: tuple[int, int]


def look(request: Request) -> Seen:
    """Look at all that is cheap to know: preset, output, picture."""
    preset = preset_of(request.preset, request.sets, request.options, request.size)
    output = _output(request, preset)
    size = picture_size(request.picture)
    load_picture(request.picture, preset.canvas)  # decodes every pixel: a file that is cut short shows here
    if request.size == "auto":
        preset = preset.model_copy(update={"canvas": preset.canvas.of_aspect(*size)})
    return Seen(preset, output, size)


@contextmanager
def _growth_shown(folder: Path, display: Display) -> Iterator[None]:
    """Show every second how much of a long sound is ready in `folder`."""
    over = threading.Event()

    def watch() -> None:
        while not over.wait(PROGRESS_EVERY_S):
            with suppress(FileNotFoundError):  # removed in this moment: the sound was no good
                ready_s = sum(path.stat().st_size for path in folder.iterdir()) / BYTES_PER_SECOND
                if ready_s >= 1:  # 0 s would read as its length
                    display.progress("sound", ready_s, None, "s")

    watcher = threading.Thread(target=watch, name="sound-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def preset_of(
    name: str, sets: Sequence[str], options: Mapping[str, tuple[str, Any]], size: str | None
) -> Preset:
    """The preset with everything that the command line changes in it; options win over --set.

    `options`: of each option the preset's dotted key and the value; `size`: WxH, auto or None.
    Raises ConfigError for what makes no preset, DeviceError for one that asks of the CPU what only a GPU does.
    """
    overrides = [parse_set(text) for text in sets]
    overrides += [Override(path, value, option) for option, (path, value) in options.items()]
    if size is not None and size != "auto":
        overrides += _sides(size)
    preset: Preset = load(name, overrides)
    if preset.compute.device == "cpu":
        check_cpu(preset)
    return preset


def _sides(size: str) -> list[Override]:
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", size)
    if match is None:
        raise ConfigError(f"--size is {size!r}; accepted: WIDTHxHEIGHT such as 144x160, or auto")
    sides = [int(side) for side in match.groups()]
    if any(side % PATCH_PX for side in sides) and all(LEAST_PX <= side <= MOST_PX for side in sides):
        below, above = (
            "x".join(str(PATCH_PX * whole(side / PATCH_PX)) for side in sides)
            for whole in (math.floor, math.ceil)
        )
        raise ConfigError(f"--size {size}: sides are multiples of {PATCH_PX}: take {below} or {above}")
    keys = ("canvas.width_px", "canvas.height_px")
    return [Override(key, side, "--size") for key, side in zip(keys, sides, strict=True)]


def _output(request: Request, preset: Preset) -> Path | None:
    """Where the video goes, None for standard output; looked at, not yet created."""
    if request.to_stdout:
        if sys.stdout.isatty():
            raise OutputError("standard output is a terminal; pipe the video to a program: -o - | mpv -")
        output = None
    else:
        default = f"{request.speech.stem}-{request.picture.stem}.mp4"
        output = Path(default if request.output is None else request.output).absolute()
        if os.path.isdir(output):
            raise OutputError(f"{output}: is a folder; name a file in it, such as {output / default}")
        for given in (request.picture, request.speech):
            with suppress(OSError):  # one of them is not there
                if output.samefile(given):
                    raise OutputError(
                        f"{output}: is an input too and would be lost; choose another name with -o"
                    )
    if request.hosts.index:
        return output  # host 0 looks at it, and writes it
    check_output(output, preset.encoding, preset.canvas.width_px, preset.canvas.height_px, request.overwrite)
    if output is not None:
        _try_folder(output)
    return output


def _try_folder(output: Path) -> None:
    """Make a nameless file where the video goes: what permissions promise is not always so."""
    try:
        with suppress(FileNotFoundError):
            os.lstat(f"{output}.part.index")  # the longest name there will be
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror}); choose another with -o") from None


def _canvas(canvas: Canvas) -> str:
    return f"{canvas.width_px}x{canvas.height_px}"
