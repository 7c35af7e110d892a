"""`flashtalk render`: a picture and a sound in, a video out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flashtalk_cli.cli.hosts import Nnodes, NodeRank, RdzvEndpoint, hosts_of
from flashtalk_cli.cli.options import (
    PERSON,
    RESULT,
    Debug,
    Device,
    Gpus,
    Json,
    Model,
    Offload,
    Overwrite,
    PresetName,
    Prompt,
    Seed,
    Sets,
    Size,
    Steps,
    Weights,
    changes,
    option,
    output_option,
)

EXAMPLES = """[bold]Examples[/bold]

flashtalk render portrait.png hello.wav

flashtalk render portrait.jpg talk.mp3 -o talk.mp4 --size auto --seed 7

flashtalk render portrait.png talk.wav --preset soulx-14b --steps 2

flashtalk render portrait.png talk.wav -o - | mpv -

flashtalk render --manifest clips.jsonl --replicas 4
"""

MANY = "Many clips"
MAX_REPLICAS = 1024


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
        str | None, option("--codec", RESULT, "NAME", "Such as h264, hevc, vp9, av1, nvenc.")
    ] = None,
    crf: Annotated[
        int | None, option("--crf", RESULT, "N", "Quality, 0 to 63: lower is better and larger.")
    ] = None,
    size: Size = None,
    fit: Annotated[
        str | None, option("--fit", PERSON, "crop|pad", "How the picture is made to fit the size.")
    ] = None,
    background: Annotated[
        str | None, option("--background", PERSON, "#RRGGBB", "Behind transparent and padded parts.")
    ] = None,
    prompt: Prompt = None,
    seed: Seed = None,
    preset: PresetName = "mini",
    model: Model = None,
    steps: Steps = None,
    device: Device = None,
    gpus: Gpus = None,
    offload: Offload = False,
    weights: Weights = None,
    sets: Sets = None,
    nnodes: Nnodes = None,
    node_rank: NodeRank = None,
    rdzv_endpoint: RdzvEndpoint = None,
    manifest: Annotated[
        Path | None,
        option(
            "--manifest",
            MANY,
            "FILE",
            "Clips to render in place of PICTURE and SPEECH: lines of JSON with picture, speech, output "
            "and options such as seed, size, prompt. What is done is not done again.",
        ),
    ] = None,
    replicas: Annotated[
        int | None,
        option("--replicas", MANY, "R", "Clips at once; each has --gpus GPUs and its own copy of the model."),
    ] = None,
    ray: Annotated[
        str | None, option("--ray", MANY, "ADDRESS|auto", "Have a Ray cluster render the manifest.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Render a portrait that speaks: PICTURE and SPEECH in, a video with sound out."""
    from flashtalk_cli.cli.request import Request, fulfil

    given = changes(
        codec=codec,
        crf=crf,
        fit=fit,
        background=background,
        prompt=prompt,
        seed=seed,
        model=model,
        steps=steps,
        device=device,
        gpus=gpus,
        offload=offload,
        weights=weights,
    )
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
