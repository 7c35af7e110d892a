"""The picture plane over ranks: which tile is ours, and what must be fetched of the others' tiles.

The VAE is written as if it saw whole frames. Two things reach beyond a pixel's own place: a
spatial convolution (its border rows and columns) and the attention in the middle (everything).
Each of them asks the passed `Tiles` object, so the network has one code path for 1 or N ranks:

    x, missing = tiles.halo(x, before, after)    # before a convolution
    k, v = tiles.gather(k), tiles.gather(v)      # before attention

With one rank nothing is fetched and nothing is copied: `halo` answers that the whole border is
`missing`, and the convolution supplies it as its own zero padding, which costs nothing. A rank of
a grid puts its neighbours' pixels around its own and zeros at the outer border, and answers
that nothing is missing: the same numbers, so results do not depend on the count of ranks.

A stride-2 convolution keeps its phase when every tile begins at an even pixel of its level: tiles
are cut in latents, where one pixel is 8 of the picture, so this holds at every level.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, product
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.errors import ConfigError
from flashtalk_cli.parallel.group import ALONE, Group

Border: TypeAlias = tuple[int, int]  # rows above and below, and as many columns left and right


@dataclass(frozen=True)
class Tiles:
    """How frames lie over ranks: here one rank, and it holds whole frames."""

    def halo(self, x: Tensor, before: int, after: int) -> tuple[Tensor, Border]:
        """Surround a tile with what a convolution reads beyond it.

        Args:
            x: tile [..., H, W, C].
            before: rows needed above, and columns needed to the left.
            after: rows needed below, and columns needed to the right.

        Returns:
            The tile with the border that could be fetched, and (before, after) that is still missing
            on all sides and is zero: the convolution pads it.
        """
        return x, (before, after)

    def gather(self, x: Tensor) -> Tensor:
        """The whole frames [..., H, W, C] of which x [..., h, w, C] is this rank's tile."""
        return x

    def cut(self, x: Tensor) -> Tensor:
        """This rank's tile [..., h, w] of x [..., H, W]: latents, or pixels of any level."""
        return x

    def join(self, x: Tensor) -> Tensor:
        """The whole [..., H, W] of which x [..., h, w] is this rank's tile, on every rank."""
        return x

    def collect(self, x: Tensor) -> Tensor | None:
        """The whole frames [..., H, W, C] on rank 0, and None on the others."""
        return x

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all tiles of what was measured on each: for colours."""
        return x


WHOLE = Tiles()


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
class TileGrid(Tiles):
    """Frames over a grid of ranks, a tile each."""

    grid: Grid
    group: Group = ALONE

    def __post_init__(self) -> None:
        assert self.grid.size == self.group.size, f"{self.grid.size} tiles, {self.group.size} ranks"

    def halo(self, x: Tensor, before: int, after: int) -> tuple[Tensor, Border]:
        """The tile with its neighbours' pixels around it, zeros where the picture ends; nothing is missing."""
        height, width = x.shape[-3:-1]
        surrounded = F.pad(x, (0, 0, before, after, before, after))
        outgoing, incoming, places = {}, {}, {}
        for rank, sends, fills in self.grid.neighbours(self.group.rank, height, width, before, after):
            sent, filled = _pixels(x, *sends), _pixels(surrounded, *fills)
            if sent.numel():
                outgoing[rank] = sent
            if filled.numel():
                incoming[rank] = torch.empty_like(filled, memory_format=torch.contiguous_format)
                places[rank] = filled
        self.group.exchange(outgoing, incoming)
        for rank, place in places.items():
            place.copy_(incoming[rank])
        return surrounded, (0, 0)

    def gather(self, x: Tensor) -> Tensor:
        """The whole frames [..., H, W, C] of which x [..., h, w, C] is this rank's tile, on every rank."""
        return self._assembled(self.group.all_gather(self._padded(x)), self._scale(x))

    def collect(self, x: Tensor) -> Tensor | None:
        """The whole frames [..., H, W, C] on rank 0, and None on the others."""
        tiles = self.group.gather(self._padded(x))
        return None if tiles is None else self._assembled(tiles, self._scale(x))

    def cut(self, x: Tensor) -> Tensor:
        """This rank's tile [..., h, w] of x [..., H, W]: latents, or pixels of any level."""
        rows, columns = self.grid.place(self.group.rank, x.shape[-2] // sum(self.grid.heights))
        return x[..., rows, columns]

    def join(self, x: Tensor) -> Tensor:
        """The whole [..., H, W] of which x [..., h, w] is this rank's tile, on every rank."""
        return self.gather(x[..., None])[..., 0]

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all tiles of what was measured on each."""
        return self.group.sum(x)

    def _scale(self, x: Tensor) -> int:
        """Pixels of x [..., h, w, C] to a latent."""
        rows, _ = self.grid.place(self.group.rank)
        return x.shape[-3] // (rows.stop - rows.start)

    def _padded(self, x: Tensor) -> Tensor:
        """x [..., h, w, C] filled up to the size of the largest tile: collectives want equal parts."""
        height, width = x.shape[-3:-1]
        scale = self._scale(x)
        return F.pad(x, (0, 0, 0, scale * self.grid.widest - width, 0, scale * self.grid.tallest - height))

    def _assembled(self, tiles: Tensor, scale: int) -> Tensor:
        """Padded tiles [size, ..., h, w, C] in their places [..., H, W, C]."""
        sides = scale * sum(self.grid.heights), scale * sum(self.grid.widths)
        whole = tiles.new_empty(*tiles.shape[1:-3], *sides, tiles.shape[-1])
        for rank, tile in enumerate(tiles):
            rows, columns = self.grid.place(rank, scale)
            height, width = rows.stop - rows.start, columns.stop - columns.start
            whole[..., rows, columns, :] = tile[..., :height, :width, :]
        return whole


def _pixels(x: Tensor, rows: slice, columns: slice) -> Tensor:
    """A part of x [..., H, W, C], not copied."""
    return x[..., rows, columns, :]
