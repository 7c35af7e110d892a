"""Where a bench's frames go: through a real encoder, as a render's would, and then nowhere."""

from __future__ import annotations

from types import TracebackType
from typing import Any

import ffmpeg
import numpy as np

from flashtalk_cli.config import Preset
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.codecs import pick_video_codec
from flashtalk_cli.media.feed import FfmpegFeed
from flashtalk_cli.media.ffmpeg import command
from flashtalk_cli.media.video_file import TO_YUV

SUFFIX = ".mp4"  # whose codec the preset's `auto` means


class NullSink:
    """An ffmpeg that encodes frames as the preset says, and writes nothing; a context manager.

    Raises `OutputError` when ffmpeg cannot encode.
    """

    def __init__(self, preset: Preset) -> None:
        canvas, encoding = preset.canvas, preset.encoding
        codec = pick_video_codec(SUFFIX, encoding.codec, canvas.width_px, canvas.height_px)
        options: dict[str, Any] = {"vf": TO_YUV, "format": "null", **codec.options(encoding.crf, SUFFIX)}
        size, fps = f"{canvas.width_px}x{canvas.height_px}", preset.sampling.fps
        frames = ffmpeg.input("pipe:0", format="rawvideo", pix_fmt="rgb24", s=size, r=fps)
        self._feed = FfmpegFeed(command(ffmpeg.output(frames, "pipe:1", **options)))
        self._ended = False

    def write(self, frames: np.ndarray) -> None:
        """Hand over uint8 [T, H, W, 3]; waits when the encoder is a chunk or so behind."""
        if not self._feed.write(frames):
            raise OutputError(
                f"ffmpeg takes no more frames ({self._feed.cause()}); flashtalk doctor checks it"
            )

    def finish(self) -> None:
        """Wait until everything is encoded."""
        self._ended = True
        if self._feed.end() != 0:
            raise OutputError(
                f"ffmpeg could not encode ({self._feed.cause()}); choose a codec with --set encoding.codec=h264"
            )

    def __enter__(self) -> NullSink:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._feed.kill()
