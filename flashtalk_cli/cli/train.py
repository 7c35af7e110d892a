"""`flashtalk train`: examples, both stages of training, evaluation, and the finished model."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flashtalk_cli.cli.options import Debug, Json

if TYPE_CHECKING:
    from flashtalk_cli.config import Preset
    from flashtalk_cli.distill.config import Task, TrainPreset
    from flashtalk_cli.presets import Kind

DATA, RUN = "Data and folders", "Run"
CLEAN_END_S = float("inf")  # to save what was learned takes as long as it takes; a second Ctrl-C ends it

app = typer.Typer(
    help="Train a model by the paper's method: examples, two stages, evaluation, export.",
    no_args_is_help=True,
)


def _option(name: str, panel: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=panel, show_default=False, help=help)


PresetName = Annotated[
    str, _option("--preset", RUN, "NAME|FILE", "mini, soulx-14b, or a file. Default: mini.")
]
Sets = Annotated[
    list[str] | None,
    _option("--set", RUN, "KEY=VALUE", "Change one value of the train preset; may be repeated."),
]
Model = Annotated[
    str | None,
    _option("--model", RUN, "NAME|FOLDER", "Model whose encoders and sizes are used. Default: the preset's."),
]
Device = Annotated[str, _option("--device", RUN, "auto|cpu|cuda", "Where it runs. Default: auto.")]
Gpus = Annotated[
    int, typer.Option("--gpus", min=1, metavar="N", rich_help_panel=RUN, help="Processes, a GPU each.")
]
MaxSeconds = Annotated[
    float | None,
    typer.Option(
        "--max-seconds",
        min=1,
        metavar="S",
        rich_help_panel=RUN,
        show_default=False,
        help="End after that time; the same command goes on from there.",
    ),
]
NoResume = Annotated[
    bool,
    typer.Option("--no-resume", rich_help_panel=RUN, help="Refuse a folder that holds a run already."),
]
Examples = Annotated[Path, typer.Argument(metavar="DATA", help="Folder of examples.")]
Out = Annotated[Path, typer.Argument(metavar="OUT", help="Folder that is written.")]


@app.command("prepare")
def prepare(
    footage: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder of videos with sound.")],
    out: Out,
    preset: PresetName = "mini",
    model: Model = None,
    device: Device = "auto",
    max_seconds: MaxSeconds = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Make examples of real footage: clips with a still background and one face."""
    return _run(
        "prepare",
        preset,
        sets,
        model,
        device,
        1,
        json,
        debug,
        out=out,
        source=footage,
        max_seconds=max_seconds,
    )


@app.command("people")
def people(
    out: Out,
    speech: Annotated[Path, _option("--speech", DATA, "FOLDER", "Bank of speech, see distill/README.md.")],
    clips: Annotated[
        int, typer.Option("--clips", min=1, metavar="N", rich_help_panel=DATA, help="Clips in all.")
    ],
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out", rich_help_panel=DATA, help="People, voices and sentences kept from training."
        ),
    ] = False,
    preset: PresetName = "mini",
    model: Model = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    max_seconds: MaxSeconds = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Make examples of generated people who talk; goes on where an earlier run ended."""
    return _run(
        "people",
        preset,
        sets,
        model,
        device,
        gpus,
        json,
        debug,
        out=out,
        source=speech,
        clips=clips,
        held_out=held_out,
        max_seconds=max_seconds,
    )


@app.command("adapt")
def adapt(
    data: Examples,
    out: Out,
    preset: PresetName = "mini",
    model: Model = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    max_seconds: MaxSeconds = None,
    no_resume: NoResume = False,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Stage 1: flow matching on chunks. OUT/weights.safetensors is the teacher of stage 2."""
    return _run(
        "adapt",
        preset,
        sets,
        model,
        device,
        gpus,
        json,
        debug,
        data=data,
        out=out,
        max_seconds=max_seconds,
        resume=not no_resume,
    )


@app.command("distill")
def distill(
    data: Examples,
    out: Out,
    teacher: Annotated[Path, _option("--teacher", DATA, "FOLDER", "What stage 1 wrote.")],
    preset: PresetName = "mini",
    model: Model = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    max_seconds: MaxSeconds = None,
    no_resume: NoResume = False,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Stage 2: distribution matching on the student's own rollouts. OUT/weights.safetensors is the student."""
    return _run(
        "distill",
        preset,
        sets,
        model,
        device,
        gpus,
        json,
        debug,
        data=data,
        out=out,
        teacher=teacher,
        max_seconds=max_seconds,
        resume=not no_resume,
    )


@app.command("eval")
def evaluate(
    out: Out,
    speech: Annotated[
        Path, _option("--speech", DATA, "FOLDER", "Bank of speech; its held-out half is used.")
    ],
    teacher: Annotated[Path | None, _option("--teacher", DATA, "FOLDER", "What stage 1 wrote.")] = None,
    student: Annotated[
        list[Path] | None, _option("--student", DATA, "FOLDER", "What stage 2 wrote; may be repeated.")
    ] = None,
    preset: PresetName = "mini",
    model: Model = None,
    device: Device = "auto",
    gpus: Gpus = 1,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Measure lips, identity, sharpness and colour on held-out people: a table, plots and film strips."""
    return _run(
        "eval",
        preset,
        sets,
        model,
        device,
        gpus,
        json,
        debug,
        out=out,
        source=speech,
        teacher=teacher,
        students=tuple(student or ()),
    )


@app.command("export")
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What stage 1 or 2 wrote.")],
    out: Annotated[Path, typer.Argument(metavar="MODEL", help="Model folder that gets the weights.")],
    preset: PresetName = "mini",
    model: Model = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Put what was trained into a model folder in the released layout, for `flashtalk render --model`."""
    return _run("export", preset, sets, model, "cpu", 1, json, debug, out=out, source=run)


def _kind() -> Kind[TrainPreset]:
    from flashtalk_cli.distill.config import TrainPreset
    from flashtalk_cli.presets import Kind

    return Kind(TrainPreset, "train")


def _run(
    task: Task,
    preset_name: str,
    sets: Sequence[str] | None,
    model: str | None,
    device: str,
    gpus: int,
    json: bool,
    debug: bool,
    **fields: Any,
) -> int:
    """Check a command line and hand its job to a worker; the exit code."""
    from flashtalk_cli import launch, log, presets
    from flashtalk_cli.cli.display import choose
    from flashtalk_cli.distill.config import TrainJob

    log.setup(debug=debug)
    kind = _kind()
    preset = presets.load(preset_name, [presets.parse_set(text, kind) for text in sets or ()], kind)
    changes = [presets.Override("compute.device", device, "--device")]
    if model is not None:
        changes.append(presets.Override("model.name", model, "--model"))
    base: Preset = presets.load(preset.render, changes)
    absolute = {name: _absolute(value) for name, value in fields.items()}
    job = TrainJob(task=task, preset=preset, base=base, **absolute)
    _check(job)
    with choose(json=json, video_on_stdout=False) as display:
        display.stage("start", "loading torch")
        return launch.run(
            job,
            display.show,
            debug=debug,
            on_log=display.log,
            processes=gpus,
            command=lambda job_path, socket_path, debug: _command(job_path, socket_path, gpus, debug),
            clean_end_s=CLEAN_END_S,
        )


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_absolute(one) for one in value)
    return value.absolute() if isinstance(value, Path) else value


def _check(job: Any) -> None:
    """What can be wrong with the folders, before torch is loaded."""
    from flashtalk_cli.errors import InputError, OutputError
    from flashtalk_cli.models.folder import find

    find(job.base.model.name, job.base.model.speech_encoder)
    for path in (job.data, job.source, job.teacher, *job.students):
        if path is not None and not path.is_dir():
            raise InputError(f"{path} is no folder")
    if job.out.exists() and not job.out.is_dir():
        raise OutputError(f"{job.out} is a file, a folder was expected")


def _command(job_path: Path, socket_path: Path, gpus: int, debug: bool) -> list[str]:
    """The worker's command line: one process, or torchrun's."""
    command = ["flashtalk_cli.distill.worker", str(job_path), str(socket_path)]
    if gpus > 1:
        command = ["flashtalk_cli.torchrun", str(gpus), *command, "--patient"]
    return [sys.executable, "-m", *command, *(["--debug"] if debug else ())]
