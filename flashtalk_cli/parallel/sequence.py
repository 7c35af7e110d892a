"""One video's tokens over the ranks that make it together: shard, attend, gather.

The model is written once, for a rank's own tokens. It is handed a `Sequence` and says three
things to it: *shard* the tokens before the first block, *attend* in self-attention (the only
place where a token meets the others), *gather* after the last. With one rank each of them
is the identity.

A rank holds a run of neighbouring tokens. Where the tokens do not divide by the ranks, the
last runs are filled up with padding, so a rank may hold more tokens than `span` says are
real; padding is never attended to and never gathered.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Sequence:
    """How a sequence of tokens is spread over `size` ranks, seen from `rank`."""

    size: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        assert (self.size, self.rank) == (1, 0), "one rank holds the whole sequence"

    def span(self, length: int) -> tuple[int, int]:
        """First and one past the last of the real tokens held here, of `length` in all."""
        return 0, length

    def shard(self, x: Tensor, dim: int) -> Tensor:
        """This rank's run of tokens along `dim`, padded to the run length that all ranks share."""
        return x

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of this rank's queries to the keys of all; each [B, N held here, heads, head_dim]."""
        return kernel(q, k, v)

    def gather(self, x: Tensor, dim: int, length: int) -> Tensor:
        """All `length` real tokens along `dim`, in order, on every rank."""
        return x
