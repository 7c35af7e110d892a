"""A video file that grows frame by frame, plays however the run ends, and appears only when whole.

While it is written it is `NAME.part`: fragmented MP4 or Matroska, playable up to the last
fragment even when everything is killed. At the end MP4 and MOV are copied, not encoded again,
into a form with the index in front, and only then does the file get its name.
"""

from __future__ import annotations

import errno
import logging
import os
import subprocess
import threading
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import ffmpeg
import numpy as np

from flashtalk_cli.config import Encoding
from flashtalk_cli.errors import OutputError
from flashtalk_cli.media.codecs import GROUP_S, Container, VideoCodec, container_of, pick_video_codec
from flashtalk_cli.media.feed import FfmpegFeed
from flashtalk_cli.media.ffmpeg import Reading, cause, command, file_input, run
from flashtalk_cli.media.files import disk_is_full, shown
from flashtalk_cli.media.mends import known, mend_of
from flashtalk_cli.media.part_file import PartFile, check_writable
from flashtalk_cli.media.soundtrack import Soundtrack

log = logging.getLogger(__name__)

STDOUT_SUFFIX = ".mp4"  # what goes to standard output, fragmented
LOST_S = (
    0.05  # of sound that is missing at the end and says that the file was cut; encoders pad, and lose none
)

# bt709 in limited range is what every player assumes; said three times, because the scaler, the frames
# and the encoder each look at their own copy.
TO_YUV = (
    "scale=out_color_matrix=bt709:out_range=tv:flags=accurate_rnd+full_chroma_int,format=yuv420p,"
    "setparams=range=tv:colorspace=bt709:color_primaries=bt709:color_trc=bt709"
)
COLOUR: dict[str, Any] = {
    "color_range": "tv",
    "colorspace": "bt709",
    "color_primaries": "bt709",
    "color_trc": "bt709",
}


def check_output(
    output: Path | None, encoding: Encoding, width_px: int, height_px: int, overwrite: bool
) -> tuple[Container, VideoCodec]:
    """Everything that can be known before the first frame: `OutputError` when it could not be written.

    Creates nothing. Cheap but for NVENC, which is tried with one frame.
    """
    suffix = _suffix(output)
    container = container_of(suffix)
    codec = pick_video_codec(suffix, encoding.codec, width_px, height_px)
    codec.options(encoding.crf, suffix)
    if output is not None:
        check_writable(output, overwrite)
    return container, codec


class VideoFile:
    """One video being written; a context manager.

    `output` None writes a fragmented MP4 to the descriptor `stdout`. `audio` is any file with sound, kept
    at its own rate, mono or stereo; it is cut, or filled with silence, to the length of the frames.
    `comment` becomes the file's comment. Raises `OutputError`, from the constructor too, and `InputError`
    for an `audio` without sound. Leaving the context without `finish` is `abort`. `stop` is set when the run
    is to end: an ffmpeg that is stuck then is waited for no longer than an `abort` would.
    """

    def __init__(
        self,
        output: Path | None,
        *,
        width_px: int,
        height_px: int,
        fps: int,
        n_frames: int,
        audio: Path | None,
        encoding: Encoding,
        comment: str = "",
        overwrite: bool = False,
        stdout: int = 1,
        stop: threading.Event | None = None,
    ) -> None:
        self._container, codec = check_output(output, encoding, width_px, height_px, overwrite)
        self._output = output
        self._frame_shape = (height_px, width_px, 3)
        self._fps = fps
        self._n_frames = n_frames
        self._sound_s = n_frames / fps if audio is not None else 0.0
        self._stop = stop
        self.frames_written = 0
        options: dict[str, Any] = {"vf": TO_YUV, "g": fps * GROUP_S, **COLOUR}
        options |= codec.options(encoding.crf, _suffix(output))
        options |= {"map_metadata": -1, "metadata": f"comment={comment}"}
        options |= {"format": self._container.muxer, "flush_packets": 1, **self._container.writing}
        self._part = None if output is None else PartFile(output, overwrite)
        self._written = file_behind(stdout) if self._part is None else self._part.path
        self._descriptor = stdout if self._part is None else self._part.descriptor
        try:
            self._feed: FfmpegFeed | None = self._start(options, audio, stdout)
        except BaseException:
            self._feed = None
            self.abort()
            raise

    def _start(self, options: dict[str, Any], audio: Path | None, stdout: int) -> FfmpegFeed:
        height_px, width_px, _ = self._frame_shape
        size = f"{width_px}x{height_px}"
        streams = [ffmpeg.input("pipe:0", format="rawvideo", pix_fmt="rgb24", s=size, r=self._fps)["v:0"]]
        soundtrack = None
        if audio is not None:
            soundtrack = Soundtrack(audio, self._fps)
            # Its header says all there is to know; looking further would wait for sound that waits for frames.
            sound = ffmpeg.input(f"pipe:{soundtrack.read_end}", format="au", probesize=32, analyzeduration=0)
            streams.append(sound["a:0"])
            options = options | self._container.sound
        if self._part is None:
            writing = command(ffmpeg.output(*streams, "pipe:1", **options))
            return FfmpegFeed(writing, stdout, (), soundtrack, self._stop)
        writing = command(ffmpeg.output(*streams, f"file:{self._part.path}", **options))
        return FfmpegFeed(writing, subprocess.DEVNULL, (self._part.descriptor,), soundtrack, self._stop)

    @property
    def pid(self) -> int | None:
        """Process id of the ffmpeg that encodes; None once it ended."""
        return self._feed.pid if self._feed else None

    def write(self, frames: np.ndarray) -> None:
        """Append uint8 [T, H, W, 3] RGB; the array is handed over, so do not change it afterwards.

        Returns before the frames are encoded, but waits when more than a few pieces are behind.
        """
        assert frames.dtype == np.uint8, frames.dtype
        assert frames.shape[1:] == self._frame_shape, (frames.shape, self._frame_shape)
        assert self._feed is not None, "already finished or aborted"
        assert self.frames_written + len(frames) <= self._n_frames, "more frames than announced"
        if len(frames) and not self._feed.write(frames):
            raise self._failure(self._feed.cause())
        self.frames_written += len(frames)

    def finish(self) -> Path | None:
        """All frames were written: end the file and give it its name, which is returned (None for stdout).

        Raises `OutputError` when not all of them can be read back; the part then stays.
        """
        assert self._feed is not None, "already finished or aborted"
        assert self.frames_written == self._n_frames, (self.frames_written, self._n_frames)
        feed = self._feed  # an `abort` from another thread ends ffmpeg, and so this wait
        status, why = feed.end(), feed.cause()
        if status != 0 or not feed.took_everything() or known([why]):
            raise self._failure(why)
        if self._written is not None and (missing := self._missing(self._written)):
            raise self._failure(missing)
        self._feed = None
        if self._part is None:
            return None
        whole = self._with_index_in_front() if self._container.remuxed else self._part.path
        try:
            self._part.publish(whole)
        finally:
            if whole != self._part.path:
                whole.unlink(missing_ok=True)
        return self._output

    def abort(self) -> Path | None:
        """End early: what was rendered, with its sound, is left in `NAME.part`, which is returned.

        None when there is nothing to keep. The final name is not touched. Never raises for ffmpeg's sake
        and takes about 5 s at most. Does nothing after `finish`.
        """
        feed, self._feed = self._feed, None
        is_ended = feed is None or feed.abort()
        kept = self._kept()
        if kept and not is_ended:  # what ffmpeg held died with it
            self.frames_written = readable(kept)[0]
        if self._part is not None and self._part.held:
            if kept is None:
                self._part.discard()
            self._part.release()
        return kept

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()

    def _kept(self) -> Path | None:
        """The part file, if it is ours and holds anything that may play."""
        if self._part is None or not self._part.held or not self.frames_written or self._part.is_empty():
            return None
        return self._part.path

    def _missing(self, path: Path) -> str:
        """What the file lacks, in a few words; nothing when it is whole.

        ffmpeg's word is not enough: version 5 ends with status 0 although its last write failed.
        """
        n_frames, sound_s = readable(path)
        if n_frames == self._n_frames and sound_s > self._sound_s - LOST_S:
            return ""
        sound = f" and {sound_s:.2f} of {self._sound_s:.2f} s of sound" if self._sound_s else ""
        return f"{n_frames} of {self._n_frames} frames{sound} can be read back"

    def _with_index_in_front(self) -> Path:
        """Copy the streams into a plain file that starts to play before it is read whole, beside the part.

        When that fails, for example for want of space, the part itself will do: it is whole and plays. The last
        packet of sound, up to 64 ms of which is padding, is said to end with the frames, as newer encoders say.
        """
        assert self._part is not None
        part = self._part.path
        whole = part.with_name(part.name + ".index")
        # The encoder's delay makes sound start before 0; these two keep it there instead of moving the picture.
        source = file_input(part, copyts=None)
        options: dict[str, Any] = {"c": "copy", "movflags": "+faststart", "avoid_negative_ts": "disabled"}
        duration_s = self._n_frames / self._fps
        options["bsf:a"] = f"setts=duration=min(DURATION\\,max(1\\,{duration_s:.6f}/TB-PTS))"
        try:
            copying = source.output(f"file:{whole}", format=self._container.muxer, map=0, **options)
            status, lines = run(copying)
            missing = cause(status, lines) if status else self._missing(whole)
            if not missing:
                return whole
            why = known(lines) or missing
            log.warning("%s stays a fragmented file, which plays too: %s", shown(part), why)
        except BaseException:
            whole.unlink(missing_ok=True)
            raise
        whole.unlink(missing_ok=True)
        return part

    def _failure(self, why: str) -> OutputError:
        """ffmpeg ended too soon, or what it wrote was cut."""
        name = "standard output" if self._output is None else shown(self._output)
        if told := known([why]):
            why = told
        elif self._written is not None and disk_is_full(self._descriptor):  # the name may be gone
            why = os.strerror(errno.ENOSPC)
        mend = mend_of(why)
        if self._output is None and ("Broken pipe" in why or "SIGPIPE" in why):
            mend = "the program that reads it went away"
        kept = self._kept()
        rest = f"; what was written is in {shown(kept)}" if kept else ""
        progress = f"{self.frames_written} of {self._n_frames} frames"
        return OutputError(f"{name}: ffmpeg ended after {progress} ({why}); {mend}{rest}")


def file_behind(descriptor: int) -> Path | None:
    """A path of the file that a descriptor is about to write from its start, as with `> FILE`; good while it is open.

    None for pipes, terminals, files that hold something already or that we may only write, and where the system
    does not tell (Linux does).
    """
    path = Path(f"/proc/{os.getpid()}/fd/{descriptor}")
    is_new = path.is_file() and not os.fstat(descriptor).st_size
    return path if is_new and os.access(path, os.R_OK) else None


def readable(path: Path) -> tuple[int, float]:
    """How many frames a file that we wrote gives back, and the end of its sound in seconds (0: no sound).

    Its packets are read, not decoded, which takes as long as reading the file does; a cut one does not count.
    """
    n_frames, end, time_base = 0, 0, Fraction(1)
    source = file_input(path, fflags="+discardcorrupt", copyts=None)
    # Lines `stream, dts, pts, duration, size, checksum`, and in the header `#tb stream: 1/RATE`.
    with Reading(source.output("-", format="framecrc", map=0, c="copy")) as reading:
        for line in reading.stdout:
            if line.startswith(b"0,"):
                n_frames += 1
            elif line.startswith(b"1,"):
                words = line.split(b",")
                end = int(words[2]) + int(words[3])
            elif line.startswith(b"#tb 1:"):
                time_base = Fraction(line.split(b":")[1].decode().strip())
    return n_frames, float(end * time_base)


def _suffix(output: Path | None) -> str:
    return STDOUT_SUFFIX if output is None else output.suffix.lower()
