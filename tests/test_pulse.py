"""Who hangs, held by an invented clock: the judge names a silent and a stuck rank in seconds once a run is warm,
never while it loads, rests, or was stopped itself (golden and property); beats travel by a store (contract)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtalk_cli import rendering
from flashtalk_cli.config import RenderJob
from flashtalk_cli.events import Emitter
from flashtalk_cli.parallel import peers, pulse
from flashtalk_cli.parallel.group import Group
from flashtalk_cli.parallel.mail import Mail
from flashtalk_cli.parallel.pulse import (
    BEAT_S,
    FIRST_S,
    SILENT_S,
    STUCK_GAPS,
    STUCK_S,
    Beat,
    Judge,
    Pulse,
    Verdict,
)
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.shelf import Shelf, shelf_of
from flashtalk_cli.parallel.traffic import Traffic
from flashtalk_cli.pipeline.session import _recorded
from flashtalk_cli.pipeline.streams import Graphs
from flashtalk_cli.presets import load

SIZE = 3


@dataclass
class Run:
    """Ranks whose beats are told, second by second, to a judge."""

    judge: Judge = field(default_factory=lambda: Judge(SIZE))
    now_s: float = 100.0
    beats: list[Beat] = field(
        default_factory=lambda: [Beat(f"host-{rank // 2}", f"log-{rank}") for rank in range(SIZE)]
    )

    def warm(self, gap_s: float = BEAT_S, rounds: int = pulse.WARM_ROUNDS) -> Run:
        """Rounds with so long a gap between exchanges."""
        self.go_on(1.0)
        for _ in range(rounds):
            assert self.go_on(gap_s, moving=()) is None
            assert self.go_on(2.0) is None
            self.beats = [replace(beat, rounds=beat.rounds + 1) for beat in self.beats]
        return self

    def go_on(
        self, for_s: float, moving: tuple[int, ...] = (0, 1, 2), beating: tuple[int, ...] = (0, 1, 2)
    ) -> Verdict | None:
        """Let time pass; the verdict, if there is one before it is over."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s += BEAT_S
            for rank in beating:
                beat = self.beats[rank]
                self.beats[rank] = replace(beat, count=beat.count + 1, begun=beat.begun + (rank in moving))
            if verdict := self.judge.look(list(self.beats), self.now_s):
                return verdict
        return None


def test_a_silent_rank_is_named() -> None:
    """Golden: stopped, or its host gone; whoever waits for it is not."""
    run = Run().warm()
    begin_s = run.now_s
    verdict = run.go_on(60, moving=(0,), beating=(0, 1))
    assert verdict
    assert verdict.text.startswith(f"rank 2 on host-1 gave no sign of life for {SILENT_S + 0.5:.0f} s")
    assert verdict.text.endswith("its log: log-2")
    assert run.now_s - begin_s < SILENT_S + 2 * BEAT_S


def test_the_rank_that_the_others_wait_for_is_named() -> None:
    """Golden: it began the fewest exchanges."""
    run = Run().warm()
    run.go_on(BEAT_S, moving=(0, 2))
    begin_s = run.now_s
    verdict = run.go_on(60, moving=())
    assert verdict
    assert verdict.text.startswith("rank 1 on host-0 hangs: the others have waited ")
    assert run.now_s - begin_s < STUCK_S + 2 * BEAT_S


def test_where_all_wait_in_one_exchange_the_network_is_blamed() -> None:
    """Golden: nobody is behind."""
    verdict = Run().warm().go_on(60, moving=())
    assert verdict
    assert "all 3 ranks (host-0, host-1)" in verdict.text


@pytest.mark.parametrize("rounds", range(pulse.WARM_ROUNDS))
def test_first_rounds_may_take_long(rounds: int) -> None:
    """Contract: what compiles, loads or tunes for minutes trips nothing; without end, it does."""
    run = Run().warm(rounds=rounds)
    assert run.go_on(FIRST_S - 10, moving=()) is None
    assert run.go_on(20, moving=()) is not None


def test_a_rank_may_be_silent_while_libraries_load() -> None:
    """Contract: before the first round is over."""
    run = Run()
    run.go_on(1.0)
    assert run.go_on(FIRST_S - 10, moving=(0, 1), beating=(0, 1)) is None


@settings(max_examples=30)
@given(st.floats(0.5, 30))
def test_what_is_usual_is_no_hang(gap_s: float) -> None:
    """Property: gaps that were seen in a warm round may come again, twice as long too; not for ever."""
    run = Run().warm(gap_s, rounds=pulse.WARM_ROUNDS + 1)
    assert run.go_on(2 * gap_s if gap_s > STUCK_S else STUCK_S - BEAT_S, moving=()) is None
    begin_s = run.now_s
    assert run.go_on(200, moving=()) is not None
    assert run.now_s - begin_s <= max(STUCK_S, STUCK_GAPS * (gap_s + 2 * BEAT_S)) + 2 * BEAT_S


def test_who_rests_is_not_stuck() -> None:
    """Contract: a slow consumer of rank 0's frames stops all ranks, as long as it likes; then the clock starts."""
    run = Run().warm()
    run.beats[0] = replace(run.beats[0], resting=True)
    assert run.go_on(1000, moving=()) is None
    run.beats[0] = replace(run.beats[0], resting=False)
    assert run.go_on(STUCK_S - BEAT_S, moving=()) is None
    assert run.go_on(60, moving=()) is not None


def test_a_judge_that_was_stopped_blames_nobody() -> None:
    """Contract: after a pause of its own it looks anew."""
    run = Run().warm()
    run.now_s += 1000
    assert run.go_on(SILENT_S - BEAT_S, moving=()) is None


def test_who_ended_in_order_is_not_missed() -> None:
    """Contract: ranks leave one after another."""
    run = Run().warm()
    run.beats[1] = replace(run.beats[1], last_word="")
    assert run.go_on(1000, moving=(), beating=(0, 2)) is None


def test_a_last_word_is_the_verdict() -> None:
    """Contract: what a rank says of its own end comes first, at any time."""
    run = Run()
    run.beats[1] = replace(run.beats[1], last_word="rank 1 has its reason")
    assert run.go_on(1.0) == Verdict("rank 1 has its reason", told=True)


class Memory:
    """A store in memory."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    def set(self, key: str, value: str, /) -> None:
        self.kept[key] = value.encode()

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        return [self.kept[key] for key in keys]


def test_ranks_hear_each_others_last_word() -> None:
    """Contract: by way of the store, within a few beats; whoever ended in order hears nothing any more."""
    store, heard, over = Memory(), [], threading.Event()
    first, second, third = (Pulse(3, rank, store, Traffic(), host="h", log="l") for rank in range(3))

    def note(verdict: Verdict) -> None:
        heard.append(verdict)
        over.set()

    first.start(note)
    third.start(heard.append)
    third.end()
    second.end("rank 1 on h: no memory")
    second.end("and another word")
    assert over.wait(10)
    first.end()
    assert heard == [Verdict("rank 1 on h: no memory", told=True)]


class Gone(Memory):
    """A store whose host went away."""

    def multi_get(self, keys: list[str], /) -> list[bytes]:
        raise RuntimeError("Connection reset by peer\nand a backtrace")


def test_the_loss_of_the_store_is_told() -> None:
    """Fault: torchrun, or the host that it runs on, is gone."""
    heard, over = [], threading.Event()
    pulse = Pulse(2, 1, Gone(), Traffic(), host="h", log="l")
    pulse.start(lambda verdict: (heard.append(verdict), over.set()))  # type: ignore[func-returns-value]
    assert over.wait(10)
    assert heard == [Verdict("rank 1 on h lost torchrun's store: Connection reset by peer", told=True)]


def test_a_dead_rank_is_seen_at_once() -> None:
    """Fault: its process is gone without a word, and no library tells; whoever started it says why."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    store, heard, over = Memory(), [], threading.Event()
    here = Pulse(2, 0, store, Traffic(), host="h", log="l")
    gone = Beat("h", "log-1", process=child.pid, space=pulse.process_space())
    store.set("pulse-1", json.dumps(asdict(replace(gone, space="another machine"))))
    here.start(lambda verdict: (heard.append(verdict), over.set()))  # type: ignore[func-returns-value]
    assert not over.wait(3 * BEAT_S)
    store.set("pulse-1", json.dumps(asdict(gone)))
    assert over.wait(10)
    assert heard == [Verdict(f"rank 1 on h, process {child.pid}, died; its log: log-1", told=True)]
    assert pulse.state_of(os.getpid()) in "RS"


def test_a_stopped_rank_is_seen_while_libraries_load() -> None:
    """Fault: nobody takes it for one that is busy, in the first round either."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    os.kill(child.pid, signal.SIGSTOP)
    store, heard, over = Memory(), [], threading.Event()
    here = Pulse(2, 0, store, Traffic(), host="h", log="l")
    store.set(
        "pulse-1", json.dumps(asdict(Beat("h", "log-1", process=child.pid, space=pulse.process_space())))
    )
    begin_s = time.monotonic()
    here.start(lambda verdict: (heard.append(verdict), over.set()))  # type: ignore[func-returns-value]
    try:
        assert over.wait(20)
    finally:
        here.end()
        child.kill()
        child.wait()
    assert SILENT_S < time.monotonic() - begin_s < 10
    assert heard[0].text.startswith("rank 1 on h gave no sign of life for 5 s: it was stopped")


def test_exchanges_are_counted_as_the_gpu_comes_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract, with a stand-in for CUDA: a process far ahead of a GPU that hangs hides nothing; graphs hold no events."""
    events: list[SimpleNamespace] = []
    recording = False

    def event() -> SimpleNamespace:
        made = SimpleNamespace(passed=False, record=lambda _: None)
        made.query = lambda: made.passed
        events.append(made)
        return made

    monkeypatch.setattr(torch.cuda, "Event", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: recording)
    traffic = Traffic(torch.device("cuda", 1))
    for _ in range(5):
        with traffic:
            pass
    assert traffic.begun == 0
    events[0].passed = events[1].passed = True
    assert traffic.begun == 2
    for made in events:
        made.passed = True
    assert traffic.begun == 5
    recording = True
    with traffic:
        pass
    assert (traffic.begun, len(events)) == (6, 5)


def test_alone_nobody_watches() -> None:
    """Contract: one process has nobody to wait for."""
    before = threading.active_count()
    alone = Pulse()
    alone.start(pytest.fail)
    with alone.resting():
        alone.round()
    alone.end()
    assert threading.active_count() == before


def test_a_replay_counts_as_one_exchange_and_its_recording_ends_before_the_groups(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Contract, with a stand-in for CUDA graphs: counted before each replay, untimed, given up before ranks leave."""
    done: list[str] = []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: done.append("replay"))
    )
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: done.append("ended"))
    ranks = Ranks(torch.device("cpu"), size=2)
    ranks.traffic.timer = SimpleNamespace(begin=lambda: done.append("timed"), end=lambda: None)
    graphs = Graphs(lambda: (ranks.traffic.count(), done.append("counted")))  # type: ignore[func-returns-value]
    ranks.before_leaving.append(lambda: (graphs.clear(), done.append("given up")))  # type: ignore[func-returns-value]
    what, x = object(), torch.ones(3)
    for _ in range(3):  # as it is, recorded and replayed, replayed
        assert torch.equal(graphs("double", what, lambda x: 2 * x, x), 2 * x)
    assert ranks.traffic.begun == 2
    ranks.leave()
    assert done == ["counted", "replay"] * 2 + ["given up", "ended"]
    assert not graphs._recordings


def test_a_tile_as_large_of_another_picture_is_recorded_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: 448 x 768 in two tiles one above the other, then 896 x 384 in two beside each other: 48 x 56 latents each."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", object)
    models: Any = SimpleNamespace(graphs=Graphs(), tiles=SimpleNamespace(count=2), vae=object())
    tile = torch.ones(1, 16, 2, 48, 56)
    for _ in range(3):
        assert _recorded(models, "motion", (96, 56), lambda x: torch.cat([x, x], dim=3), tile).shape[3:] == (
            96,
            56,
        )
    for _ in range(3):
        found = _recorded(models, "motion", (48, 112), lambda x: torch.cat([x, x], dim=4), tile)
        assert found.shape[3:] == (48, 112)


def test_what_a_recording_keeps_is_one_object_from_the_first_call_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: so that another recording can read it; a change of what is given besides makes it anew."""
    replays: list[None] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replays.append(None)))
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    monkeypatch.setattr(torch.cuda, "Stream", object)
    graphs, what, x = Graphs(), object(), torch.ones(3)
    found = [graphs.kept("double", (what, 1000, (0, 2000)), lambda x: (2 * x,), x) for _ in range(3)]
    assert found[0] is found[1] is found[2]
    assert torch.equal(found[0][0], 2 * x)
    assert len(replays) == 3
    assert graphs.kept("double", (what, 1000, (0, 2001)), lambda x: (2 * x,), x) is not found[0]
    assert graphs.kept("double", (object(), 1000, (0, 2001)), lambda x: (3 * x,), x)[0][0] == 3
    graphs.works = False
    assert graphs.kept("double", (what,), lambda x: (2 * x,), x) is not found[0]


@pytest.mark.parametrize("fails_here", [True, False])
def test_a_step_is_recorded_by_all_ranks_or_by_none(
    monkeypatch: pytest.MonkeyPatch, fails_here: bool
) -> None:
    """Contract: where one rank has no memory left for a recording, the others give theirs up; each asks once."""
    asked: list[bool] = []
    monkeypatch.setattr(
        torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: pytest.fail("replayed"))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", object)

    def recording(*_: object, **__: object) -> nullcontext[None]:
        if fails_here:
            raise torch.OutOfMemoryError("no memory")
        return nullcontext()

    monkeypatch.setattr(torch.cuda, "graph", recording)
    graphs = Graphs(agree=lambda failed: (asked.append(failed), True)[1])
    what, x = object(), torch.ones(3)
    for _ in range(4):
        assert torch.equal(graphs("double", what, lambda x: 2 * x, x), 2 * x)
    assert asked == [fails_here]
    assert not graphs.works


@pytest.mark.parametrize("fails_here", [True, False])
def test_gpus_that_cannot_share_memory_exchange_by_collectives(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, fails_here: bool
) -> None:
    """Contract: tried once, by all; where it fails on any rank, it is said in a line and all do without."""
    tried: list[None] = []

    def reach(*_: object) -> None:
        tried.append(None)
        if fails_here:
            raise RuntimeError("cuMemExportToShareableHandle: not permitted\nat ...")

    monkeypatch.setattr(peers, "reach", reach)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda *_: True)
    asked: list[bool] = []  # whether GPUs may not reach each other, and then whether it failed
    monkeypatch.setattr(Ranks, "any", lambda _, here: (asked.append(here), here or len(asked) == 2)[1])
    monkeypatch.setattr(Ranks, "everyone", Group(2, 0, None))
    ranks = Ranks(torch.device("cuda", 0), size=2)
    assert type(ranks.mail) is Mail
    assert type(shelf_of(ranks.everyone, reached=ranks.reached)) is Shelf
    assert len(tried) == 1
    assert asked == [False, fails_here]
    assert ("by collectives, which is slower" in caplog.text) == fails_here
    assert "at ..." not in caplog.text


def test_a_run_that_rests_is_not_ended_by_the_libraries() -> None:
    """Contract: ranks meet within ten minutes, and from then on the pulse alone says what takes too long."""
    program = (
        "import torch, torch.distributed as dist\n"
        "from flashtalk_cli.parallel.ranks import WATCHED_S, join\n"
        "ranks = join(torch.device('cpu'), None, WATCHED_S)\n"
        "limit = dist.group.WORLD._get_backend(torch.device('cpu')).options._timeout\n"
        "assert limit.total_seconds() == ranks.patience_s == WATCHED_S > 7 * 24 * 3600, limit\n"
        "ranks.leave()\n"
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "TORCHELASTIC_RUN_ID": "alone"}
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, **alone, **place}, check=True, timeout=60
    )


@pytest.mark.parametrize("n_frames", [2, 9])
def test_a_file_may_take_long_to_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, n_frames: int) -> None:
    """Contract: ranks that wait for the next clip are told that rank 0 rests, whole and interrupted."""
    done: list[str] = []

    class File:
        frames_written = 0

        def __init__(self, *_: object, **__: object) -> None:
            """Takes what a file takes."""

        def __enter__(self) -> File:
            return self

        def __exit__(self, *_: object) -> None:
            """Closed."""

        def write(self, frames: np.ndarray) -> None:
            self.frames_written += len(frames)

        def end(self, how: str) -> Path:
            assert ranks.pulse._resting, how
            done.append(how)
            return tmp_path / "x.mp4"

        def finish(self) -> Path:
            return self.end("finished")

        def abort(self) -> Path:
            return self.end("interrupted")

    monkeypatch.setattr(rendering, "VideoFile", File)
    ranks = Ranks(torch.device("cpu"))
    worker: Any = SimpleNamespace(ranks=ranks, comment=lambda: "", emitter=Emitter(None))
    preset = load("mini")
    speech: Any = SimpleNamespace(n_samples=n_frames * preset.sampling.samples_per_frame)
    job = RenderJob.model_construct(
        preset=preset, output=tmp_path / "x.mp4", speech=speech, audio=tmp_path / "x.wav", overwrite=False
    )
    rendering.write(worker, job, iter([torch.zeros(2, 4, 4, 3, dtype=torch.uint8)]), -1, threading.Event())
    assert done == ["finished" if n_frames == 2 else "interrupted"]
    assert not ranks.pulse._resting
