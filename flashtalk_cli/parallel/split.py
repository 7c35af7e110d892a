"""How one video is split over ranks: arithmetic alone, so that the parent can do it without torch.

The DiT's tokens are cut into runs, one a rank; its attention heads over an Ulysses group of ranks, and
what is left over a ring of such groups. The picture plane is cut into a grid of tiles, for the VAE.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from math import gcd
from typing import NamedTuple

from flashtalk_cli.errors import ConfigError


def run_length(length: int, size: int) -> int:
    """Tokens that each of `size` ranks holds of `length`, padding counted."""
    return -(-length // size)


def span(length: int, size: int, rank: int) -> tuple[int, int]:
    """First and one past the last real token of a rank's run."""
    run = run_length(length, size)
    return min(length, rank * run), min(length, (rank + 1) * run)


def ulysses_degree(size: int, heads: int) -> int:
    """Ranks of an Ulysses group: as many as divide both the ranks and the heads; the ring gets the rest.

    Two ranks are a ring: keys and values for each other are the same bytes as swapped heads, and they travel
    while the queries are made. Of more ranks a ring would have to send more.
    """
    return 1 if size == 2 else gcd(size, heads)


class Neighbour(NamedTuple):
    """A rank next to ours (or at a corner), what it reads of our tile, and where its pixels go in ours."""

    rank: int
    sends: tuple[slice, slice]  # rows and columns of our tile
    fills: tuple[slice, slice]  # rows and columns of our tile with its border


@dataclass(frozen=True)
class Grid:
    """A picture cut into rows and columns of tiles, numbered row by row; sizes in latents."""

    heights: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def size(self) -> int:
        """Count of tiles."""
        return len(self.heights) * len(self.widths)

    @property
    def tallest(self) -> int:
        """Height of the highest tile."""
        return max(self.heights)

    @property
    def widest(self) -> int:
        """Width of the broadest tile."""
        return max(self.widths)

    def place(self, rank: int, scale: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a tile in the whole picture, which is `scale` times as large as its latents."""
        row, column = divmod(rank, len(self.widths))
        rows, columns = ([0, *accumulate(sizes)] for sizes in (self.heights, self.widths))
        return (
            slice(scale * rows[row], scale * rows[row + 1]),
            slice(scale * columns[column], scale * columns[column + 1]),
        )

    def neighbours(self, rank: int, height: int, width: int, before: int, after: int) -> Iterator[Neighbour]:
        """All exchanges that surround a tile of height x width pixels by `before` and `after` pixels.

        Eight at most, corners included, so that one round is enough. A neighbour that has nothing to
        give also wants nothing: both see the same border.
        """
        row, column = divmod(rank, len(self.widths))
        for down, right in product((-1, 0, 1), repeat=2):
            r, c = row + down, column + right
            if (down, right) == (0, 0) or not (0 <= r < len(self.heights) and 0 <= c < len(self.widths)):
                continue
            yield Neighbour(
                r * len(self.widths) + c,
                (_read_from(down, height, before, after), _read_from(right, width, before, after)),
                (_filled_from(down, height, before, after), _filled_from(right, width, before, after)),
            )


def _read_from(step: int, length: int, before: int, after: int) -> slice:
    """What a neighbour `step` further along an axis reads of our `length` pixels."""
    return {-1: slice(0, after), 0: slice(0, length), 1: slice(length - before, length)}[step]


def _filled_from(step: int, length: int, before: int, after: int) -> slice:
    """Where the pixels of a neighbour `step` further go, in our pixels with their border."""
    end = before + length
    return {-1: slice(0, before), 0: slice(before, end), 1: slice(end, end + after)}[step]


def choose_grid(size: int, height: int, width: int) -> Grid:
    """The grid of `size` tiles for a picture of height x width latents: tiles as equal and square as can be.

    First the largest tile is as small as possible, since all wait for it; then its border.
    Raises ConfigError when some tile would be empty.
    """

    def cost(rows: int) -> tuple[int, int]:
        tall, wide = -(-height // rows), -(-width // (size // rows))
        return tall * wide, tall + wide

    fitting = [n for n in range(1, size + 1) if size % n == 0 and n <= height and size // n <= width]
    if not fitting:
        raise ConfigError(
            f"{size} GPUs cannot share a picture of {width} x {height} latents, 8 px each, "
            "in equal rows and columns: take fewer GPUs or a larger --size"
        )
    rows = min(fitting, key=cost)
    return Grid(_evenly(height, rows), _evenly(width, size // rows))


def _evenly(length: int, parts: int) -> tuple[int, ...]:
    """Cut a length into parts that differ by one at most, the larger ones first."""
    return tuple(length // parts + (n < length % parts) for n in range(parts))


@dataclass(frozen=True)
class Split:
    """Who does what in one video: degrees of the DiT and tiles of the VAE."""

    ulysses: int
    ring: int
    grid: Grid

    @property
    def size(self) -> int:
        """Count of ranks."""
        return self.ulysses * self.ring

    def __str__(self) -> str:
        rows, columns = len(self.grid.heights), len(self.grid.widths)
        return f"heads over {self.ulysses}, a ring of {self.ring}, picture in {rows} x {columns} tiles"


def split(size: int, heads: int, height: int, width: int, ulysses: int | None = None) -> Split:
    """The way to share a video of height x width latents among `size` ranks.

    Args:
        size: ranks.
        heads: attention heads of the DiT.
        height: of the picture, in latents.
        width: of the picture, in latents.
        ulysses: ranks that share heads; None for `ulysses_degree`.

    Raises ConfigError when a degree does not divide, or the picture has too few latents for the ranks.
    """
    degree = ulysses_degree(size, heads) if ulysses is None else ulysses
    if size % degree or heads % degree:
        raise ConfigError(
            f"compute.ulysses {degree} does not divide {size} GPUs and {heads} heads; {gcd(size, heads)} does"
        )
    return Split(degree, size // degree, choose_grid(size, height, width))
