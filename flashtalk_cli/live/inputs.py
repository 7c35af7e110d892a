"""What a user names as the sound of a stream, and the source that it opens."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from pydantic import ValidationError

from flashtalk_cli.config import PcmFormat, SoundSource, StreamJob
from flashtalk_cli.errors import InputError, UsageError
from flashtalk_cli.live.address import parse_address
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.listen import ListenSource
from flashtalk_cli.live.sources import PROTOCOLS, FfmpegSource, Source, StdinSource, ffmpeg_input
from flashtalk_cli.live.timeline import Timeline
from flashtalk_cli.media.audio import WANTED
from flashtalk_cli.media.ffmpeg import cause, run
from flashtalk_cli.media.files import check_file, shown

STDIN = 0


def parse_source(audio: str, *, pcm: str = "s16le:16000:1", loop: bool = False) -> SoundSource:
    """The source that `--audio` names. Raises `UsageError`, or `InputError` for a file that is none."""
    if audio == "-":
        return SoundSource(kind="stdin", pcm=parse_pcm(pcm))
    device = re.fullmatch(r"mic(?::(.+))?", audio)
    if device:
        return SoundSource(kind="microphone", where=device[1] or "")
    try:
        scheme = urlsplit(audio).scheme if "://" in audio else ""
    except ValueError:
        raise UsageError(
            "--audio: the address cannot be understood; give it as SCHEME://HOST:PORT/PATH"
        ) from None
    if scheme:
        if scheme not in PROTOCOLS:
            raise UsageError(f"--audio: no sound is read from {scheme}://; give {', '.join(PROTOCOLS)}")
        return SoundSource(kind="url", where=audio)
    path = Path(audio)
    check_file(path, WANTED)
    return SoundSource(kind="file", where=str(path.absolute()), loop=loop)


def check_readable(source: SoundSource) -> None:
    """`InputError` when ffmpeg gets no sound from a file."""
    status, lines = run(ffmpeg_input(source).output("-", format="null", map="0:a:0", t=0.1))
    if status:
        raise InputError(
            f"{shown(source.where)}: no sound can be had from it ({cause(status, lines)}); give {WANTED}"
        )


def parse_listen(address: str, *, pcm: str = "s16le:16000:1", token: str | None = None) -> SoundSource:
    """The source that `--listen` names. Raises `UsageError`: beyond this machine only with a token."""
    where = parse_address("--listen", address)
    if not where.is_loopback and not token:
        raise UsageError(f"--listen {where} can be reached from other machines: give a --token too")
    return SoundSource(kind="listen", where=str(where), pcm=parse_pcm(pcm), token=token)


def parse_pcm(text: str) -> PcmFormat:
    """`s16le:16000:1`: encoding, samples a second, channels; what is left out is as in this example."""
    match = re.fullmatch(r"([a-z0-9]+)(?::(\d{1,7}))?(?::(\d{1,2}))?", text)
    try:
        if match is None:
            raise ValueError
        given = {"encoding": match[1], "rate_hz": match[2], "channels": match[3]}
        return PcmFormat(
            **{key: value if key == "encoding" else int(value) for key, value in given.items() if value}  # type: ignore[arg-type]
        )
    except (ValueError, ValidationError):
        raise UsageError(
            f"--pcm is {text!r}; give ENCODING:RATE:CHANNELS, such as s16le:16000:1, with s16le, s16be, s32le, "
            "f32le or u8, 8000 to 192000 a second, 1 to 8 channels"
        ) from None


def open_source(
    job: StreamJob, timeline: Timeline, clock: Clock, on_warning: Callable[[str], None]
) -> Source:
    """The source of a job, not yet started. `UsageError` when it cannot listen where it should."""
    source = job.source
    rest = (timeline, clock, on_warning)
    if source.kind == "stdin":
        return StdinSource(STDIN, source.pcm, *rest)
    if source.kind == "listen":
        return ListenSource(parse_address("--listen", source.where), source.pcm, source.token, *rest)
    return FfmpegSource(source, job.keep_alive, *rest)
