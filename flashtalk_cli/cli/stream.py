"""`flashtalk stream`: a picture and a live voice in, a person on air for as long as it lasts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flashtalk_cli.cli.options import (
    RESULT,
    SPEED,
    Debug,
    Device,
    Gpus,
    Json,
    Model,
    Overwrite,
    PresetName,
    Prompt,
    Seed,
    Sets,
    Size,
    Steps,
    Weights,
    changes,
    flag,
    option,
)

EXAMPLES = """[bold]Examples[/bold]

flashtalk stream portrait.png --audio talk.mp3 --loop --rtmp rtmp://localhost/live/KEY

flashtalk stream portrait.png --audio mic --rtmp @stream-key.txt -o recording.mp4

arecord -t raw -f S16_LE -r 16000 | flashtalk stream portrait.png --audio - --preview 8080

flashtalk stream portrait.png --listen 127.0.0.1:9000 --srt srt://host:7000

While it runs: [bold]flashtalk ctl status[/bold], interrupt, mute, prompt, picture, stop.
"""

SOUND, CONTROL = "Sound", "Watching and steering"


def _many(name: str, kind: str) -> Any:
    return option(name, RESULT, "URL", f"{kind} May be repeated; @FILE and env:NAME keep a key out of sight.")


def stream(
    picture: Annotated[
        Path, typer.Argument(metavar="PICTURE", help="Portrait: PNG, JPEG, WebP, BMP or GIF.")
    ],
    audio: Annotated[
        str | None,
        option(
            "--audio",
            SOUND,
            "SOURCE",
            "A file; - is raw PCM on stdin; mic or mic:DEVICE; an rtmp, srt, rtsp, http or udp address.",
        ),
    ] = None,
    listen: Annotated[
        str | None,
        option(
            "--listen", SOUND, "HOST:PORT", "A WebSocket for PCM from a voice agent, in place of --audio."
        ),
    ] = None,
    token: Annotated[
        str | None,
        option("--token", SOUND, "TOKEN", "What a client of --listen must show; @FILE or env:NAME too."),
    ] = None,
    pcm: Annotated[
        str | None,
        option("--pcm", SOUND, "FORMAT", "Of raw PCM: encoding:rate:channels. Default: s16le:16000:1."),
    ] = None,
    loop: Annotated[bool, flag("--loop", SOUND, "Repeat the file without end.")] = False,
    keep_alive: Annotated[
        bool, flag("--keep-alive", SOUND, "Stay on air, silent, after the sound ended.")
    ] = False,
    rtmp: Annotated[list[str] | None, _many("--rtmp", "Publish to an RTMP server.")] = None,
    srt: Annotated[list[str] | None, _many("--srt", "Send over SRT.")] = None,
    whip: Annotated[list[str] | None, _many("--whip", "Publish as WebRTC.")] = None,
    udp: Annotated[list[str] | None, _many("--udp", "Send MPEG-TS over UDP.")] = None,
    hls: Annotated[
        list[str] | None, option("--hls", RESULT, "FOLDER", "Write an HLS playlist and its segments.")
    ] = None,
    output: Annotated[
        list[str] | None,
        option(("-o", "--output"), RESULT, "FILE", "Record, to .mp4, .mov or .mkv; - is standard output."),
    ] = None,
    overwrite: Overwrite = False,
    preview: Annotated[
        str | None,
        option("--preview", CONTROL, "[HOST:]PORT", "A page to watch it on, for a browser on this machine."),
    ] = None,
    metrics: Annotated[
        str | None, option("--metrics", CONTROL, "[HOST:]PORT", "Figures for Prometheus, at /metrics.")
    ] = None,
    control: Annotated[
        Path | None,
        option("--control", CONTROL, "SOCKET", "Where flashtalk ctl finds it; made for you alone."),
    ] = None,
    restart: Annotated[
        bool, flag("--restart", CONTROL, "Start again and go on when the process that makes the video dies.")
    ] = False,
    size: Size = None,
    prompt: Prompt = None,
    seed: Seed = None,
    late: Annotated[
        str | None,
        option(
            "--late",
            SPEED,
            "repeat|drop|fail",
            "When a frame is not there in time, show the last again, and then: wait for a pause to catch up; "
            "leave out sound at once; end when it lasts.",
        ),
    ] = None,
    away: Annotated[
        str | None,
        option(
            "--away",
            SPEED,
            "go-on|pause",
            "While no server takes the stream: go on speaking, or hold the last frame until one does.",
        ),
    ] = None,
    latency_target: Annotated[
        float | None,
        option("--latency-target", SPEED, "SECONDS", "The delay to come back to after falling behind."),
    ] = None,
    preset: PresetName = "mini",
    model: Model = None,
    steps: Steps = None,
    device: Device = None,
    gpus: Gpus = None,
    weights: Weights = None,
    sets: Sets = None,
    json: Json = False,
    debug: Debug = False,
) -> int:
    """Put a portrait on air that speaks as the sound arrives: PICTURE and a live voice in, streams out."""
    from flashtalk_cli.cli.live_request import LiveRequest, fulfil

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
        restart=restart,
        preset=preset,
        sets=sets or (),
        options=changes(
            prompt=prompt,
            seed=seed,
            late=late,
            away=away,
            latency_target=latency_target,
            model=model,
            steps=steps,
            device=device,
            gpus=gpus,
            weights=weights,
        ),
        size=size,
    )
    return fulfil(request, json=json, debug=debug)
