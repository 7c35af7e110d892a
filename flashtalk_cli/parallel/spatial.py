"""The picture plane over ranks: which tile is ours, and what must be fetched of the others' tiles.

The VAE is written as if it saw whole frames. Two things reach beyond a pixel's own place: a
spatial convolution (its border rows and columns) and the attention in the middle (everything).
Each of them asks the passed `Tiles` object, so the network has one code path for 1 or N ranks:

    x, missing = tiles.halo(x, before, after)    # before a convolution
    k, v = tiles.gather(k), tiles.gather(v)      # before attention

A kernel that writes what a convolution reads leaves `tiles.room` around it, and `tiles.fill` fills that:
no pass over memory is spent on the border.

With one rank nothing is fetched and nothing is copied: `halo` answers that the whole border is
`missing`, and the convolution supplies it as its own zero padding, which costs nothing. A rank of
a grid puts its neighbours' pixels around its own and zeros at the outer border, and answers
that nothing is missing: the same numbers, so results do not depend on the count of ranks.

A stride-2 convolution keeps its phase when every tile begins at an even pixel of its level: tiles
are cut in latents, where one pixel is 8 of the picture, so this holds at every level.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.parallel.group import ALONE, Group
from flashtalk_cli.parallel.mail import Mail
from flashtalk_cli.parallel.split import Grid

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

    @property
    def count(self) -> int:
        """Tiles that the picture is cut into."""
        return 1

    def room(self, before: int, after: int) -> Border:
        """What is to be left free, and zero, around a tile for `fill`, of the border that a convolution reads."""
        return 0, 0

    def fill(self, x: Tensor, before: int, after: int) -> None:
        """Write the neighbours' pixels into the room [..., before + H + after, before + W + after, C] of a tile."""

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


@dataclass(frozen=True)
class TileGrid(Tiles):
    """Frames over a grid of ranks, a tile each."""

    grid: Grid
    group: Group = ALONE
    mail: Mail | None = field(default=None, compare=False)  # None: by a collective

    def __post_init__(self) -> None:
        assert self.grid.size == self.group.size, f"{self.grid.size} tiles, {self.group.size} ranks"

    @property
    def count(self) -> int:
        """Tiles that the picture is cut into."""
        return self.grid.size

    def halo(self, x: Tensor, before: int, after: int) -> tuple[Tensor, Border]:
        """The tile with its neighbours' pixels around it, zeros where the picture ends; nothing is missing."""
        surrounded = F.pad(x, (0, 0, before, after, before, after))
        self.fill(surrounded, before, after)
        return surrounded, (0, 0)

    def room(self, before: int, after: int) -> Border:
        """All of the border: whether there is a neighbour or the picture's end."""
        return before, after

    def fill(self, x: Tensor, before: int, after: int) -> None:
        """Write the neighbours' pixels into the room around a tile; where the picture ends it stays as it is."""
        height, width = (side - before - after for side in x.shape[-3:-1])
        tile = _pixels(x, slice(before, before + height), slice(before, before + width))
        outgoing, places = {}, {}  # also where nothing is to be sent or to be filled: both sides know
        for rank, sends, fills in self.grid.neighbours(self.group.rank, height, width, before, after):
            outgoing[rank], places[rank] = _pixels(tile, *sends), _pixels(x, *fills)
        # Of a strip of the longest side of any tile: so that all ranks know it.
        side = self._scale(tile) * max(self.grid.tallest, self.grid.widest)
        longest = max(before, after) * side * x.itemsize * (x.numel() // math.prod(x.shape[-3:-1]))
        shapes = {rank: place.shape for rank, place in places.items()}
        received = (self.mail or Mail(self.group)).exchange(outgoing, shapes, longest)
        for rank, place in places.items():
            place.copy_(received[rank])

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
