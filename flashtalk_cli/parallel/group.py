"""Ranks that exchange tensors: the few collectives that this program is built on, as one small value.

A group of one is the identity, so callers have one path. Whoever needs its peers holds a `Group`
in a field; nobody asks a global for one. None of these can be differentiated through.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from flashtalk_cli.parallel.traffic import Traffic

# Renamed in torch 2.13; the old name warns there.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Group:
    """`size` ranks, seen from the `rank`-th of them. Tensors may have any strides and any dtype."""

    size: int = 1
    rank: int = 0
    handle: dist.ProcessGroup | None = None
    traffic: Traffic = field(default_factory=Traffic, compare=False)

    def all_to_all(self, x: Tensor) -> Tensor:
        """x [size, ...], whose part i is for rank i, to [size, ...], whose part i came from rank i."""
        if self.size == 1:
            return x
        x = x.contiguous()
        received = torch.empty_like(x)
        with self.traffic:
            dist.all_to_all_single(_carried(received), _carried(x), group=self.handle)
        return received

    def all_gather(self, x: Tensor) -> Tensor:
        """Everybody's x [...], equal in shape, as [size, ...] on every rank."""
        if self.size == 1:
            return x[None]
        flat = x.contiguous().flatten()
        received = flat.new_empty(self.size * flat.numel())
        with self.traffic:
            _all_gather(_carried(received), _carried(flat), group=self.handle)
        return received.view(self.size, *x.shape)

    def share(self, room: Tensor) -> None:
        """Fill room [size, ...], contiguous, in which everybody wrote his own part, with those of the others."""
        if self.size == 1:
            return
        with self.traffic:
            _all_gather(_carried(room).view(-1), _carried(room[self.rank]).view(-1), group=self.handle)

    def gather(self, x: Tensor) -> Tensor | None:
        """Everybody's x [...], equal in shape, as [size, ...] on rank 0; None on the others."""
        if self.size == 1:
            return x[None]
        received = x.new_empty(self.size, *x.shape) if self.rank == 0 else None
        parts = None if received is None else list(received)
        with self.traffic:
            dist.gather(x.contiguous(), parts, group=self.handle, group_dst=0)
        return received

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everybody's x, on every rank."""
        if self.size == 1:
            return x
        total = x.clone(memory_format=torch.contiguous_format)
        with self.traffic:
            dist.all_reduce(total, group=self.handle)
        return total

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, torch.Size]
    ) -> dict[int, Tensor]:
        """Send a tensor to each of some ranks; what came from each of some ranks, in the shapes given.

        There is one to send at least, though it may be empty; all are of one dtype. Every rank must call this,
        and what one sends to another, that one must expect. It is one collective, which runs in the stream of
        what is computed; messages from rank to rank would run in streams of the library's own.
        """
        ranks = range(self.size)
        taken = [incoming[rank].numel() if rank in incoming else 0 for rank in ranks]
        given = [outgoing[rank].numel() if rank in outgoing else 0 for rank in ranks]
        sent = torch.cat([outgoing[rank].flatten() for rank in sorted(outgoing)])
        received = sent.new_empty(sum(taken))
        with self.traffic:
            dist.all_to_all_single(received, sent, taken, given, group=self.handle)
        parts = received.split(taken)
        return {rank: parts[rank].view(shape) for rank, shape in incoming.items()}


def _carried(x: Tensor) -> Tensor:
    """The same as numbers that every library carries: no sums are made of those of eight bits."""
    return x.view(torch.uint8) if x.itemsize == 1 else x


ALONE = Group()
