"""How a video is split, held to: every token and pixel is somebody's, once, and ranks together compute what one
computes, for any counts (properties, with ranks as threads); a split that cannot be is refused (contract)."""

from __future__ import annotations

from functools import partial
from unittest.mock import Mock

import pytest
import torch
from attending import attend
from hypothesis import given, settings
from hypothesis import strategies as st
from thread_ranks import groups, on_ranks
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.errors import ConfigError
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.models.attention_fp8 import emulated, to_e4m3
from flashtalk_cli.parallel import shelf
from flashtalk_cli.parallel.peers import Reached
from flashtalk_cli.parallel.sequence import UlyssesRing
from flashtalk_cli.parallel.spatial import TileGrid
from flashtalk_cli.parallel.split import Grid, choose_grid, run_length, span, split, ulysses_degree

few = settings(max_examples=25)


@given(st.integers(1, 500), st.integers(1, 64))
def test_every_token_is_held_once(length: int, size: int) -> None:
    """Property: spans are neighbouring runs in rank order, none longer than what all hold."""
    spans = [span(length, size, rank) for rank in range(size)]
    assert [token for start, stop in spans for token in range(start, stop)] == list(range(length))
    assert max(stop - start for start, stop in spans) == run_length(length, size)


@given(st.integers(1, 64), st.integers(1, 64))
def test_ulysses_takes_all_that_divides(size: int, heads: int) -> None:
    """Property: the chosen degree divides ranks and heads, and no larger one does; two ranks are a ring."""
    degrees = [n for n in range(1, size + 1) if size % n == 0 and heads % n == 0]
    assert ulysses_degree(size, heads) == (1 if size == 2 else max(degrees))


sides = st.integers(1, 40)


@given(st.integers(1, 16), sides, sides, st.sampled_from([1, 8]))
def test_every_pixel_is_in_one_tile(size: int, height: int, width: int, scale: int) -> None:
    """Property: a chosen grid covers the picture once, no tile empty; else it says why it cannot."""
    if not any(size % n == 0 and n <= height and size // n <= width for n in range(1, size + 1)):
        with pytest.raises(ConfigError, match=f"^{size} GPUs cannot share a picture of {width} x {height} "):
            choose_grid(size, height, width)
        return
    grid = choose_grid(size, height, width)
    covered = torch.zeros(scale * height, scale * width, dtype=torch.int)
    for rank in range(size):
        tile = covered[grid.place(rank, scale)]
        assert tile.numel() > 0
        tile += 1
    assert grid.size == size
    assert (covered == 1).all()


@pytest.mark.parametrize(
    ("size", "shape"), [(2, (1, 2)), (4, (2, 2)), (6, (2, 3)), (8, (2, 4)), (7, (7, 1)), (1, (1, 1))]
)
def test_tiles_are_square_where_they_can_be(size: int, shape: tuple[int, int]) -> None:
    """Golden: the grids of a wide picture, and of the same one upright."""
    wide, tall = choose_grid(size, 56, 96), choose_grid(size, 96, 56)
    assert (len(wide.heights), len(wide.widths)) == shape
    assert (len(tall.widths), len(tall.heights)) == shape


def test_a_degree_that_does_not_divide_is_refused() -> None:
    """Contract: one line with the numbers."""
    with pytest.raises(ConfigError, match=r"^compute.ulysses 3 does not divide 4 GPUs and 6 heads; 2 does$"):
        split(4, 6, 8, 8, 3)


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """Ulysses and ring degree, heads, tokens, batch: ranks of any count, also more than tokens."""
    ulysses, ring = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    heads = ulysses * draw(st.integers(1, 3))
    return ulysses, ring, heads, draw(st.integers(1, 40)), draw(st.integers(1, 2))


def rings(ulysses: int, ring: int) -> list[UlyssesRing]:
    """The sequence of each rank."""
    everyone = groups(ulysses * ring)
    along = [groups(ulysses) for _ in range(ring)]
    across = [groups(ring) for _ in range(ulysses)]
    return [
        UlyssesRing(
            everyone[rank], along[rank // ulysses][rank % ulysses], across[rank % ulysses][rank // ulysses]
        )
        for rank in range(ulysses * ring)
    ]


@few
@given(sequences(), st.integers(0, 2**31))
def test_ranks_attend_as_one(case: tuple[int, int, int, int, int], seed: int) -> None:
    """Property: shard, attend, gather is attention, for any degrees, heads, tokens and batch; padding is not seen."""
    ulysses, ring, heads, length, batch = case
    q, k, v = torch.randn(3, batch, length, heads, 4, generator=torch.Generator().manual_seed(seed))
    ranks = rings(ulysses, ring)

    def work(rank: int) -> Tensor:
        own = ranks[rank]
        parts = [own.shard(x, 1) for x in (q, k, v)]
        start, stop = own.span(length)
        assert all(
            torch.equal(part[:, : stop - start], x[:, start:stop])
            for part, x in zip(parts, (q, k, v), strict=True)
        )
        return own.gather(attend(own, SDPA, *parts, length), 1, length)

    expected = SDPA(q, k, v)
    for found in on_ranks(len(ranks), work):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@few
@given(sequences(), st.integers(0, 2**31))
def test_ranks_attend_as_one_in_eight_bits(case: tuple[int, int, int, int, int], seed: int) -> None:
    """Property: e4m3 travels as it is, and each rank is told the scales of its own heads."""
    ulysses, ring, heads, length, batch = case
    draw = torch.Generator().manual_seed(seed)
    scales = 0.01 + torch.rand(3, batch, heads, generator=draw)
    whole = torch.randn(3, batch, length, heads, 16, generator=draw)
    q, k, v = (to_e4m3(x, scale) for x, scale in zip(whole, scales, strict=True))
    ranks, kernel = rings(ulysses, ring), partial(emulated, dtype=torch.float32)

    def work(rank: int) -> Tensor:
        own = ranks[rank]
        parts = (own.shard(x.float(), 1).to(x.dtype) for x in (q, k, v))
        return own.gather(attend(own, kernel, *parts, length, scales), 1, length)

    expected = kernel(q, k, v, scales)
    for found in on_ranks(len(ranks), work):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_ranks_begin_with_the_same_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: also one that got further than the others in a recording that failed."""
    monkeypatch.setattr(shelf, "reach", lambda sizes, *_: Reached(torch.zeros(sizes), (), Mock()))
    ours = shelf.PeerShelf(groups(2)[0])

    def room() -> Tensor:
        return ours.room((3,), torch.float32, torch.device("cpu"))

    first, second = room(), room()
    assert first is not second
    assert room() is first
    ours.begin()
    assert room() is first


def test_queries_keys_and_values_travel_together() -> None:
    """Contract: a self-attention is two exchanges among ranks that share heads, and one more round a ring."""
    x = torch.randn(1, 8, 4, 2)
    for (ulysses, ring), exchanges in {(2, 1): 2, (1, 2): 1, (2, 2): 3}.items():
        ranks = rings(ulysses, ring)
        on_ranks(len(ranks), lambda rank: attend(ranks[rank], SDPA, *[ranks[rank].shard(x, 1)] * 3, 8))  # noqa: B023
        begun = [own.ulysses.traffic.begun + own.ring.traffic.begun for own in ranks]
        assert begun == [exchanges] * len(ranks)


@st.composite
def cuts(draw: st.DrawFn) -> Grid:
    """Any cut of a picture, uneven too."""
    heights, widths = (tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))) for _ in "hw")
    return Grid(heights, widths)


@few
@given(cuts(), st.sampled_from([(1, 1), (0, 1), (1, 0)]), st.sampled_from([1, 2]))
def test_tiles_see_what_the_whole_sees(grid: Grid, border: tuple[int, int], scale: int) -> None:
    """Property: halos are the neighbours' pixels and zeros outside; cut, join, gather, collect and sum fit together."""
    height, width = scale * sum(grid.heights), scale * sum(grid.widths)
    picture = torch.arange(1.0, 1 + 2 * height * width).view(2, height, width)
    channels_last = picture.permute(1, 2, 0)[None]
    padded = F.pad(channels_last, (0, 0, *border, *border))
    members = groups(grid.size)

    def work(rank: int) -> Tensor | None:
        tiles = TileGrid(grid, members[rank])
        tile = tiles.cut(picture)
        last = tile.permute(1, 2, 0)[None]
        rows, columns = grid.place(rank, scale)
        around, missing = tiles.halo(last, *border)
        reach = sum(border)
        assert missing == (0, 0)
        assert torch.equal(
            around, padded[:, rows.start : rows.stop + reach, columns.start : columns.stop + reach]
        )
        assert torch.equal(tiles.join(tile), picture)
        assert torch.equal(tiles.gather(last), channels_last)
        assert tiles.sum(tile.sum(dtype=torch.float64)) == picture.sum(dtype=torch.float64)
        return tiles.collect(last)

    first, *others = on_ranks(grid.size, work)
    assert first is not None
    assert torch.equal(first, channels_last)
    assert others == [None] * (grid.size - 1)
