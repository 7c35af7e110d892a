"""How an evaluation is spread over ranks."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashtalk_cli.distill.drive import Method
from flashtalk_cli.distill.evaluate import CHUNK_COST, Candidate, share_out
from flashtalk_cli.distill.losses import Guidance

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
