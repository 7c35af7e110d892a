"""Which codecs go into which file, and the options of each for a wanted quality."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ffmpeg
import numpy as np

from flashtalk_cli.errors import ConfigError, OutputError
from flashtalk_cli.media.ffmpeg import cause, encoders, run

GROUP_S = 2  # seconds between key frames: what a killed run may lose


@dataclass(frozen=True)
class Container:
    """A kind of file: ffmpeg's muxer, its options while it is being written, and its sound codec."""

    muxer: str
    writing: dict[str, Any]
    sound: dict[str, Any]
    video: tuple[str, ...]  # codecs that `auto` tries, best first
    remuxed: bool  # at the end copied into a form with its index in front


# A fragmented MP4 plays however it ends. Its header waits for the first packets (delay_moov):
# only then are the encoders' delays known, and picture and sound start together.
_MP4: dict[str, Any] = {"movflags": "+frag_keyframe+delay_moov+default_base_moof"}
# A short cluster bounds what lies unwritten in memory.
_WEBM: dict[str, Any] = {"cluster_time_limit": GROUP_S * 1000}
# AAC's encoder delay lies before 0 here, or older ffmpegs would start the picture that much late.
_MKV: dict[str, Any] = {**_WEBM, "avoid_negative_ts": "disabled"}
_AAC: dict[str, Any] = {"c:a": "aac", "b:a": "160k"}
_OPUS: dict[str, Any] = {"c:a": "libopus", "b:a": "128k"}

CONTAINERS = {
    ".mp4": Container("mp4", _MP4, _AAC, ("libx264", "h264_nvenc"), remuxed=True),
    ".mov": Container("mov", _MP4, _AAC, ("libx264", "h264_nvenc"), remuxed=True),
    ".mkv": Container("matroska", _MKV, _AAC, ("libx264", "h264_nvenc", "libvpx-vp9"), remuxed=False),
    ".webm": Container("webm", _WEBM, _OPUS, ("libvpx-vp9", "libsvtav1"), remuxed=False),
}


@dataclass(frozen=True)
class VideoCodec:
    """An encoder: where its stream may go, and how it is told the quality."""

    name: str
    suffixes: tuple[str, ...]
    worst_crf: int
    quality: Callable[[int], dict[str, Any]]
    mp4_tag: str | None = None  # the name that Apple's players want in MP4 and MOV
    needs_gpu: bool = False

    def options(self, crf: int, suffix: str) -> dict[str, Any]:
        """Output options for ffmpeg; lower `crf` is better."""
        if crf > self.worst_crf:
            raise OutputError(
                f"crf {crf} is beyond {self.name}'s range 0 to {self.worst_crf}; give a lower --crf"
            )
        chosen = {"c:v": self.name, **self.quality(crf)}
        if self.mp4_tag and suffix in (".mp4", ".mov"):
            chosen["tag:v"] = self.mp4_tag
        return chosen


def _nvenc(crf: int) -> dict[str, Any]:
    return {"rc": "vbr", "cq": max(crf, 1), "b:v": 0, "preset": "p5"}  # 0 would mean "you choose"


_H264 = (".mp4", ".mov", ".mkv")
_OPEN = (".webm", ".mkv", ".mp4")

VIDEO_CODECS = {
    codec.name: codec
    for codec in (
        VideoCodec("libx264", _H264, 51, lambda crf: {"crf": crf, "preset": "fast"}),
        VideoCodec("h264_nvenc", _H264, 51, _nvenc, needs_gpu=True),
        VideoCodec(
            "libx265",
            _H264,
            51,
            lambda crf: {"crf": crf, "preset": "fast", "x265-params": "log-level=error"},
            mp4_tag="hvc1",
        ),
        VideoCodec("hevc_nvenc", _H264, 51, _nvenc, mp4_tag="hvc1", needs_gpu=True),
        VideoCodec(
            "libvpx-vp9",
            _OPEN,
            63,
            lambda crf: {"crf": crf, "b:v": 0, "deadline": "good", "cpu-used": 5, "row-mt": 1},
        ),
        VideoCodec("libsvtav1", _OPEN, 63, lambda crf: {"crf": crf, "preset": 8}),
    )
}

ALIASES = {  # of several for one encoder, the first is the one that messages name
    "h264": "libx264",
    "hevc": "libx265",
    "h265": "libx265",
    "nvenc": "h264_nvenc",
    "vp9": "libvpx-vp9",
    "av1": "libsvtav1",
}


def container_of(suffix: str) -> Container:
    """What a file of that suffix is; `OutputError` for one that we do not write."""
    if suffix.lower() not in CONTAINERS:
        problem = f"cannot write a '{suffix}' file" if suffix else "the output's name has no suffix"
        raise OutputError(f"{problem}; end its name in one of {', '.join(CONTAINERS)}")
    return CONTAINERS[suffix.lower()]


def pick_video_codec(suffix: str, wanted: str, width_px: int = 256, height_px: int = 256) -> VideoCodec:
    """The codec for a file of that suffix; `wanted` is `auto`, a name of `VIDEO_CODECS` or of `ALIASES`.

    `auto` means libx264 (libvpx-vp9 in WebM): beside the rendering its cost is nothing, and it leaves the
    GPU's memory alone. NVENC is taken when asked for or when there is no libx264, and only if it really
    opens at this size. Raises `ConfigError` for an unknown codec, `OutputError` for one not compiled in or not
    fit for the file.
    """
    suffix = suffix.lower()
    container = container_of(suffix)
    if wanted == "auto":
        for name in container.video:
            if name in encoders() and _refusal(VIDEO_CODECS[name], width_px, height_px) is None:
                return VIDEO_CODECS[name]
        tried = ", ".join(container.video)
        raise OutputError(f"this ffmpeg has no encoder for {suffix} (tried {tried}); install a full ffmpeg")
    codec = VIDEO_CODECS.get(ALIASES.get(wanted, wanted))
    if codec is None:
        raise ConfigError(f"unknown codec '{wanted}'; {suffix} takes {_fitting(suffix)}")
    if suffix not in codec.suffixes:
        raise OutputError(f"codec {wanted} does not go into {suffix}, which takes {_fitting(suffix)}")
    if codec.name not in encoders():
        raise OutputError(
            f"this ffmpeg has no encoder {codec.name}; use --codec auto or install a full ffmpeg"
        )
    refusal = _refusal(codec, width_px, height_px)
    if refusal is not None:
        raise OutputError(f"{codec.name} does not open here ({refusal}); use --codec auto")
    return codec


def _fitting(suffix: str) -> str:
    """What may be asked of a file of that suffix, by the names that users know."""
    short = {encoder: alias for alias, encoder in reversed(ALIASES.items())}
    fitting = [short.get(name, name) for name, codec in VIDEO_CODECS.items() if suffix in codec.suffixes]
    return ", ".join(["auto", *fitting])


def opens(name: str, width_px: int = 256, height_px: int = 256) -> bool:
    """Whether that encoder is there and encodes a frame of that size on this machine."""
    return name in encoders() and _first_frame(name, width_px, height_px) is None


def _refusal(codec: VideoCodec, width_px: int, height_px: int) -> str | None:
    """Why a GPU's encoder will not do; software ones are taken at their word."""
    return _first_frame(codec.name, width_px, height_px) if codec.needs_gpu else None


def _first_frame(encoder: str, width_px: int, height_px: int) -> str | None:
    """Encode one black frame to nowhere: None, or why that failed."""
    black = np.zeros((height_px, width_px, 3), np.uint8)
    source = ffmpeg.input("pipe:0", format="rawvideo", pix_fmt="rgb24", s=f"{width_px}x{height_px}", r=25)
    status, lines = run(
        source.output("-", format="null", pix_fmt="yuv420p", **{"c:v": encoder}), black.tobytes()
    )
    return cause(status, lines) if status else None
