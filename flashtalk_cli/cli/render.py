"""`flashtalk render`, and the options that other commands share with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashtalk_cli.cli.hosts import Nnodes, NodeRank, RdzvEndpoint, hosts_of

EXAMPLES = """[bold]Examples[/bold]

flashtalk render portrait.png hello.wav

flashtalk render portrait.jpg talk.mp3 -o talk.mp4 --size auto --seed 7

flashtalk render portrait.png talk.wav --preset soulx-14b --steps 2

flashtalk render portrait.png talk.wav -o - | mpv -

flashtalk render --manifest clips.jsonl --replicas 4
"""

RESULT, PERSON, SPEED, REPORT = "Result", "Picture and motion", "Model and machine", "Reports"
MANY = "Many clips"
MAX_REPLICAS = 1024


def output_option(default: str) -> Any:
    """The option that names the video; `default` says what it is called without."""
    return typer.Option(
        "-o",
        "--output",
        metavar="FILE",
        rich_help_panel=RESULT,
        show_default=False,
        help=f"Video to write: .mp4, .mov, .mkv or .webm; - is standard output. Default: {default}.",
    )


Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=RESULT, help="Replace the output file if it exists."),
]
PresetName = Annotated[
    str,
    typer.Option(
        "--preset", metavar="NAME|FILE", rich_help_panel=SPEED, help="See `flashtalk presets list`."
    ),
]
Sets = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        rich_help_panel=SPEED,
        show_default=False,
        help="Change one value of the preset; may be repeated. Keys: `flashtalk presets show NAME`.",
    ),
]
Gpus = Annotated[
    str | None,
    typer.Option(
        "--gpus",
        metavar="N|all",
        rich_help_panel=SPEED,
        show_default=False,
        help="GPUs that make the video together.",
    ),
]
Offload = Annotated[
    bool,
    typer.Option(
        "--offload",
        rich_help_panel=SPEED,
        help="For a GPU that cannot hold the model: keep most of it in host memory; slower.",
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        rich_help_panel=REPORT,
        help="Print events as lines of JSON on stdout (on stderr with -o -).",
    ),
]
Debug = Annotated[
    bool, typer.Option("--debug", rich_help_panel=REPORT, help="Show tracebacks and more of the log.")
]


def _option(name: str, panel: str, metavar: str, help: str) -> Any:
    return typer.Option(name, metavar=metavar, rich_help_panel=panel, show_default=False, help=help)


def number_or_word(text: str | None) -> int | str | None:
    """An option that is a count or a word such as `all`."""
    return int(text) if text is not None and text.isdecimal() else text


def render(
    picture: Annotated[
        Path | None, typer.Argument(metavar="PICTURE", help="Portrait: PNG, JPEG, WebP, BMP or GIF.")
    ] = None,
    speech: Annotated[
        Path | None, typer.Argument(metavar="SPEECH", help="Sound, or a video's: whatever ffmpeg reads.")
    ] = None,
    output: Annotated[str | None, output_option("SPEECH-PICTURE.mp4 here")] = None,
    overwrite: Overwrite = False,
    codec: Annotated[
        str | None, _option("--codec", RESULT, "NAME", "Such as h264, hevc, vp9, av1, nvenc.")
    ] = None,
    crf: Annotated[
        int | None, _option("--crf", RESULT, "N", "Quality, 0 to 63: lower is better and larger.")
    ] = None,
    size: Annotated[
        str | None,
        _option(
            "--size",
            PERSON,
            "WxH|auto",
            "Multiples of 16, such as 448x768; auto keeps the picture's shape at the preset's area.",
        ),
    ] = None,
    fit: Annotated[
        str | None, _option("--fit", PERSON, "crop|pad", "How the picture is made to fit the size.")
    ] = None,
    background: Annotated[
        str | None, _option("--background", PERSON, "#RRGGBB", "Behind transparent and padded parts.")
    ] = None,
    prompt: Annotated[
        str | None, _option("--prompt", PERSON, "TEXT", "What the person does, in words.")
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", PERSON, "N", "Another seed is another performance.")
    ] = None,
    preset: PresetName = "mini",
    model: Annotated[
        str | None, _option("--model", SPEED, "NAME|FOLDER", "Weights to use in place of the preset's.")
    ] = None,
    steps: Annotated[
        int | None, _option("--steps", SPEED, "N", "Denoising steps a chunk: fewer is faster.")
    ] = None,
    device: Annotated[str | None, _option("--device", SPEED, "auto|cpu|cuda", "Where it runs.")] = None,
    gpus: Gpus = None,
    offload: Offload = False,
    weights: Annotated[
        str | None,
        _option("--weights", SPEED, "released|random", "random: noise for a video, to time a machine."),
    ] = None,
    sets: Sets = None,
    nnodes: Nnodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: RdzvEndpoint = None,
    manifest: Annotated[
        Path | None,
        _option(
            "--manifest",
            MANY,
            "FILE",
            "Clips to render in place of PICTURE and SPEECH: lines of JSON with picture, speech, output "
            "and options such as seed, size, prompt. What is done is not done again.",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        _option(
            "--replicas", MANY, "R", "Clips at once; each has --gpus GPUs and its own copy of the model."
        ),
    ] = None,
    ray: Annotated[
        str | None, _option("--ray", MANY, "ADDRESS|auto", "Have a Ray cluster render the manifest.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Render a portrait that speaks: PICTURE and SPEECH in, a video with sound out."""
    from flashtalk_cli.cli.request import Request, fulfil

    options = {
        "--codec": ("encoding.codec", codec),
        "--crf": ("encoding.crf", crf),
        "--fit": ("canvas.fit", fit),
        "--background": ("canvas.background", background),
        "--prompt": ("sampling.prompt", prompt),
        "--seed": ("sampling.seed", seed),
        "--model": ("model.name", model),
        "--steps": ("sampling.steps", steps),
        "--device": ("compute.device", device),
        "--gpus": ("compute.gpus", number_or_word(gpus)),
        "--offload": ("compute.offload", offload or None),
        "--weights": ("model.weights", weights),
    }
    given = {option: pair for option, pair in options.items() if pair[1] is not None}
    hosts = hosts_of(nnodes, node_rank, rdzv_endpoint)
    _check_inputs(picture, speech, output, manifest, replicas, ray, hosts.count)
    here = Path()  # a manifest says itself which
    request = Request(
        picture or here, speech or here, output, preset, sets or (), given, size, overwrite, hosts
    )
    if manifest is None:
        return fulfil(request, json=json, debug=debug)
    from flashtalk_cli.cli.batch import render_all

    return render_all(manifest, request, replicas=replicas or 1, ray=ray, json=json, debug=debug)


def _check_inputs(
    picture: Path | None,
    speech: Path | None,
    output: str | None,
    manifest: Path | None,
    replicas: int | None,
    ray: str | None,
    n_hosts: int,
) -> None:
    """Either a picture and a speech, or a manifest and what only a manifest takes."""
    from flashtalk_cli.errors import UsageError

    if manifest is None:
        for name, value in (("PICTURE", picture), ("SPEECH", speech)):
            if value is None:
                raise UsageError(f"missing argument '{name}'; see flashtalk render --help")
        for option, given in (("--replicas", replicas), ("--ray", ray)):
            if given is not None:
                raise UsageError(f"{option} is for the clips of a --manifest; see flashtalk render --help")
    elif picture is not None or output is not None:
        what = "-o" if picture is None else "PICTURE and SPEECH"
        raise UsageError(f"a --manifest names its own files: leave out {what}")
    elif n_hosts > 1:
        raise UsageError("--nnodes has hosts share one video; for a --manifest on several hosts use --ray")
    if replicas is not None and not 1 <= replicas <= MAX_REPLICAS:
        raise UsageError(f"--replicas is {replicas}; accepted: 1 to {MAX_REPLICAS}")
