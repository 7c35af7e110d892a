"""What the encoder makes: coded pictures and sounds, each with its exact time, and how they are described.

Times come from counts: the n-th picture is n / fps, the n-th packet of sound (n - 1) * 1024 / rate, for AAC
begins with a packet that only fills its memory. Python's integers have no end, so there is no wrap.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

SAMPLE_RATE_HZ = 48_000
AAC_SAMPLES = 1024  # in a packet; as many lie before the first sample
US_PER_S = 1_000_000

AUDIO_TAG, VIDEO_TAG = 8, 9
FLV_HEADER_BYTES = 13  # with the size of the tag before the first, 0
TAG_HEADER = struct.Struct(">B3s3sB3s")
TAG_TRAILER_BYTES = 4


@dataclass(frozen=True)
class StreamFormat:
    """What a decoder must know before the first unit."""

    width_px: int
    height_px: int
    fps: int
    n_channels: int
    avc: bytes  # AVCDecoderConfigurationRecord, ISO/IEC 14496-15
    aac: bytes  # AudioSpecificConfig, ISO/IEC 14496-3


@dataclass(frozen=True)
class Unit:
    """One coded picture (AVC, with lengths before its NAL units) or packet of sound (AAC without ADTS)."""

    is_video: bool
    is_key: bool  # a picture that needs none before it
    time_us: int
    data: bytes


@dataclass(frozen=True)
class Tag:
    """One FLV tag that matters: a configuration or a coded unit."""

    is_video: bool
    is_config: bool
    is_key: bool
    data: bytes


def frame_time_us(index: int, fps: int) -> int:
    """When a picture is shown, in microseconds, rounded."""
    return (2 * index * US_PER_S + fps) // (2 * fps)


def packet_time_us(index: int) -> int:
    """When the first sample of a packet of sound is heard: negative for the first packet."""
    return (2 * (index - 1) * AAC_SAMPLES * US_PER_S + SAMPLE_RATE_HZ) // (2 * SAMPLE_RATE_HZ)


class FlvReader:
    """Cuts an FLV stream into tags as bytes arrive. Its times are not looked at: they would wrap."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._skip = FLV_HEADER_BYTES

    def tags(self, data: bytes) -> Iterator[Tag]:
        """The tags that are complete with these bytes."""
        self._held += data
        while len(self._held) >= self._skip + TAG_HEADER.size:
            kind, size, _, _, _ = TAG_HEADER.unpack_from(self._held, self._skip)
            start = self._skip + TAG_HEADER.size
            stop = start + int.from_bytes(size, "big")
            if len(self._held) < stop + TAG_TRAILER_BYTES:
                return
            body = bytes(self._held[start:stop])
            del self._held[: stop + TAG_TRAILER_BYTES]
            self._skip = 0
            tag = _tag(kind, body)
            if tag is not None:
                yield tag


def _tag(kind: int, body: bytes) -> Tag | None:
    """Video: frame type and codec, packet type, 3 bytes of composition time. Audio: format, packet type."""
    if kind == VIDEO_TAG and len(body) >= 5 and body[1] in (0, 1):
        return Tag(True, body[1] == 0, body[0] >> 4 == 1, body[5:])
    if kind == AUDIO_TAG and len(body) >= 2:
        return Tag(False, body[1] == 0, False, body[2:])
    return None  # metadata, or the end of a sequence
