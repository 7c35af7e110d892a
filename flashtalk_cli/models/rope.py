"""Rotary position embedding over (frame, row, column).

Neighbouring channels (2i, 2i + 1) of a head are a pair, turned by an angle that is the
token's place times a frequency. Of a head's c = head_dim / 2 frequencies the first
c - 2 (c // 3) turn with the frame, the next c // 3 with the row, the last c // 3 with the column;
within each share of n the i-th frequency is 10000^(-i / n).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor

BASE = 10_000.0


@lru_cache(maxsize=8)
def rotation_table(grid: tuple[int, int, int], head_dim: int, device: torch.device) -> Tensor:
    """Cosine and sine of every token's angles: float32 [T * h * w, head_dim / 2, 2].

    Tokens are in order of frame, row, column. Made once for a grid and kept.
    """
    half = head_dim // 2
    shares = (half - 2 * (half // 3), half // 3, half // 3)
    # Kept for training too, where a tensor made under inference mode would be refused.
    with torch.inference_mode(False), torch.no_grad():
        places = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in grid), indexing="ij")
        angles = torch.cat(
            [
                place.flatten()[:, None] * BASE ** (-torch.arange(n, dtype=torch.float64) / n)
                for place, n in zip(places, shares, strict=True)
            ],
            dim=1,
        )
        return torch.stack([angles.cos(), angles.sin()], dim=-1).float().to(device)


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn the pairs of x, float32 [B, N, heads, head_dim], by table [N, head_dim / 2, 2].

    One product written two ways: on a CPU a pair is taken as a complex number, whose vectorised
    product is some 25 times as fast as strided real ones (900 tokens of 4 x 64: 32 against 930
    microseconds); elsewhere compilers, which know no complex numbers, fuse the real form.
    """
    pairs, turn = rearrange(x, "b n h (c p) -> b n h c p", p=2), table[:, None]
    turned = _as_complex(pairs, turn) if x.device.type == "cpu" else _as_reals(pairs, turn)
    return turned.flatten(-2)


def _as_complex(pairs: Tensor, turn: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn))


def _as_reals(pairs: Tensor, turn: Tensor) -> Tensor:
    (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
