"""The picture plane over ranks: which tile is ours, and what must be fetched of the others' tiles.

The VAE is written as if it saw whole frames. Two things reach beyond a pixel's own place: a
spatial convolution (its border rows and columns) and the attention in the middle (everything).
Each of them asks the passed `Tiles` object, so the network has one code path for 1 or N ranks:

    x, missing = tiles.halo(x, before, after)    # before a convolution
    k, v = tiles.gather(k), tiles.gather(v)      # before attention

With one rank nothing is fetched and nothing is copied: `halo` answers that the whole border is
`missing`, and the convolution supplies it as its own zero padding, which costs nothing. A rank of
a grid will concatenate its neighbours' pixels inside and zeros at the outer border, and answer
that nothing is missing: the same numbers, so results do not depend on the count of ranks.

A stride-2 convolution keeps its phase when every tile begins at an even pixel of its level: tiles
are cut in latents, where one pixel is 8 of the picture, so this holds at every level.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

Border: TypeAlias = tuple[int, int]  # rows above and below, and as many columns left and right


@dataclass(frozen=True)
class Tiles:
    """How frames lie over ranks: here one rank, and it holds whole frames."""

    size: int = 1
    rank: int = 0

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


WHOLE = Tiles()
