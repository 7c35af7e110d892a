"""`flashtalk stream`: a picture and a live voice in, a person on air for as long as it lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashtalk_cli.cli.render import (
    PERSON,
    RESULT,
    SPEED,
    Debug,
    Gpus,
    Json,
    Overwrite,
    PresetName,
    Sets,
    number_or_word,
)

EXAMPLES = """[bold]Examples[/bold]

flashtalk stream portrait.png --audio talk.mp3 --loop --rtmp rtmp://localhost/live/KEY

flashtalk stream portrait.png --audio mic --rtmp @stream-key.txt -o recording.mp4

arecord -t raw -f S16_LE -r 16000 | flashtalk stream portrait.png --audio - --preview 8080

flashtalk stream portrait.png --listen 127.0.0.1:9000 --srt srt://host:7000

While it runs: [bold]flashtalk ctl status[/bold], interrupt, mute, prompt, picture, stop.
"""

SOUND, CONTROL = "Sound", "Watching and steering"


def _option(names: str | tuple[str, ...], panel: str, metavar: str, help: str) -> Any:
    names = (names,) if isinstance(names, str) else names
    return typer.Option(*names, metavar=metavar, rich_help_panel=panel, show_default=False, help=help)


def _many(name: str, kind: str) -> Any:
    return _option(
        name, RESULT, "URL", f"{kind} May be repeated; @FILE and env:NAME keep a key out of sight."
    )


def stream(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="Portrait: PNG, JPEG, WebP, BMP or GIF.")
    ],
    audio: Annotated[
        str | None,
        _option(
            "--audio",
            SOUND,
            "SOURCE",
            "A file; - is raw PCM on stdin; mic or mic:DEVICE; an rtmp, srt, rtsp, http or udp address.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        _option(
            "--listen", SOUND, "HOST:PORT", "A WebSocket for PCM from a voice agent, in place of --audio."
        ),
    ] = None,
    token: Annotated[
        str | None,
        _option("--token", SOUND, "TOKEN", "What a client of --listen must show; @FILE or env:NAME too."),
    ] = None,
    pcm: Annotated[
        str | None,
        _option("--pcm", SOUND, "FORMAT", "Of raw PCM: encoding:rate:channels. Default: s16le:16000:1."),
    ] = None,
    loop: Annotated[
        bool, typer.Option("--loop", rich_help_panel=SOUND, help="Repeat the file without end.")
    ] = False,
    keep_alive: Annotated[
        bool,
        typer.Option(
            "--keep-alive", rich_help_panel=SOUND, help="Stay on air, silent, after the sound ended."
        ),
    ] = False,
    rtmp: Annotated[list[str] | None, _many("--rtmp", "Publish to an RTMP server.")] = None,
    srt: Annotated[list[str] | None, _many("--srt", "Send over SRT.")] = None,
    whip: Annotated[list[str] | None, _many("--whip", "Publish as WebRTC.")] = None,
    udp: Annotated[list[str] | None, _many("--udp", "Send MPEG-TS over UDP.")] = None,
    hls: Annotated[
        list[str] | None, _option("--hls", RESULT, "FOLDER", "Write an HLS playlist and its segments.")
    ] = None,
    output: Annotated[
        list[str] | None,
        _option(("-o", "--output"), RESULT, "FILE", "Record, to .mp4, .mov or .mkv; - is standard output."),
    ] = None,
    overwrite: Overwrite = False,
    preview: Annotated[
        str | None,
        _option("--preview", CONTROL, "[HOST:]PORT", "A page to watch it on, for a browser on this machine."),
    ] = None,
    metrics: Annotated[
        str | None, _option("--metrics", CONTROL, "[HOST:]PORT", "Figures for Prometheus, at /metrics.")
    ] = None,
    control: Annotated[
        Path | None,
        _option("--control", CONTROL, "SOCKET", "Where flashtalk ctl finds it; made for you alone."),
    ] = None,
    size: Annotated[
        str | None, _option("--size", PERSON, "WxH|auto", "Multiples of 16; auto keeps the picture's shape.")
    ] = None,
    prompt: Annotated[
        str | None, _option("--prompt", PERSON, "TEXT", "What the person does, in words.")
    ] = None,
    seed: Annotated[
        int | None, _option("--seed", PERSON, "N", "Another seed is another performance.")
    ] = None,
    late: Annotated[
        str | None,
        _option(
            "--late",
            SPEED,
            "repeat|drop|fail",
            "When a frame is not there in time, show the last again, and then: wait for a pause to catch up; "
            "leave out sound at once; end when it lasts.",
        ),
    ] = None,
    latency_target: Annotated[
        float | None,
        _option("--latency-target", SPEED, "SECONDS", "The delay to come back to after falling behind."),
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
    weights: Annotated[
        str | None, _option("--weights", SPEED, "released|random", "random: noise for a video.")
    ] = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Put a portrait on air that speaks as the sound arrives: PICTURE and a live voice in, streams out."""
    from flashtalk_cli.cli.live_request import LiveRequest, fulfil

    options = {
        "--prompt": ("sampling.prompt", prompt),
        "--seed": ("sampling.seed", seed),
        "--late": ("live.late", late),
        "--latency-target": ("live.latency_target_s", latency_target),
        "--model": ("model.name", model),
        "--steps": ("sampling.steps", steps),
        "--device": ("compute.device", device),
        "--gpus": ("compute.gpus", number_or_word(gpus)),
        "--weights": ("model.weights", weights),
    }
    kinds = {"rtmp": rtmp, "srt": srt, "whip": whip, "udp": udp, "hls": hls, "file": output}
    request = LiveRequest(
        picture=picture,
        audio=audio,
        listen=listen,
        token=token,
        pcm=pcm,
        loop=loop,
        keep_alive=keep_alive,
        targets=[(kind, place) for kind, places in kinds.items() for place in places or ()],
        overwrite=overwrite,
        preview=preview,
        metrics=metrics,
        control=control,
        preset=preset,
        sets=sets or (),
        options={option: pair for option, pair in options.items() if pair[1] is not None},
        size=size,
    )
    return fulfil(request, json=json, debug=debug)
