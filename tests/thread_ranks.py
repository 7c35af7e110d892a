"""Ranks as threads of one process: groups whose exchanges meet in memory, and runs without torchrun."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from flashtalk_cli.parallel.group import Group
from flashtalk_cli.parallel.ranks import Ranks

T = TypeVar("T")
MEET_S = 20.0


class Table:
    """Where the ranks of a group lay things down for one another."""

    def __init__(self, size: int, meet_s: float = MEET_S) -> None:
        self.laid: list[object] = [None] * size
        self.barrier = threading.Barrier(size, timeout=meet_s)

    def swap(self, rank: int, what: T) -> list[T]:
        """What everybody laid down, in order."""
        self.laid[rank] = what
        self.barrier.wait()
        found = list(self.laid)
        self.barrier.wait()
        return found  # type: ignore[return-value]


@dataclass(frozen=True)
class ThreadGroup(Group):
    """A group of threads. It holds its members to equal shapes, as the real libraries do."""

    table: Table = field(default_factory=lambda: Table(1), compare=False)

    def _swap(self, x: Tensor) -> list[Tensor]:
        with self.traffic:
            found = self.table.swap(self.rank, x)
        assert {(each.shape, each.dtype) for each in found} == {(x.shape, x.dtype)}
        return found

    def all_to_all(self, x: Tensor) -> Tensor:
        assert x.shape[0] == self.size
        return torch.stack([each[self.rank] for each in self._swap(x)])

    def all_gather(self, x: Tensor) -> Tensor:
        return torch.stack(self._swap(x))

    def share(self, room: Tensor) -> None:
        assert room.is_contiguous()
        room.copy_(torch.stack(self._swap(room[self.rank].clone())))

    def gather(self, x: Tensor) -> Tensor | None:
        found = self._swap(x)
        return torch.stack(found) if self.rank == 0 else None

    def sum(self, x: Tensor) -> Tensor:
        return torch.stack(self._swap(x)).sum(0)

    def exchange(
        self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, torch.Size]
    ) -> dict[int, Tensor]:
        with self.traffic:
            mail = self.table.swap(self.rank, {peer: x.clone() for peer, x in outgoing.items()})
        found = {peer: mail[peer].pop(self.rank) for peer in incoming}
        assert {peer: x.shape for peer, x in found.items()} == dict(incoming)
        assert not [rank for rank in range(self.size) if rank not in incoming and self.rank in mail[rank]]
        return found


@dataclass(frozen=True)
class ThreadRanks(Ranks):
    """The processes of a run as threads, as far as they only coordinate; what they hand on can be pickled."""

    table: Table = field(default_factory=lambda: Table(1), compare=False)

    def wait(self) -> None:
        self.table.swap(self.rank, None)

    def any(self, here: bool) -> bool:
        return any(self.table.swap(self.rank, here))

    def to_leader(self, value: T) -> list[T]:
        found = self.table.swap(self.rank, pickle.dumps(value))
        return [pickle.loads(each) for each in found] if self.leads else []


def on_ranks(size: int, work: Callable[[int], T]) -> list[T]:
    """What `work` gives for each rank, all at once."""
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(work, range(size)))


def groups(size: int) -> list[ThreadGroup]:
    """One group of so many, as each of its members sees it."""
    table = Table(size)
    return [ThreadGroup(size, rank, table=table) for rank in range(size)]
