"""Two of the video VAE's layers as Triton kernels, with gradients, for CUDA devices.

A norm over few channels is a row of 8 to 384 numbers: general kernels give each row a block of
threads and leave most of them idle, so that on an H200 a training step of the embedded VAE spent more
than half of its time there. Here a program takes many rows, and SiLU is applied on the way out. The
gradient of stacking three frames is one read and one write instead of fifteen.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TILE = 4096  # elements a program works on at a time
PROGRAMS = 1024  # of the norm's backward pass, each with a partial sum for gamma
FLOOR = 1e-24  # added to the mean square: a pixel of zeros stays zero


@triton.jit
def _norm(  # type: ignore[no-untyped-def]
    x,
    gamma,
    y,
    n_rows,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    FLOOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    there = (row < n_rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    value = tl.load(x + at, there, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 1) / C + FLOOR)
    out = value * scale[:, None] * tl.load(gamma + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    if SILU:
        out = out * tl.sigmoid(out)
    tl.store(y + at, out.to(y.dtype.element_ty), there)


@triton.jit
def _norm_backward(  # type: ignore[no-untyped-def]
    x,
    gamma,
    dy,
    dx,
    dgamma,
    n_rows,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    FLOOR: tl.constexpr,
):
    channel = tl.arange(0, WIDE)
    weight = tl.load(gamma + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    total = tl.zeros((WIDE,), tl.float32)
    for tile in range(tl.program_id(0), tl.cdiv(n_rows, ROWS), tl.num_programs(0)):
        row = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        there = (row < n_rows)[:, None] & (channel < C)[None, :]
        at = row[:, None] * C + channel[None, :]
        value = tl.load(x + at, there, other=0.0).to(tl.float32)
        grad = tl.load(dy + at, there, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(value * value, 1) / C + FLOOR)[:, None]
        unit = value * scale
        if SILU:
            out = unit * weight
            gate = tl.sigmoid(out)
            grad = grad * gate * (1 + out * (1 - gate))
        total += tl.sum(grad * unit, 0)
        grad = grad * weight
        along = tl.sum(grad * unit, 1)[:, None] / C
        tl.store(dx + at, (scale * (grad - unit * along)).to(dx.dtype.element_ty), there)
    tl.store(dgamma + tl.program_id(0) * C + channel, total, channel < C)


@triton.jit
def _unstack(g, frames, n_frames, frame_size, C: tl.constexpr, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Frame t of `frames` is the sum of its three copies in `g`; grid (blocks of a frame, B * (n_frames + 2))."""
    inside = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = inside < frame_size
    pixel, channel = inside // C, inside % C
    which = tl.program_id(1).to(tl.int64)
    clip, t = which // (n_frames + 2), which % (n_frames + 2)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(3):
        frame = t - k + 0 * inside
        known = there & (frame >= 0) & (frame < n_frames)
        at = (clip * n_frames + frame) * frame_size * 3 + pixel * (3 * C) + k * C + channel
        total += tl.load(g + at, known, other=0.0).to(tl.float32)
    tl.store(frames + which * frame_size + inside, total.to(frames.dtype.element_ty), there)


def _tiles(channels: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(channels)
    return wide, max(1, TILE // wide)


class NormSilu(torch.autograd.Function):
    """Root mean square norm over the last dim, gamma, and SiLU where asked: x [..., C], gamma [C]."""

    @staticmethod
    def forward(ctx, x: Tensor, gamma: Tensor, silu: bool) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: D102
        x = x.contiguous()
        channels = x.shape[-1]
        n_rows, (wide, rows) = x.numel() // channels, _tiles(channels)
        y = torch.empty_like(x)
        _norm[(triton.cdiv(n_rows, rows),)](x, gamma, y, n_rows, channels, wide, rows, silu, FLOOR)
        ctx.save_for_backward(x, gamma)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[no-untyped-def]  # noqa: D102
        x, gamma = ctx.saved_tensors
        channels = x.shape[-1]
        n_rows, (wide, rows) = x.numel() // channels, _tiles(channels)
        programs = min(PROGRAMS, triton.cdiv(n_rows, rows))
        dx = torch.empty_like(x)
        partial = torch.empty(programs, channels, device=x.device)
        _norm_backward[(programs,)](
            x, gamma, dy.contiguous(), dx, partial, n_rows, channels, wide, rows, ctx.silu, FLOOR
        )
        return dx, partial.sum(0).to(gamma.dtype), None


class StackFrames(torch.autograd.Function):
    """Each frame's two predecessors and itself side by side: [B, 2 + T, H, W, C] to [B, T, H, W, 3 C]."""

    @staticmethod
    def forward(ctx, frames: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: D102
        return torch.cat([frames[:, :-2], frames[:, 1:-1], frames[:, 2:]], dim=-1)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: D102
        batch, n_frames, height, width, stacked = grad.shape
        channels = stacked // 3
        frames = grad.new_empty(batch, n_frames + 2, height, width, channels)
        size, block = height * width * channels, 1024
        grid = (triton.cdiv(size, block), batch * (n_frames + 2))
        _unstack[grid](grad.contiguous(), frames, n_frames, size, channels, block)
        return frames
