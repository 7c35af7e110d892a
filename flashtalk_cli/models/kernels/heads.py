"""Queries, keys and values to e4m3, a scale a head over all tokens; see models/attention_fp8.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.models.attention_fp8 import Heads
from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK

TOKENS, WARPS = 128, 8  # a program


@triton.jit
def _tile(  # type: ignore[no-untyped-def]
    x,
    signs,
    n_tokens,
    video_step,
    token_step,
    head_step,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    MIX: tl.constexpr,
):
    """Tokens and channels of a head that this program takes, and its numbers, mixed."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    channel = tl.arange(0, WIDE)
    there = (token < n_tokens)[:, None] & (channel < WIDTH)[None, :]
    at = tl.program_id(2).to(tl.int64) * video_step + tl.program_id(1) * head_step
    given = tl.load(x + at + token[:, None] * token_step + channel[None, :], there, other=0.0)
    if MIX:
        matrix = tl.load(signs + channel[:, None] * WIDE + channel[None, :])
        value = tl.dot(given, matrix, input_precision="ieee") * WIDTH**-0.5
    else:
        value = given.to(tl.float32)
    return token, channel, there, value


@triton.jit
def _peaks(  # type: ignore[no-untyped-def]
    x,
    signs,
    peaks,
    n_tokens,
    video_step,
    token_step,
    head_step,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    MIX: tl.constexpr,
):
    """The largest magnitude of each head, into zeros. Grid (blocks of tokens, heads, videos)."""
    _, _, _, value = _tile(x, signs, n_tokens, video_step, token_step, head_step, WIDTH, WIDE, TOKENS, MIX)
    peak = tl.max(tl.max(tl.abs(value), 1), 0)
    tl.atomic_max(peaks + tl.program_id(2) * tl.num_programs(1) + tl.program_id(1), peak)


@triton.jit
def _quantise_heads(  # type: ignore[no-untyped-def]
    x,
    signs,
    peaks,
    values,
    scales,
    n_tokens,
    video_step,
    token_step,
    head_step,
    WIDTH: tl.constexpr,
    WIDE: tl.constexpr,
    TOKENS: tl.constexpr,
    MIX: tl.constexpr,
    LARGEST: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """values * scales = x, mixed. Grid (blocks of tokens, heads, videos)."""
    token, channel, there, value = _tile(
        x, signs, n_tokens, video_step, token_step, head_step, WIDTH, WIDE, TOKENS, MIX
    )
    head, heads, video = tl.program_id(1), tl.num_programs(1), tl.program_id(2).to(tl.int64)
    scale = tl.maximum(tl.load(peaks + video * heads + head), SMALLEST) / LARGEST
    tl.store(scales + video * heads + head, scale)  # every program of a head the same
    at = ((video * n_tokens + token) * heads + head)[:, None] * WIDTH + channel[None, :]
    tl.store(values + at, (value * (1 / scale)).to(values.dtype.element_ty), there)


def quantise(x: Tensor, signs: Tensor | None = None) -> Heads:
    """x [B, n, heads, head_dim], of any strides but the last, in e4m3.

    signs: a matrix [head_dim, head_dim] in x's dtype that each head is multiplied by before, over
    sqrt(head_dim); head_dim is a power of two then, 16 at least.
    """
    videos, n_tokens, heads, width = x.shape
    assert x.stride(3) == 1, x.stride()
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(videos, heads, dtype=torch.float32, device=x.device)
    peaks = torch.zeros_like(scales)
    given = (n_tokens, *x.stride()[:3], width, triton.next_power_of_2(width), TOKENS, signs is not None)
    grid = (triton.cdiv(n_tokens, TOKENS), heads, videos)
    _peaks[grid](x, signs, peaks, *given, num_warps=WARPS)
    _quantise_heads[grid](x, signs, peaks, values, scales, *given, LARGEST, SMALLEST_PEAK, num_warps=WARPS)
    return Heads(values, scales)
