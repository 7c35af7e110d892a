"""What happens to sound inside a stream: the bounded store that keeps it in order, what is heard of it by the model and
how loud, and how long it took."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_parts import timeline

from flashtalk_cli.live.latency import Latency
from flashtalk_cli.live.loudness import RunningGain
from flashtalk_cli.live.timeline import RATE_HZ
from flashtalk_cli.media.loudness import normalise_loudness


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.sampled_from(["add", "take", "skip", "pauses", "interrupt"]), st.integers(1, 900)))
)
def test_the_store_keeps_order_bounds_and_count(happenings) -> None:
    """Against a plain list: what is taken is what arrived, in order, less what is counted as dropped."""
    store = timeline(backlog_s=2.0, rate_hz=1000)
    next_value, taken, dropped_before = 1, [], 0
    for what, n in happenings:
        if what == "add":
            quiet = n % 3 == 0
            values = np.arange(next_value, next_value + n) * (1e-9 if quiet else 1.0)
            store.add(values.astype(np.float32), float(next_value))
            next_value += n
        elif what == "take":
            frames = 1 + n % 30
            got = store.take(frames, silence_before_s=(n % 5) / 100)
            assert len(got.samples) == frames * 40
            assert len(got.arrived_s) == frames
            sound = got.samples[got.samples != 0]
            assert len(sound) + got.silent_samples == len(got.samples)
            taken += [value if value >= 1 else value * 1e9 for value in sound.tolist()]
            n_past = min(1000, len(got.samples))
            np.testing.assert_array_equal(store.heard(0.0)[-n_past:], got.samples[-n_past:])
        elif what == "interrupt":
            store.interrupt()
            assert store.unspoken_s == 0
        else:
            store.skip(n / 1000, pauses_only=what == "pauses")
        assert store.unspoken_s <= 2.0 + 1e-9
        assert store.dropped_samples >= dropped_before
        dropped_before = store.dropped_samples
        assert len(taken) + store.dropped_samples + round(store.unspoken_s * 1000) == next_value - 1
    rounded = np.round(taken)
    assert (np.diff(rounded) > 0).all(), "in order, none twice"


def test_what_is_heard_ends_with_what_has_arrived_of_the_look_ahead() -> None:
    store = timeline(rate_hz=1000)
    store.add(np.arange(1, 101, dtype=np.float32), 0.0)
    store.take(2)
    heard = store.heard(0.05)
    assert len(heard) == 1050
    np.testing.assert_array_equal(heard[-130:], np.concatenate([np.arange(1, 101), np.zeros(30)])[-130:])


def test_a_pause_is_shortened_and_speech_is_not() -> None:
    store = timeline(rate_hz=1000)
    voice = np.concatenate([np.ones(500), np.full(1000, 1e-5), np.ones(500)]).astype(np.float32)
    store.add(voice, 0.0)
    assert store.skip(5.0, pauses_only=True) == pytest.approx(0.7, abs=0.05)
    left = store.take(100).samples
    assert (left == 1).sum() == 1000


def test_single_samples_do_not_make_a_piece_each() -> None:
    store = timeline()
    for index in range(3000):
        store.add(np.ones(1, np.float32), float(index))
    assert len(store._unspoken) < 10


def test_latency_is_of_the_last_frames_with_sound() -> None:
    seen = Latency(size=100)
    assert seen.summary()["total"]["p50_s"] is None
    for index in range(1000):
        seen.add(
            np.array([index, np.nan, index]),
            index + 0.5,
            index + 0.7,
            index + 0.8 if index > 900 else index + 9,
        )
    summary = seen.summary()
    assert summary["total"] == {"p50_s": 0.8, "p95_s": 0.8, "p99_s": 0.8}
    assert summary["fill"]["p50_s"] == 0.5
    assert summary["compute"]["p50_s"] == pytest.approx(0.2)
    assert summary["delivery"]["p50_s"] == pytest.approx(0.1)


def test_latency_may_be_asked_for_while_frames_are_sent() -> None:
    """Who asks sees whole frames: never a total whose parts are yet to be written."""

    def send(seen: Latency) -> None:
        for index in range(1000):
            seen.add(np.full(7, float(index)), index, index + 1, index + 2)

    for _ in range(10):
        seen = Latency(size=7000)
        sender = threading.Thread(target=send, args=(seen,))
        sender.start()
        while sender.is_alive():
            values = [value for part in seen.summary().values() for value in part.values()]
            assert None in values or np.isfinite(np.array(values, float)).all(), values


@pytest.mark.parametrize("level", [0.003, 0.4])
def test_the_running_gain_is_the_one_of_the_whole_sound(level) -> None:
    """A voice of steady loudness: after seconds the gain is within 1 dB of what measuring it whole gives."""
    rng = np.random.default_rng(2)
    voice = (
        level * rng.standard_normal(12 * RATE_HZ) * np.repeat(rng.random(120) > 0.2, RATE_HZ // 10)
    ).astype(np.float32)
    gain = RunningGain(RATE_HZ, -23.0)
    for at in range(0, len(voice), RATE_HZ):
        factor = gain.add(voice[at : at + RATE_HZ])
    whole = np.abs(normalise_loudness(voice, -23.0, RATE_HZ)).max() / np.abs(voice).max()
    assert 20 * np.log10(factor / whole) == pytest.approx(0, abs=1.0)
    assert len(gain._blocks) <= 300


def test_noise_without_speech_is_heard_as_silence_and_speech_is_not() -> None:
    rng = np.random.default_rng(3)
    gain = RunningGain(RATE_HZ, -23.0)
    speech = 0.05 * rng.standard_normal(4 * RATE_HZ)
    noise = 3e-4 * rng.standard_normal(8 * RATE_HZ)
    gain.add(speech)
    gain.add(noise)
    assert not gain.hear(noise).any()
    assert gain.hear(speech).any()
    with_both = np.concatenate([speech, noise])
    np.testing.assert_allclose(gain.hear(with_both), with_both * gain.factor, rtol=1e-5)
