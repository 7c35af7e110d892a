"""Whole streams in real time with a stand-in for the model, which flashes where its sound claps: through real
sources, the real encoder and a real RTMP server. Picture and sound are measured in what arrived there."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import soundfile
from live_outputs import (
    FPS,
    PER_FRAME,
    RATE_HZ,
    SIDE_PX,
    RtmpServer,
    clap_times,
    live,
    needs_nginx,
    rtmp_server,
)
from live_simulation import FRAMES as CHUNK_FRAMES
from live_simulation import rules

from flashtalk_cli.config import PcmFormat
from flashtalk_cli.live.clock import Clock
from flashtalk_cli.live.delivery import Delivery
from flashtalk_cli.live.inputs import parse_source
from flashtalk_cli.live.loop import Loop, Manners
from flashtalk_cli.live.pacing import JUMP_S
from flashtalk_cli.live.sources import FfmpegSource, Source, StdinSource
from flashtalk_cli.live.timeline import Taken, Timeline
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.limits import LivePolicy
from flashtalk_cli.media.live.targets import Target, parse_target
from flashtalk_cli.media.probe import probe

CLAP_S = 1.48  # between claps: no multiple of a chunk, so that they meet every place in one


class Flasher:
    """A performer that shows white where its own sound is loud, and takes a given part of real time."""

    def __init__(self, work: float) -> None:
        self._work_s = work * CHUNK_FRAMES / FPS

    def perform(self, sound: Taken, heard: np.ndarray) -> Generator[np.ndarray, None, None]:
        """One chunk, four frames at a time."""
        loud = np.abs(sound.samples).reshape(CHUNK_FRAMES, PER_FRAME).max(axis=1) > 0.4
        frames = np.full((CHUNK_FRAMES, SIDE_PX, SIDE_PX, 3), 40, np.uint8)
        frames[loud] = 255
        time.sleep(self._work_s / 2)
        for start in range(0, CHUNK_FRAMES, 4):
            time.sleep(self._work_s / 2 / 7)
            yield frames[start : start + 4]

    def rewind(self) -> None:
        """There is nothing to go back to."""


def clapping(seconds: float) -> np.ndarray:
    """A murmur with claps of 10 ms, each at the beginning of a frame: 48 kHz."""
    rng = np.random.default_rng(0)
    sound = (0.05 * rng.standard_normal(round(seconds * RATE_HZ))).clip(-0.15, 0.15)
    clap = 0.8 * np.sin(2 * np.pi * 2000 / RATE_HZ * np.arange(480))
    for at in np.arange(0.4, seconds - 0.1, CLAP_S):
        sound[round(at * FPS) * PER_FRAME :][:480] = clap
    return sound.astype(np.float32)


@contextmanager
def on_air(
    open_source: Callable[[Timeline], Source], targets: list[Target], work: float = 0.3, **changes: object
) -> Iterator[tuple[Loop, LiveEncoder]]:
    """A stream in the background; leaving the context waits for its end and ends its outputs."""
    timeline, clock, stop = Timeline(past_s=2, backlog_s=8, fps=FPS), Clock(), threading.Event()
    source = open_source(timeline)
    encoder = live(targets, policy=LivePolicy())
    chosen = rules(**changes)
    delivery = Delivery(chosen, lambda f, s: encoder.write(f, s) and None, clock, RATE_HZ, stop)
    loop = Loop(
        chosen,
        Manners(source.paced, source.may_wait_s, False),
        timeline,
        Flasher(work),
        delivery,
        stop,
        clock,
    )
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loop.run()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    with encoder:
        source.start()
        delivery.start()
        thread.start()
        try:
            yield loop, encoder
        except BaseException:
            stop.set()
            raise
        finally:
            thread.join(1200)
            source.close()
        assert not failures, failures
        assert encoder.end(10)


def when_sent(delivery: Delivery) -> list[float]:
    """Gets the time of each sending from now on."""
    found: list[float] = []
    send = delivery._sink

    def sink(frames: np.ndarray, samples: np.ndarray) -> None:
        found.append(time.monotonic())
        send(frames, samples)

    delivery._sink = sink
    return found


def file_of_claps(folder: Path, seconds: float) -> Callable[[Timeline], Source]:
    soundfile.write(folder / "claps.wav", clapping(seconds), RATE_HZ)
    source = parse_source(str(folder / "claps.wav"))
    return lambda timeline: FfmpegSource(source, False, timeline, Clock(), pytest.fail)


def check_sync(path: Path, least: int, missing: int = 0) -> None:
    """Every clap within a frame of its flash, from the first to the last; white frames on end are one flash."""
    white, clicks = clap_times(path)
    flashes = [at for at, before in zip(white, [-1.0, *white], strict=False) if at - before > 1.5 / FPS]
    assert len(clicks) >= least
    assert abs(len(flashes) - len(clicks)) <= missing
    offsets = [min(abs(flash - click) for flash in flashes) for click in clicks]
    assert sorted(offsets)[len(offsets) - 1 - missing] < 1 / FPS, offsets


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RtmpServer]:
    with rtmp_server(tmp_path / "server") as running:
        yield running


@needs_nginx
def test_what_an_rtmp_server_takes_is_in_sync_and_leaves_in_real_time(server, tmp_path) -> None:
    seconds = 5.0
    with on_air(
        file_of_claps(tmp_path, seconds),
        [parse_target("rtmp", server.address + "/key"), parse_target("file", str(tmp_path / "r.mp4"))],
    ) as (loop, _):
        sent_s = when_sent(loop.delivery)
    assert loop.delivery.first_sent_s is not None
    late_s = sent_s[-1] - loop.delivery.first_sent_s - (loop.delivery.sent_frames - 1) / FPS
    assert late_s > -1 / FPS
    assert late_s < JUMP_S + 2 or loop.delivery.jumps, "a machine that stood still"
    for path in (server.taken()[0], tmp_path / "r.mp4"):
        check_sync(path, least=3)
    frames = probe(tmp_path / "r.mp4").video.n_frames
    assert frames == loop.delivery.sent_frames == round(seconds * FPS) + loop.delivery.repeated_frames


def test_a_jittering_source_and_a_slow_machine_are_survived_by_four_outputs(tmp_path) -> None:
    """Sound in bursts up to 2 s late, a performer at 83 % of real time: bounded, counted, in sync."""
    out, into = os.pipe()
    sound = clapping(4.5)

    def feed() -> None:
        rng, at = np.random.default_rng(4), 0
        with os.fdopen(into, "wb") as pipe:
            while at < len(sound):
                n = int(rng.integers(1, 2 * RATE_HZ))
                time.sleep(min(len(sound) - at, n) / RATE_HZ)
                pipe.write(sound[at : at + n].astype("<f4").tobytes())
                pipe.flush()
                at += n

    pcm = PcmFormat(encoding="f32le", rate_hz=RATE_HZ)
    names = ["a.mp4", "b.mkv", "c.mov"]
    targets = [parse_target("file", str(tmp_path / name)) for name in names]
    targets.append(parse_target("hls", str(tmp_path / "hls")))
    threading.Thread(target=feed, daemon=True).start()
    with on_air(
        lambda timeline: StdinSource(out, pcm, timeline, Clock(), pytest.fail), targets, work=1.2
    ) as (loop, _):
        pass
    assert loop.delivery.repeated_frames > 0
    assert loop.timeline.dropped_samples == 0
    heard_s = (loop.timeline.arrived_samples + loop.timeline.silent_samples) / RATE_HZ
    sent_s = (loop.delivery.sent_frames - loop.delivery.repeated_frames) / FPS
    assert abs(heard_s - sent_s) < 2 * CHUNK_FRAMES / FPS
    for name in names:
        assert probe(tmp_path / name).video.n_frames == loop.delivery.sent_frames
        check_sync(tmp_path / name, least=3)


@needs_nginx
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_minutes_with_the_server_killed_five_times(server, tmp_path) -> None:
    """In sync at the end as at the beginning; the recording beside it loses nothing; memory does not grow."""
    seconds = 600.0
    targets = [parse_target("rtmp", server.address + "/key"), parse_target("file", str(tmp_path / "r.mkv"))]
    memory = []
    with on_air(file_of_claps(tmp_path, seconds), targets) as (loop, encoder):
        for _ in range(5):
            time.sleep(60)
            server.kill()
            time.sleep(5)
            server.start()
            memory.append(resident_bytes())
        time.sleep(60)
        statistics = {sink.kind: sink for sink in encoder.statistics()}
        assert statistics["rtmp"].reconnects >= 5
        assert statistics["file"].frames_dropped == 0
    assert memory[-1] - memory[0] < 30e6
    recorded = probe(tmp_path / "r.mkv").video.n_frames
    assert recorded == loop.delivery.sent_frames
    assert recorded - loop.delivery.repeated_frames == seconds * FPS
    assert loop.delivery.repeated_frames < 5 * FPS
    check_sync(tmp_path / "r.mkv", least=400)
    assert len(server.taken()) >= 6
    for path in server.taken():
        check_sync(path, least=5, missing=2)  # a clap may fall on either end


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
