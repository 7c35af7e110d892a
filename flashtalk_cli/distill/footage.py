"""`flashtalk train prepare`: a folder of videos with sound to examples, file by file.

A file is decoded at the preset's frame rate, at the size of the bucket whose aspect ratio is nearest,
and cut into clips of a few chunks. Sound and frames both count from the file's time zero, whatever
their streams' first packets say. Of each file it is kept what became of its clips.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flashtalk_cli.config import SAMPLE_RATE_HZ, Canvas, Preset
from flashtalk_cli.distill.config import Data
from flashtalk_cli.distill.encoding import Clip, Encoders
from flashtalk_cli.distill.filters import Box, Faces, background_motion, face_box, has_cut
from flashtalk_cli.errors import FlashtalkError, InputError
from flashtalk_cli.media.audio import prepare_speech, read_samples
from flashtalk_cli.media.ffmpeg import Reading, cause, file_input, run
from flashtalk_cli.media.loudness import gain_to

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".ts")
JOURNAL = "files.json"
KEPT = "kept"


def videos_in(folder: Path) -> list[Path]:
    """Video files of a folder and those below it, sorted. Raises InputError when there are none."""
    found = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not found:
        raise InputError(f"{folder} has no videos; looked for {', '.join(SUFFIXES)}")
    return found


def buckets_of(canvas: Canvas, aspects: tuple[str, ...]) -> list[Canvas]:
    """A canvas of about the given one's area for each aspect ratio."""
    ratios = [aspect.split(":") for aspect in aspects]
    return [canvas.of_aspect(int(width), int(height)) for width, height in ratios]


def nearest(buckets: list[Canvas], width_px: int, height_px: int) -> Canvas:
    """The bucket that loses least of a frame."""
    wanted = np.log(width_px / height_px)
    return min(buckets, key=lambda canvas: abs(np.log(canvas.width_px / canvas.height_px) - wanted))


@dataclass(frozen=True)
class Found:
    """Clips of one file that are fit, and how many there were for every reason."""

    size_px: tuple[int, int]
    clips: list[Clip]
    reasons: Counter


class FrameReading(Reading):
    """Frames of a video at a rate and size, cropped to its middle."""

    def __init__(self, path: Path, canvas: Canvas, fps: int) -> None:
        self.shape = (canvas.height_px, canvas.width_px, 3)
        w, h = canvas.width_px, canvas.height_px
        filters = f"fps={fps}:start_time=0,scale={w}:{h}:force_original_aspect_ratio=increase:flags=area,crop={w}:{h}"
        super().__init__(
            file_input(path, an=None).output("-", format="rawvideo", pix_fmt="rgb24", vf=filters)
        )

    def frames(self, n: int) -> np.ndarray:
        """The next n frames, fewer at the end: uint8 [n, H, W, 3]."""
        frame_bytes = int(np.prod(self.shape))
        data = self.stdout.read(n * frame_bytes)
        whole = len(data) // frame_bytes
        return np.frombuffer(data, np.uint8, count=whole * frame_bytes).reshape(whole, *self.shape)


def size_of(path: Path) -> tuple[int, int]:
    """(width, height) of a video as it is meant to be seen. Raises InputError when it cannot be decoded."""
    import io

    from PIL import Image

    with Reading(
        file_input(path, an=None).output("-", format="image2pipe", vcodec="png", vframes=1)
    ) as reading:
        data = reading.stdout.read()
        status, lines = reading.outcome()
    if not data:
        raise InputError(f"{path} is no video that ffmpeg can decode ({cause(status, lines)})")
    return Image.open(io.BytesIO(data)).size


def cut(path: Path, base: Preset, data: Data, buckets: list[Canvas], faces: Faces | None) -> Found:
    """The clips of a file. Raises InputError for a file that is no video, or has no sound."""
    sampling = base.sampling
    canvas = nearest(buckets, *size_of(path))
    longest = sampling.motion_frames + data.clip_chunks * sampling.new_frames
    shortest = sampling.motion_frames + 2 * sampling.new_frames
    samples = _sound(path, base)
    found = Found((canvas.height_px, canvas.width_px), [], Counter())
    at = 0
    with FrameReading(path, canvas, sampling.fps) as reading:
        while len(frames := reading.frames(longest)) >= shortest:
            verdict, box = judge(frames, data, faces)
            found.reasons[verdict] += 1
            if verdict == KEPT:
                origin = at * SAMPLE_RATE_HZ // sampling.fps
                found.clips.append(Clip(torch.from_numpy(frames.copy()), samples, origin, box))
            at += len(frames)
    return found


def judge(frames: np.ndarray, data: Data, faces: Faces | None) -> tuple[str, Box | None]:
    """Whether a clip is kept, else why not; and its face's box, where faces are looked for."""
    if has_cut(frames):
        return "cut", None
    if background_motion(frames) > data.max_background_motion:
        return "moving background", None
    if faces is None:
        return KEPT, None
    box = face_box(frames, faces, data.min_face_share)
    return (KEPT, box) if box else ("no single face", None)


def _sound(path: Path, base: Preset) -> np.ndarray:
    """All samples of a file from its time zero, at the gain that rendering would give it."""
    with tempfile.TemporaryDirectory(prefix="flashtalk-") as folder:
        wav = Path(folder, "sound.wav")
        stream = file_input(path, vn=None).output(
            str(wav), map="0:a:0", af="aresample=async=1:first_pts=0", acodec="pcm_s16le"
        )
        status, lines = run(stream)
        if status or not wav.exists():
            raise InputError(f"{path} has no sound that ffmpeg can decode ({cause(status, lines)})")
        speech = prepare_speech(wav, Path(folder))
        gain = gain_to(speech.loudness_lufs, base.hearing.loudness_lufs)
        return read_samples(speech, 0, speech.n_samples) * np.float32(gain)


class Preparation:
    """Goes through a folder; what it has done is written to a journal when its shards are on disk."""

    def __init__(self, encoders: Encoders, data: Data, folder: Path, out: Path, faces: Faces | None) -> None:
        self.encoders, self.data, self.folder, self.out, self.faces = encoders, data, folder, out, faces
        self.buckets = buckets_of(encoders.base.canvas, data.aspects)
        self.journal: dict[str, Any] = read_journal(out)

    def left(self) -> list[Path]:
        """Files that are not in the journal."""
        return [path for path in videos_in(self.folder) if self._name(path) not in self.journal]

    def encode(self, path: Path) -> tuple[tuple[int, int], list[dict[str, Tensor]], dict[str, Any]]:
        """A file's clips as shards of one clip, and what to say of the file. Bad files are passed over."""
        try:
            found = cut(path, self.encoders.base, self.data, self.buckets, self.faces)
        except FlashtalkError as error:
            log.warning("%s", error)
            return (0, 0), [], {"error": str(error)}
        tensors = [self.encoders.encode([clip], self.data.pictures) for clip in found.clips]
        return found.size_px, tensors, dict(found.reasons)

    def write_journal(self, done: dict[str, Any]) -> None:
        """Note files whose shards are on disk."""
        self.journal |= done
        part = self.out / f"{JOURNAL}.part"
        part.write_text(json.dumps(self.journal, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.out / JOURNAL)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def batches(self) -> Iterator[tuple[dict[tuple[int, int], list[dict[str, Tensor]]], dict[str, Any]]]:
        """Clips by size and the files they come from, whenever there are enough for a shard, and at the end."""
        waiting: dict[tuple[int, int], list[dict[str, Tensor]]] = {}
        done: dict[str, Any] = {}
        for path in self.left():
            size_px, tensors, said = self.encode(path)
            waiting.setdefault(size_px, []).extend(tensors)
            done[self._name(path)] = said
            if sum(map(len, waiting.values())) >= self.data.shard_clips:
                yield {size: parts for size, parts in waiting.items() if parts}, done
                waiting, done = {}, {}
        if done:
            yield {size: parts for size, parts in waiting.items() if parts}, done


def read_journal(out: Path) -> dict[str, Any]:
    """Files done so far, and what became of their clips."""
    path = out / JOURNAL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
