"""How lips are compared, by whose voices they are told, and how an evaluation is spread over ranks."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flashtalk_cli.distill import tasks
from flashtalk_cli.distill.config import Evaluation
from flashtalk_cli.distill.drive import Method
from flashtalk_cli.distill.evaluate import CHUNK_COST, Candidate, share_out
from flashtalk_cli.distill.losses import Guidance
from flashtalk_cli.distill.measures import MAX_LAG_FRAMES, compare_lips
from flashtalk_cli.distill.report import by_voice
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE
from flashtalk_cli.parallel.ranks import Ranks

METHODS = (Method(40, Guidance(1.0, 2.0)), Method(4), Method(2))


def _candidate(method: Method, n_chunks: int) -> Candidate:
    return Candidate("", lambda: None, method, n_chunks)  # type: ignore[arg-type,return-value]


def _cost(candidate: Candidate) -> float:
    return candidate.n_chunks * (candidate.method.evaluations + CHUNK_COST)


@given(
    st.lists(st.builds(_candidate, st.sampled_from(METHODS), st.integers(1, 300)), min_size=1, max_size=9),
    st.integers(1, 5),
)
def test_every_candidate_is_measured_once_and_no_rank_has_much_more(
    candidates: list[Candidate], n_ranks: int
) -> None:
    """Property: whoever has most to do has at most the longest candidate more than whoever has least."""
    shares = share_out(candidates, n_ranks)
    assert sorted(place for share in shares for place in share) == list(range(len(candidates)))
    loads = [sum(_cost(candidates[place]) for place in share) for share in shares]
    assert max(loads) - min(loads) <= max(map(_cost, candidates)) + 1e-6


def test_the_teacher_has_a_rank_of_its_own() -> None:
    """Example: a teacher's five minutes take longer than all that two students are put to."""
    teacher, apart = _candidate(METHODS[0], 270), _candidate(Method(4), 9)
    students = [_candidate(METHODS[1], 270), _candidate(METHODS[2], 9)] * 2
    assert share_out([teacher, apart, *students], 2)[0] == [0]


def _gaps(n_frames: int = 250) -> np.ndarray:
    """Two people's gaps, shut in every fourth second."""
    noise = np.random.default_rng(0).normal(size=(2, n_frames + 8))
    smooth = np.stack([np.convolve(one, np.ones(5) / 5, "same") for one in noise])[:, 4:-4]
    shut = (np.arange(n_frames) // 25) % 4 == 0
    return np.where(shut, 0, np.clip(smooth + 0.6, 0.1, None))


@given(st.integers(-MAX_LAG_FRAMES, MAX_LAG_FRAMES), st.floats(0.1, 10), st.floats(0, 1))
def test_lips_that_only_come_late_at_another_scale_agree(lag: int, scale: float, offset: float) -> None:
    """Property: the best lag is found, and there they agree; how far open shut lips are is told."""
    truth = _gaps()
    found = compare_lips(scale * np.roll(truth, lag, axis=1) + offset * scale, truth)
    assert found.lag_frames == lag
    assert found.correlation == pytest.approx(1, abs=1e-6)
    assert found.correlation_now <= found.correlation + 1e-9
    if lag == 0:
        wide = np.quantile(truth, 0.95, axis=1)
        assert found.closed == pytest.approx(float(np.mean(offset / (wide + offset))), abs=1e-6)


def test_lips_of_the_silent_do_not_count() -> None:
    """Example: who says nothing has no correlation, and a mouth that never moves has 0."""
    truth = np.concatenate([_gaps(), np.zeros((1, 250))])
    still = truth.copy()
    still[1] = 0.3
    found = compare_lips(still, truth)
    assert found.people == 2
    assert found.each[:2] == (pytest.approx(1), 0.0)
    assert math.isnan(found.each[2])
    assert found.correlation == pytest.approx(0.5)
    assert found.worst == 0
    nobody = compare_lips(truth[2:], truth[2:])
    assert nobody.people == 0
    assert math.isnan(nobody.correlation)


def test_lips_by_whose_voice_was_heard() -> None:
    """Example: the mean of those who speak with an engine's voices, the silent left out."""
    truth = np.concatenate([_gaps(), np.zeros((1, 250))])
    still = truth.copy()
    still[1] = 0.3
    lines = by_voice([("me", compare_lips(still, truth))], ["kokoro", "flite", "flite"]).splitlines()
    assert lines[0] == "| lips r by voices | flite, 2 people | kokoro, 1 people |"
    assert lines[2] == "| me | 0.000 | 1.000 |"


def test_an_evaluation_that_is_asked_to_end_does_so_between_people(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: whoever is drawn is told, and nobody more once it should end: 130, with nothing written."""
    stop, drawn, said = threading.Event(), [], []

    def draw(encoders: object, bank: object, plan: object, told: Callable[[int], None]) -> None:
        for number in range(4):
            told(number)
            drawn.append(number)
            if number == 1:
                stop.set()

    monkeypatch.setattr(tasks, "draw_panel", draw)
    monkeypatch.setattr(tasks, "Encoders", lambda *_: None)
    monkeypatch.setattr(tasks, "_candidates", lambda _: [_candidate(Method(4), 9)])
    emitter = SimpleNamespace(emit=lambda event, **more: said.append((event, more.get("done"))))
    preset = SimpleNamespace(evaluation=Evaluation(people=4))
    job = SimpleNamespace(preset=preset, base=None, source=Path("bank"))
    work = SimpleNamespace(
        job=job,
        ranks=Ranks(torch.device("cpu")),
        stop=stop,
        emitter=emitter,
        folder=None,
        say=lambda *_: None,
    )
    assert tasks.evaluate(work) == INTERRUPTED_EXIT_CODE  # type: ignore[arg-type]
    assert drawn == [0, 1]
    assert said == [("progress", 0), ("progress", 1), ("interrupted", None)]
