"""How a stream ends some of whose outputs came to nothing: what is said of each, and the exit code."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_outputs import free_port, live, n_frames, of_kind, send_claps, wait_for
from noisy_stream import Noisy, Told, job_in

from flashtalk_cli.events import Event
from flashtalk_cli.live import session
from flashtalk_cli.live.outcome import are_late, failure, where_it_went
from flashtalk_cli.media.live.encoder import LiveEncoder
from flashtalk_cli.media.live.statistics import SinkStatistics, State
from flashtalk_cli.media.live.targets import parse_target


def streamed(folder: Path, *targets: tuple[str, str]) -> tuple[int, list[Event]]:
    """The exit code and the events of a stream of noise."""
    worker = SimpleNamespace(emitter=Told(), comment=lambda: "")
    code = session.lead(worker, job_in(folder, *targets), Noisy(), threading.Event(), 1)  # type: ignore[arg-type]
    return code, worker.emitter.events


def warnings_of(events: list[Event]) -> list[str]:
    told = [str(happened["message"]) for happened in events if happened["event"] == "warning"]
    return [text for text in told if "command line" not in text]


def test_a_recording_that_failed_is_no_success(tmp_path, monkeypatch) -> None:
    """Its disk is full on the way: the others end as they should, and then the run has code 6."""
    write = LiveEncoder.write

    def fill_up(encoder: LiveEncoder, *what: object, **how: object) -> bool:
        lost = encoder._sinks[0]
        if not lost.has_failed and lost.statistics().frames_sent:
            lost._fail("No space left on device")
        return write(encoder, *what, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(LiveEncoder, "write", fill_up)
    lost, kept = tmp_path / "lost.mp4", tmp_path / "kept.mp4"
    code, events = streamed(tmp_path, ("file", str(lost)), ("file", str(kept)))
    assert code == 6
    *_, sent, last = events
    assert sent["name"] == "sent"
    assert (last["event"], last["type"], last["exit_code"]) == ("error", "OutputError", 6)
    assert last["message"] == f"{lost}: No space left on device; free some space or write elsewhere"
    assert not any("not every output" in text for text in warnings_of(events)), "the other one was done"
    assert not lost.exists()
    assert n_frames(kept) >= 38


def test_a_server_that_never_answered_is_no_success(tmp_path) -> None:
    """Connection refused all the time: no frame was sent, and that is said once at the end."""
    address = f"rtmp://127.0.0.1:{free_port()}/live"
    code, events = streamed(tmp_path, ("rtmp", f"{address}/k"), ("file", str(tmp_path / "kept.mp4")))
    assert code == 6
    *_, sent, last = events
    assert f"{address}/*** (never connected), {tmp_path}/kept.mp4 (" in sent["detail"]
    assert last["message"].startswith(f"{address}/***: never connected (")
    assert "\n" not in last["message"]
    assert not any("not every output" in text for text in warnings_of(events))
    assert n_frames(tmp_path / "kept.mp4") >= 38


def test_a_stream_that_went_everywhere_names_its_recording(tmp_path) -> None:
    code, events = streamed(tmp_path, ("hls", str(tmp_path / "hls")), ("file", str(tmp_path / "kept.mp4")))
    assert code == 0
    assert events[-1]["event"] == "done"
    assert str(events[-1]["path"]) == str(tmp_path / "kept.mp4")
    assert not warnings_of(events)


def test_a_recording_that_goes_on_elsewhere_has_two_names(tmp_path) -> None:
    with live([parse_target("file", str(tmp_path / "a.mp4"))]) as encoder:
        send_claps(encoder, 0, 125)
        wait_for(lambda: (tmp_path / "a.mp4.part").stat().st_size > 2000)
        assert encoder.recordings == ()
        assert encoder.sink_pids[0] is not None
        os.kill(encoder.sink_pids[0], signal.SIGKILL)
        send_claps(encoder, 125, 5)
        wait_for(lambda: of_kind(encoder, "file").reconnects == 1)
        send_claps(encoder, 130, 100)
        assert encoder.end(10)
        assert encoder.recordings == (tmp_path / "a.mp4", tmp_path / "a-2.mp4")


def test_frames_for_a_server_that_is_not_there_are_dropped_and_not_sent() -> None:
    """However many a pipe took before the connection was refused."""
    with live([parse_target("srt", f"srt://127.0.0.1:{free_port()}?connect_timeout=300")]) as encoder:
        for at in range(0, 60, 10):
            send_claps(encoder, at, 10)
            time.sleep(0.1)
        wait_for(lambda: of_kind(encoder, "srt").reconnects > 0)
        found = of_kind(encoder, "srt")
        assert (found.frames_sent, found.bytes_sent) == (0, 0)
        encoder.abort()


def sink(kind: str, state: State, frames: int = 100, why: str = "") -> SinkStatistics:
    return SinkStatistics(f"the {kind}", kind, state, 0, 0, frames, 0, why, 0.0)


def test_the_last_words_count_what_each_output_got_and_what_was_shown_twice() -> None:
    sinks = [sink("hls", "ended", 303), sink("srt", "failed", 0)]
    assert where_it_went(sinks, 0) == "the hls (303 frames), the srt (never connected); in real time"
    assert where_it_went(sinks[:1], 7) == "the hls (303 frames); 7 frames were shown twice"


@pytest.mark.parametrize(
    ("before", "after", "late", "said"),
    [
        (sink("rtmp", "live"), sink("rtmp", "ended"), False, ""),
        (sink("rtmp", "live"), sink("rtmp", "failed"), True, ""),
        (sink("rtmp", "failed"), sink("rtmp", "failed"), False, ""),
        (
            sink("rtmp", "waiting", 0),
            sink("rtmp", "failed", 0, "x"),
            False,
            r"the rtmp: never connected \(x\)",
        ),
        (sink("stdout", "live", 0), sink("stdout", "failed", 0), True, ""),  # nobody knows who reads it
        (sink("file", "live"), sink("file", "failed"), False, "the file: was not done when time was up"),
    ],
)
def test_what_is_said_of_an_output(before, after, late, said) -> None:
    others = sink("hls", "ended")
    assert are_late([others, before], [others, after]) == late
    problem = failure([others, after])
    assert bool(problem) == bool(said)
    if problem is not None:
        with pytest.raises(type(problem), match=said):
            raise problem
