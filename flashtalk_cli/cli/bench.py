"""`flashtalk bench`: how fast this machine makes video, part by part."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtalk_cli.cli.render import REPORT, SPEED, Debug, Gpus, Json, PresetName, Sets, number_or_word

if TYPE_CHECKING:
    from rich.table import Table

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def bench(
    preset: PresetName = "mini",
    chunks: Annotated[
        int, typer.Option(min=1, rich_help_panel=SPEED, help="Chunks to time, after two that are not.")
    ] = 20,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="released|random",
            rich_help_panel=SPEED,
            show_default=False,
            help="random needs no model.",
        ),
    ] = None,
    gpus: Gpus = None,
    sets: Sets = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", metavar="FILE", rich_help_panel=REPORT, help="Also write the report as JSON."
        ),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Time chunks on this machine: hearing, denoising, decoding, and what the next chunk needs."""
    from flashtalk_cli import launch, log
    from flashtalk_cli.cli.display import choose
    from flashtalk_cli.cli.hosts import check_split
    from flashtalk_cli.cli.machine import processes_of
    from flashtalk_cli.config import BenchJob, Preset
    from flashtalk_cli.events import Event
    from flashtalk_cli.media.audio import prepare_speech
    from flashtalk_cli.models.folder import resolve
    from flashtalk_cli.presets import Override, load, parse_set

    overrides = [parse_set(text) for text in sets or ()]
    overrides += [Override("model.weights", weights, "--weights")] if weights else []
    overrides += [Override("compute.gpus", number_or_word(gpus), "--gpus")] if gpus else []
    chosen: Preset = load(preset, overrides)
    model = chosen.model
    resolve(model.name, model.speech_encoder, random=model.weights == "random")
    log.setup(debug=debug)
    reports: list[dict[str, Any]] = []

    def on_event(happened: Event) -> None:
        if happened["event"] == "report":
            reports.append(happened["data"])
        display.show(happened)

    with choose(json=json, video_on_stdout=False) as display, tempfile.TemporaryDirectory() as folder:
        speech = prepare_speech(next((_ASSETS / "speech").glob("*.wav")), Path(folder))
        picture = next((_ASSETS / "portraits").glob("*.png"))
        job = BenchJob(preset=chosen, picture=picture, speech=speech, chunks=chunks)
        processes = processes_of(chosen.compute)
        check_split(chosen, processes)
        code = launch.run(job, on_event, debug=debug, on_log=display.log, processes=processes)
    for data in reports:
        if output:
            _write(output, data)
        if not json:
            _show(data)
    return code


def _write(output: Path, data: dict[str, Any]) -> None:
    import json

    from flashtalk_cli.errors import OutputError

    try:
        output.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{output}: cannot be written ({error.strerror})") from None


def _show(data: dict[str, Any]) -> None:
    from rich.console import Console

    Console().print(_table(data))


def _table(data: dict[str, Any]) -> Table:
    from rich.table import Table

    machine = data["machine"]
    table = Table(
        title=f"{data['preset']} {data['canvas']}, {data['steps']} steps, {data['weights']} weights\n"
        f"{machine['device']}, {machine['threads']} threads, torch {machine['torch']}",
        caption=f"{data['fps']:.1f} frames a second, {data['realtime']:.2f} times real time\n{_each(data)}",
    )
    table.add_column("part of a chunk")
    for name in ("p50 ms", "p95 ms", "p99 ms"):
        table.add_column(name, justify="right")
    for name, spread in {**data["parts"], "chunk": data["chunk"]}.items():
        table.add_row(name, *(f"{spread[key] * 1000:.0f}" for key in ("p50_s", "p95_s", "p99_s")))
    return table


def _each(data: dict[str, Any]) -> str:
    """Peak memory of each rank, and where there are several how long they exchanged."""
    peaks = ", ".join(f"{rank['peak_memory_gib']:.2f}" for rank in data["ranks"])
    if len(data["ranks"]) == 1:
        return f"peak memory {peaks} GiB"
    longest_s = max(rank["exchange"]["p50_s"] for rank in data["ranks"])
    return f"peak memory of each rank {peaks} GiB; exchanges and waiting {longest_s * 1000:.0f} ms a chunk"
