"""Kernels over rows of tokens: a program takes whole rows, so that a norm or a peak needs no second pass.

All of them move bytes and hardly compute: the floor is the size of inputs and outputs over the memory's
bandwidth. Vectors over channels (weights, gates) are read for each row, which costs the caches little; kept in
registers they would leave room for one program on a multiprocessor instead of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK, Rows

ROWS = 4  # that a program takes one after another


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
    eps,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SUM: tl.constexpr,
    GATED: tl.constexpr,
    NORM: tl.constexpr,
    QUANTISE: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_PEAK: tl.constexpr,
):
    """total = x + y * gate, rounded; normal = LayerNorm(total) * weight + bias. Grid (blocks of rows, videos)."""
    video = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < DIM
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        at = (video * n_rows + row) * DIM + channel
        value = tl.load(x + at, inside, other=0.0).to(tl.float32)
        if SUM:
            added = tl.load(y + at, inside, other=0.0).to(tl.float32)
            if GATED:
                added = added * tl.load(gate + video * gate_step + channel, inside, other=0.0).to(tl.float32)
            rounded = (value + added).to(total.dtype.element_ty)
            tl.store(total + at, rounded, inside)
            value = rounded.to(tl.float32)
        if NORM:
            centred = tl.where(inside, value - tl.sum(value, 0) / DIM, 0.0)
            w = tl.load(weight + video * weight_step + channel, inside, other=0.0).to(tl.float32)
            b = tl.load(bias + video * weight_step + channel, inside, other=0.0).to(tl.float32)
            out = centred * tl.rsqrt(tl.sum(centred * centred, 0) / DIM + eps) * w + b
            if QUANTISE:
                scale = tl.maximum(tl.max(tl.abs(out), 0), SMALLEST_PEAK) / LARGEST
                tl.store(scales + video * n_rows + row, scale)
                out = out / scale
            tl.store(normal + at, out.to(normal.dtype.element_ty), inside)


@triton.jit
def _rms_rotate(  # type: ignore[no-untyped-def]
    x,
    weight,
    table,
    out,
    n_rows,
    video_step,
    row_step,
    eps,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    ROTATE: tl.constexpr,
):
    """RMS norm over the full width, then pairs (2i, 2i + 1) turned by the row's angles. HALF: pairs, padded."""
    video = tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, 2 * HALF)
    inside = channel < DIM
    w = tl.load(weight + channel, inside, other=0.0).to(tl.float32)
    first = tl.program_id(0) * ROWS
    for row in range(first, tl.minimum(first + ROWS, n_rows)):
        value = tl.load(x + video * video_step + row * row_step + channel, inside, other=0.0).to(tl.float32)
        value = value * tl.rsqrt(tl.sum(value * value, 0) / DIM + eps) * w
        if ROTATE:
            turn = tl.load(table + row * HEAD + channel % HEAD, inside, other=0.0)
            cos, sin = tl.split(tl.reshape(turn, (HALF, 2)))
            a, b = tl.split(tl.reshape(value, (HALF, 2)))
            value = tl.reshape(tl.join(a * cos - b * sin, a * sin + b * cos), (2 * HALF,))
        tl.store(out + (video * n_rows + row) * DIM + channel, value.to(out.dtype.element_ty), inside)


@triton.jit
def _quantise(  # type: ignore[no-untyped-def]
    x,
    values,
    scales,
    row_step,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    GELU: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST_PEAK: tl.constexpr,
):
    """values * scales = x, or GELU(x) in its tanh form; a program a row."""
    row = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, WIDE)
    inside = channel < DIM
    value = tl.load(x + row * row_step + channel, inside, other=0.0).to(tl.float32)
    if GELU:  # (1 + tanh u) / 2 = sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3)
        value = value * tl.sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
    scale = tl.maximum(tl.max(tl.abs(value), 0), SMALLEST_PEAK) / LARGEST
    tl.store(scales + row, scale)
    tl.store(values + row * DIM + channel, (value / scale).to(values.dtype.element_ty), inside)


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
    assert bias_step == weight_step, (bias_step, weight_step)
    gate, gate_step = _vectors(gate, videos)
    wide = triton.next_power_of_2(dim)
    _sum_norm[(triton.cdiv(n_rows, ROWS), videos)](
        *(x, None if y is None else y.contiguous(), gate, total, weight, bias, normal, scales),
        *(n_rows, gate_step, weight_step, eps, dim, wide, ROWS),
        *(y is not None, gate is not None, weight is not None, quantise, LARGEST, SMALLEST_PEAK),
        num_warps=_warps(wide),
    )
    return total, normal if scales is None or normal is None else Rows(normal, scales)


def rms_rotate(x: Tensor, weight: Tensor, table: Tensor | None, head_dim: int, eps: float) -> Tensor:
    """RMS norm of x [B, n, dim] over its full width * weight [dim], and with a table each head's pairs turned.

    table: float32 [n, head_dim / 2, 2], cosine and sine. Rows of x may lie apart (a slice of a wider tensor).
    """
    videos, n_rows, dim = x.shape
    assert x.stride(2) == 1, x.stride()
    assert dim % 2 == head_dim % 2 == 0, (dim, head_dim)
    out = x.new_empty(x.shape)
    half = triton.next_power_of_2(dim // 2)
    _rms_rotate[(triton.cdiv(n_rows, ROWS), videos)](
        *(x, weight, None if table is None else table.contiguous(), out, n_rows, x.stride(0), x.stride(1)),
        *(eps, dim, half, head_dim, ROWS, table is not None),
        num_warps=_warps(2 * half),
    )
    return out


def quantise_rows(x: Tensor, gelu: bool = False) -> Rows:
    """x [..., dim], or GELU(x), in e4m3 with a scale a row."""
    dim = x.shape[-1]
    rows = x.reshape(-1, dim)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(*x.shape[:-1], 1, dtype=torch.float32, device=x.device)
    wide = triton.next_power_of_2(dim)
    _quantise[(len(rows),)](
        *(rows, values, scales, rows.stride(0), dim, wide, gelu, LARGEST, SMALLEST_PEAK),
        num_warps=_warps(wide),
    )
    return Rows(values, scales)


def _vectors(x: Tensor | None, videos: int) -> tuple[Tensor | None, int]:
    """One vector or one a video, and how far apart those of two videos lie."""
    if x is None:
        return None, 0
    x = x.reshape(-1, x.shape[-1])
    assert len(x) in (1, videos), (x.shape, videos)
    assert x.stride(1) == 1, x.stride()
    return x, x.stride(0) if len(x) > 1 else 0


def _warps(wide: int) -> int:
    """Sixteen to thirty-two numbers a thread."""
    return min(16, max(1, wide // 1024))
