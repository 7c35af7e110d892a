"""One video's tokens over the ranks that make it together: shard, attend, gather.

The model is written once, for a rank's own tokens. It is handed a `Sequence` and says three
things to it: *shard* the tokens before the first block, *attend* in self-attention (the only
place where a token meets the others), *gather* after the last. With one rank each of them
is the identity.

To attend is an `Exchange`: the model writes queries, keys and values where it says, so that no copy is left
between a block's kernels and what travels, and tells it when keys and values are there.

A rank holds a run of neighbouring tokens, all runs of one length. Where the tokens do not divide
by the ranks, the end is filled up with zeros once, so a rank may hold more tokens than `span` says
are real, or none that is real; padding is never attended to and never gathered.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.group import ALONE, Group
from flashtalk_cli.parallel.shelf import Shelf
from flashtalk_cli.parallel.split import run_length, span


class Attend(Protocol):
    """Attention of q [B, n, heads, head_dim] to k and v [B, m, heads, head_dim], of q's shape."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None, /) -> Tensor:
        """scales: float32 [3, B, heads], what q, k and v were divided by where they come in eight bits."""


class Size(NamedTuple):
    """Of what a rank has of a self-attention: its queries, and its share of keys and values."""

    videos: int
    tokens: int  # held here
    heads: int
    head_dim: int
    length: int  # real tokens of the whole video
    dtype: torch.dtype
    device: torch.device


class Exchange:
    """One self-attention of the tokens held here, from where its parts are written to what comes of it: on one rank.

    q, k, v: memory to write them to, [B, n, groups of heads, channels of a group]; None: anywhere, as [B, n, dim].
    """

    keys_first: ClassVar[bool] = False  # whether keys and values should be made before queries

    def __init__(self, size: Size) -> None:
        self.size = size
        self.q: Tensor | None = None
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def send(self) -> None:
        """Keys and values are written: they may travel while the queries are made."""

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """Attention to the keys of all tokens: [B, n, dim], or in groups as `q` is.

        q, k, v: as they were written. scales: see `Attend`, of all heads.
        """
        return kernel(self._heads(q), self._heads(k), self._heads(v), scales).flatten(2)

    def _heads(self, x: Tensor) -> Tensor:
        return x.flatten(2).unflatten(2, (self.size.heads, self.size.head_dim))


@dataclass(frozen=True)
class Sequence:
    """How a sequence of tokens is spread over ranks: here one rank, and it holds all."""

    def span(self, length: int) -> tuple[int, int]:
        """First and one past the last of the real tokens held here, of `length` in all."""
        return 0, length

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of tokens along `dim`, padded to the run length that all ranks share."""
        return x

    def exchange(self, size: Size) -> Exchange:
        """The next self-attention. No gradient goes through one that exchanges anything."""
        return Exchange(size)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` real tokens along `dim`, in order, on every rank."""
        return x


UNDIVIDED = Sequence()


@dataclass(frozen=True)
class UlyssesRing(Sequence):
    """A grid of ranks: `ulysses` neighbours share heads, `ring` such groups share keys and values.

    Self-attention needs every key for every query, but only head by head. So the ranks of an Ulysses
    group swap: each gives away its tokens of the other ranks' heads and gets all of the group's tokens
    for heads of its own (`Swap`). That moves 4 / size of the activations, and it works for as many ranks as
    divide the heads.

    The rest is along the ring: the groups keep their queries, and keys and values go round. Here they
    are gathered at once and not passed on neighbour by neighbour: the same bytes in one collective
    in place of size - 1, and one plain softmax, where a ring must merge partial ones. Its price
    is memory for all keys and values of a rank's heads in one layer. Where nothing is swapped, nothing but
    keys and values travels, and it does while the queries are made (`Gathering`).

    Ranks are numbered along Ulysses groups first, so that a group's tokens are a run too.
    """

    everyone: Group = ALONE
    ulysses: Group = ALONE
    ring: Group = ALONE
    shelf: Shelf | None = field(default=None, compare=False)  # of the ring; None: a collective's
    beside: Beside = field(default_factory=Beside, compare=False)

    def __post_init__(self) -> None:
        assert self.ulysses.size * self.ring.size == self.everyone.size
        assert self.ring.rank * self.ulysses.size + self.ulysses.rank == self.everyone.rank

    def span(self, length: int) -> tuple[int, int]:
        """First and one past the last of the real tokens held here; equal where there is none."""
        return span(length, self.everyone.size, self.everyone.rank)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of tokens along `dim`, padded to the run length that all ranks share."""
        if self.shelf is not None:
            self.shelf.begin()
        start, stop = self.span(x.shape[dim])
        padding = run_length(x.shape[dim], self.everyone.size) - (stop - start)
        run = x.narrow(dim, start, stop - start)
        return F.pad(run, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, padding)) if padding else run

    def exchange(self, size: Size) -> Exchange:
        """The next self-attention; every rank must make the same."""
        if self.ulysses.size > 1:
            return Swap(size, self.ulysses, self.ring)
        return Gathering(size, self.ring.rank, self.shelf or Shelf(self.ring), self.beside)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` real tokens along `dim`, in order, on every rank."""
        runs = self.everyone.all_gather(x)
        return torch.cat(runs.unbind(0), dim).narrow(dim, 0, length)


class Swap(Exchange):
    """All tokens of an Ulysses group for some of the heads: one all-to-all there, and one back.

    A token's q, k and v lie together: so what comes from the ranks, one after another, is all tokens
    in order, which attention reads by strides.
    """

    def __init__(self, size: Size, ulysses: Group, ring: Group) -> None:
        super().__init__(size)
        self.ulysses, self.ring = ulysses, ring
        channels = size.heads // ulysses.size * size.head_dim
        self._room = torch.empty(
            *(ulysses.size, size.videos, size.tokens, 3, channels), dtype=size.dtype, device=size.device
        )
        self.q, self.k, self.v = rearrange(self._room, "u b n three c -> three b n u c")

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """Attention to the keys of all tokens: [B, n, ranks that share heads, channels of a rank's heads]."""
        _check_no_gradient(q)
        given = self.ulysses.all_to_all(self._room)
        q, k, v = rearrange(given, "u b n three (h d) -> three b (u n) h d", d=self.size.head_dim)
        if self.ring.size > 1:
            gathered = self.ring.all_gather(torch.stack([k, v]))
            k, v = rearrange(gathered, "r two b n h d -> two b (r n) h d")
        own = (
            None if scales is None else scales.chunk(self.ulysses.size, dim=2)[self.ulysses.rank].contiguous()
        )
        out = kernel(q, k[:, : self.size.length], v[:, : self.size.length], own)
        runs = rearrange(out, "b (u n) h d -> u b n (h d)", u=self.ulysses.size)
        return rearrange(self.ulysses.all_to_all(runs), "u b n c -> b n u c")


class Gathering(Exchange):
    """All keys and values for the queries held here. They travel beside the main stream from `send` on."""

    keys_first = True

    def __init__(self, size: Size, rank: int, shelf: Shelf, beside: Beside) -> None:
        super().__init__(size)
        self._shelf, self._beside = shelf, beside
        shape = (size.videos, size.tokens, 2, size.heads * size.head_dim)
        self._room = shelf.room(shape, size.dtype, size.device)
        self.k, self.v = rearrange(self._room[rank], "b n two c -> two b n 1 c")

    def send(self) -> None:
        """Off they go."""
        with self._beside.run():
            self._shelf.share(self._room)

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """Attention to the keys of all tokens: [B, n, dim]."""
        _check_no_gradient(q)
        self._beside.join()
        k, v = rearrange(self._room, "r b n two (h d) -> two b (r n) h d", d=self.size.head_dim)
        return kernel(self._heads(q), k[:, : self.size.length], v[:, : self.size.length], scales).flatten(2)


def _check_no_gradient(q: Tensor) -> None:
    assert not (torch.is_grad_enabled() and q.requires_grad), "no gradient goes through an exchange"
