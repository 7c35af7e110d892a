"""The parts of live outputs that are pure: waits, queues, cutting, counting times, what is owed after a death."""

from __future__ import annotations

import itertools
import random
import struct
import threading
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashtalk_cli.media.live.backoff import CAP_S, SETTLED_S, Backoff
from flashtalk_cli.media.live.encoder_process import Backlog
from flashtalk_cli.media.live.matroska import cluster
from flashtalk_cli.media.live.unit_queue import UnitQueue
from flashtalk_cli.media.live.units import (
    AUDIO_TAG,
    TAG_HEADER,
    US_PER_S,
    VIDEO_TAG,
    FlvReader,
    Unit,
    frame_time_us,
    packet_time_us,
)

WEEK_S = 7 * 24 * 3600


@given(
    st.integers(0, 2**32), st.lists(st.floats(0, 2 * SETTLED_S), min_size=1, max_size=60), st.floats(0.01, 2)
)
def test_waits_double_up_to_the_cap_and_begin_anew_after_a_settled_connection(seed, lives_s, first_s):
    backoff, whole_s = Backoff(random.Random(seed), first_s), first_s
    for live_s in lives_s:
        if live_s >= SETTLED_S:
            whole_s = first_s
        assert whole_s / 2 <= backoff.wait_s(live_s) <= whole_s
        whole_s = min(CAP_S, whole_s * 2)


def test_waits_are_spread_and_repeatable():
    """A thousand clients that lose their server together do not come back together."""
    waits = [Backoff(random.Random(seed), 1.0).wait_s(0) for seed in range(1000)]
    assert waits == [Backoff(random.Random(seed), 1.0).wait_s(0) for seed in range(1000)]
    assert np.histogram(waits, bins=10, range=(0.5, 1.0))[0].min() > 50


@given(st.sampled_from([1, 8, 10, 16, 20, 25, 30, 32, 40, 50, 60]), st.integers(0, 60 * 365 * 24 * 3600))
def test_times_are_exact_to_a_microsecond_for_years(fps, index):
    """Drift is none by construction: no time is a sum of rounded steps."""
    assert abs(frame_time_us(index, fps) - Fraction(index * US_PER_S, fps)) <= Fraction(1, 2)
    assert abs(packet_time_us(index) - Fraction((index - 1) * 1024 * US_PER_S, 48_000)) <= Fraction(1, 2)
    assert frame_time_us(index + fps, fps) - frame_time_us(index, fps) == US_PER_S
    assert packet_time_us(index + 375) - packet_time_us(index) == 8 * US_PER_S


def test_sound_and_picture_of_a_week_end_together():
    assert frame_time_us(25 * WEEK_S, 25) == packet_time_us(1 + 48_000 * WEEK_S // 1024) == WEEK_S * US_PER_S


@given(st.integers(0, 2**50), st.booleans())
def test_a_cluster_holds_times_of_any_length(time_us, is_video):
    """Timestamp (0xE7) then a simple block (0xA3) at its own time 0; sound's is later by what the reader takes off."""
    data = cluster(Unit(is_video, True, time_us, b"payload"), 0)
    at = data.index(b"\xe7")
    length = data[at + 1] & 0x7F
    assert int.from_bytes(data[at + 2 : at + 2 + length], "big") == time_us + (0 if is_video else 21_333)
    assert data[at + 2 + length] == 0xA3
    assert data.endswith((b"\x81" if is_video else b"\x82") + b"\0\0\x80payload")


def flv(tags: list[tuple[int, bytes]]) -> bytes:
    header = b"FLV\x01\x05" + struct.pack(">II", 9, 0)
    packed = (
        TAG_HEADER.pack(kind, len(body).to_bytes(3, "big"), b"\xff\xff\xff", 0x7F, b"\0\0\0") + body
        for kind, body in tags
    )
    return header + b"".join(one + struct.pack(">I", len(one)) for one in packed)


@given(
    st.lists(
        st.tuples(st.sampled_from([AUDIO_TAG, VIDEO_TAG]), st.booleans(), st.binary(max_size=40)), max_size=20
    ),
    st.lists(st.integers(1, 50), min_size=1),
)
def test_tags_are_cut_however_the_bytes_arrive(wanted, sizes):
    """Metadata and ends of sequences are left out; whatever the clock says, nothing depends on it."""
    tags = [(18, b"onMetaData"), (VIDEO_TAG, b"\x17\x02\0\0\0")]
    for kind, is_key, data in wanted:
        head = b"\xaf\x01" if kind == AUDIO_TAG else (b"\x17" if is_key else b"\x27") + b"\x01\0\0\0"
        tags.append((kind, head + data))
    stream, reader, found, at = flv(tags), FlvReader(), [], 0
    for size in itertools.cycle(sizes):
        found += reader.tags(stream[at : at + size])
        at += size
        if at >= len(stream):
            break
    assert [(tag.is_video, tag.is_key, tag.data) for tag in found] == [
        (kind == VIDEO_TAG, kind == VIDEO_TAG and is_key, data) for kind, is_key, data in wanted
    ]


def endless(group_frames: int) -> Iterator[Unit]:
    """Pictures at 25 fps, a key frame at the start of each group, a packet of sound after each."""
    for at in itertools.count():
        yield Unit(True, at % group_frames == 0, frame_time_us(at, 25), b"")
        yield Unit(False, False, frame_time_us(at, 25) + 1, b"")


def units(n_frames: int, group_frames: int) -> list[Unit]:
    return list(itertools.islice(endless(group_frames), 2 * n_frames))


def take_all(queue: UnitQueue) -> list[Unit]:
    return list(iter(lambda: queue.take(0), None))


@given(
    st.lists(st.one_of(st.integers(1, 120), st.sampled_from(["take", "away", "start"])), max_size=40),
    st.integers(1, 60),
    st.sampled_from([0.5, 2.0, 6.0]),
)
def test_a_sink_always_gets_whole_groups_and_the_queue_is_bounded(steps, group_frames, limit_s):
    """Whatever comes, goes and is too slow: after every gap the first picture is a key frame, every frame is
    taken, dropped or held, and no more is held than the limit, or the newest group.
    """
    queue, source = UnitQueue(limit_s), endless(group_frames)
    put, taken, attached = 0, [], False
    for step in steps:
        if step == "away":
            queue.interrupt()
            attached = False
            taken.append(None)
        elif step == "start":
            if not attached and queue._units:
                attached = queue.wait_for_start()
        elif step == "take":
            taken += [queue.take(0)] if attached else []
        else:
            for unit in itertools.islice(source, 2 * step):
                assert queue.put(unit, 0)
                put += unit.is_video
        held = list(queue._units)
        span_us = held[-1].time_us - held[0].time_us if held else 0
        assert span_us <= max(limit_s if attached else 0.0, group_frames / 25) * US_PER_S
        n_taken = sum(unit.is_video for unit in taken if unit)
        assert n_taken + queue.frames_dropped + sum(unit.is_video for unit in held) == put
    expected: int | None = None  # time of the picture that may follow without being a key frame
    for unit in [*taken, *(take_all(queue) if attached else [])]:
        if unit is None:
            expected = None
        elif unit.is_video:
            assert unit.is_key or unit.time_us == expected
            expected = unit.time_us + 40_000


def test_a_recordings_queue_waits_and_drops_nothing():
    queue, wanted = UnitQueue(1.0, lossless=True), units(200, 50)
    taken: list[Unit] = []
    n_put = sum(queue.put(unit, 0.0) for unit in wanted[:60])
    assert n_put < 60
    taker = threading.Thread(target=lambda: taken.extend(iter(lambda: queue.take(5), None)))
    taker.start()
    assert all(queue.put(unit, 5) for unit in wanted[n_put:])
    queue.end()
    taker.join()
    assert taken == wanted
    assert queue.frames_dropped == 0


def test_a_closed_queue_lets_everybody_go():
    queue = UnitQueue(0.1, lossless=True)
    while queue.put(units(1, 1)[0], 0) and len(queue._units) < 3:
        queue.put(units(100, 1)[-1], 0)
    waiting = threading.Thread(target=queue.put, args=(units(1, 1)[0], 30))
    waiting.start()
    queue.close()
    waiting.join(5)
    assert not waiting.is_alive()
    assert not queue.wait_for_start()
    assert queue.is_drained


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.data())
def test_a_new_encoder_is_given_exactly_what_the_old_one_owed(pieces, data):
    """Whatever was coded when it died: frames from the next one on, sound from two packets before the next."""
    fps, per_frame = 25, 1920
    total = sum(pieces)
    frames = np.arange(total, dtype=np.uint8).reshape(total, 1, 1, 1)
    samples = np.arange(total * per_frame, dtype=np.float32)[:, None]
    backlog, at = Backlog(fps, room_frames=1000), 0
    for n in pieces:
        assert backlog.add(frames[at : at + n], samples[at * per_frame : (at + n) * per_frame], 0)
        at += n
    backlog.end()
    n_coded = data.draw(st.integers(0, total))
    n_packets = data.draw(st.integers(0, n_coded * per_frame // 1024 + 1))
    for is_video, n in ((True, n_coded), (False, n_packets)):
        for _ in range(n):
            backlog.note_coded(is_video)
    owed = list(backlog.frames_from(backlog.coded_frames, lambda: False))
    assert [int(frame.item()) for frame in owed] == list(range(n_coded, total))
    first = backlog.packets_from() * 1024
    assert first == max(0, n_packets - 2) * 1024
    heard = list(backlog.samples_from(first, lambda: False))
    assert np.array_equal(np.concatenate([*heard, np.zeros((0, 1))]), samples[first:])


def test_a_backlog_is_bounded_and_lets_a_closed_writer_go():
    backlog = Backlog(25, room_frames=10)
    piece = np.zeros((5, 1, 1, 1), np.uint8), np.zeros((5 * 1920, 1), np.float32)
    assert [backlog.add(*piece, 0.0) for _ in range(4)] == [True, True, False, False]
    backlog.note_coded(True)
    assert backlog.add(*piece, 0.0)
    waiting = threading.Thread(target=backlog.add, args=(*piece, None))
    waiting.start()
    backlog.close()
    waiting.join(5)
    assert not waiting.is_alive()


def test_a_unit_before_the_start_is_a_fault():
    with pytest.raises(AssertionError):
        cluster(Unit(True, True, 0, b""), 1)
