"""The video VAE's passes over memory between two convolutions, one kernel each; no gradients.

A causal convolution runs as a 2-D one over three frames side by side (see vae_blocks.conv_causal). Made
one by one, bias, norm, SiLU, the join with the past and the stacking read and write a frame's bytes some
twenty times; here they are read once and written three times, as the convolution wants them. Its bias
stays out of the convolution, where torch adds it in a pass of its own, and goes into the next of these.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE = 4096  # elements a program works on at a time
FLOOR = 1e-24  # added to the mean square: a pixel of zeros stays zero


@triton.jit
def _norm_stack(  # type: ignore[no-untyped-def]
    x,
    bias,
    gamma,
    past,
    stacked,
    kept,
    n_frames,
    height,
    width,
    before,
    after,
    C: tl.constexpr,
    WIDE: tl.constexpr,
    ROWS: tl.constexpr,
    BIAS: tl.constexpr,
    PAST: tl.constexpr,
    FLOOR: tl.constexpr,
):
    """Grid (tiles of a frame with its border, B * (2 + n_frames)); of each video the first two frames are the past."""
    wide = before + width + after
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)  # in a frame with its border
    y, x_ = place // wide - before, place % wide - before
    own = (y >= 0) & (y < height) & (x_ >= 0) & (x_ < width)
    pixels, places = height * width, (before + height + after) * wide
    channel = tl.arange(0, WIDE)
    room = (place < places)[:, None] & (channel < C)[None, :]
    there = own[:, None] & (channel < C)[None, :]
    inside = (y.to(tl.int64) * width + x_)[:, None] * C + channel[None, :]
    which = tl.program_id(1).to(tl.int64)
    clip, frame = which // (n_frames + 2), which % (n_frames + 2)
    if frame >= 2:
        at = (clip * n_frames + frame - 2) * pixels * C + inside
        value = tl.load(x + at, there, other=0.0).to(tl.float32)
        if BIAS:
            value += tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
        scale = tl.rsqrt(tl.sum(value * value, 1) / C + FLOOR)
        weight = tl.load(gamma + channel, channel < C, other=0.0).to(tl.float32)
        value = value * scale[:, None] * weight[None, :]
        value = tl.where(there, value * tl.sigmoid(value), 0.0)  # a bias is no part of the border
    else:
        value = tl.zeros((ROWS, WIDE), tl.float32)
        if PAST:
            value = tl.load(past + (clip * 2 + frame) * pixels * C + inside, there, other=0.0).to(tl.float32)
    out = value.to(stacked.dtype.element_ty)
    for k in tl.static_range(3):
        to = frame - k + 0 * place
        wanted = (to >= 0) & (to < n_frames)
        at = ((clip * n_frames + to) * places + place)[:, None] * (3 * C) + k * C + channel[None, :]
        tl.store(stacked + at, out, room & wanted[:, None])
    if frame >= n_frames:
        tl.store(kept + (clip * 2 + frame - n_frames) * pixels * C + inside, out, there)


@triton.jit
def _add_bias(y, bias, x, n_rows, C: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """y += bias + x, in place. Rows and channels apart: a remainder for each number would outlast its bytes."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, WIDE)
    there = (row < n_rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * C + channel[None, :]
    value = tl.load(y + at, there, other=0.0).to(tl.float32) + tl.load(x + at, there, other=0.0).to(
        tl.float32
    )
    value += tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    tl.store(y + at, value.to(y.dtype.element_ty), there)


@triton.jit
def _interleave(  # type: ignore[no-untyped-def]
    corners, bias, out, height, width, C: tl.constexpr, WIDE: tl.constexpr, COLUMNS: tl.constexpr
):
    """Row y, column x of `out` is corner ((y + 1) / 2, (x + 1) / 2), part 2 ((y + 1) % 2) + (x + 1) % 2.

    Grid (tiles of a row, rows, frames).
    """
    x = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    y = tl.program_id(1)
    frame = tl.program_id(2).to(tl.int64)
    channel = tl.arange(0, WIDE)
    there = (x < width)[:, None] & (channel < C)[None, :]
    corner = (frame * (height // 2 + 1) + (y + 1) // 2) * (width // 2 + 1) + (x + 1) // 2
    part = ((y + 1) % 2) * 2 + (x + 1) % 2
    value = tl.load(corners + (corner * 4 + part)[:, None] * C + channel[None, :], there, other=0.0)
    value = value.to(tl.float32) + tl.load(bias + channel, channel < C, other=0.0).to(tl.float32)[None, :]
    at = ((frame * height + y) * width + x)[:, None] * C + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), there)


def norm_stack(
    x: Tensor, bias: Tensor | None, gamma: Tensor, past: Tensor | None, room: tuple[int, int] = (0, 0)
) -> tuple[Tensor, Tensor]:
    """SiLU(norm(x + bias) * gamma) behind the past, each frame beside its two predecessors; the new past.

    x: [B, T, H, W, C]. past: [B, 2, H, W, C], as this gave it before; None: zeros. room: zeros to leave above
    and left of each frame, and below and right of it. Returns [B, T, H + room, W + room, 3 C] and [B, 2, H, W, C].
    """
    x = x.contiguous()
    batch, n_frames, height, width, channels = x.shape
    places = (sum(room) + height, sum(room) + width)
    stacked = x.new_empty(batch, n_frames, *places, 3 * channels)
    kept = x.new_empty(batch, 2, height, width, channels)
    wide, rows = _tiles(channels)
    _norm_stack[(triton.cdiv(places[0] * places[1], rows), batch * (n_frames + 2))](
        *(x, bias, gamma, None if past is None else past.contiguous(), stacked, kept, n_frames),
        *(height, width, *room, channels, wide, rows, bias is not None, past is not None, FLOOR),
    )
    return stacked, kept


def add_bias(y: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """y + bias + x, in y's memory; y and x [..., C] contiguous, bias [C]."""
    assert y.is_contiguous()
    assert y.shape == x.shape, (y.shape, x.shape)
    channels = y.shape[-1]
    n_rows, (wide, rows) = y.numel() // channels, _tiles(channels)
    _add_bias[(triton.cdiv(n_rows, rows),)](y, bias, x.contiguous(), n_rows, channels, wide, rows)
    return y


def interleave(corners: Tensor, bias: Tensor) -> Tensor:
    """Four outputs around each corner to pixels: [B, T, h + 1, w + 1, 4 C], plus bias [C], to [B, T, 2h, 2w, C]."""
    corners = corners.contiguous()
    batch, n_frames, height, width, channels = corners.shape
    height, width, channels = 2 * (height - 1), 2 * (width - 1), channels // 4
    out = corners.new_empty(batch, n_frames, height, width, channels)
    wide, columns = _tiles(channels)
    columns = min(columns, triton.next_power_of_2(width))
    _interleave[(triton.cdiv(width, columns), height, batch * n_frames)](
        corners, bias, out, height, width, channels, wide, columns
    )
    return out


def _tiles(channels: int) -> tuple[int, int]:
    wide = triton.next_power_of_2(channels)
    return wide, max(1, TILE // wide)
