"""What each sink's ffmpeg reads: Matroska, because its times have 64 bits and it can begin anywhere.

MPEG-TS would wrap after 26.5 hours and FLV after 24.8 days. A tick is a microsecond here, and every unit is a
cluster of its own, so nothing waits for a second one. Numbers of elements: RFC 9559.
"""

from __future__ import annotations

import struct

from flashtalk_cli.media.live.units import AAC_SAMPLES, SAMPLE_RATE_HZ, US_PER_S, StreamFormat, Unit

TICK_NS = 1000
VIDEO, AUDIO = 1, 2  # tracks, and their types too
KEY_FLAG = 0x80
PADDING_US = AAC_SAMPLES * US_PER_S // SAMPLE_RATE_HZ  # what the reader takes off every packet of sound
UNKNOWN_SIZE = b"\x01" + b"\xff" * 7


def header(form: StreamFormat) -> bytes:
    """What comes before the first cluster: one track of pictures, one of sound, no end."""
    ebml = _element(
        0x1A45DFA3,
        _number(0x4286, 1) + _number(0x42F7, 1) + _number(0x42F2, 4) + _number(0x42F3, 8),
        _element(0x4282, b"matroska") + _number(0x4287, 4) + _number(0x4285, 2),
    )
    info = _element(
        0x1549A966, _number(0x2AD7B1, TICK_NS), _element(0x4D80, b"flashtalk"), _element(0x5741, b"-")
    )
    picture = _element(0xE0, _number(0xB0, form.width_px), _number(0xBA, form.height_px))
    video = _element(
        0xAE,
        _track(VIDEO, b"V_MPEG4/ISO/AVC", form.avc),
        _number(0x23E383, 1_000_000_000 // form.fps),  # default duration
        picture,
    )
    sound = _element(0xE1, _element(0xB5, struct.pack(">d", SAMPLE_RATE_HZ)), _number(0x9F, form.n_channels))
    audio = _element(
        0xAE,
        _track(AUDIO, b"A_AAC", form.aac),
        _number(0x56AA, PADDING_US * TICK_NS),
        sound,  # codec delay
    )
    return ebml + _id(0x18538067) + UNKNOWN_SIZE + info + _element(0x1654AE6B, video, audio)


def cluster(unit: Unit, origin_us: int) -> bytes:
    """A unit as a cluster, its time counted from `origin_us`; sound may begin one packet earlier."""
    time_us = unit.time_us - origin_us + (0 if unit.is_video else PADDING_US)
    assert time_us >= 0, (unit.time_us, origin_us)
    flags = KEY_FLAG if unit.is_key or not unit.is_video else 0
    track = VIDEO if unit.is_video else AUDIO
    block = _element(0xA3, bytes((0x80 | track, 0, 0, flags)), unit.data)
    return _element(0x1F43B675, _number(0xE7, time_us), block)


def _track(number: int, codec: bytes, private: bytes) -> bytes:
    numbers = _number(0xD7, number) + _number(0x73C5, number) + _number(0x83, number) + _number(0x9C, 0)
    return numbers + _element(0x86, codec) + _element(0x63A2, private)


def _element(number: int, *content: bytes) -> bytes:
    size = sum(map(len, content))
    n_bytes = next(n for n in range(1, 9) if size < (1 << 7 * n) - 1)
    return b"".join((_id(number), (size | 1 << 7 * n_bytes).to_bytes(n_bytes, "big"), *content))


def _number(number: int, value: int) -> bytes:
    return _element(number, value.to_bytes(max(1, -(-value.bit_length() // 8)), "big"))


def _id(number: int) -> bytes:
    return number.to_bytes(-(-number.bit_length() // 8), "big")
