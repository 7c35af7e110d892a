"""Memory with a place for each rank of a group: everybody writes to his own, and then all have all.

`Shelf` is that by a collective. `PeerShelf` is the same among GPUs of one host that reach each other's memory,
as over NVLink: each copies its part into the others' memory itself. Copies between GPUs have engines of their
own, so products run on at their full rate meanwhile; a collective's kernels would take multiprocessors from them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flashtalk_cli.parallel.group import Group
from flashtalk_cli.parallel.peers import Reached, reach

TURNS = 2  # rooms that take turns, so that nobody writes where another still reads


class Shelf:
    """Rooms of new memory, shared by a collective."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory [ranks, *shape]; this rank writes to the part of its number."""
        return torch.empty(self.group.size, *shape, dtype=dtype, device=device)

    def begin(self) -> None:
        """All ranks have met since the last room was read."""

    def share(self, room: Tensor) -> None:
        """What this rank wrote to all others, and what they wrote to us: in the order of the current stream."""
        self.group.share(room)


class PeerShelf(Shelf):
    """Rooms that stay, of one size at a time; all ranks must ask for the same, in one order.

    A part is written to the others' room as soon as it is there. Nobody reads that room any more: whoever is one
    round behind still reads the other one, and nobody can be further behind, for each round ends with all having met.
    Whoever begins anew, with `begin` or a recording, may take the room of the last round again: ranks must have met
    between (the DiT's do when they gather what it gives).
    """

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._kind: object = None
        self._rooms: list[Reached] = []
        self._turn = 0

    def begin(self) -> None:
        """All ranks begin with the same room, also after a recording that some of them did not get through."""
        self._turn = 0

    def room(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """The next room. The first of a new size is made by all ranks together; none may be recording then."""
        if self._kind != (kind := (tuple(shape), dtype)):
            self._kind, self._rooms = kind, []  # the old ones' memory is free for the new ones
            sizes = (self.group.size, *shape)
            self._rooms = [reach(sizes, dtype, device, self.group) for _ in range(TURNS)]
        self._turn = (self._turn + 1) % TURNS
        return self._rooms[self._turn].own

    def share(self, room: Tensor) -> None:
        """Write this rank's part to all others; over when theirs are here."""
        own, theirs, signals = self._rooms[self._turn]
        assert room is own, "rooms are shared in the order in which they were given"
        rank, size = self.group.rank, self.group.size
        with self.group.traffic:
            for step in range(1, size):  # each to another at a time
                theirs[(rank + step) % size][rank].copy_(own[rank])
            signals.barrier()


def shelf_of(group: Group, *, reached: bool) -> Shelf:
    """The shelf of these ranks: their GPUs' own memory where they reach it (see `Ranks.reached`), else a collective's."""
    return PeerShelf(group) if reached and group.size > 1 else Shelf(group)
