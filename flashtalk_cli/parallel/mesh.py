"""The ranks of a run and what each kind of work makes of them."""

from __future__ import annotations

from dataclasses import dataclass

from flashtalk_cli.parallel.sequence import Sequence


@dataclass(frozen=True)
class Mesh:
    """`size` ranks make one video together; this is the `rank`-th of them."""

    size: int = 1
    rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this rank is the one that delivers frames and reports."""
        return self.rank == 0

    @property
    def sequence(self) -> Sequence:
        """How the DiT's tokens are spread."""
        return Sequence(self.size, self.rank)
