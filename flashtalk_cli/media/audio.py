"""Any sound to what the model hears: 16 kHz mono, raw in a file, its loudness measured on the way.

Everything streams, so an hour costs no more memory than a second. Lossless files and Ogg are
read by soundfile; MP3 and all else by ffmpeg, which also reads the sound a second time for the
video, so that both cut an encoder's delay in the same way.
"""

from __future__ import annotations

import logging
import os
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from flashtalk_cli.config import SAMPLE_RATE_HZ, Speech
from flashtalk_cli.errors import InputError, OutputError
from flashtalk_cli.media.ffmpeg import MONO_OR_STEREO, cause, file_input, run
from flashtalk_cli.media.files import check_file, shown
from flashtalk_cli.media.loudness import LoudnessMeter
from flashtalk_cli.media.pcm import BYTES_PER_SAMPLE, SoundReading

log = logging.getLogger(__name__)

WANTED = "a sound file such as WAV, FLAC, MP3, OGG or M4A"
BLOCK_FRAMES = 65536

# What ffmpeg says, among much else, when a file ends before its own header's word.
CUT_SHORT = re.compile(r"partial file|ended prematurely|moov atom not found|truncated", re.IGNORECASE)
NO_SOUND = re.compile(r"matches no streams|does not contain any stream", re.IGNORECASE)
UNBOUNDED_BYTES = 0x7FFF0000  # a header that claims more was written before the length was known


@dataclass(frozen=True)
class Sound:
    """An open sound: `blocks` are float32 [n, channels], full scale at 1."""

    rate_hz: int
    blocks: Iterator[np.ndarray]


def prepare_speech(path: Path, work_dir: Path) -> Speech:
    """Make a sound ready for the model: mono mix, 16 kHz float32 in a new file of `work_dir`, loudness.

    The mix is the channels' mean; the length is the sound's, rounded to a sample, at least one. Raises
    `InputError` for a file that is no usable sound, `OutputError` when `work_dir` cannot take it.
    """
    check_file(path, WANTED)
    samples_path, file = _new_file(work_dir)
    meter = LoudnessMeter()
    n_samples = 0
    try:
        with file, _open_sound(path) as sound:
            for piece in _resampled(path, sound):
                meter.add(piece)
                _append(file, piece, samples_path)
                n_samples += len(piece)
    except BaseException:
        samples_path.unlink(missing_ok=True)
        raise
    return Speech(samples_path=samples_path, n_samples=n_samples, loudness_lufs=meter.integrated_lufs())


def check_speech(path: Path) -> None:
    """Raise the InputError that `prepare_speech` would, as far as the beginning of the sound tells. Cheap."""
    check_file(path, WANTED)
    with _open_sound(path) as sound:
        if next(iter(sound.blocks), None) is None:
            raise InputError(f"{shown(path)}: holds no samples (0.0 s); give {WANTED}")


def read_samples(speech: Speech, start: int, stop: int) -> np.ndarray:
    """Samples [start, stop) of the prepared sound: float32 [stop - start], zeros outside the sound."""
    samples = np.zeros(max(0, stop - start), np.float32)
    first, last = max(0, start), min(stop, speech.n_samples)
    if last > first:
        held = np.fromfile(speech.samples_path, "<f4", count=last - first, offset=first * BYTES_PER_SAMPLE)
        if len(held) < last - first:
            raise InputError(f"{shown(speech.samples_path)}: was cut short while in use; run again")
        samples[first - start : last - start] = held
    return samples


def _new_file(work_dir: Path) -> tuple[Path, IO[bytes]]:
    try:
        descriptor, name = tempfile.mkstemp(prefix="speech-", suffix=".f32", dir=work_dir)
    except OSError as error:
        raise OutputError(
            f"{shown(work_dir)}: cannot hold the samples ({error.strerror}); choose another working folder"
        ) from None
    return Path(name).absolute(), os.fdopen(descriptor, "wb")


def _append(file: IO[bytes], piece: np.ndarray, samples_path: Path) -> None:
    try:
        file.write(piece.astype("<f4", copy=False).data)
        file.flush()
    except OSError as error:
        folder = shown(samples_path.parent)
        per_hour = 3600 * SAMPLE_RATE_HZ * BYTES_PER_SAMPLE // 1_000_000
        raise OutputError(
            f"{folder}: cannot hold the samples ({error.strerror}); an hour of sound takes {per_hour} MB there"
        ) from None


def _resampled(path: Path, sound: Sound) -> Iterator[np.ndarray]:
    """Mono float32 pieces at 16 kHz; together round(frames / rate * 16000) samples, at least one."""
    resampler = None
    n_in = n_out = 0
    for block in sound.blocks:
        mono = np.ascontiguousarray(block.T).mean(axis=0)  # five times as fast as over the short axis
        _check_finite(path, mono, n_in, sound.rate_hz)
        n_in += len(mono)
        if sound.rate_hz != SAMPLE_RATE_HZ:
            resampler = resampler or _resampler(path, sound.rate_hz)
            mono = resampler.resample_chunk(mono)
        n_out += len(mono)
        yield mono
    if n_in == 0:
        raise InputError(f"{shown(path)}: holds no samples (0.0 s); give {WANTED}")
    total = max(1, (2 * n_in * SAMPLE_RATE_HZ + sound.rate_hz) // (2 * sound.rate_hz))
    tail = np.zeros(total - n_out, np.float32)
    if resampler is not None:
        held_back = resampler.resample_chunk(np.zeros(0, np.float32), last=True)[: len(tail)]
        tail[: len(held_back)] = held_back
    yield tail


def _resampler(path: Path, rate_hz: int) -> Any:
    import soxr

    try:
        return soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{shown(path)}: a rate of {rate_hz} Hz cannot be used ({error})") from None


def _check_finite(path: Path, mono: np.ndarray, n_before: int, rate_hz: int) -> None:
    finite = np.isfinite(mono)
    if not finite.all():
        second = (n_before + int(np.argmin(finite))) / rate_hz
        raise InputError(
            f"{shown(path)}: a sample at {second:.3f} s is NaN or infinite; export the sound anew"
        )


@contextmanager
def _open_sound(path: Path) -> Iterator[Sound]:
    """The sound through soundfile where it can, else through ffmpeg; `InputError` when neither can."""
    with ExitStack() as stack:
        _check_mp3_whole(path)
        file = _soundfile(path, stack)
        if file is not None:
            _check_whole(path, file)
            _check_ffmpeg_reads(path)
            yield Sound(file.samplerate, _soundfile_blocks(path, file))
            return
        reading = stack.enter_context(SoundReading(path))
        yield Sound(reading.rate_hz, _ffmpeg_blocks(path, reading))


def _soundfile(path: Path, stack: ExitStack) -> Any:
    """The open `soundfile.SoundFile`, or None when ffmpeg is to read this one."""
    import soundfile

    if _is_mpeg(path):
        return None
    # By descriptor: soundfile would take a name's suffix for a format, and cannot take every name.
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    try:
        return stack.enter_context(soundfile.SoundFile(descriptor, closefd=False))
    except soundfile.LibsndfileError:
        return None


def _is_mpeg(path: Path) -> bool:
    """MP3 or bare AAC, by an ID3 tag or the eleven set bits that begin a frame."""
    with path.open("rb") as file:
        head = file.read(3)
    return head == b"ID3" or (head[:1] == b"\xff" and len(head) > 1 and head[1] & 0xE0 == 0xE0)


def _check_mp3_whole(path: Path) -> None:
    """An encoder's Xing or Info frame says how many bytes an MP3 has; decoders do not mind fewer."""
    n_bytes = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # its length has four times seven bits
            n_bytes -= 10 + sum(bits << shift for bits, shift in zip(head[6:], (21, 14, 7, 0), strict=False))
        file.seek(path.stat().st_size - n_bytes)
        frame = file.read(256)
    at = max(frame.find(b"Xing"), frame.find(b"Info"))
    if not _is_mpeg(path) or at < 0 or len(frame) < at + 16:
        return
    flags, first, second = struct.unpack(">3I", frame[at + 4 : at + 16])
    declared = second if flags & 3 == 3 else first if flags & 3 == 2 else 0  # a frame count may come before
    if n_bytes < declared * 0.99:
        raise InputError(
            f"{shown(path)}: cut short ({n_bytes} bytes of sound of {declared} are there); copy or export it anew"
        )


def _soundfile_blocks(path: Path, file: Any) -> Iterator[np.ndarray]:
    import soundfile

    n_read = 0
    try:
        while len(block := file.read(BLOCK_FRAMES, dtype="float32", always_2d=True)):
            n_read += len(block)
            yield block
    except soundfile.LibsndfileError as error:
        raise _cut_short(path, n_read / file.samplerate, str(error)) from None
    if n_read < file.frames:
        raise _cut_short(
            path, n_read / file.samplerate, f"the header says {file.frames / file.samplerate:.2f} s"
        )


def _check_whole(path: Path, file: Any) -> None:
    """libsndfile reads a WAV or AIFF that was cut short as if it were whole, but notes it in its log."""
    found = re.search(r"^(?:data|SSND) *: (\d+) \(should be (\d+)\)", file.extra_info, re.MULTILINE)
    if found and int(found[2]) < int(found[1]) < UNBOUNDED_BYTES:
        raise _cut_short(
            path, file.frames / file.samplerate, f"{found[2]} bytes of sound of {found[1]} are there"
        )


def _check_ffmpeg_reads(path: Path) -> None:
    """The video gets this sound through ffmpeg: better to know now whether it can."""
    source = file_input(path, vn=None, t=0.1)
    status, lines = run(source.output("-", format="null", map="0:a:0", af=MONO_OR_STEREO))
    if status:
        raise InputError(
            f"{shown(path)}: ffmpeg cannot use it for the video ({cause(status, lines)}); "
            "convert it to a WAV of one or two channels"
        )


def _ffmpeg_blocks(path: Path, reading: SoundReading) -> Iterator[np.ndarray]:
    n_read = 0
    while reading.rate_hz and len(block := reading.samples(BLOCK_FRAMES)):
        n_read += len(block)
        yield block.astype(np.float32)
    _raise_for_ffmpeg(path, *reading.outcome(), n_read / max(1, reading.rate_hz))


def _raise_for_ffmpeg(path: Path, status: int, lines: list[str], seconds: float) -> None:
    """`InputError` if ffmpeg failed, or went on although the file ends too soon."""
    told = "\n".join(lines)
    if NO_SOUND.search(told):
        raise InputError(f"{shown(path)}: has no sound in it; give {WANTED}")
    cut = CUT_SHORT.search(told)
    if cut:
        raise _cut_short(path, seconds, cut[0])
    if status:
        raise InputError(
            f"{shown(path)}: not a sound that can be read ({cause(status, lines)}); give {WANTED}"
        )
    if lines:
        log.warning("%s: ffmpeg found faults and went on: %s", shown(path), cause(status, lines))


def _cut_short(path: Path, seconds: float, reason: str) -> InputError:
    reason = " ".join(reason.split()).rstrip(".")
    return InputError(
        f"{shown(path)}: broken or cut short after {seconds:.2f} s ({reason}); copy or export it anew"
    )
