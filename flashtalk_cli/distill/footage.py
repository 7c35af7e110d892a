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
from collections.abc import Callable, Iterator
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
from flashtalk_cli.distill.shards import shard_paths
from flashtalk_cli.errors import FlashtalkError, InputError
from flashtalk_cli.media.audio import prepare_speech, read_samples
from flashtalk_cli.media.ffmpeg import Reading, cause, file_input, run
from flashtalk_cli.media.loudness import gain_to

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi", ".m4v", ".mpg", ".ts")
JOURNAL = "files.json"
KEPT = "kept"
SHARD = "shard"  # in the journal: the file with a video's clips


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


def cut(
    path: Path, canvas: Canvas, base: Preset, data: Data, faces: Faces | None
) -> Iterator[tuple[str, Clip | None]]:
    """What became of each clip of a file, with the clip if it is fit, one at a time: hours of video do not fit
    in memory. Raises InputError for a file without sound.
    """
    sampling = base.sampling
    longest = sampling.motion_frames + data.clip_chunks * sampling.new_frames
    shortest = sampling.motion_frames + 2 * sampling.new_frames
    samples = _sound(path, base)
    at = 0
    with FrameReading(path, canvas, sampling.fps) as reading:
        while len(frames := reading.frames(longest)) >= shortest:
            verdict, box = judge(frames, data, faces)
            origin = at * SAMPLE_RATE_HZ // sampling.fps
            fit = verdict == KEPT
            yield verdict, Clip(torch.from_numpy(frames.copy()), samples, origin, box) if fit else None
            at += len(frames)


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


@dataclass(frozen=True)
class Batch:
    """Clips of some files, encoded, by the size of their frames in pixels; and of each file that size and what is
    to be said of it.
    """

    clips: dict[tuple[int, int], list[dict[str, Tensor]]]
    done: dict[str, tuple[tuple[int, int], dict[str, Any]]]


class Preparation:
    """Goes through a folder; what it has done is written to a journal when its shards are on disk."""

    def __init__(self, encoders: Encoders, data: Data, folder: Path, out: Path, faces: Faces | None) -> None:
        self.encoders, self.data, self.folder, self.out, self.faces = encoders, data, folder, out, faces
        self.buckets = buckets_of(encoders.base.canvas, data.aspects)
        self.journal: dict[str, Any] = read_journal(out)

    def left(self) -> list[Path]:
        """Files that are not in the journal, or whose shard is gone."""
        there = {path.name for paths in shard_paths(self.out).values() for path in paths}
        done = {name for name, said in self.journal.items() if said.get(SHARD) in {None, *there}}
        return [path for path in videos_in(self.folder) if self._name(path) not in done]

    def encode(self, path: Path) -> tuple[tuple[int, int], list[dict[str, Tensor]], dict[str, Any]]:
        """A file's clips as shards of one clip, and what to say of the file. Bad files are passed over."""
        reasons: Counter[str] = Counter()
        tensors = []
        try:
            canvas = nearest(self.buckets, *size_of(path))
            for verdict, clip in cut(path, canvas, self.encoders.base, self.data, self.faces):
                reasons[verdict] += 1
                if clip is not None:
                    tensors.append(self.encoders.encode([clip], self.data.pictures))
        except FlashtalkError as error:
            log.warning("%s", error)
            return (0, 0), [], {"error": str(error)}
        return (canvas.height_px, canvas.width_px), tensors, dict(reasons)

    def write_journal(self, done: dict[str, Any]) -> None:
        """Note files whose shards are on disk."""
        self.journal |= done
        part = self.out / f"{JOURNAL}.part"
        part.write_text(json.dumps(self.journal, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        os.replace(part, self.out / JOURNAL)

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder).as_posix()

    def batches(self, ends: Callable[[], bool]) -> Iterator[Batch]:
        """Clips and the files they come from, whenever there are enough for a shard, and when it `ends`."""
        batch = Batch({}, {})
        for path in self.left():
            if ends():
                break
            size_px, tensors, said = self.encode(path)
            batch.done[self._name(path)] = (size_px, said)
            if tensors:
                batch.clips.setdefault(size_px, []).extend(tensors)
            if sum(map(len, batch.clips.values())) >= self.data.shard_clips:
                yield batch
                batch = Batch({}, {})
        if batch.done:
            yield batch


def read_journal(out: Path) -> dict[str, Any]:
    """Files done so far, and what became of their clips."""
    path = out / JOURNAL
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
