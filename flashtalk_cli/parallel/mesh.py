"""What the ranks of a run are to each part of the work: chosen once, and passed on as values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import UNDIVIDED, Sequence, UlyssesRing
from flashtalk_cli.parallel.shelf import shelf_of
from flashtalk_cli.parallel.spatial import WHOLE, TileGrid, Tiles
from flashtalk_cli.parallel.split import Split
from flashtalk_cli.parallel.xfuser import kernels_in, xfuser_ring


@dataclass(frozen=True)
class Mesh:
    """How the DiT's tokens and the VAE's frames are spread."""

    sequence: Sequence = UNDIVIDED
    tiles: Tiles = WHOLE


def make_mesh(ranks: Ranks, split: Split, engine: str = "torch", attention: str = "sdpa") -> Mesh:
    """Spread one video over all ranks; every rank must call this.

    Args:
        ranks: the processes of the run.
        split: how, see `flashtalk_cli.parallel.split`.
        engine: whose exchanges self-attention uses, `torch` or `xfuser`.
        attention: name of the attention kernel, which xfuser brings its own of.

    Raises DeviceError when xfuser is asked for and cannot run here.
    """
    if ranks.size == 1:
        return Mesh()
    sequence = ring_of(ranks, split.ulysses)
    return Mesh(
        sequence if engine == "torch" else xfuser_ring(sequence, ranks.device, attention),
        make_tiles(ranks, split),
    )


def kernels_of(split: Split, engine: str) -> Collection[str] | None:
    """The attention kernels that can serve such a spread, by name; None: any."""
    return None if split.size == 1 or engine == "torch" else kernels_in(split.ring)


def make_tiles(ranks: Ranks, split: Split) -> Tiles:
    """The picture alone, for another canvas: no process group is made, so ranks need not meet for it again."""
    return WHOLE if ranks.size == 1 else TileGrid(split.grid, ranks.everyone, ranks.mail)


def ring_of(ranks: Ranks, ulysses: int) -> UlyssesRing:
    """Ulysses within runs of neighbouring ranks, which have the fastest links, and a ring across them."""
    everyone = range(ranks.size)
    ring = ranks.split([everyone[start::ulysses] for start in range(ulysses)])
    return UlyssesRing(
        everyone=ranks.everyone,
        ulysses=ranks.split([everyone[start : start + ulysses] for start in everyone[::ulysses]]),
        ring=ring,
        shelf=shelf_of(ring, reached=ranks.reached),
        beside=Beside(ranks.device),
    )
