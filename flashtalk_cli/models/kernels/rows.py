"""Kernels over rows of tokens: a program takes a whole row, so that a norm or a peak needs no second pass.

All of them move bytes and hardly compute: the floor is the size of inputs and outputs over the memory's
bandwidth. So that arithmetic stays under it, a row is held in pieces of 16 bytes a thread, which waste no
lane where the width is no power of two, and nothing is divided by twice. Vectors over channels (weights,
gates) are read for each row, which costs the caches little.

Rows may come or go in groups of channels that lie apart, as ranks exchange them (see parallel/sequence.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK, Rows

EACH = 8  # numbers of a piece in a thread: 16 bytes of bfloat16
WARP = 32  # threads
LONGEST_PIECE = 1024  # of rows up to eight pieces; of longer ones it is twice that


@triton.jit
def _load(x, DIM: tl.constexpr, PIECE: tl.constexpr, GROUP: tl.constexpr, group_step):  # type: ignore[no-untyped-def]
    """A row as float32, in pieces. Channels come in groups of GROUP, group_step apart."""
    values = ()
    for first in tl.static_range(0, DIM, PIECE):
        channel = first + tl.arange(0, PIECE)
        at = channel if GROUP == DIM else channel // GROUP * group_step + channel % GROUP
        values = values + (tl.load(x + at, channel < DIM, other=0.0).to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
    return values


@triton.jit
def _mean_square(values, mean, DIM: tl.constexpr, PIECE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Of what a row is off its mean by."""
    total = tl.zeros((PIECE,), tl.float32)
    for index in tl.static_range(len(values)):
        inside = index * PIECE + tl.arange(0, PIECE) < DIM
        off = tl.where(inside, values[index] - mean, 0.0)
        total += off * off
    return tl.sum(total, 0) / DIM


@triton.jit
def _mean(values, DIM: tl.constexpr):  # type: ignore[no-untyped-def]
    total = values[0]
    for index in tl.static_range(1, len(values)):
        total += values[index]
    return tl.sum(total, 0) / DIM


@triton.jit
def _store_e4m3(  # type: ignore[no-untyped-def]
    values,
    to,
    scale_to,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """A row as e4m3 numbers and what they were divided by."""
    peaks = tl.abs(values[0])
    for index in tl.static_range(1, len(values)):
        peaks = tl.maximum(peaks, tl.abs(values[index]))
    scale = tl.maximum(tl.max(peaks, 0), SMALLEST) / LARGEST
    tl.store(scale_to, scale)
    inverse = 1 / scale
    for index in tl.static_range(len(values)):
        channel = index * PIECE + tl.arange(0, PIECE)
        tl.store(to + channel, (values[index] * inverse).to(to.dtype.element_ty), channel < DIM)


@triton.jit
def _sum_norm(  # type: ignore[no-untyped-def]
    x,
    y,
    gate,
    total,
    weight,
    bias,
    normal,
    scales,
    n_rows,
    gate_step,
    weight_step,
    bias_step,
    eps,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    SUM: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """total = x + y * gate, rounded; normal = LayerNorm(total) * weight + bias. Grid (rows, videos)."""
    video = tl.program_id(1).to(tl.int64)
    row = video * n_rows + tl.program_id(0)
    values = _load(x + row * DIM, DIM, PIECE, DIM, 0)
    if SUM:
        added = _load(y + row * DIM, DIM, PIECE, DIM, 0)
        sums = ()
        for index in tl.static_range(len(values)):
            channel = index * PIECE + tl.arange(0, PIECE)
            more = added[index]
            if GATED:
                more *= tl.load(gate + video * gate_step + channel, channel < DIM, other=0.0).to(tl.float32)
            rounded = (values[index] + more).to(total.dtype.element_ty)
            tl.store(total + row * DIM + channel, rounded, channel < DIM)
            sums = sums + (rounded.to(tl.float32),)  # type: ignore[assignment]  # noqa: RUF005
        values = sums
    if NORM:
        mean = _mean(values, DIM)
        scale = tl.rsqrt(_mean_square(values, mean, DIM, PIECE) + eps)
        outs = ()
        for index in tl.static_range(len(values)):
            channel = index * PIECE + tl.arange(0, PIECE)
            inside = channel < DIM
            w = tl.load(weight + video * weight_step + channel, inside, other=0.0).to(tl.float32)
            b = tl.load(bias + video * bias_step + channel, inside, other=0.0).to(tl.float32)
            out = (values[index] - mean) * scale * w + b  # beyond the width 0, as w and b are
            if QUANTISE:
                outs = outs + (out,)  # type: ignore[assignment]  # noqa: RUF005
            else:
                tl.store(normal + row * DIM + channel, out.to(normal.dtype.element_ty), inside)
        if QUANTISE:
            _store_e4m3(outs, normal + row * DIM, scales + row, DIM, PIECE, LARGEST, SMALLEST)


@triton.jit
def _rms_rotate(  # type: ignore[no-untyped-def]
    x,
    weight,
    table,
    out,
    video_step,
    row_step,
    group_step,
    out_video_step,
    out_row_step,
    out_group_step,
    eps,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    HEAD: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_GROUP: tl.constexpr,
    TURN: tl.constexpr,
):
    """RMS norm over the full width, then pairs (2i, 2i + 1) turned by the row's angles; or a copy.

    Grid (rows, videos).
    """
    video, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    values = _load(x + video * video_step + row * row_step, DIM, PIECE, GROUP, group_step)
    out += video * out_video_step + row * out_row_step
    if TURN:
        scale = tl.rsqrt(_mean_square(values, 0.0, DIM, PIECE) + eps)
    for index in tl.static_range(len(values)):
        channel = index * PIECE + tl.arange(0, PIECE)
        inside = channel < DIM
        value = values[index]
        if TURN:
            value = value * scale * tl.load(weight + channel, inside, other=0.0).to(tl.float32)
            turn = tl.load(table + row * HEAD + channel % HEAD, inside, other=0.0)
            cos, sin = tl.split(tl.reshape(turn, (PIECE // 2, 2)))
            a, b = tl.split(tl.reshape(value, (PIECE // 2, 2)))
            value = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (PIECE,))
        at = channel if OUT_GROUP == DIM else channel // OUT_GROUP * out_group_step + channel % OUT_GROUP
        tl.store(out + at, value.to(out.dtype.element_ty), inside)


@triton.jit
def _inverse_rms(  # type: ignore[no-untyped-def]
    x,
    out,
    n_rows,
    video_step,
    row_step,
    group_step,
    eps,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
):
    """One over the root of a row's mean square. Grid (rows, videos)."""
    video, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    values = _load(x + video * video_step + row * row_step, DIM, PIECE, GROUP, group_step)
    tl.store(out + video * n_rows + row, tl.rsqrt(_mean_square(values, 0.0, DIM, PIECE) + eps))


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    n_rows,
    video_step,
    row_step,
    group_step,
    DIM: tl.constexpr,
    PIECE: tl.constexpr,
    GROUP: tl.constexpr,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """values * scales = x, or GELU(x) in its tanh form. Grid (rows, videos)."""
    video, row = tl.program_id(1).to(tl.int64), tl.program_id(0).to(tl.int64)
    given = _load(x + video * video_step + row * row_step, DIM, PIECE, GROUP, group_step)
    taken = ()
    for index in tl.static_range(len(given)):
        value = given[index]
        if GELU:  # x (1 + tanh u) / 2 = x / (1 + exp(-2 u)), u = sqrt(2 / pi) (x + 0.044715 x^3)
            value /= 1 + tl.exp2(value * (-2.302208198 - 0.1029432397 * value * value))
        taken = taken + (value,)  # type: ignore[assignment]  # noqa: RUF005
    row += video * n_rows
    _store_e4m3(taken, values + row * DIM, scales + row, DIM, PIECE, LARGEST, SMALLEST)


def sum_norm(
    x: Tensor,
    y: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 0.0,
    quantise: bool = False,
) -> tuple[Tensor, Tensor | Rows | None]:
    """x + y * gate in x's dtype, and LayerNorm of it * weight + bias; what is not given is left out.

    x, y: [B, n, dim]. gate, weight and bias: [B or 1, 1, dim], or [dim]. With `quantise` the norm comes in
    e4m3 with a scale a row.
    """
    x = x.contiguous()
    videos, n_rows, dim = x.shape
    total = x if y is None else torch.empty_like(x)
    normal, scales = None, None
    if weight is not None:
        normal = torch.empty_like(x, dtype=torch.float8_e4m3fn if quantise else x.dtype)
        scales = x.new_empty(videos, n_rows, 1, dtype=torch.float32) if quantise else None
    weight, weight_step = _vectors(weight, videos)
    bias, bias_step = _vectors(bias, videos)
    gate, gate_step = _vectors(gate, videos)
    piece, warps = pieces(dim)
    _sum_norm[(n_rows, videos)](
        *(x, None if y is None else y.contiguous(), gate, total, weight, bias, normal, scales),
        *(n_rows, gate_step, weight_step, bias_step, eps, dim, piece),
        *(y is not None, gate is not None, weight is not None, quantise, LARGEST, SMALLEST_PEAK),
        num_warps=warps,
    )
    return total, normal if scales is None or normal is None else Rows(normal, scales)


def rms_rotate(
    x: Tensor,
    weight: Tensor | None,
    table: Tensor | None,
    head_dim: int,
    eps: float = 0.0,
    out: Tensor | None = None,
) -> Tensor:
    """RMS norm of x [B, n, dim] over its full width * weight [dim], and each head's pairs turned; or a copy.

    table: float32 [n, head_dim / 2, 2], cosine and sine; without weight and table x is copied. x, and `out`
    where it is given, may be [B, n, groups, channels of a group] and lie apart in all but the last.
    """
    assert (weight is None) == (table is None)
    given, dim = _grouped(x), x.shape[2:].numel()
    videos, n_rows = x.shape[:2]
    assert dim % 2 == head_dim % 2 == 0, (dim, head_dim)
    out = x.new_empty(videos, n_rows, dim) if out is None else out
    to = _grouped(out)
    piece, warps = pieces(dim)
    _rms_rotate[(n_rows, videos)](
        *(x, weight, None if table is None else table.contiguous(), out, *given.steps, *to.steps),
        *(eps, dim, piece, head_dim, given.width, to.width, weight is not None),
        num_warps=warps,
    )
    return out


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """One over the root of each row's mean square, of x [B, n, groups, channels of a group]: float32 [B, n].

    x may lie apart in all but the last.
    """
    given, dim = _grouped(x), x.shape[2:].numel()
    out = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    piece, warps = pieces(dim)
    grid = (x.shape[1], x.shape[0])
    _inverse_rms[grid](*(x, out, x.shape[1], *given.steps, eps, dim, piece, given.width), num_warps=warps)
    return out


def quantise_rows(x: Tensor, gelu: bool = False) -> Rows:
    """x [B, n, dim], or GELU(x), in e4m3 with a scale a row.

    It may be [B, n, groups, channels of a group], and lie apart in all but the last.
    """
    given, dim = _grouped(x), x.shape[2:].numel()
    videos, n_rows = x.shape[:2]
    values = torch.empty(videos, n_rows, dim, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(videos, n_rows, 1, dtype=torch.float32, device=x.device)
    piece, warps = pieces(dim)
    _quantise[(n_rows, videos)](
        *(x, values, scales, n_rows, *given.steps, dim, piece, given.width),
        *(gelu, LARGEST, SMALLEST_PEAK),
        num_warps=warps,
    )
    return Rows(values, scales)


class _Layout(NamedTuple):
    steps: tuple[int, int, int]  # from a video, a row and a group of channels to the next
    width: int  # channels of a group


def _grouped(x: Tensor) -> _Layout:
    assert x.stride(-1) == 1, x.stride()
    if x.ndim == 3:
        return _Layout((x.stride(0), x.stride(1), 0), x.shape[2])
    assert x.ndim == 4, x.shape
    one = x.shape[2] == 1 or x.stride(2) == x.shape[3]  # groups lie one behind another
    return _Layout(
        (x.stride(0), x.stride(1), 0 if one else x.stride(2)), x.shape[2] * x.shape[3] if one else x.shape[3]
    )


def _vectors(x: Tensor | None, videos: int) -> tuple[Tensor | None, int]:
    """One vector or one a video, and how far apart those of two videos lie."""
    if x is None:
        return None, 0
    x = x.reshape(-1, x.shape[-1])
    assert len(x) in (1, videos), (x.shape, videos)
    assert x.stride(1) == 1, x.stride()
    return x, x.stride(0) if len(x) > 1 else 0


def pieces(dim: int) -> tuple[int, int]:
    """What a row is cut into, and the warps that take a piece together."""
    longest = LONGEST_PIECE if dim <= 8 * LONGEST_PIECE else 2 * LONGEST_PIECE
    piece = min(triton.next_power_of_2(dim), longest)
    return piece, max(1, piece // (EACH * WARP))
