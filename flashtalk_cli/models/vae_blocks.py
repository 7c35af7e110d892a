"""Layers of the video VAE: causal convolution, norm, residual block, attention, resampling.

Activations are channels-last, contiguous [B, T, H, W, C], from the first convolution to the last.
Every layer is a pure function `layer(x, past, tiles) -> (x, past)`: `past` is what the layer must
remember of earlier frames (None before the first), and what comes out replaces it.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flashtalk_cli.parallel.spatial import Tiles

Past: TypeAlias = Any  # None, a tensor, or a tuple of pasts; only the layer that made it looks inside


class Conv(nn.Module):
    """Weight [O, I, (T,) kh, kw] and bias of a convolution, laid out in memory as O, kh, kw, T, I."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, ...]) -> None:
        super().__init__()
        *time, height, width = kernel
        weight = torch.empty(out_channels, height, width, *time, in_channels)
        bias = torch.empty(out_channels)
        bound = 1 / math.sqrt(in_channels * math.prod(kernel))
        nn.init.uniform_(weight, -bound, bound)
        nn.init.uniform_(bias, -bound, bound)
        self.weight = nn.Parameter(
            rearrange(weight, "o h w t i -> o i t h w" if time else "o h w i -> o i h w")
        )
        self.bias = nn.Parameter(bias)

    def kernel_2d(self) -> Tensor:
        """The weight as [O, (T I), kh, kw]: a channels-last view when the memory order is ours."""
        if self.weight.ndim == 4:
            return self.weight
        return rearrange(self.weight, "o i t h w -> o (t i) h w")

    def pointwise(self, x: Tensor) -> Tensor:
        """Apply a kernel of one pixel to stacked frames [..., (T I)]: a matrix product."""
        return F.linear(x, self.kernel_2d().flatten(1), self.bias)

    def spatial(self, x: Tensor, tiles: Tiles, stride: int = 1) -> Tensor:
        """Apply a 3 x 3 kernel to [N, H, W, (T I)]; stride 2 reads beyond the far border only."""
        x, missing = tiles.halo(x, *((1, 1) if stride == 1 else (0, 1)))
        if missing == (0, 1):
            x, missing = F.pad(x, (0, 0, 0, 1, 0, 1)), (0, 0)
        frames = rearrange(x, "n h w c -> n c h w")
        y = F.conv2d(frames, self.kernel_2d(), self.bias, stride=stride, padding=missing[0])
        return rearrange(y, "n c h w -> n h w c")


class CausalConv(Conv):
    """3 x 3 x 3 convolution that sees its frame and the two before it; its past is those two."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, (3, 3, 3))

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """[B, T, H, W, I] to [B, T, H, W, O]."""
        batch = x.shape[0]
        stacked, past = stack_frames(x, past)
        y = self.spatial(rearrange(stacked, "b t h w c -> (b t) h w c"), tiles)
        return rearrange(y, "(b t) h w c -> b t h w c", b=batch), past


def stack_frames(x: Tensor, past: Past) -> tuple[Tensor, Tensor]:
    """Put each frame's two predecessors and itself side by side on channels.

    [B, T, H, W, C] and the past two frames [B, 2, H, W, C] (None: zeros) to [B, T, H, W, 3 C] and
    the last two frames.
    """
    if past is None:
        past = torch.zeros_like(x[:, :1]).expand(-1, 2, -1, -1, -1)
    frames = torch.cat([past, x], dim=1)
    stacked = torch.cat([frames[:, :-2], frames[:, 1:-1], frames[:, 2:]], dim=-1)
    return stacked, frames[:, -2:].clone()


class RmsNorm(nn.Module):
    """Divide by the root mean square over channels, then scale by gamma [C, 1, 1, (1)]."""

    def __init__(self, channels: int, dims: int = 3) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor, silu: bool = False) -> Tensor:
        """[..., C] to [..., C]; SiLU on top where asked."""
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        y = x * (math.sqrt(x.shape[-1]) / norm).to(x.dtype) * self.gamma.flatten()
        return F.silu(y) if silu else y


class ResidualBlock(nn.Module):
    """Twice norm, SiLU, causal convolution; beside it the input, through a 1 x 1 where widths differ."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.ModuleDict(  # the released checkpoint's places in its nn.Sequential
            {
                "0": RmsNorm(in_channels),
                "2": CausalConv(in_channels, out_channels),
                "3": RmsNorm(out_channels),
                "6": CausalConv(out_channels, out_channels),
            }
        )
        self.shortcut = Conv(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """[B, T, H, W, I] to [B, T, H, W, O]."""
        past_1, past_2 = past or (None, None)
        y, past_1 = self.residual["2"](self.residual["0"](x, silu=True), past_1, tiles)
        y, past_2 = self.residual["6"](self.residual["3"](y, silu=True), past_2, tiles)
        return y + (x if self.shortcut is None else self.shortcut.pointwise(x)), (past_1, past_2)


class Attention(nn.Module):
    """Single-head attention among all pixels of a frame; keys and values come from every tile."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = RmsNorm(channels, dims=2)
        self.to_qkv = Conv(channels, 3 * channels, (1, 1))
        self.proj = Conv(channels, channels, (1, 1))
        nn.init.zeros_(self.proj.weight)

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """[B, T, H, W, C] to [B, T, H, W, C]."""
        batch, _, height, width, _ = x.shape
        frames = rearrange(x, "b t h w c -> (b t) h w c")
        q, k, v = self.to_qkv.pointwise(self.norm(frames)).chunk(3, dim=-1)
        q, k, v = (rearrange(a, "n h w c -> n 1 (h w) c") for a in (q, tiles.gather(k), tiles.gather(v)))
        y = self.proj.pointwise(F.scaled_dot_product_attention(q, k, v))
        return x + rearrange(y, "(b t) 1 (h w) c -> b t h w c", b=batch, h=height, w=width), past


class Downsample(nn.Module):
    """Halve height and width, and with `temporal` the frame rate, the very first frame excepted."""

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels, (3, 3))})
        self.time_conv = Conv(channels, channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """[B, T, H, W, C] to [B, T or T/2, H/2, W/2, C]; the past is one downsampled frame."""
        y = self.resample["1"].spatial(rearrange(x, "b t h w c -> (b t) h w c"), tiles, stride=2)
        y = rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0])
        if self.time_conv is None:
            return y, None
        if past is None:
            assert y.shape[1] == 1, f"{y.shape[1]} frames where the first must come alone"
            return y, y
        frames = torch.cat([past, y], dim=1)
        stacked = torch.cat([frames[:, :-2:2], frames[:, 1:-1:2], frames[:, 2::2]], dim=-1)
        return self.time_conv.pointwise(stacked), y[:, -1:].clone()


class Upsample(nn.Module):
    """Double height and width and halve the channels; with `temporal` double the frame rate first.

    The very first frame stays alone, and is no past for the second: that one sees zeros.
    """

    def __init__(self, channels: int, temporal: bool) -> None:
        super().__init__()
        self.resample = nn.ModuleDict({"1": Conv(channels, channels // 2, (3, 3))})
        self.time_conv = Conv(channels, 2 * channels, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, past: Past, tiles: Tiles) -> tuple[Tensor, Past]:
        """[B, T, H, W, C] to [B, T or 2 T, 2 H, 2 W, C/2]."""
        if self.time_conv is not None:
            if past is None:
                assert x.shape[1] == 1, f"{x.shape[1]} frames where the first must come alone"
                past = torch.zeros_like(x).expand(-1, 2, -1, -1, -1)
            else:
                stacked, past = stack_frames(x, past)
                x = rearrange(self.time_conv.pointwise(stacked), "b t h w (n c) -> b (t n) h w c", n=2)
        y = rearrange(x, "b t h w c -> (b t) h w c")
        y = y.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
        y = self.resample["1"].spatial(y, tiles)
        return rearrange(y, "(b t) h w c -> b t h w c", b=x.shape[0]), past
