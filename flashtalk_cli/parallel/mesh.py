"""What the ranks of a run are to each part of the work: chosen once, and passed on as values."""

from __future__ import annotations

from dataclasses import dataclass

from flashtalk_cli.errors import ConfigError
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.sequence import UNDIVIDED, Sequence, UlyssesRing, ulysses_degree
from flashtalk_cli.parallel.spatial import WHOLE, TileGrid, Tiles, choose_grid


@dataclass(frozen=True)
class Mesh:
    """How the DiT's tokens and the VAE's frames are spread."""

    sequence: Sequence = UNDIVIDED
    tiles: Tiles = WHOLE


def choose_mesh(ranks: Ranks, heads: int, height: int, width: int, ulysses: int | None = None) -> Mesh:
    """Spread one video of height x width latents over all ranks; every rank must call this.

    Args:
        ranks: the processes of the run.
        heads: attention heads of the DiT.
        height: of the picture, in latents.
        width: of the picture, in latents.
        ulysses: ranks that share heads; None for as many as divide both ranks and heads.

    Raises ConfigError when a degree does not divide, or the picture has too few latents for the ranks.
    """
    if ranks.size == 1:
        return Mesh()
    return Mesh(
        choose_sequence(ranks, heads, ulysses),
        TileGrid(choose_grid(ranks.size, height, width), ranks.everyone),
    )


def choose_sequence(ranks: Ranks, heads: int, ulysses: int | None = None) -> Sequence:
    """Ulysses within runs of neighbouring ranks, which have the fastest links, and a ring across them."""
    degree = ulysses_degree(ranks.size, heads) if ulysses is None else ulysses
    if ranks.size % degree or heads % degree:
        raise ConfigError(
            f"compute.ulysses {degree} does not divide {ranks.size} GPUs and {heads} heads; "
            f"{ulysses_degree(ranks.size, heads)} does"
        )
    everyone = range(ranks.size)
    return UlyssesRing(
        everyone=ranks.everyone,
        ulysses=ranks.split([everyone[start : start + degree] for start in everyone[::degree]]),
        ring=ranks.split([everyone[start::degree] for start in range(degree)]),
    )
