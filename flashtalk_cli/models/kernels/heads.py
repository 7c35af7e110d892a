"""Queries, keys and values in e4m3, under scales that are known before; see models/attention_fp8.py.

A program takes some tokens, whole rows of them, and a tile of so many heads at a time: first for the rows'
norms, then again, out of the second-level cache, to be normed, turned, mixed by the tensor cores and stored.
What all programs that run at a time have read is 21 MB then, of 50 that the cache of a Hopper GPU holds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.attention_fp8 import hadamard
from flashtalk_cli.models.fp8 import LARGEST
from flashtalk_cli.models.kernels.rows import _grouped

HEADS = 8  # of a tile
NUMBERS = {2: 8192, 4: 2048}  # of a tile, by bytes a number: in float32 no tensor core multiplies
WARPS, REGISTERS = 8, 128  # so that two programs share a multiprocessor
STAGES = 3  # two more tiles are fetched while one is worked on


@triton.jit
def _store(  # type: ignore[no-untyped-def]
    value,
    first,
    factor,
    scales,
    out,
    left,
    row_step,
    group_step,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """A tile [heads from `first` on x tokens, channels], times factor over each head's scale, as e4m3.

    Heads lie in groups of GROUP, group_step apart. `left`: tokens that there are from the tile's first on.
    """
    row, channel = tl.arange(0, value.shape[0]), tl.arange(0, value.shape[1])
    head, token = first + row // TOKENS, row % TOKENS
    inverse = factor / tl.load(scales + head, head < HEADS, other=1.0)
    value = tl.clamp(value.to(tl.float32) * inverse[:, None], -LARGEST, LARGEST)
    to = head * WIDTH
    if GROUP < HEADS:
        to = (head // GROUP).to(tl.int64) * group_step + head % GROUP * WIDTH
    inside = ((head < HEADS) & (token < left))[:, None] & (channel < WIDTH)[None, :]
    at = (to + token * row_step)[:, None] + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _rms_rotate_heads(  # type: ignore[no-untyped-def]
    x,
    weight,
    table,
    signs,
    scales,
    out,
    n_tokens,
    video_step,
    row_step,
    out_video_step,
    out_row_step,
    out_group_step,
    scale_step,
    eps,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TAKEN: tl.constexpr,
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """RMS norm over the full width, pairs (2i, 2i + 1) turned, heads mixed, e4m3. Grid (blocks of tokens, videos)."""
    video, begin = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64) * TOKENS
    left = n_tokens - tl.program_id(0) * TOKENS
    x += video * video_step + begin * row_step
    out += video * out_video_step + begin * out_row_step
    each, token, channel = tl.arange(0, TAKEN), tl.arange(0, TOKENS), tl.arange(0, WIDE)
    there = (token < left)[None, :, None] & (channel < WIDTH)[None, None, :]
    at = (each * WIDTH)[:, None, None] + (token * row_step)[None, :, None] + channel[None, None, :]
    squares = tl.zeros((TAKEN, TOKENS, WIDE), tl.float32)
    for tile in tl.static_range(0, HEADS, TAKEN):
        some = there & (each < HEADS - tile)[:, None, None]
        seen = tl.load(x + tile * WIDTH + at, some, other=0.0).to(tl.float32)
        squares += seen * seen
    norm = tl.rsqrt(tl.sum(tl.sum(squares, 2), 0) / (HEADS * WIDTH) + eps)
    # The angles of a token, for each head of a tile: so a thread has those of its numbers, with no exchange.
    turns = (token * WIDTH)[None, :, None] + channel[None, None, :] + (each * 0)[:, None, None]
    turn = tl.load(table + begin * WIDTH + turns, there & (each < TAKEN)[:, None, None], other=0.0)
    turn *= norm[None, :, None]
    cos, sin = tl.split(tl.reshape(turn, (TAKEN, TOKENS, WIDE // 2, 2)))
    if MIX:
        matrix = tl.load(signs + channel[:, None] * WIDE + channel[None, :])
    weights = (each * WIDTH)[:, None, None] + channel[None, None, :]
    for first in range(0, HEADS, TAKEN):
        more = (each < HEADS - first)[:, None, None]
        given = tl.load(x + first * WIDTH + at, there & more, other=0.0)
        w = tl.load(weight + first * WIDTH + weights, more & (channel < WIDTH)[None, None, :], other=0.0)
        value = given.to(tl.float32) * w.to(tl.float32)
        a, b = tl.split(tl.reshape(value, (TAKEN, TOKENS, WIDE // 2, 2)))
        turned = tl.join(a * cos - b * sin, a * sin + b * cos).to(given.dtype)
        flat = tl.reshape(turned, (TAKEN * TOKENS, WIDE))
        if MIX:
            mixed, factor = tl.dot(flat, matrix, input_precision="ieee"), WIDTH**-0.5
        else:
            mixed, factor = flat, 1.0
        _store(
            mixed, first, factor, scales + video * scale_step, out, left, out_row_step, out_group_step,
            HEADS, WIDTH, OUT_GROUP, TOKENS, LARGEST,
        )  # fmt: skip


@triton.jit
def _place_heads(  # type: ignore[no-untyped-def]
    x,
    scales,
    out,
    n_tokens,
    video_step,
    row_step,
    out_video_step,
    out_row_step,
    out_group_step,
    scale_step,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    TOKENS: tl.constexpr,
    TAKEN: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Heads over their scales, as e4m3. Grid (blocks of tokens, tiles of heads, videos)."""
    video, begin = tl.program_id(2).to(tl.int64), tl.program_id(0).to(tl.int64) * TOKENS
    left, first = n_tokens - tl.program_id(0) * TOKENS, tl.program_id(1) * TAKEN
    x += video * video_step + begin * row_step
    out += video * out_video_step + begin * out_row_step
    row, channel = tl.arange(0, TAKEN * TOKENS), tl.arange(0, WIDE)
    head, token = first + row // TOKENS, row % TOKENS
    inside = ((head < HEADS) & (token < left))[:, None] & (channel < WIDTH)[None, :]
    value = tl.load(x + (head * WIDTH + token * row_step)[:, None] + channel[None, :], inside, other=0.0)
    _store(
        value, first, 1.0, scales + video * scale_step, out, left, out_row_step, out_group_step,
        HEADS, WIDTH, OUT_GROUP, TOKENS, LARGEST,
    )  # fmt: skip


def rms_rotate(
    x: Tensor, weight: Tensor, table: Tensor, scales: Tensor, eps: float, out: Tensor | None = None
) -> Tensor:
    """RMS norm of x [B, n, dim] over its full width * weight [dim], each head's pairs turned and its channels mixed.

    table: float32 [n, head_dim / 2, 2], cosine and sine. scales: float32 [B or 1, heads]. Heads that have no
    matrix to be mixed by stay as they are. `out`, where given, may be [B, n, groups, channels of a group] and
    lie apart in all but the last.
    """
    videos, n_tokens, _ = x.shape
    heads, width, (tokens, taken, wide) = _tiles(x, scales)
    assert width % 2 == 0, width
    signs = hadamard(width, x.device, x.dtype)
    out = _room(x) if out is None else out
    steps = (*x.stride()[:2], *_grouped(out).steps)
    _rms_rotate_heads[(triton.cdiv(n_tokens, tokens), videos)](
        *(x, weight, table.contiguous(), signs, scales, out),
        *(n_tokens, *steps, _scale_step(scales, videos), eps),
        *(heads, width, wide, _grouped(out).width // width, tokens, taken, signs is not None, LARGEST),
        num_warps=WARPS,
        num_stages=STAGES,
        maxnreg=REGISTERS,
    )
    return out


def place(x: Tensor, scales: Tensor, out: Tensor | None = None) -> Tensor:
    """Each head of x [B, n, dim] over its scale, float32 [B or 1, heads]; `out` as in `rms_rotate`."""
    videos, n_tokens, _ = x.shape
    heads, width, (tokens, taken, wide) = _tiles(x, scales)
    out = _room(x) if out is None else out
    steps = (*x.stride()[:2], *_grouped(out).steps)
    _place_heads[(triton.cdiv(n_tokens, tokens), triton.cdiv(heads, taken), videos)](
        *(x, scales, out, n_tokens, *steps, _scale_step(scales, videos)),
        *(heads, width, wide, _grouped(out).width // width, tokens, taken, LARGEST),
        num_warps=WARPS,
    )
    return out


def _scale_step(scales: Tensor, videos: int) -> int:
    """How far apart the scales of two videos lie."""
    assert len(scales) in (1, videos), (scales.shape, videos)
    assert scales.stride(1) == 1, scales.stride()
    return scales.stride(0) if len(scales) > 1 else 0


def _room(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)


def _tiles(x: Tensor, scales: Tensor) -> tuple[int, int, tuple[int, int, int]]:
    """Heads, channels of one; and of a tile the tokens, heads and channels, all powers of two."""
    heads, dim = scales.shape[-1], x.shape[2]
    assert x.stride(2) == 1, x.stride()
    assert dim % heads == 0, (dim, heads)
    wide = triton.next_power_of_2(dim // heads)
    taken = min(HEADS, triton.next_power_of_2(heads))
    rows = max(NUMBERS[x.itemsize] // wide, 16)  # which a tensor core asks for
    return heads, dim // heads, (rows // taken, taken, wide)
