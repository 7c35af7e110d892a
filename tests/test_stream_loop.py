"""The loop of a stream, held to in an invented world: picture and sound belong together in every frame,
whatever source and machine do; nothing spoken is lost, or all that is lost is counted; queues stay bounded;
pauses, gaps, ends, interruptions and long runs do what they should."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from live_simulation import CLICK, FPS, FRAMES, PER_FRAME, RATE_HZ, World, murmur, rules, with_clicks

from flashtalk_cli.errors import WorkerError
from flashtalk_cli.live.delivery import Batch

CHUNK_S = FRAMES / FPS


def spoken(world: World) -> np.ndarray:
    """The sound that went out, without the silence between."""
    return world.sound[world.sound != 0]


def claps(world: World) -> tuple[np.ndarray, np.ndarray]:
    """Times in the output, in seconds, of clicks in the sound and of flashes in the picture."""
    clicks = np.flatnonzero(np.abs(world.sound) > CLICK / 2) / RATE_HZ
    return clicks, np.flatnonzero(world.picture) / FPS


def test_a_live_voice_is_heard_whole_in_sync_and_soon() -> None:
    """Clapped: every click lies within its flash, at the start as after ten minutes, and nothing is lost."""
    world = World()
    voice = with_clicks(murmur(600), every_s=7.3)
    world.end_at(world.speak(voice) + 0.01)
    world.run()
    clicks, flashes = claps(world)
    assert len(clicks) == len(flashes) == np.count_nonzero(voice > CLICK / 2)
    assert (np.abs(clicks - flashes) < 1 / FPS).all()
    assert world.mismatches == 0
    np.testing.assert_array_equal(spoken(world), voice)
    total = world.delivery.latency.summary()["total"]
    assert total["p99_s"] < CHUNK_S + 0.2 + 0.5 + 0.2 + 0.15, "fill, look-ahead, compute and reserve"
    assert total["p99_s"] - total["p50_s"] < 0.1
    assert not world.delivery.repeated_frames


def test_output_keeps_to_the_clock() -> None:
    """Frames leave when they are due by their count: none drifts from the first."""
    world = World()
    world.end_at(world.speak(murmur(120)))
    world.run()
    due_s = world.sent_s[0] + np.arange(len(world.sent_s)) / FPS
    assert np.abs(np.array(world.sent_s) - due_s).max() < 1e-6


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(["repeat", "drop"]),
    st.booleans(),
    st.floats(0.2, 1.6),
)
def test_whatever_happens_frames_show_the_sound_that_they_carry(seed, late, paced, speed) -> None:
    """Bursts, jitter of 2 s, gaps, a machine of any speed that stalls at times: bounded, counted, in sync."""
    rng = np.random.default_rng(seed)
    world = World(
        rules=rules(late=late), paced=paced, backlog_s=8.0, cost_s=lambda chunk: rng.exponential(speed)
    )
    voice = with_clicks(murmur(90, seed), every_s=0.97)
    at, after_s = 0, 0.0
    while at < len(voice):
        n = int(rng.integers(1, 2 * RATE_HZ))
        after_s += n / RATE_HZ * rng.uniform(0.2, 1.5) + rng.choice([0, 0, 0, rng.uniform(0, 8)])
        world.arrive(max(0.0, after_s + rng.uniform(0, 2)), voice[at : at + n])
        at += n
    world.end_at(after_s + 3)
    world.run()
    assert world.mismatches == 0
    clicks, flashes = claps(world)
    assert (np.isin(np.floor(clicks * FPS + 1e-6).astype(int), np.round(flashes * FPS).astype(int))).all()
    assert world.delivery.ahead_most_s <= 2 * CHUNK_S + max(world.rules.start_buffer_s, 3 * speed) + 6
    assert world.timeline.unspoken_s <= 8.0 + 1e-6
    heard = np.count_nonzero(world.sound)
    assert heard + world.timeline.dropped_samples == len(voice), "all that is not heard is counted"
    assert len(world.picture) == world.delivery.sent_frames


def test_a_file_is_spoken_without_waiting_for_its_end() -> None:
    """A source that can wait: the first frames leave as soon as they are made, and all of it is heard."""
    world = World(paced=False)
    voice = with_clicks(murmur(20.03), every_s=1.7)
    world.arrive(0.3, voice)
    world.end_at(0.4)
    world.run()
    assert world.sent_s[0] < 0.3 + 0.5
    np.testing.assert_array_equal(spoken(world), voice)
    assert len(world.picture) == int(np.ceil(len(voice) / PER_FRAME)), "as long as the sound, to the frame"


def test_the_person_idles_while_there_is_no_sound_and_speaks_at_once_when_it_returns() -> None:
    world = World()
    first = world.speak(murmur(5, 1))
    gap_s = 20.0
    world.end_at(world.speak(murmur(5, 2), start_s=first + gap_s))
    world.run()
    quiet = world.sound == 0
    edges = np.flatnonzero(np.diff(np.concatenate([[True], quiet, [True]]).astype(int)))
    assert len(edges) == 4, "two stretches of speech, each without a gap"
    returned_s = world.sent_s[edges[2] // PER_FRAME]
    assert returned_s - (first + gap_s) < 2 * CHUNK_S + 1.0
    assert not world.delivery.repeated_frames, "silence is shown, not a frozen picture"


def test_short_words_of_an_agent_are_spoken_at_once() -> None:
    """Sound that came in one go and has ended is not held back for more of itself."""
    world = World(paced=False, keep_alive=True)
    for index in range(6):
        world.arrive(3 + 5 * index, murmur(0.4, index))
    world.stop_at(35)
    world.run()
    starts = np.flatnonzero((world.sound != 0) & (np.concatenate([[0], world.sound[:-1]]) == 0))
    assert len(starts) == 6
    delays = [world.sent_s[at // PER_FRAME] - (3 + 5 * index) for index, at in enumerate(starts)]
    assert max(delays) < 2 * CHUNK_S + 0.8


def test_a_machine_20_percent_too_slow_repeats_frames_and_drops_what_exceeds_the_backlog() -> None:
    world = World(cost_s=lambda chunk: 1.2 * CHUNK_S, backlog_s=5.0)
    world.end_at(world.speak(with_clicks(murmur(120), 1.0)))
    world.run()
    assert world.mismatches == 0
    assert world.delivery.repeated_frames > 100
    assert world.timeline.dropped_samples > RATE_HZ
    total = world.delivery.latency.summary()["total"]
    assert total["p99_s"] < 5.0 + 4 * CHUNK_S, "bounded by the backlog"
    assert world.loop.realtime == pytest.approx(1 / 1.2, rel=0.01)


def test_drop_holds_the_delay_by_leaving_out_sound() -> None:
    """A stall of 10 s in the middle: with `drop` the delay is back at its target soon after."""
    costs = {20: 10.0}
    world = World(rules=rules(late="drop"), cost_s=lambda chunk: costs.get(chunk, 0.4))
    world.end_at(world.speak(murmur(120)))
    world.run()
    assert world.delivery.latency.summary()["total"]["p99_s"] < 3.0 + 0.2
    assert 5 < world.timeline.dropped_samples / RATE_HZ < 12


def test_repeat_takes_back_the_delay_in_pauses_and_loses_no_word() -> None:
    costs = {20: 6.0}
    world = World(cost_s=lambda chunk: costs.get(chunk, 0.4))
    sentence, pause = murmur(3), np.full(RATE_HZ, 1e-4, np.float32)
    voice = np.concatenate([sentence, pause] * 40)
    world.end_at(world.speak(voice))
    world.run()
    loud = spoken(world)[np.abs(spoken(world)) > 0.01]
    np.testing.assert_array_equal(loud, np.tile(sentence, 40))
    assert world.timeline.dropped_samples > 2 * RATE_HZ
    assert world.delivery.latency.summary()["total"]["p50_s"] < 3.2


def test_fail_ends_a_stream_that_fell_behind() -> None:
    costs = {5: 8.0}
    world = World(rules=rules(late="fail"), cost_s=lambda chunk: costs.get(chunk, 0.4))
    world.end_at(world.speak(murmur(60)))
    with pytest.raises(WorkerError, match="fell behind"):
        world.run()


@pytest.mark.parametrize("cost_s", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("moment", np.linspace(8, 8 + CHUNK_S, 7).round(2))
def test_an_interruption_is_silent_at_once_and_closes_the_mouth_within_a_chunk(cost_s, moment) -> None:
    """At any moment of a chunk: what was already made beyond the one on air is made anew."""
    world = World(paced=False, keep_alive=True, cost_s=lambda chunk: cost_s)
    world.arrive(0.0, with_clicks(murmur(25), every_s=0.2))
    world.clock.at(world.began_s + moment, world.loop.interrupt)
    world.arrive(14.0, murmur(3, 5))
    world.stop_at(22.0)
    world.run()
    at = np.searchsorted(world.sent_s, moment + 1e-9)
    again = np.searchsorted(world.sent_s, 14.0)
    assert not world.sound[at * PER_FRAME : again * PER_FRAME].any()
    moving = np.flatnonzero(world.picture[at:again])
    still_s = cost_s / 2  # of the last frame, repeated while the new chunk is made
    assert not len(moving) or moving[-1] / FPS <= CHUNK_S + still_s
    assert world.sound[again * PER_FRAME :].any(), "and what is said next is heard"


@pytest.mark.parametrize("late", ["repeat", "drop", "fail"])
def test_the_person_pauses_while_nobody_takes_the_stream(late) -> None:
    """Asked to: no chunk is made meanwhile, it counts as no lateness, and every word is said afterwards."""
    world = World(paced=False, rules=rules(late=late))
    voice = with_clicks(murmur(20), 1.1)
    world.arrive(0.0, voice)
    world.end_at(0.1)
    away_s = (world.began_s + 8.0, world.began_s + 15.0)
    world.loop.is_away = lambda: away_s[0] <= world.clock.now_s() < away_s[1]
    world.run()
    np.testing.assert_array_equal(spoken(world), voice)
    assert world.mismatches == 0
    sent_s = np.array(world.sent_s)
    loud = np.abs(world.sound).reshape(-1, PER_FRAME).max(axis=1) > 0
    assert not loud[(sent_s > 8 + 2 * CHUNK_S) & (sent_s < 15)].any()
    assert world.delivery.held_frames == pytest.approx((7 - CHUNK_S) * FPS, abs=CHUNK_S * FPS)
    assert world.delivery.repeated_frames < FPS
    assert sent_s[-1] == pytest.approx(20 + 7, abs=CHUNK_S + 1)


@pytest.mark.parametrize("paced", [True, False])
def test_little_waits_however_long_the_outputs_take_nothing(paced) -> None:
    """For 8 s they are stuck; what is overdue is no reason to make more, and afterwards all of it is said."""
    world = World(paced=paced)
    voice = with_clicks(murmur(28), 1.1)
    if paced:
        world.end_at(world.speak(voice))
    else:
        world.arrive(0.0, voice)
        world.end_at(0.1)
    stuck_s = (world.began_s + 12.0, world.began_s + 20.0)
    queued_s: list[float] = []
    put, poll = world.delivery.put, world.delivery.poll

    def counted(batch: Batch) -> None:
        put(batch)
        queued_s.append(world.delivery.queued_s)

    world.delivery.put = counted  # type: ignore[method-assign]
    world.delivery.poll = lambda: (  # type: ignore[method-assign]
        stuck_s[1] if stuck_s[0] <= world.clock.now_s() < stuck_s[1] else poll()
    )
    world.run()
    assert max(queued_s) <= 3 * CHUNK_S + 0.2
    assert world.delivery.jumps == 1
    assert world.mismatches == 0
    np.testing.assert_array_equal(spoken(world), voice)


def test_mute_consumes_sound_in_silence() -> None:
    world = World()
    world.clock.at(world.began_s + 10.0, lambda: world.loop.mute(True))
    world.clock.at(world.began_s + 20.0, lambda: world.loop.mute(False))
    world.end_at(world.speak(murmur(30)))
    world.run()
    sent_s = np.array(world.sent_s)
    loud = np.abs(world.sound).reshape(-1, PER_FRAME).max(axis=1) > 0
    assert not loud[(sent_s > 10.01) & (sent_s < 20.0)].any()
    assert loud[(sent_s > 24) & (sent_s < 30)].all()
    assert world.delivery.latency.summary()["total"]["p99_s"] < 3, "muted sound does not pile up"


def test_a_machine_that_slept_goes_on() -> None:
    """Suspended for an hour in mid-stream: one jump, no burst of repeated frames, and sync is kept."""
    world = World()
    world.end_at(world.speak(with_clicks(murmur(40), 1.1)))
    world.clock.at(world.began_s + 12.0, lambda: world.clock.jump(3600))
    world.run()
    assert world.delivery.jumps == 1
    assert world.delivery.repeated_frames < 2 * FPS
    assert world.mismatches == 0


def test_a_request_to_stop_ends_it_soon() -> None:
    world = World(paced=False)
    world.arrive(0.0, murmur(28))
    world.stop_at(9.0)
    world.run()
    assert world.clock.now_s() - world.began_s < 9.0 + 3.0


def live_for(hours: float, start_samples: int = 0) -> World:
    """A voice that never ends, with pauses, of a clock 100 ppm fast; in coarse steps, to be quick."""
    world = World(keep_output=False, cost_s=lambda chunk: 0.4)
    world.timeline.arrived_samples = start_samples
    world.delivery.every_s = 0.3
    block = with_clicks(murmur(0.56), every_s=0.56)
    pause = np.full_like(block, 1e-4)
    seconds, drift = hours * 3600, 1 + 1e-4

    def arrive(index: int = 0) -> None:
        world.timeline.add(pause if index % 8 == 7 else block, world.clock.now_s())
        next_s = (index + 1) * 0.56 / drift
        if next_s < seconds:
            world.clock.at(world.began_s + next_s, lambda: arrive(index + 1))

    arrive()
    world.stop_at(seconds)
    return world.run()


def hold_long(world: World, hours: float) -> None:
    assert world.mismatches == 0
    assert world.delivery.sent_frames == pytest.approx(hours * 3600 * FPS, abs=4 * FRAMES)
    assert world.delivery.latency.summary()["total"]["p99_s"] < 3.0 + 2 * CHUNK_S
    assert world.timeline.unspoken_s < 6
    assert world.flashes > 0.95 * hours * 3600 / 0.56 * 7 / 8
    assert world.timeline.dropped_samples / world.timeline.arrived_samples < 0.01


def test_time_costs_no_memory_and_no_sync() -> None:
    """Half an hour, with sample counts beyond 2^33 and a source clock 100 ppm fast: nothing grows or drifts."""
    live_for(0.05)
    tracemalloc.start()
    hold_long(live_for(0.5, start_samples=2**33 - 1000), 0.5)
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 2_000_000


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_week_costs_no_memory_and_no_sync() -> None:
    hold_long(live_for(7 * 24.0), 7 * 24.0)
