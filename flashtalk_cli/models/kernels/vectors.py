"""What a video has one vector of: the embedded time, and what it makes of a block's modulation.

Little work, but a step has it whole on every rank: in plain code some ten launches a block, and weights copied to
float32 to multiply one row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SHIFT, SCALE = 0, 1  # of a block's vectors: those of its first norm
ROWS, COLUMNS, WARPS = 16, 512, 8  # of a weight, that a program takes at once


@triton.jit
def _modulate(  # type: ignore[no-untyped-def]
    own,
    time,
    out,
    reach,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    SCALE: tl.constexpr,
    REACH: tl.constexpr,
):
    """One of a block's six vectors of a video. Grid (6, videos)."""
    which, video = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDE)
    inside = channel < DIM
    time += video * 6 * DIM
    value = tl.load(own + which * DIM + channel, inside, other=0.0).to(tl.float32)
    value += tl.load(time + which * DIM + channel, inside, other=0.0)
    stretch = tl.where(which % 3 == SCALE, value + 1, value)
    tl.store(out + (video * 6 + which) * DIM + channel, stretch, inside)
    if REACH and which == SHIFT:
        scale = tl.load(own + SCALE * DIM + channel, inside, other=-1.0).to(tl.float32) + 1
        scale += tl.load(time + SCALE * DIM + channel, inside, other=0.0)
        length = tl.sqrt(tl.sum(value * value, 0))
        tl.store(reach + video, DIM**0.5 * tl.max(tl.abs(scale), 0) + length)


@triton.jit
def _linear(  # type: ignore[no-untyped-def]
    x, weight, bias, out, n_rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """One row of x by some rows of a weight. Grid (blocks of them, rows of x)."""
    row, column = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    video = tl.program_id(1)
    there = row < n_rows
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(0, width, COLUMNS):
        inside = first + column < width
        at = row.to(tl.int64)[:, None] * width + first + column[None, :]
        w = tl.load(weight + at, there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += w * tl.load(x + video * width + first + column, inside, other=0.0)[None, :]
    value = tl.sum(total, 1) + tl.load(bias + row, there, other=0.0).to(tl.float32)
    tl.store(out + video * n_rows + row, value, there)


def modulate(own: Tensor, time: Tensor, reach: bool) -> tuple[Tensor, Tensor | None]:
    """own [1, 6, dim] and time, float32 [B, 6, dim], summed; see `TokenOps.modulate`."""
    videos, n, dim = time.shape
    assert n == 6, n
    time = time.contiguous()
    out = torch.empty_like(time)
    longest = time.new_empty(videos) if reach else None
    wide = triton.next_power_of_2(dim)
    _modulate[(n, videos)](
        *(own.contiguous(), time, out, longest, dim, wide, SHIFT, SCALE, reach), num_warps=WARPS
    )
    return out, longest


def linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """x, float32 [B, in], by a weight [out, in] of any dtype, multiplied in float32: [B, out]."""
    (n_rows, width), x = weight.shape, x.contiguous()
    out = x.new_empty(len(x), n_rows)
    _linear[(triton.cdiv(n_rows, ROWS), len(x))](
        *(x, weight.contiguous(), bias, out, n_rows, width, ROWS, COLUMNS), num_warps=WARPS
    )
    return out
