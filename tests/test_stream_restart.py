"""A stream whose worker is killed goes on with --restart: on air again, its recordings playable, nothing that was
written lost; and without it the recording that was cut off plays."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from stream_process import Stream, furnish

from flashtalk_cli import events
from flashtalk_cli.cli import restart
from flashtalk_cli.config import SoundSource, StreamJob
from flashtalk_cli.errors import FlashtalkError, InputError, WorkerError
from flashtalk_cli.media.part_file import part_path
from flashtalk_cli.media.probe import probe
from flashtalk_cli.presets import load

STATUS = {"position_s": 12.0, "ahead_s": 1.5, "frames": 250}


def job_of(folder: Path, **source: object) -> StreamJob:
    sound = SoundSource(**{"kind": "file", "where": "a.wav", **source})  # type: ignore[arg-type]
    return StreamJob(
        preset=load("mini", []),
        picture=folder / "p.png",
        source=sound,
        targets=(("file", str(folder / "talk.mp4")), ("hls", str(folder / "hls"))),
        control=folder / "control.sock",
    )


class Worker:
    """A stand-in that is on air and dies, as often as it is told to, and then ends in order."""

    def __init__(self, deaths: list[Exception], writes: bool = True) -> None:
        self.deaths = deaths
        self.jobs: list[StreamJob] = []
        self.writes = writes

    def __call__(self, job: StreamJob, on_event) -> int:
        self.jobs.append(job)
        recording = Path(dict(job.targets)["file"])
        if self.writes:
            part_path(recording).write_bytes(b"recorded")
        on_event(events.event("live", **STATUS))
        if self.deaths:
            raise self.deaths.pop(0)
        return 0


@pytest.fixture
def told(monkeypatch) -> list[events.Event]:
    monkeypatch.setattr(restart.Backoff, "wait_s", lambda *words: 0.0)
    return []


def test_what_was_recorded_gets_its_name_and_the_file_is_spoken_on(tmp_path, told) -> None:
    worker = Worker([WorkerError("killed"), FlashtalkError("internal error")])
    assert restart.run(job_of(tmp_path), worker, told.append, []) == 0
    assert [Path(dict(job.targets)["file"]).name for job in worker.jobs] == [
        "talk.mp4",
        "talk-2.mp4",
        "talk-3.mp4",
    ]
    assert [job.restarts for job in worker.jobs] == [0, 1, 2]
    assert [job.source.start_s for job in worker.jobs] == [0.0, 10.5, 21.0]
    assert {path.name for path in tmp_path.iterdir()} == {"talk.mp4", "talk-2.mp4", "talk-3.mp4.part"}
    warnings = [happened["message"] for happened in told if happened["event"] == "warning"]
    assert len(warnings) == 2
    assert "killed; it is started again" in warnings[0]
    assert "talk.mp4" in warnings[0]


def test_a_looped_file_begins_anew_and_an_unwritten_recording_keeps_its_name(tmp_path, told) -> None:
    worker = Worker([WorkerError("killed")], writes=False)
    assert restart.run(job_of(tmp_path, loop=True), worker, told.append, []) == 0
    assert worker.jobs[1].source.start_s == 0
    assert dict(worker.jobs[1].targets)["file"].endswith("talk.mp4")
    assert list(tmp_path.iterdir()) == []


def test_it_gives_up_after_some_deaths_in_a_row(tmp_path, told) -> None:
    worker = Worker([WorkerError(str(at)) for at in range(20)])
    with pytest.raises(WorkerError, match=str(restart.MOST_IN_A_ROW)):
        restart.run(job_of(tmp_path), worker, told.append, [])
    assert len(worker.jobs) == 1 + restart.MOST_IN_A_ROW


def test_what_would_come_again_at_once_or_was_never_on_air_ends_it(tmp_path, told) -> None:
    worker = Worker([InputError("no sound")])
    with pytest.raises(InputError):
        restart.run(job_of(tmp_path), worker, told.append, [])

    def never(job: StreamJob, on_event) -> int:
        raise WorkerError("out of memory")

    with pytest.raises(WorkerError):
        restart.run(job_of(tmp_path), never, told.append, [])


def test_a_request_to_end_while_it_waits_ends_it_in_order(tmp_path, told, monkeypatch) -> None:
    requests: list[int] = []
    monkeypatch.setattr(restart.Backoff, "wait_s", lambda *words: requests.append(15) or 60.0)
    began_s = time.monotonic()
    assert restart.run(job_of(tmp_path), Worker([WorkerError("killed")]), told.append, requests) == 0
    assert time.monotonic() - began_s < 5
    assert told[-1]["event"] == "done"
    assert told[-1]["path"] == str(tmp_path / "talk.mp4")


def test_waits_grow_and_are_bounded() -> None:
    backoff = restart.Backoff(random.Random(0), restart.FIRST_WAIT_S)
    waits = [backoff.wait_s(0.0) for _ in range(restart.MOST_IN_A_ROW)]
    assert 0.5 <= waits[0] <= 1 < waits[-1] <= 16


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return furnish(tmp_path_factory.mktemp("restart"))


@pytest.fixture
def streams() -> Iterator[list[Stream]]:
    started: list[Stream] = []
    yield started
    for stream in started:
        stream.close()


def worker_of(stream: Stream) -> int:
    """Process id of a stream's worker."""
    (pid,) = Path(f"/proc/{stream.process.pid}/task/{stream.process.pid}/children").read_text().split()
    return int(pid)


@pytest.mark.slow
def test_a_worker_killed_twice_comes_back_and_every_recording_plays(place, streams) -> None:
    """SIGKILL in mid-stream: the sound goes on where it was, and nothing that was written is lost."""
    words = ["--audio", "speech.wav", "--loop", "-o", "again.mp4", "--hls", "again", "--restart"]
    streams.append(stream := Stream(place, *words))
    for life in range(2):
        status = stream.wait_for(lambda e, life=life: e["restarts"] == life and e["media_s"] > 3)
        os.kill(worker_of(stream), signal.SIGKILL)
        name = "again.mp4" if not life else "again-2.mp4"
        stream.wait_for(lambda e, life=life: e["restarts"] == life + 1 and e["frames"] > 25, 90)
        found = probe(place / name)
        assert found.video.duration_s > status["media_s"] - 1.5, "all but what the encoder still held"
        assert abs(found.video.duration_s - found.audio.duration_s) < 0.2
    asked_s = time.monotonic()
    stream.process.send_signal(signal.SIGTERM)
    assert stream.end() == 0
    assert time.monotonic() - asked_s < 5
    assert probe(place / "again-3.mp4").video.n_frames > 25
    playlist = (place / "again/index.m3u8").read_text()
    assert playlist.count("ENDLIST") == 1
    numbers = [int(line[8:14]) for line in playlist.splitlines() if line.startswith("segment-")]
    assert numbers == sorted(set(numbers)), "segments count on"
    warnings = [e["message"] for e in stream.events if e["event"] == "warning"]
    assert sum("SIGKILL" in text for text in warnings) == 2
    assert not list(place.glob("again*.part"))


@pytest.mark.slow
def test_without_restart_a_killed_worker_leaves_a_part_that_plays(place, streams) -> None:
    streams.append(stream := Stream(place, "--audio", "speech.wav", "--loop", "-o", "cut.mp4"))
    stream.wait_for(lambda e: e["media_s"] > 3)
    os.kill(worker_of(stream), signal.SIGKILL)
    assert stream.end() == WorkerError.exit_code
    assert "SIGKILL" in stream.events[-1]["message"]
    assert probe(place / "cut.mp4.part").video.n_frames > 25
