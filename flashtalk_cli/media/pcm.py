"""A file's sound as float samples at its own rate, decoded by ffmpeg as it is read.

The samples come as an AU stream, because its header is six numbers: rate and channels are
known without reading what ffmpeg prints for people.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from flashtalk_cli.media.ffmpeg import Reading, file_input

BYTES_PER_SAMPLE = 4
AU_HEADER = struct.Struct(">6I")  # magic, offset of the samples, their bytes, encoding, rate, channels
AU_MAGIC, AU_UNKNOWN_BYTES, AU_FLOAT32 = 0x2E736E64, 0xFFFFFFFF, 6


class SoundReading(Reading):
    """The first sound of a file. `rate_hz` and `n_channels` are 0 when nothing came out of it.

    Samples count from the first one in the file, whatever times its packets have.
    """

    def __init__(self, path: Path, filters: str | None = None) -> None:
        options: dict[str, Any] = {"format": "au", "map": "0:a:0", "c:a": "pcm_f32be"}
        if filters:
            options["af"] = filters
        super().__init__(file_input(path, vn=None).output("-", **options))
        header = self.stdout.read(AU_HEADER.size)
        self.rate_hz = self.n_channels = 0
        if len(header) == AU_HEADER.size:
            _, start, _, _, self.rate_hz, self.n_channels = AU_HEADER.unpack(header)
            self.stdout.read(start - len(header))

    def samples(self, n: int) -> np.ndarray:
        """The next n samples of each channel, fewer at the end: big-endian float32 [n, channels]."""
        frame_bytes = BYTES_PER_SAMPLE * self.n_channels
        data = self.stdout.read(n * frame_bytes)
        whole = len(data) // frame_bytes
        return np.frombuffer(data, ">f4", count=whole * self.n_channels).reshape(whole, self.n_channels)


def au_header(rate_hz: int, n_channels: int) -> bytes:
    """What begins an AU stream of big-endian float32 samples."""
    return AU_HEADER.pack(AU_MAGIC, AU_HEADER.size, AU_UNKNOWN_BYTES, AU_FLOAT32, rate_hz, n_channels)
