"""One video's tokens over the ranks that make it together: shard, attend, gather.

The model is written once, for a rank's own tokens. It is handed a `Sequence` and says three
things to it: *shard* the tokens before the first block, *attend* in self-attention (the only
place where a token meets the others), *gather* after the last. With one rank each of them
is the identity.

A rank holds a run of neighbouring tokens, all runs of one length. Where the tokens do not divide
by the ranks, the end is filled up with zeros once, so a rank may hold more tokens than `span` says
are real, or none that is real; padding is never attended to and never gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.parallel.group import ALONE, Group
from flashtalk_cli.parallel.split import run_length, span

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sequence:
    """How a sequence of tokens is spread over ranks: here one rank, and it holds all."""

    def span(self, length: int) -> tuple[int, int]:
        """First and one past the last of the real tokens held here, of `length` in all."""
        return 0, length

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of tokens along `dim`, padded to the run length that all ranks share."""
        return x

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Attention of this rank's queries to the keys of all `length` real tokens.

        q, k, v and the result: [B, tokens held here, heads, head_dim].
        """
        return kernel(q, k, v)

    def room(self, x: Tensor) -> Tensor | None:
        """Memory for q, k and v of x [B, n, dim], as `attend_room` sends them; None where nothing is sent.

        [B, n, 3, ranks that share heads, channels of a rank's heads], views of what lies rank by rank.
        """
        return None

    def attend_room(self, kernel: Attend, room: Tensor, head_dim: int, length: int) -> Tensor:
        """`attend` of what was written to `room`: [B, n, ranks that share heads, channels of a rank's heads]."""
        raise NotImplementedError

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` real tokens along `dim`, in order, on every rank."""
        return x


UNDIVIDED = Sequence()


@dataclass(frozen=True)
class UlyssesRing(Sequence):
    """A grid of ranks: `ulysses` neighbours share heads, `ring` such groups share keys and values.

    Self-attention needs every key for every query, but only head by head. So the ranks of an Ulysses
    group swap: each gives away its tokens of the other ranks' heads and gets all of the group's tokens
    for heads of its own, in one all-to-all for q, k and v together and one for what comes out. That
    moves 4 / size of the activations, and it works for as many ranks as divide the heads.

    The rest is along the ring: the groups keep their queries, and keys and values go round. Here they
    are gathered at once and not passed on neighbour by neighbour: the same bytes in one collective
    in place of size - 1, and one plain softmax, where a ring must merge partial ones. Its price
    is memory for all keys and values of a rank's heads in one layer.

    Ranks are numbered along Ulysses groups first, so that a group's tokens are a run too.
    """

    everyone: Group = ALONE
    ulysses: Group = ALONE
    ring: Group = ALONE

    def __post_init__(self) -> None:
        assert self.ulysses.size * self.ring.size == self.everyone.size
        assert self.ring.rank * self.ulysses.size + self.ulysses.rank == self.everyone.rank

    def span(self, length: int) -> tuple[int, int]:
        """First and one past the last of the real tokens held here; equal where there is none."""
        return span(length, self.everyone.size, self.everyone.rank)

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of tokens along `dim`, padded to the run length that all ranks share."""
        start, stop = self.span(x.shape[dim])
        padding = run_length(x.shape[dim], self.everyone.size) - (stop - start)
        run = x.narrow(dim, start, stop - start)
        return F.pad(run, (0, 0) * (x.ndim - 1 - dim % x.ndim) + (0, padding)) if padding else run

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Attention of this rank's queries to the keys of all `length` real tokens."""
        room = self.room(q.flatten(2))
        if room is None:
            return self._attend_round(kernel, q, k, v, length)
        for place, x in zip(room.unbind(2), (q, k, v), strict=True):
            place.copy_(x.flatten(2).unflatten(-1, place.shape[2:]))
        return self.attend_room(kernel, room, q.shape[-1], length).flatten(2).unflatten(-1, q.shape[2:])

    def room(self, x: Tensor) -> Tensor | None:
        """Memory for q, k and v of x [B, n, dim]: no copy is left between a block's kernels and the exchange.

        A token's q, k and v lie together: so what comes from the ranks, one after another, is all tokens
        in order, which attention reads by strides.
        """
        if self.ulysses.size == 1:
            return None
        videos, tokens, dim = x.shape
        room = x.new_empty(self.ulysses.size, videos, tokens, 3, dim // self.ulysses.size)
        return rearrange(room, "u b n three c -> b n three u c")

    def attend_room(self, kernel: Attend, room: Tensor, head_dim: int, length: int) -> Tensor:
        """Attention of the queries in `room` to the keys of all `length` real tokens, by groups of heads."""
        given = self.ulysses.all_to_all(rearrange(room, "b n three u c -> u b n three c"))
        q, k, v = rearrange(given, "u b n three (h d) -> three b (u n) h d", d=head_dim)
        out = self._attend_round(kernel, q, k, v, length)
        runs = rearrange(out, "b (u n) h d -> u b n (h d)", u=self.ulysses.size)
        return rearrange(self.ulysses.all_to_all(runs), "u b n c -> b n u c")

    def _attend_round(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Attention to the keys of all groups along the ring; q, k, v are of this rank's heads."""
        assert not (torch.is_grad_enabled() and q.requires_grad), "no gradient goes through collectives"
        if self.ring.size > 1:
            gathered = self.ring.all_gather(torch.stack([k, v]))
            k, v = rearrange(gathered, "r two b n h d -> two b (r n) h d")
        return kernel(q, k[:, :length], v[:, :length])

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` real tokens along `dim`, in order, on every rank."""
        runs = self.everyone.all_gather(x)
        return torch.cat(runs.unbind(0), dim).narrow(dim, 0, length)
