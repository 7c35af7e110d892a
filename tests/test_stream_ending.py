"""A request to end is met soon although the model is in the middle of a long call that no handler interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_outputs import n_frames
from noisy_stream import Noisy, Told, job_in
from stream_process import Stream, furnish

from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE
from flashtalk_cli.live import session
from flashtalk_cli.live.ending import GRACE_S, Ending
from flashtalk_cli.media.live.encoder import LiveEncoder

ROOT = Path(__file__).resolve().parent.parent
BUSY = f"""
import hashlib, signal, sys, threading
sys.path.insert(0, {str(ROOT)!r})
from flashtalk_cli.live.ending import Ending, heard_at_once, outlived
stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *words: None)
def end(late):
    print("ended", late)
    if "fail" in sys.argv:
        raise RuntimeError
    return 6 if "lost" in sys.argv else 0
watched = outlived(stop, 0.0, lambda: 130) if "early" in sys.argv else Ending(stop, end).watched()
with heard_at_once(stop), watched:
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


@pytest.mark.parametrize(
    ("word", "code", "said"),
    [
        ("on air", 0, "ended True"),
        ("fail", 1, "ended True"),
        ("lost", 6, "ended True"),
        ("early", INTERRUPTED_EXIT_CODE, ""),
    ],
)
def test_a_process_inside_a_long_call_ends_when_asked(word, code, said) -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY, word], stdout=-1, stderr=-1, text=True) as busy:
        assert busy.stdout
        assert busy.stdout.readline() == "ready\n"
        asked_s = time.monotonic()
        busy.send_signal(signal.SIGTERM)
        out, _ = busy.communicate(timeout=20)
    assert time.monotonic() - asked_s < GRACE_S + 1.5
    assert busy.returncode == code
    assert out.strip() == said


def test_what_ends_a_stream_is_done_once() -> None:
    """By whoever comes first, and the second waits until it is done."""
    done: list[bool] = []

    def end(late: bool) -> int:
        time.sleep(0.1)
        done.append(late)
        return 6

    ending = Ending(threading.Event(), end)
    threads = [threading.Thread(target=ending, args=(late,)) for late in (True, True)]
    for thread in threads:
        thread.start()
    assert ending() == 6
    assert len(done) == 1
    for thread in threads:
        thread.join()
    assert len(done) == 1


def test_a_request_to_stop_shortens_the_wait_for_an_output_that_takes_nothing(tmp_path, monkeypatch) -> None:
    """The sound is over and whoever reads standard output has paused: then the recording is whole, and code 0."""
    job = job_in(tmp_path, ("stdout", "-"), ("file", str(tmp_path / "kept.mp4")))
    stop, asked_s = threading.Event(), []
    end = LiveEncoder.end

    def ask() -> None:
        while not (tmp_path / "kept.mp4").exists():
            time.sleep(0.05)
        asked_s.append(time.monotonic())
        stop.set()

    def ending(encoder: LiveEncoder, limit_s: float) -> bool:
        assert limit_s == session.END_S
        threading.Thread(target=ask, daemon=True).start()
        return end(encoder, 10 * limit_s)

    monkeypatch.setattr(LiveEncoder, "end", ending)
    read_end, write_end = os.pipe()
    worker = SimpleNamespace(emitter=Told(), comment=lambda: "")
    assert session.lead(worker, job, Noisy(), stop, write_end) == 0  # type: ignore[arg-type]
    assert time.monotonic() - asked_s[0] < 30, "and not 300"
    os.close(read_end)
    os.close(write_end)
    *_, warning, done = (e for e in worker.emitter.events if e["event"] in ("warning", "done"))
    assert "not every output was done" in warning["message"]
    assert done["event"] == "done"
    assert n_frames(tmp_path / "kept.mp4") == done["frames"] >= 38


@pytest.mark.slow
def test_a_stream_that_is_not_on_air_yet_ends_at_once(tmp_path) -> None:
    """Its warm-up takes so many steps that no machine is done with it when the request comes."""
    words = ["--audio", "speech.wav", "--loop", "-o", "never.mp4", "--steps", "1000"]
    stream = Stream(furnish(tmp_path), *words)
    try:
        for name in ("encode", "warm"):
            end_s = time.monotonic() + 120
            while not any(e["event"] == "stage" and e["name"] == name for e in stream.events):
                assert time.monotonic() < end_s
                time.sleep(0.01)
        asked_s = time.monotonic()
        stream.process.send_signal(signal.SIGTERM)
        assert stream.end() == INTERRUPTED_EXIT_CODE
        assert time.monotonic() - asked_s < 5
    finally:
        stream.close()
    assert stream.events[-1]["event"] == "interrupted"
    assert not list(tmp_path.glob("never*"))
