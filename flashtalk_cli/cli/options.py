"""Options that several commands share, declared once each, and what they change in a preset.

A command's signature names them: `preset: PresetName = "mini"`. A default is the command's own.
"""

from __future__ import annotations

from typing import Annotated, Any

import typer

RESULT, PERSON, SPEED, REPORT = "Result", "Picture and motion", "Model and machine", "Reports"

KEYS = {  # what an option changes in the preset
    "codec": "encoding.codec",
    "crf": "encoding.crf",
    "fit": "canvas.fit",
    "background": "canvas.background",
    "prompt": "sampling.prompt",
    "seed": "sampling.seed",
    "late": "live.late",
    "away": "live.away",
    "latency_target": "live.latency_target_s",
    "model": "model.name",
    "steps": "sampling.steps",
    "device": "compute.device",
    "gpus": "compute.gpus",
    "offload": "compute.offload",
    "weights": "model.weights",
}


def option(names: str | tuple[str, ...], panel: str, metavar: str, help: str) -> Any:
    """An option with a value and without a default of its own."""
    names = (names,) if isinstance(names, str) else names
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, show_default=False, help=help)


def flag(name: str, panel: str, help: str) -> Any:
    """An option that is given or not."""
    return typer.Option(name, rich_help_panel=panel, help=help)


def output_option(default: str) -> Any:
    """The option that names the video; `default` says what it is called without."""
    return option(
        ("-o", "--output"),
        RESULT,
        "FILE",
        f"Video to write: .mp4, .mov, .mkv or .webm; - is standard output. Default: {default}.",
    )


def changes(**given: Any) -> dict[str, tuple[str, Any]]:
    """Of each option that was given, by its name as typed: the key of the preset that it changes, and the value.

    What is None, or a flag that is off, was not given. A count may be a word, such as `all` of --gpus.
    """
    return {
        f"--{name.replace('_', '-')}": (KEYS[name], number_or_word(value) if name == "gpus" else value)
        for name, value in given.items()
        if value is not None and value is not False
    }


def number_or_word(text: str | None) -> int | str | None:
    """An option that is a count or a word such as `all`."""
    return int(text) if text is not None and text.isdecimal() else text


# Result

Overwrite = Annotated[bool, flag("--overwrite", RESULT, "Replace the output file if it exists.")]

# Picture and motion

Size = Annotated[
    str | None,
    option(
        "--size",
        PERSON,
        "WxH|auto",
        "Multiples of 16 from 64 on, such as 144x160 for mini, 448x768 for soulx-14b; auto keeps the "
        "picture's shape, up to 4:1, at the preset's area.",
    ),
]
Prompt = Annotated[str | None, option("--prompt", PERSON, "TEXT", "What the person does, in words.")]
Seed = Annotated[int | None, option("--seed", PERSON, "N", "Another seed is another performance.")]

# Model and machine

PresetName = Annotated[
    str,
    typer.Option(
        "--preset", metavar="NAME|FILE", rich_help_panel=SPEED, help="See `flashtalk presets list`."
    ),
]
Model = Annotated[
    str | None, option("--model", SPEED, "NAME|FOLDER", "Weights to use in place of the preset's.")
]
Steps = Annotated[int | None, option("--steps", SPEED, "N", "Denoising steps a chunk: fewer is faster.")]
Device = Annotated[str | None, option("--device", SPEED, "auto|cpu|cuda", "Where it runs.")]
Gpus = Annotated[str | None, option("--gpus", SPEED, "N|all", "GPUs that make the video together.")]
Offload = Annotated[
    bool,
    flag(
        "--offload",
        SPEED,
        "For a GPU that cannot hold the model: keep most of it in host memory; slower.",
    ),
]
Weights = Annotated[
    str | None,
    option("--weights", SPEED, "released|random", "random: noise for a video, to time a machine."),
]
Sets = Annotated[
    list[str] | None,
    option(
        "--set",
        SPEED,
        "KEY=VALUE",
        "Change one value of the preset; may be repeated. Keys: `flashtalk presets show NAME`.",
    ),
]

# Reports

Json = Annotated[
    bool, flag("--json", REPORT, "Print events as lines of JSON on stdout (on stderr with -o -).")
]
Debug = Annotated[bool, flag("--debug", REPORT, "Show tracebacks and more of the log.")]
