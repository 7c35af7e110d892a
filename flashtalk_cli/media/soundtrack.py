"""The sound of a video on its way to the encoder, in step with the frames.

The encoder could read the file by itself, but then nothing would end the sound when the frames
end early: ffmpeg's `-shortest` holds back seconds of both and drops the last packet. Here the
sound ends at the last frame to the sample, whether the video is whole, was interrupted, or
lost its parent.
"""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import IO

import numpy as np

from flashtalk_cli.errors import InputError
from flashtalk_cli.media.ffmpeg import MONO_OR_STEREO, cause, widen
from flashtalk_cli.media.files import shown
from flashtalk_cli.media.pcm import SoundReading, au_header

log = logging.getLogger(__name__)

# How far the sound may run ahead of the frames that ffmpeg took. Less, and an encoder that
# interleaves by time could wait for sound while we wait for it to take a frame.
LEAD_S = 1.0
JOIN_S = 5.0


class Soundtrack:
    """A sound, mono or stereo, written as an AU stream to a pipe by a thread of its own.

    `read_end` is the descriptor that ffmpeg inherits as its input; call `start` when it has. Raises
    `InputError` when there is no sound to be had from the file.
    """

    def __init__(self, path: Path, fps: int) -> None:
        self._path = path
        self._fps = fps
        self._reading = SoundReading(path, MONO_OR_STEREO)
        if not self._reading.rate_hz:
            with self._reading as reading:
                raise InputError(f"{shown(path)}: not a sound that can be read ({cause(*reading.outcome())})")
        self.lead_frames = max(1, round(LEAD_S * fps))
        self.written_frames = 0  # those whose sound went into the pipe
        self.read_end, self._write_end = os.pipe()
        widen(self._write_end)  # ffmpeg leaves the sound lying there until it has the pictures to it
        self._changed = threading.Condition()
        self._n_frames = 0  # the sound may be written up to the end of this frame
        self._ended = False
        self._thread = threading.Thread(target=self._write, name="ffmpeg-sound", daemon=True)

    def start(self) -> None:
        """Begin to write; the reader has its copy of `read_end` by now."""
        os.close(self.read_end)
        self._thread.start()

    def allow(self, n_frames: int) -> None:
        """Let the sound go on to the end of that many frames."""
        with self._changed:
            self._n_frames = max(self._n_frames, n_frames)
            self._changed.notify()

    def end(self) -> None:
        """No more frames will come: finish with those allowed."""
        with self._changed:
            self._ended = True
            self._changed.notify()

    def close(self) -> None:
        """Let go of the file and of the pipe, whose reader has ended."""
        self.end()
        self._reading.close()
        self._thread.join(JOIN_S)

    def _write(self) -> None:
        try:
            with os.fdopen(self._write_end, "wb", buffering=0) as pipe:
                rate_hz, n_channels = self._reading.rate_hz, self._reading.n_channels
                _write_all(pipe, au_header(rate_hz, n_channels))
                while (n_frames := self._next()) > self.written_frames:
                    due = round(n_frames * rate_hz / self._fps)
                    due -= round(self.written_frames * rate_hz / self._fps)
                    samples = np.zeros((due, n_channels), ">f4")  # silence where the sound has ended
                    heard = self._reading.samples(due)
                    # Encoders that meet sound far beyond full scale, or none at all, end or hang.
                    samples[: len(heard)] = np.nan_to_num(heard, nan=0.0).clip(-1, 1)
                    _write_all(pipe, samples.tobytes())
                    self.written_frames = n_frames
        except (OSError, ValueError) as error:  # ffmpeg ended, or the file was closed under us
            log.debug("the sound of %s was not taken to its end: %s", shown(self._path), error)

    def _next(self) -> int:
        """Wait for frames to go on to, or for the end."""
        with self._changed:
            while self._n_frames <= self.written_frames and not self._ended:
                self._changed.wait()
            return self._n_frames


def _write_all(pipe: IO[bytes], data: bytes) -> None:
    rest = memoryview(data)
    while len(rest):
        rest = rest[pipe.write(rest) :]
