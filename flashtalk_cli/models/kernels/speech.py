"""Attention to speech between its products: keys and values folded, and the softmax over few keys.

See AudioCrossAttention in models/audio.py for what is folded and why. A batched product of torch's would write
heads outside of frames, where the products after it want them within, and each copy costs as much again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK, Rows
from flashtalk_cli.models.kernels.cross import padded

# Of a program that folds, by bytes a number: rows, of all frames, that it takes at once, and columns. Hopper's tensor
# cores take 64 rows at least, and in float32 there is none: larger tiles would not fit into registers. Few warps, so
# that several programs share a multiprocessor and some read weights while others write.
TILES = {2: (64, 128), 4: (16, 64)}
WARPS, STAGES = 4, 2
SEGMENTS = 4096  # numbers of softmaxes that a program takes at once


@triton.jit
def _fold(  # type: ignore[no-untyped-def]
    x,
    weight,
    bias,
    out,
    n_frames,
    frame_step,
    token_step,
    head_step,
    weight_head_step,
    weight_row_step,
    weight_column_step,
    out_row_step,
    out_column_step,
    dim,
    scales,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BIAS: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """x [frames TOKENS, WIDTH] of a head times its weight [WIDTH, columns], which is read once. Grid (columns, heads).

    QUANTISE: over the scale of its row, "rows", or of its column, "columns"; else "".
    """
    head = tl.program_id(1)
    channel, column = tl.arange(0, WIDE), tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = (channel < WIDTH)[:, None] & (column < dim)[None, :]
    within = channel[:, None] * weight_row_step + column[None, :] * weight_column_step
    w = tl.load(weight + head.to(tl.int64) * weight_head_step + within, there, other=0.0)
    if QUANTISE == "columns":
        under = tl.load(scales + column, column < dim, other=1.0)
        inverse = 1 / tl.maximum(under, SMALLEST)
    x += head * head_step
    if BIAS:
        shift = tl.load(bias + column, column < dim, other=0.0).to(tl.float32) / HEADS
    n_rows = n_frames * TOKENS
    for first in range(0, n_rows, ROWS):
        row = first + tl.arange(0, ROWS)
        frame, token = row // TOKENS, row % TOKENS
        known = (row < n_rows)[:, None] & (channel < WIDTH)[None, :]
        at = (frame * frame_step + token * token_step)[:, None] + channel[None, :]
        value = tl.dot(tl.load(x + at, known, other=0.0), w, input_precision="ieee")
        if BIAS:
            value += shift[None, :]
        if QUANTISE == "rows":
            under = tl.load(scales + (frame * HEADS + head) * TOKENS + token, row < n_rows, other=1.0)
            value = tl.clamp(value * (1 / tl.maximum(under, SMALLEST))[:, None], -LARGEST, LARGEST)
        if QUANTISE == "columns":
            value = tl.clamp(value * inverse[None, :], -LARGEST, LARGEST)
        to = frame.to(tl.int64) * (HEADS * TOKENS * dim) + (head * TOKENS + token) * out_row_step
        wanted = (row < n_rows)[:, None] & (column < dim)[None, :]
        to = to[:, None] + (column * out_column_step)[None, :]
        tl.store(out + to, value.to(out.dtype.element_ty), wanted)


@triton.jit
def _softmax(  # type: ignore[no-untyped-def]
    scores,
    bias,
    out,
    scale,
    factor,
    n_segments,
    of_a_frame,
    skipped,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    PADDED_TOKENS: tl.constexpr,
    SEGMENTS: tl.constexpr,
):
    """Times factor; a segment is what one token of the video makes of one head's keys, `skipped` are missing at first."""
    segment = tl.program_id(0) * SEGMENTS + tl.arange(0, SEGMENTS)
    token = tl.arange(0, PADDED_TOKENS)
    there = (segment < n_segments)[:, None] & (token < TOKENS)[None, :]
    at = segment.to(tl.int64)[:, None] * TOKENS + token[None, :]
    value = tl.load(scores + at, there, other=0.0).to(tl.float32)
    owed = ((segment + skipped) // of_a_frame * HEADS + segment % HEADS)[:, None] * TOKENS + token[None, :]
    value = (value + tl.load(bias + owed, there, other=0.0).to(tl.float32)) * scale
    value = tl.where((token < TOKENS)[None, :], value, float("-inf"))
    value = tl.exp(value - tl.max(value, 1)[:, None])
    value *= (factor / tl.sum(value, 1))[:, None]
    tl.store(out + at, value.to(out.dtype.element_ty), there)


def fold(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [f, n, heads, head_dim] times weight [heads, head_dim, dim], plus bias / heads: [f, heads n, dim]."""
    n_frames, n_tokens, heads, _ = x.shape
    out = torch.empty(n_frames, heads * n_tokens, weight.shape[2], dtype=x.dtype, device=x.device)
    return _folded(x, weight, bias, out, out.stride()[1:])


def fold_keys(x: Tensor, weight: Tensor, scales: Tensor) -> Rows:
    """The same in e4m3; see `TokenOps.fold_keys`."""
    n_frames, n_tokens, heads, _ = x.shape
    shape = (n_frames, heads * n_tokens, weight.shape[2])
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    return Rows(_folded(x, weight, None, out, out.stride()[1:], scales, "rows"), scales)


def fold_values(x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Rows:
    """The same in e4m3, [f, dim, heads n], as a product in eight bits reads it; see `TokenOps.fold_values`."""
    n_frames, n_tokens, heads, _ = x.shape
    shape = (n_frames, weight.shape[2], heads * n_tokens)
    out = torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)
    _folded(x, weight, bias, out, out.stride()[:0:-1], scales, "columns")
    return Rows(out, scales[:, None].expand(n_frames, -1, 1).contiguous())


def _folded(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    steps: tuple[int, ...],
    scales: Tensor | None = None,
    quantise: str = "",
) -> Tensor:
    """Written to `out` by steps from a row and a column to the next, over scales where it is in eight bits."""
    n_frames, n_tokens, heads, width = x.shape
    dim = weight.shape[2]
    assert x.stride(3) == 1, x.stride()
    rows, columns = TILES[x.itemsize]
    _fold[(triton.cdiv(dim, columns), heads)](
        *(x, weight, bias, out, n_frames, *x.stride()[:3], *weight.stride(), *steps, dim, scales),
        *(heads, n_tokens, width, padded(width), rows, columns, bias is not None),
        *(quantise, LARGEST, SMALLEST_PEAK),
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out


def softmax(scores: Tensor, bias: Tensor, scale: float) -> Tensor:
    """softmax((scores + bias) * scale) over each head's keys, in the memory of scores.

    scores: [f, s, heads n]. bias: [f, heads, n].
    """
    _each_softmax(scores, bias, scores, scale, 1.0, scores.shape[1], 0)
    return scores


def softmax_rows(scores: Tensor, bias: Tensor, scale: float, frame_tokens: int, skipped: int) -> Rows:
    """The same in e4m3, under one scale: no weight is more than one.

    scores: [s, heads n], of tokens of frames one behind another, but for the first so many of the first frame.
    """
    values = torch.empty_like(scores, dtype=torch.float8_e4m3fn)
    _each_softmax(scores, bias, values, scale, LARGEST, frame_tokens, skipped)
    return Rows(values, torch.full_like(scores[:, :1], 1 / LARGEST, dtype=torch.float32))


def _each_softmax(
    scores: Tensor, bias: Tensor, out: Tensor, scale: float, factor: float, frame_tokens: int, skipped: int
) -> None:
    assert scores.is_contiguous()
    heads, n_keys = bias.shape[1:]
    wide = triton.next_power_of_2(n_keys)
    n_segments, each = scores.numel() // n_keys, max(1, SEGMENTS // wide)
    _softmax[(triton.cdiv(n_segments, each),)](
        *(scores, bias.contiguous(), out, scale, factor, n_segments, frame_tokens * heads, skipped * heads),
        *(heads, n_keys, wide, each),
    )
