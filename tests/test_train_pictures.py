"""Which picture a rollout is shown: none of the frames that it is to make (properties)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_stages import make_toy, pool_of

from flashtalk_cli.distill.encoding import picture_frames, window_starts
from flashtalk_cli.distill.pool import Pool
from flashtalk_cli.distill.tables import Tables

CHUNK, MOTION = 33, 5
NEW = CHUNK - MOTION


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    n_pictures=st.integers(2, 6),
    n_chunks=st.integers(1, 6),
)
def test_a_rollout_is_not_shown_what_it_is_to_make(
    lengths: list[int], n_pictures: int, n_chunks: int
) -> None:
    """Property: of clips as they are encoded, all pictures outside the rollout; where there is none, the first frame."""
    starts = [window_starts(MOTION + n * NEW, CHUNK, NEW) for n in lengths]
    windows = [(clip, start) for clip, some in enumerate(starts) for start in some]
    pictures = [(clip, at) for clip, some in enumerate(starts) for at in picture_frames(some, n_pictures)]
    columns = [torch.tensor(column) for column in (*zip(*windows, strict=True), *zip(*pictures, strict=True))]
    tables = Tables(start=columns[1], clip=columns[0], picture_clip=columns[2], picture_frame=columns[3])
    span = CHUNK + (n_chunks - 1) * NEW
    choices = tables.of_rollouts(CHUNK, span)
    run = tables.chains(NEW)[1].tolist()
    for i, (clip, start) in enumerate(windows):
        if run[i] < n_chunks:
            continue
        shown = {pictures[number] for number in choices.table[i, : choices.counts[i]].tolist()}
        outside = {one for one in pictures if one[0] == clip and not start <= one[1] < start + span}
        assert shown == (outside or {(clip, start)})


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return pool_of(make_toy(tmp_path_factory.mktemp("toy")))


@pytest.mark.parametrize("n_chunks", [1, 2, 3, 4, 5])
def test_people_are_drawn_with_pictures_from_elsewhere(pool: Pool, n_chunks: int) -> None:
    """Example: in the toy's clips of five windows, with pictures of their frames 0 and 32, none is of frames to be made."""
    drawn = pool.buckets[0].draw_people(200, n_chunks, torch.Generator().manual_seed(n_chunks))
    for window, picture in zip(drawn.window.tolist(), drawn.picture.tolist(), strict=True):
        assert window // 5 == picture // 2, "of the same clip"
        start, frame = 8 * (window % 5), 32 * (picture % 2)
        assert not start + 5 <= frame < start + 13 + 8 * (n_chunks - 1)
    assert len(set(drawn.picture.tolist())) == (6 if n_chunks < 4 else 3)
