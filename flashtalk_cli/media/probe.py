"""What is inside a media file, found by decoding all of it.

imageio-ffmpeg brings no ffprobe, and a header's word is not what plays. ffmpeg's `framecrc`
muxer writes one line for every decoded frame, with times, for programs to read.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from flashtalk_cli.errors import InputError
from flashtalk_cli.media.ffmpeg import Reading, cause, file_input
from flashtalk_cli.media.files import check_file, shown


@dataclass
class StreamProbe:
    """One stream. Times are in seconds on the file's own clock: the start of the first picture or
    decoded sample, and the end that the file gives the last packet (of whose samples some may be padding).
    """

    kind: str = "?"  # video or audio
    codec: str = "?"
    width_px: int = 0
    height_px: int = 0
    rate_hz: int = 0
    layout: str = ""  # mono, stereo, …
    n_frames: int = 0  # pictures, or packets of samples
    start_s: float = 0.0
    end_s: float = 0.0
    time_base: Fraction = Fraction(1)

    @property
    def duration_s(self) -> float:
        """From the first frame's start to the last one's end."""
        return self.end_s - self.start_s


@dataclass
class Probe:
    """A file's streams and tags."""

    streams: list[StreamProbe]
    tags: dict[str, str]

    @property
    def video(self) -> StreamProbe | None:
        """The first video stream."""
        return next((stream for stream in self.streams if stream.kind == "video"), None)

    @property
    def audio(self) -> StreamProbe | None:
        """The first audio stream."""
        return next((stream for stream in self.streams if stream.kind == "audio"), None)


def probe(path: Path) -> Probe:
    """Decode the whole file and say what came out; `InputError` when it does not decode.

    Costs as much time as decoding; memory does not grow with the file.
    """
    check_file(path, "a media file")
    decoded = _list_frames(path)
    for stream, packets in zip(decoded, _list_frames(path, c="copy"), strict=True):
        stream.codec, stream.end_s = packets.codec, packets.end_s
        if stream.kind == "video":  # decoded frames have their times rounded to the frame rate
            stream.start_s = packets.start_s
    with Reading(file_input(path).output("-", format="ffmetadata")) as reading:
        text = reading.stdout.read().decode(errors="replace")
    tags = dict(line.split("=", 1) for line in text.splitlines() if "=" in line and line[0] not in ";#[")
    return Probe(decoded, {key.lower(): value.replace("\\", "") for key, value in tags.items()})


def _list_frames(path: Path, **options: Any) -> list[StreamProbe]:
    """Streams of ffmpeg's framecrc listing. Header lines are `#key stream: value`, the others
    `stream, dts, pts, duration, size, checksum` in the stream's time base.
    """
    streams: dict[int, StreamProbe] = {}
    # The file's own clock (copyts): ffmpeg would shift it to begin at 0, and round frames while doing so.
    source = file_input(path, copyts=None)
    with Reading(source.output("-", format="framecrc", map=0, **options)) as reading:
        for raw in reading.stdout:
            line = raw.decode(errors="replace").strip()
            if line.startswith("#"):
                key, _, value = line[1:].partition(": ")
                name, _, index = key.rpartition(" ")
                if index.isdigit():
                    _describe(streams.setdefault(int(index), StreamProbe()), name, value)
                continue
            words = [word.strip() for word in line.split(",")]
            if len(words) >= 6:
                _count(streams[int(words[0])], int(words[2]), int(words[3]))
        status, lines = reading.outcome()
    if status != 0 or not streams:
        raise InputError(f"{shown(path)}: cannot be decoded ({cause(status, lines)})")
    return [streams[index] for index in sorted(streams)]


def _describe(stream: StreamProbe, name: str, value: str) -> None:
    if name == "tb":
        stream.time_base = Fraction(value)
    elif name == "media_type":
        stream.kind = value
    elif name == "codec_id":
        stream.codec = value
    elif name == "dimensions":
        stream.width_px, stream.height_px = (int(side) for side in value.split("x"))
    elif name == "sample_rate":
        stream.rate_hz = int(value)
    elif name == "channel_layout_name":
        stream.layout = value


def _count(stream: StreamProbe, start: int, duration: int) -> None:
    start_s = float(start * stream.time_base)
    stream.start_s = min(stream.start_s, start_s) if stream.n_frames else start_s
    stream.end_s = max(stream.end_s, float((start + duration) * stream.time_base))
    stream.n_frames += 1
