"""`flashtalk doctor` warns of a machine that is slower than real time, before anybody is on air."""

from __future__ import annotations

import json
import time

import pytest

from flashtalk_cli import events
from flashtalk_cli.cli import pace
from flashtalk_cli.cli.app import run
from flashtalk_cli.errors import ModelError


@pytest.mark.parametrize(
    ("realtime", "state", "said"),
    [(0.27, "note", "too slow to be live"), (1.1, "note", "little to spare"), (2.0, "good", "fast enough")],
)
def test_the_speed_is_judged(realtime, state, said) -> None:
    found = pace.pace(realtime)
    assert (found.topic, found.state) == ("speed", state)
    assert said in found.text
    assert f"{realtime:.2f} s of video in a second" in found.text


def test_chunks_are_timed_without_the_first_and_then_the_worker_is_asked_to_end(monkeypatch) -> None:
    """A worker whose chunks take 0.1 s, the first a whole second, is found to be 11.2 times as fast as life."""
    asked: list[bool] = []

    def stand_in(job, on_event, *, requests, **rest) -> int:
        for index in range(job.warmup_chunks + job.chunks):
            time.sleep(0.1 if index else 1.0)
            asked.append(bool(requests))
            on_event(events.event("progress", name="measure", done=index + 1, total=9, unit="chunks"))
        return 130 if requests else 0

    monkeypatch.setattr(pace.launch, "run", stand_in)
    assert pace.rehearse() == pytest.approx(11.2, rel=0.2)
    assert not any(asked)


def test_a_worker_that_fails_is_no_speed(monkeypatch) -> None:
    def broken(*words, **rest) -> int:
        raise ModelError("no such model")

    monkeypatch.setattr(pace.launch, "run", broken)
    assert pace.rehearse() is None
    assert "not measured" in pace.pace(None).text


@pytest.mark.slow
def test_this_machine_is_measured(capsys) -> None:
    assert run(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)["findings"]
    (speed,) = [finding for finding in findings if finding["topic"] == "speed"]
    assert "s of video in a second here" in speed["text"]
