"""Pacing, held to with an invented clock: frames are due by their count and by nothing else; what is late is
repeated, dropped or fatal as asked; whatever the source, the machine and the clock do, waits are finite,
decisions fit what is there, and no rule asks for what another forbids."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_simulation import FPS, rules

from flashtalk_cli.live.pacing import (
    JUMP_S,
    Air,
    Fail,
    Outlook,
    Repeat,
    Send,
    Wait,
    decide,
    silence_before_s,
    skip_s,
    spare_s,
    wait_s,
)

seconds = st.floats(0, 100)
outlooks = st.builds(
    Outlook,
    unspoken_s=seconds,
    ended=st.booleans(),
    ahead_s=st.floats(-5, 5),
    first_frame_s=st.floats(0, 3),
    silent_before=st.booleans(),
    since_arrival_s=seconds | st.just(math.inf),
    on_air=st.booleans(),
    may_wait_s=st.floats(-10, 10),
)
any_rules = st.builds(
    rules,
    lookahead_s=st.floats(0, 1),
    start_buffer_s=st.floats(0.04, 2),
    latency_target_s=st.floats(0.2, 10),
    late=st.sampled_from(["repeat", "drop", "fail"]),
)


def test_nothing_of_the_live_room_asks_the_wall_clock() -> None:
    """People and NTP set it: only monotonic time may decide."""
    for path in (Path(__file__).parent.parent / "flashtalk_cli/live").rglob("*.py"):
        names = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if hasattr(node, "attr")}
        assert not names & {"time.time", "datetime.now", "time.localtime", "datetime.datetime.now"}, path


@settings(max_examples=300)
@given(
    any_rules,
    st.lists(st.tuples(st.floats(0, 3), st.integers(0, 40)), min_size=1, max_size=60),
    st.floats(0, 1e7),
)
def test_a_sender_that_does_as_decided_keeps_the_schedule(chosen, happenings, start_s) -> None:
    """Bursts, stalls and jumps: frames queue up in any number, time leaps by anything up to seconds."""
    air, queued, now_s = Air(), 0, start_s
    for leap_s, arrived in happenings:
        now_s += leap_s
        queued += arrived
        for _ in range(200):
            before = air
            decision, air = decide(chosen, air, queued, False, now_s)
            if isinstance(decision, Wait):
                assert decision.until_s is None or decision.until_s > now_s - 1e-6
                break
            if isinstance(decision, Fail):
                assert chosen.late == "fail"
                assert decision.late_s > chosen.fail_after_s
                return
            sent = decision.frames if isinstance(decision, Send) else 1
            assert sent > 0
            if isinstance(decision, Send):
                assert decision.frames <= queued
                queued -= decision.frames
            else:
                assert isinstance(decision, Repeat)
                assert not queued, "a frame is there: it must not be repeated"
            if before.anchor_s is not None and before.jumps == air.jumps:
                assert air.sent_frames == before.sent_frames + sent
            assert air.anchor_s is not None
            due = 1 + (now_s - air.anchor_s) * FPS
            assert air.sent_frames <= due + 1e-3, "sent before it was due"
        else:
            pytest.fail("it never waits")
        if air.anchor_s is not None:
            behind_s = now_s - (air.anchor_s + air.sent_frames / FPS)
            assert behind_s <= 1e-6, "what was due was not sent"


def test_frames_are_due_by_their_count_however_many_they_are() -> None:
    """After 2^33 frames (eleven years) the next one is due to the microsecond; nothing adds up."""
    start_s, n = 12_345.678, 2**33
    decision, _ = decide(rules(), Air(start_s, n), 5, False, start_s + (n - 0.5) / FPS)
    assert isinstance(decision, Wait)
    assert decision.until_s == pytest.approx(start_s + n / FPS, abs=1e-6)
    decision, after = decide(rules(), Air(start_s, n), 5, False, start_s + n / FPS)
    assert decision == Send(1)
    assert after.sent_frames == n + 1


def test_going_on_air_waits_for_the_start_buffer_and_no_longer() -> None:
    chosen = rules(start_buffer_s=0.2)
    assert decide(chosen, Air(), 4, False, 0.0) == (Wait(None), Air())
    assert decide(chosen, Air(), 5, False, 7.0)[0] == Send(1)
    assert decide(chosen, Air(), 1, True, 7.0)[0] == Send(1), "a very short stream is sent too"


def test_a_machine_that_slept_owes_no_hour_of_frames() -> None:
    decision, air = decide(rules(), Air(0.0, 100), 3, False, 4.0 + 3600)
    assert decision == Send(1)
    assert air.jumps == 1
    decision, _ = decide(rules(), air, 2, False, 4.0 + 3600)
    assert decision == Wait(pytest.approx(4.0 + 3600 + 1 / FPS))


def test_a_short_stall_is_caught_up_with_frames_that_are_there() -> None:
    decision, air = decide(rules(), Air(0.0, 100), 30, False, 4.0 + JUMP_S / 2)
    assert decision == Send(
        1 + round(JUMP_S / 2 * FPS) if JUMP_S / 2 * FPS % 1 == 0 else math.floor(JUMP_S / 2 * FPS) + 1
    )
    assert air.jumps == 0


@pytest.mark.parametrize("late", ["repeat", "drop", "fail"])
def test_late_frames_are_repeated_until_it_is_too_much_where_that_was_asked(late) -> None:
    air, now_s = Air(0.0, 1), 0.0
    for _ in range(100):
        now_s += 1 / FPS
        decision, air = decide(rules(late=late), air, 0, False, now_s)
        if late == "fail" and now_s > rules().fail_after_s + 1e-6:
            assert isinstance(decision, Fail)
            break
        assert decision == Repeat()
    assert decide(rules(), air, 0, True, now_s + 1)[0] == Wait(None), "nothing is repeated at the end"


@settings(max_examples=300)
@given(any_rules, outlooks)
def test_a_chunk_waits_only_for_what_it_needs_and_only_while_there_is_time(chosen, outlook) -> None:
    wait = wait_s(chosen, outlook)
    assert 0 <= wait < math.inf
    if outlook.unspoken_s >= chosen.need_s and not (outlook.on_air and outlook.ahead_s > chosen.chunk_s):
        assert wait == 0
    if outlook.on_air and outlook.ahead_s < outlook.first_frame_s:
        assert wait == 0, "late, and still it waits"
    if wait and outlook.on_air:
        assert outlook.ahead_s - wait >= outlook.first_frame_s + chosen.start_buffer_s - 1e-9


@settings(max_examples=300)
@given(any_rules, outlooks)
def test_silence_comes_first_only_before_speech_that_is_arriving(chosen, outlook) -> None:
    silence = silence_before_s(chosen, outlook)
    assert 0 <= silence <= chosen.chunk_s
    if silence:
        assert outlook.silent_before
        assert not outlook.ended
        assert outlook.unspoken_s < chosen.need_s
        assert outlook.since_arrival_s < 1


@settings(max_examples=300)
@given(any_rules, outlooks, st.floats(-5, 100))
def test_only_sound_in_excess_is_left_out_and_only_when_late(chosen, outlook, delay_s) -> None:
    left_out = skip_s(chosen, outlook, delay_s)
    assert left_out >= 0
    if left_out:
        assert delay_s - left_out >= chosen.latency_target_s - 1e-9
        assert outlook.unspoken_s - left_out >= chosen.need_s - 1e-9
        assert left_out <= outlook.unspoken_s - chosen.need_s + min(0.0, spare_s(chosen, outlook)) + 1e-9
