"""A manifest of clips: one JSON object a line, looked at line by line before anything slow begins.

    {"picture": "anna.png", "speech": "hello.wav", "output": "anna.mp4", "seed": 7, "size": "auto"}

Paths are relative to the manifest. All other keys are options of `flashtalk render` and win over those of
the command line; none of them needs other networks. A line that is wrong costs its own clip alone.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashtalk_cli.batch.clip import Clip
from flashtalk_cli.cli.request import Request, look
from flashtalk_cli.errors import FlashtalkError, InputError
from flashtalk_cli.events import Event, event
from flashtalk_cli.media.audio import check_speech

PATHS = ("picture", "speech", "output")
OPTIONS = {  # key of a line: dotted key of the preset
    "seed": "sampling.seed",
    "prompt": "sampling.prompt",
    "steps": "sampling.steps",
    "fit": "canvas.fit",
    "background": "canvas.background",
    "codec": "encoding.codec",
    "crf": "encoding.crf",
}
KEYS = (*PATHS, "size", *OPTIONS)
LOOKERS = 4  # threads; decoding pictures and starting ffmpeg leave Python's lock alone


@dataclass(frozen=True)
class Line:
    """A line that is well formed."""

    number: int
    request: Request

    @property
    def output(self) -> Path:
        """The video that it asks for."""
        assert self.request.output is not None
        return Path(self.request.output)


@dataclass(frozen=True)
class Plan:
    """What is to be done, and what has come to its end already: lines that failed, clips that exist."""

    clips: list[Clip]
    ended: list[Event]


def plan(manifest: Path, common: Request, progress: Callable[[int, int], None]) -> Plan:
    """Read a manifest and look at all its clips; `common` has the options of all, `progress` hears of each.

    Raises InputError when the manifest cannot be read or is empty.
    """
    well_formed, ended = read(manifest, common)
    lines, twins = _outputs_once(well_formed)
    ended += twins
    inputs = {
        os.path.realpath(path): line.number
        for line in well_formed
        for path in (line.request.picture, line.request.speech)
    }
    todo: list[Line] = []
    for line in lines:
        if common.overwrite or not os.path.isfile(line.output):
            todo.append(line)
        else:
            ended.append(event("clip", line=line.number, output=line.output, state="skipped"))
    clips = []
    with ThreadPoolExecutor(LOOKERS) as pool:
        for done, found in enumerate(pool.map(lambda line: _looked_at(line, inputs), todo), start=1):
            clips.append(found) if isinstance(found, Clip) else ended.append(found)
            progress(done, len(todo))
    return Plan(clips, sorted(ended, key=lambda happened: happened["line"]))


def read(manifest: Path, common: Request) -> tuple[list[Line], list[Event]]:
    """Its lines, and the failure of each line that cannot be understood; empty lines are passed over."""
    try:
        text = manifest.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(
            f"{manifest}: cannot be read ({error.strerror}); give a file of JSON lines"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{manifest}: is not UTF-8 at byte {error.start}; save it as such") from None
    folder = manifest.absolute().parent
    lines: list[Line] = []
    failed: list[Event] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            given: dict[str, Any] = {}
            try:
                given = _object(line)
                lines.append(Line(number, _request(given, folder, common)))
            except FlashtalkError as error:
                known = {"output": folder / given["output"]} if _is_text(given.get("output")) else {}
                failed.append(_failed(number, error, **known))
    if not lines and not failed:
        raise InputError(
            f"{manifest}: has no clips; a line looks like {json.dumps(dict.fromkeys(PATHS, '…'))}"
        )
    return lines, failed


def _object(line: str) -> dict[str, Any]:
    """The JSON object of a line."""
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()  # "\\ud800" is JSON, but names no character
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON ({error}); one object a line") from None
    if not isinstance(given, dict):
        raise InputError(f"not an object but {line.strip()[:40]}; give at least {', '.join(PATHS)}")
    return given


def _is_text(value: Any) -> bool:
    """Whether the value of a key can be a path or a size."""
    return isinstance(value, str) and bool(value) and "\0" not in value


def _request(given: dict[str, Any], folder: Path, common: Request) -> Request:
    """An object as the request that it stands for."""
    if unknown := [key for key in given if key not in KEYS]:
        raise InputError(f"unknown key {unknown[0]!r}; keys are {', '.join(KEYS)}")
    if missing := [key for key in PATHS if key not in given]:
        raise InputError(f'key "{missing[0]}" is missing; give at least {", ".join(PATHS)}')
    for key in (*PATHS, "size"):
        value = given.get(key, common.size or "auto")
        if not _is_text(value):
            raise InputError(f"{key} is {value!r}; give a text")
    own: dict[str, tuple[str, Any]] = {
        key: (path, given[key]) for key, path in OPTIONS.items() if given.get(key) is not None
    }
    return replace(
        common,
        picture=folder / given["picture"],
        speech=folder / given["speech"],
        output=str(folder / given["output"]),
        options={**common.options, **own},
        size=given.get("size", common.size),
    )


def _outputs_once(lines: Sequence[Line]) -> tuple[list[Line], list[Event]]:
    """The lines that are the first with their output, and the failure of each other one."""
    first: dict[str, int] = {}
    kept: list[Line] = []
    failed: list[Event] = []
    for line in lines:
        number = first.setdefault(os.path.realpath(line.output), line.number)
        if number == line.number:
            kept.append(line)
        else:
            problem = InputError(f"{line.output}: same output as line {number}; give each its own")
            failed.append(_failed(line.number, problem, output=line.output))
    return kept, failed


def _looked_at(line: Line, inputs: dict[str, int]) -> Clip | Event:
    """The clip of a line after a look at all that is cheap to know of it, or why it failed."""
    request = line.request
    try:
        if user := inputs.get(os.path.realpath(line.output)):
            raise InputError(f"{line.output}: is an input of line {user}; give another output")
        seen = look(request)
        check_speech(request.speech)
    except FlashtalkError as error:
        return _failed(line.number, error, output=line.output)
    return Clip(
        line=line.number,
        preset=seen.preset,
        picture=request.picture,
        speech=request.speech,
        output=line.output,
        overwrite=request.overwrite,
    )


def _failed(number: int, error: FlashtalkError, **fields: Path) -> Event:
    """The event of a line that cannot be rendered."""
    return event("clip", line=number, state="failed", type=type(error).__name__, message=str(error), **fields)
