"""The command lines of the encoder and of the sinks, and which ffmpeg can run them.

A command line can be read by every user of the machine (`ps`). So what is secret goes to ffmpeg as options in
a preset that it reads from a pipe: an RTMP application and play path, an SRT passphrase and stream id. Two
things remain visible: what no option takes (a WHIP address, a name and password before an RTMP host), and
everything where ffmpeg ignores such presets (4.2, 5.1 and 7.0 follow them, 9.0 does not). `Sending.exposed`
says so, and the user is told.
"""

from __future__ import annotations

import functools
import os
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlencode, urlsplit

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.codecs import CONTAINERS, GROUP_S, VideoCodec, pick_video_codec
from flashtalk_cli.media.ffmpeg import QUIET, candidates, find_ffmpeg, listed, version
from flashtalk_cli.media.live.targets import Target, rtmp_names
from flashtalk_cli.media.live.units import SAMPLE_RATE_HZ
from flashtalk_cli.media.video_file import COLOUR, TO_YUV

MUXERS = {"rtmp": "flv", "srt": "mpegts", "udp": "mpegts", "whip": "whip", "hls": "hls", "stdout": "mpegts"}
# What each scheme stands on; a redirect or a playlist reaches nothing else.
PROTOCOLS = {
    "rtmp": "rtmp,tcp",
    "rtmps": "rtmps,tls,tcp",
    "srt": "srt",
    "udp": "udp",
    "http": "http,tcp,udp,dtls",
    "https": "https,http,tls,tcp,udp,dtls",
}
PLAYLIST, SEGMENTS = "index.m3u8", "segment-%06d.ts"
TS_DATAGRAM_BYTES = 1316  # seven packets of 188
SOCKET_BYTES = 256 << 10  # what the kernel may hold back: more would hide for long that a server stalls
ORPHAN_US = 20_000_000  # after which a stuck ffmpeg ends by itself, should nobody be left to end it
SRT_SECRETS = {"passphrase": "passphrase", "streamid": "srt_streamid", "srt_streamid": "srt_streamid"}
PRESET_LINE_BYTES = 990  # ffmpeg cuts longer ones
LOW_LATENCY: dict[str, dict[str, Any]] = {
    "libx264": {"preset": "veryfast", "tune": "zerolatency", "sc_threshold": 0},
    "h264_nvenc": {"preset": "p4", "tune": "ll", "zerolatency": 1, "delay": 0, "no-scenecut": 1},
}


@dataclass(frozen=True)
class Sending:
    """How to run a sink: its command, and the preset (in ffmpeg's own form) that must be in the pipe.

    `{preset}` in the command stands for the pipe's name. `exposed` is whether the command holds secrets.
    """

    command: tuple[str, ...] = field(repr=False)
    preset: bytes = field(default=b"", repr=False)
    exposed: bool = False
    folder: Path | None = None  # to run in


def live_codec(encoding: Encoding, width_px: int, height_px: int) -> VideoCodec:
    """The H.264 encoder to use; `OutputError` when another codec is wanted or none is there."""
    codec = pick_video_codec(".mp4", encoding.codec, width_px, height_px)
    if codec.name not in LOW_LATENCY:
        raise OutputError(
            f"live outputs carry H.264, not {codec.name}; set the codec to auto, {' or '.join(LOW_LATENCY)}"
        )
    codec.options(encoding.crf, ".mp4")
    return codec


@dataclass(frozen=True)
class Coding:
    """How the one encoder is run. `max_kbps` caps the video over a second, as public services ask.

    With `for_browsers` it takes the profile that everything that speaks WebRTC decodes.
    """

    codec: VideoCodec
    crf: int
    max_kbps: int
    width_px: int
    height_px: int
    fps: int
    n_channels: int
    for_browsers: bool


def encoder_command(coding: Coding, sound: int) -> list[str]:
    """Raw RGB on stdin and float32 samples on the descriptor `sound` in, FLV on stdout out.

    FLV for its framing only: each tag has a size and says whether it is a key frame. No B-frames and no
    lookahead, so nothing waits.
    """
    group_frames = GROUP_S * coding.fps
    at_once = {"protocol_whitelist": "pipe", "probesize": 32, "analyzeduration": 0}
    size = f"{coding.width_px}x{coding.height_px}"
    video = {"f": "rawvideo", "pix_fmt": "rgb24", "s": size, "r": coding.fps, "i": "pipe:0"}
    audio = {"f": "f32le", "ar": SAMPLE_RATE_HZ, "ac": coding.n_channels, "i": f"pipe:{sound}"}
    coded: dict[str, Any] = {
        "map": "0:v:0",
        "vf": TO_YUV,
        **COLOUR,
        **coding.codec.options(coding.crf, ".mp4"),
    }
    coded |= {"bf": 0, "g": group_frames, "keyint_min": group_frames, **LOW_LATENCY[coding.codec.name]}
    coded |= {"maxrate": f"{coding.max_kbps}k", "bufsize": f"{coding.max_kbps}k"}
    if coding.for_browsers:
        coded["profile:v"] = "baseline"
    heard = {"map": "1:a:0", "c:a": "aac", "b:a": "160k"}
    flv = {"f": "flv", "flvflags": "no_duration_filesize", "flush_packets": 1}
    arguments = _options(at_once | video) + _options(at_once | audio)
    return [find_ffmpeg(), *QUIET, *arguments, *_options(coded), *_options(heard), *_options(flv), "pipe:1"]


def sending(target: Target, fps: int, comment: str, part: Path | None = None) -> Sending:
    """How to send Matroska from stdin to a target; `part` is where a recording lies while it grows.

    Raises `OutputError` when no ffmpeg here can: before anything slow, and in one line.
    """
    program = _program(target)
    reading = {"protocol_whitelist": "pipe", "analyzeduration": 0}
    if target.kind == "file":
        reading["copyts"] = ""  # the encoder's delay stays before 0
    reading |= {"f": "matroska", "i": "pipe:0"}
    copied = {"map": 0, "c": "copy", "map_metadata": -1, "metadata": f"comment={comment}", "flush_packets": 1}
    said = {"progress": "pipe:2", "stats_period": 0.2}
    begin = [program, "-y", *QUIET, *_options(said), *_options(reading), *_options(copied)]
    if target.kind == "file":
        assert part is not None
        return Sending((*begin, *_options(_recording(part, fps)), f"file:{part}"))
    if target.kind == "hls":
        return Sending((*begin, *_options(_HLS), PLAYLIST), folder=target.path)
    if target.kind == "stdout":
        return Sending((*begin, *_options({"protocol_whitelist": "pipe", "f": "mpegts"}), "pipe:1"))
    return _to_network(target, program, begin)


def after_restart(sending: Sending) -> Sending:
    """The same for a second process: a playlist goes on where the first left it."""
    if "hls" not in sending.command:
        return sending
    flags = f"{_HLS['hls_flags']}+append_list"
    command = tuple(flags if word == _HLS["hls_flags"] else word for word in sending.command)
    return Sending(command, sending.preset, sending.exposed, sending.folder)


# ENDLIST is written when the stream ends; until then the newest dozen seconds can be played.
_HLS: dict[str, Any] = {
    "protocol_whitelist": "file",
    "f": "hls",
    "hls_time": GROUP_S,
    "hls_list_size": 6,
    "hls_delete_threshold": 3,
    "hls_flags": "delete_segments+temp_file+independent_segments",
    "hls_segment_filename": SEGMENTS,
}


def _recording(part: Path, fps: int) -> dict[str, Any]:
    container = CONTAINERS[Path(part.stem).suffix.lower()]
    whole_frames = {"video_track_timescale": fps * 512} if container.remuxed else {}
    options = {"protocol_whitelist": "file", "avoid_negative_ts": "disabled", **container.writing}
    return {**options, **whole_frames, "f": container.muxer}


def _to_network(target: Target, program: str, begin: list[str]) -> Sending:
    parts = urlsplit(target.url)
    options: dict[str, Any] = {"protocol_whitelist": PROTOCOLS[parts.scheme], "f": MUXERS[target.kind]}
    secret: dict[str, str] = {}
    url = target.url
    if target.kind == "rtmp":
        options |= {"flvflags": "no_duration_filesize", "send_buffer_size": SOCKET_BYTES}
        options["rw_timeout"] = ORPHAN_US
        app, playpath = rtmp_names(parts)
        url = f"{parts.scheme}://{parts.netloc}/"
        secret = {"rtmp_app": app, "rtmp_playpath": playpath}
    elif target.kind == "srt":
        pairs = parse_qsl(parts.query, keep_blank_values=True)
        secret = {SRT_SECRETS[key]: value for key, value in pairs if key in SRT_SECRETS}
        query = urlencode([pair for pair in pairs if pair[0] not in SRT_SECRETS], quote_via=quote)
        url = f"{parts.scheme}://{parts.netloc}" + (f"?{query}" if query else "")
    elif target.kind == "udp":
        options["pkt_size"] = TS_DATAGRAM_BYTES
    elif target.kind == "whip":
        options |= {"c:a": "libopus", "ac": 2}
        token = unquote(parts.password or "")
        url = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        secret = {"authorization": token} if token else {}
    preset = "".join(f"{name}={value}\n" for name, value in secret.items()).encode()
    if secret and _fits(secret) and reads_presets(program):
        left = any(piece in url for piece in target.secrets)
        command = (*begin, *_options(options), "-fpre", "{preset}", url)
        return Sending(command, preset, exposed=left)
    if target.kind == "whip":  # of which no ffmpeg makes a header by itself
        return Sending((*begin, *_options(options | secret), url), exposed=True)
    return Sending((*begin, *_options(options), target.url), exposed=bool(target.secrets))


def _fits(secret: dict[str, str]) -> bool:
    lines = [f"{name}={value}" for name, value in secret.items()]
    return all(value for value in secret.values()) and all(
        len(line) < PRESET_LINE_BYTES and line.isprintable() for line in lines
    )


def _program(target: Target) -> str:
    """An ffmpeg that can send there, the usual one if possible; before others one that keeps secrets unseen."""
    if target.kind == "file":
        return find_ffmpeg()
    muxer = MUXERS[target.kind]
    scheme = (
        urlsplit(target.url).scheme if target.is_network else "pipe" if target.kind == "stdout" else "file"
    )
    able = [
        program
        for program in dict.fromkeys((find_ffmpeg(), *candidates()))
        if muxer in listed(program, "-muxers") and scheme in listed(program, "-protocols")
    ]
    if able:
        discreet = filter(reads_presets, able if target.secrets else ())
        return next(discreet, able[0])
    mend = (
        "pip install -U imageio-ffmpeg brings one that can"
        if target.kind == "whip"
        else "install a full ffmpeg"
    )
    raise OutputError(f"{target.shown}: ffmpeg {version()} cannot send {target.kind}; {mend}")


@functools.lru_cache(maxsize=4)
def reads_presets(program: str) -> bool:
    """Whether that ffmpeg follows a preset from a pipe, found by trying: some builds read and ignore it."""
    read_end, write_end = os.pipe()
    try:
        os.write(write_end, b"mpegts_service_id=4660\n")  # 0x1234, to be found in the tables
        os.close(write_end)
        source = _options({"f": "rawvideo", "pix_fmt": "gray", "s": "16x16", "i": "pipe:0"})
        coded = _options({"c:v": "mpeg2video", "fpre": f"/dev/fd/{read_end}", "f": "mpegts"})
        ended = subprocess.run(
            [program, *QUIET, *source, *coded, "pipe:1"],
            input=bytes(256),
            capture_output=True,
            timeout=20,
            pass_fds=(read_end,),
        )
        return ended.returncode == 0 and b"\x12\x34" in ended.stdout
    except (OSError, subprocess.SubprocessError):
        return False
    finally:
        os.close(read_end)


def _options(options: dict[str, Any]) -> list[str]:
    """Option words; one with an empty value stands alone."""
    words: list[str] = []
    for name, value in options.items():
        words += [f"-{name}"] if value == "" else [f"-{name}", str(value)]
    return words
