"""Events to a parent that does not read them, stopped by Ctrl-Z or held up by its own reader: nobody in the worker
waits for it, and once it reads again it finds every event but stale statuses, and last the run's last word."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from flashtalk_cli import events

ROOT = Path(__file__).resolve().parent.parent
STATUS = {"state": "speaking", "source": "x" * 1200}  # as long as a status with an output or two
SOON_S = 20.0  # what does not wait for the parent is over long before, on any machine
LEAVING = f"""
import os, sys
sys.path.insert(0, {str(ROOT)!r})
from pathlib import Path
from flashtalk_cli import events
emitter = events.Emitter(Path(sys.argv[1]))
for frames in range(500):
    emitter.emit("live", frames=frames, source="x" * 1200)
emitter.error(RuntimeError("no luck"))
os._exit(1)
"""


@pytest.fixture
def line() -> Iterator[tuple[events.Listener, events.Emitter]]:
    """The parent's end and the worker's."""
    with tempfile.TemporaryDirectory() as name:
        with events.Listener(Path(name, "s")) as listener:
            emitter = events.Emitter(Path(name, "s"))
            yield listener, emitter
        emitter.close()


def within(limit_s: float, work: Callable[[], object]) -> None:
    """Do it in a thread; a failure, and no test that hangs, when it takes longer."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(limit_s)
    assert not thread.is_alive(), "it waits"


def read_until(listener: events.Listener, true: Callable[[events.Event], bool]) -> list[events.Event]:
    found: list[events.Event] = []
    end_s = time.monotonic() + SOON_S
    while not any(map(true, found)):
        assert time.monotonic() < end_s, found[-3:]
        found += listener.read(wait_s=0.1)
    return found


def ramble(emitter: events.Emitter, statuses: int = 1000) -> None:
    """Many statuses, with a warning after every hundredth."""
    for index in range(statuses):
        emitter.emit("live", frames=index, **STATUS)
        if index % 100 == 99:
            emitter.emit("warning", message=str(index))


def test_nobody_waits_for_a_parent_that_does_not_read(line) -> None:
    """Every thread goes on; warnings are kept in their order, of the statuses some old ones and none twice."""
    listener, emitter = line
    within(SOON_S, lambda: [ramble(emitter), emitter.emit("done", path="x"), emitter.close()])
    found = listener.drain()
    assert [e["message"] for e in found if e["event"] == "warning"] == [str(99 + 100 * n) for n in range(10)]
    statuses = [e["frames"] for e in found if e["event"] == "live"]
    assert statuses == sorted(set(statuses))
    assert 10 < len(statuses) < 1000
    assert found[-1]["event"] == "done", "the last word is last, and is there after the emitter has gone"


def test_a_parent_that_reads_again_gets_the_newest_status_without_another_event(line) -> None:
    listener, emitter = line
    within(SOON_S, lambda: ramble(emitter, 1001))
    read_until(listener, lambda e: e.get("frames") == 1000)
    emitter.emit("warning", message="later")
    read_until(listener, lambda e: e.get("message") == "later")


def test_the_last_word_and_the_end_wait_for_the_parent_only_so_long(line, monkeypatch) -> None:
    listener, emitter = line
    monkeypatch.setattr(events, "FLUSH_S", 0.3)

    def talk() -> None:
        for _ in range(3):
            emitter.emit("warning", message="x" * (8 << 20))  # more than any socket holds
        emitter.emit("done", path="x")
        emitter.close()

    within(SOON_S, talk)
    assert not [e for e in listener.drain() if e["event"] == "done"]


def test_a_parent_that_reads_late_gets_more_than_its_socket_holds(line, monkeypatch) -> None:
    """The end of the worker waits for it meanwhile."""
    listener, emitter = line
    monkeypatch.setattr(events, "FLUSH_S", SOON_S)
    texts = [str(index) * (1 << 19) for index in range(8)]

    def talk() -> None:
        for text in texts:
            emitter.emit("warning", message=text)
        emitter.emit("done", path="x")
        emitter.close()

    thread = threading.Thread(target=talk)
    thread.start()
    found = read_until(listener, lambda e: e["event"] == "done")
    thread.join()
    assert [e["message"] for e in found[:-1]] == texts


def test_an_error_arrives_although_the_process_ends_right_after_it(line) -> None:
    """Without `close`, and before the parent has read anything."""
    listener, emitter = line
    emitter.close()
    path = listener._server.getsockname()
    with subprocess.Popen([sys.executable, "-S", "-c", LEAVING, path]) as worker:
        assert worker.wait(SOON_S) == 1
    found = listener.drain()
    assert found[-1]["event"] == "error"
    assert "no luck" in found[-1]["message"]
