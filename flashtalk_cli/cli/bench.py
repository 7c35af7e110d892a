"""`flashtalk bench`: how fast this machine makes video, part by part."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtalk_cli.cli.options import REPORT, SPEED, Debug, Gpus, Json, PresetName, Sets, number_or_word

if TYPE_CHECKING:
    from flashtalk_cli.bench.compare import Comparison
    from flashtalk_cli.cli.display import Display
    from flashtalk_cli.config import Preset

EXAMPLES = """[bold]Examples[/bold]

flashtalk bench

flashtalk bench --preset soulx-14b --weights random --gpus 2 -o two.json --also one.json --html report.html

flashtalk bench --compare old.json

flashtalk bench --from new.json --compare old.json

Exit code 10: slower than the report of --compare, beyond noise.
"""
_ASSETS = Path(__file__).resolve().parent.parent / "assets"
_KINDS = ("released", "random")
_OF_MEASURING = ("preset", "chunks", "weights", "gpus", "sets")
LOOK_S = 0.5
BUSY_PERCENT = 20.0  # of all processors, before anything of ours runs


def _file(name: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=REPORT, show_default=False, help=help)


def bench(
    context: typer.Context,
    preset: PresetName = "mini",
    chunks: Annotated[
        int, typer.Option(min=1, rich_help_panel=SPEED, help="Chunks to time, after two that are not.")
    ] = 20,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="random|MODEL",
            rich_help_panel=SPEED,
            show_default=False,
            help="random needs no model and is as fast; else a model's name or folder.",
        ),
    ] = None,
    gpus: Gpus = None,
    sets: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", rich_help_panel=REPORT, help="Write the report as JSON."
        ),
    ] = None,
    html: Annotated[Path | None, _file("--html", "FILE", "Write the report as a page with plots.")] = None,
    compare: Annotated[
        Path | None,
        _file("--compare", "OLD.json", "Exit with code 10 when slower than this report, beyond noise."),
    ] = None,
    also: Annotated[
        list[Path] | None,
        _file("--also", "FILE", "Another report, of another count of GPUs, for the page; may be repeated."),
    ] = None,
    source: Annotated[
        Path | None, _file("--from", "FILE", "Measure nothing: show, compare or draw this report.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Time chunks on this machine, part by part, and say what it can do live."""
    from flashtalk_cli.bench.form import read
    from flashtalk_cli.cli.display import choose
    from flashtalk_cli.events import event

    began_s = time.monotonic()
    with choose(json=json, video_on_stdout=False) as display:
        _check_options(context, source, html, also)
        old = read(compare) if compare else None
        others = [read(path) for path in also or ()]
        _check_writable(output, html)
        if source is not None:
            data = read(source)
        else:
            chosen = _preset(preset, weights, gpus, sets or [])
            processes = _processes(chosen, old, chunks)
            code, found = _measure(chosen, chunks, processes, display, debug=debug)
            if found is None:
                return code
            data = found
            if not json:  # to people it says that measuring is over; to programs, below, that all is
                display.show(event("done", elapsed_s=time.monotonic() - began_s))
        _publish(data, others, output, html)
        _conclude(data, old, display, json=json)
        if json:
            display.show(event("done", path=output, frames=None, elapsed_s=time.monotonic() - began_s))
    return 0


def _check_options(
    context: typer.Context, source: Path | None, html: Path | None, also: list[Path] | None
) -> None:
    """Whether options go together: those that say how to measure mean nothing where nothing is measured."""
    from flashtalk_cli.errors import UsageError

    if also and html is None:
        raise UsageError(
            "--also: its reports are drawn on the page of --html, which is missing; give --html FILE"
        )
    if source is None:
        return
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "")
        if parameter.name in _OF_MEASURING and given is not None and given.name == "COMMANDLINE":
            raise UsageError(f"{parameter.opts[0]}: --from measures nothing; leave out one of the two")


def _check_writable(*paths: Path | None) -> None:
    """Before minutes of measuring: whether there is a folder for each file."""
    from flashtalk_cli.errors import OutputError

    for path in paths:
        if path is not None and path.is_dir():
            raise OutputError(f"{path}: is a folder; give a file")
        if path is not None and not os.access(path.absolute().parent, os.W_OK):
            raise OutputError(f"{path}: cannot be written (no folder {path.absolute().parent} to write in)")


def _preset(name: str, weights: str | None, gpus: str | None, sets: list[str]) -> Preset:
    """The preset as the command line changes it."""
    from flashtalk_cli.presets import Override, load, parse_set

    overrides = [parse_set(text) for text in sets]
    if weights:
        key = "model.weights" if weights in _KINDS else "model.name"
        overrides.append(Override(key, weights, "--weights"))
    if gpus:
        overrides.append(Override("compute.gpus", number_or_word(gpus), "--gpus"))
    return load(name, overrides)


def _processes(preset: Preset, old: dict[str, Any] | None, chunks: int) -> int:
    """How many will measure; that it can be compared with the old report is looked at before anything is loaded."""
    from flashtalk_cli.bench.compare import check
    from flashtalk_cli.bench.report import setting_of
    from flashtalk_cli.cli.machine import processes_of

    processes = processes_of(preset.compute)
    if old:
        check(old, {**setting_of(preset), "ranks": processes}, chunks)
    return processes


def _measure(
    preset: Preset, chunks: int, processes: int, display: Display, *, debug: bool
) -> tuple[int, dict[str, Any] | None]:
    """Run the bench: its exit code, and its report if it came to one. Neither that nor its end is shown here."""
    import tempfile

    from flashtalk_cli import launch, log
    from flashtalk_cli.cli.hosts import check_split
    from flashtalk_cli.cli.machine import cautions, check_machine
    from flashtalk_cli.config import BenchJob
    from flashtalk_cli.events import Event, event
    from flashtalk_cli.media.audio import prepare_speech
    from flashtalk_cli.models.folder import resolve

    check_machine(preset)
    model = preset.model
    resolve(model.name, model.speech_encoder, random=model.weights == "random")
    log.setup(debug=debug)
    reports: list[dict[str, Any]] = []

    def on_event(happened: Event) -> None:
        if happened["event"] == "report":
            reports.append(happened["data"])
        elif happened["event"] != "done":
            display.show(happened)

    with tempfile.TemporaryDirectory() as folder:
        speech = prepare_speech(next((_ASSETS / "speech").glob("*.wav")), Path(folder))
        picture = next((_ASSETS / "portraits").glob("*.png"))
        check_split(preset, processes)
        for text in (*cautions(preset, processes), *_busy()):
            display.show(event("warning", message=text))
        display.stage("start", "loading torch")
        job = BenchJob(
            preset=preset, picture=picture, speech=speech, chunks=chunks, launched_unix_s=time.time()
        )
        code = launch.run(job, on_event, debug=debug, on_log=display.log, processes=processes)
    return code, reports[-1] if reports and code == 0 else None


def _busy() -> list[str]:
    """A warning where others use this machine; asked before anything of ours runs."""
    import psutil

    used_percent = psutil.cpu_percent(LOOK_S)
    if used_percent < BUSY_PERCENT:
        return []
    return [
        f"other programs use {used_percent:.0f} % of this machine's processors, which slows what is measured; stop them and measure again"
    ]


def _publish(
    data: dict[str, Any], others: list[dict[str, Any]], output: Path | None, html: Path | None
) -> None:
    """Write the files that were asked for."""
    import json

    from flashtalk_cli.bench.page import page

    if output:
        _write(output, json.dumps(data, indent=1) + "\n")
    if html:
        _write(html, page(data, others))


def _write(path: Path, text: str) -> None:
    from flashtalk_cli.errors import OutputError

    part = path.with_name(f"{path.name}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise OutputError(f"{path}: cannot be written ({error.strerror})") from None


def _conclude(data: dict[str, Any], old: dict[str, Any] | None, display: Display, *, json: bool) -> None:
    """Show the report and the comparison; raises SlowerError for a regression."""
    from dataclasses import asdict

    from flashtalk_cli.bench.compare import compare
    from flashtalk_cli.events import event

    found = None
    try:
        found = compare(old, data) if old else None
    finally:  # what was measured is shown also where it cannot be compared
        display.show(event("report", data=data, comparison=asdict(found) if found else None))
        if not json:
            _print(data, found)
    if found and found.regressions:
        raise _slower(found)


def _print(data: dict[str, Any], found: Comparison | None) -> None:
    """The report and the comparison as tables on standard output."""
    from rich.console import Console

    from flashtalk_cli.bench import table, words

    console = Console()
    console.print(table.tables(data))
    if found:
        console.print(table.comparison(found))
    console.print(f"\n[dim]a row for a table:[/]\n{words.readme_line(data)}", soft_wrap=True, highlight=False)


def _slower(found: Comparison) -> Exception:
    from flashtalk_cli.errors import SlowerError

    rows = ", ".join(
        f"{row.name} {row.ratio:.2f} times ({row.low:.2f} to {row.high:.2f})" for row in found.regressions
    )
    differs = f"; differs: {', '.join(found.settings)}" if found.settings else ""
    return SlowerError(f"a regression beyond noise against the old report: {rows}{differs}")
