"""Colour held to the picture's, so that an endless video does not drift.

Per frame, the mean and the standard deviation of L, a and b (CIE 1976, D65) are moved to
those of the picture. They follow from sums over pixels, so several GPUs that hold a tile
each need to add up a few numbers a frame, not to exchange pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from flashtalk_cli.parallel.spatial import WHOLE, Tiles

# Linear sRGB to CIE XYZ with ITU-R BT.709 primaries, each row over the D65 white (0.95047, 1, 1.08883).
_RGB_TO_XYZ = torch.tensor(
    [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]],
    dtype=torch.float64,
) / torch.tensor([[0.95047], [1.0], [1.08883]], dtype=torch.float64)
_XYZ_TO_RGB = torch.linalg.inv(_RGB_TO_XYZ)
_SRGB_LINE, _LINEAR_LINE = 0.04045, 0.0031308  # where sRGB's line near black ends: coded, and in light
_CUBE_ROOT_FROM, _SLOPE = 0.008856, 7.787  # the same of CIE's line, and how steep it is
_CUBE_FROM = _CUBE_ROOT_FROM ** (1 / 3)


@lru_cache(maxsize=8)
def _matrices(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """RGB to XYZ and back, there already when they are used: a copy to a GPU would wait for all its work."""
    with torch.inference_mode(False):
        return _RGB_TO_XYZ.to(device, dtype), _XYZ_TO_RGB.to(device, dtype)


def _mix(matrix: Tensor, x: Tensor) -> Tensor:
    return torch.einsum("ij,bjthw->bithw", matrix, x)


def _power(x: Tensor, exponent: float) -> Tensor:
    """Powers of positive numbers, by logarithms: on a CPU in half the time."""
    return x.log2().mul_(exponent).exp2_()


def to_lab(video: Tensor) -> Tensor:
    """sRGB video [B, 3, T, H, W] in [-1, 1] -> L, a, b, same shape, float32.

    Here and on the way back a curve with a line near black is written as what the curve gives above the
    line's end plus what the line takes off below it: on a CPU a choice by mask costs as much as a power.
    """
    rgb = ((video.float() + 1) / 2).contiguous()
    linear = _power((rgb.clamp(min=_SRGB_LINE) + 0.055) / 1.055, 2.4)
    linear = linear + (rgb.clamp(max=_SRGB_LINE) - _SRGB_LINE) / 12.92
    xyz = _mix(_matrices(linear.device, linear.dtype)[0], linear)
    f = _power(xyz.clamp(min=_CUBE_ROOT_FROM), 1 / 3)
    f = f + _SLOPE * (xyz.clamp(max=_CUBE_ROOT_FROM) - _CUBE_ROOT_FROM)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def from_lab(lab: Tensor) -> Tensor:
    """L, a, b [B, 3, T, H, W] -> sRGB in [-1, 1], clipped to what a screen can show."""
    y = (lab[:, 0] + 16) / 116
    f = torch.stack([lab[:, 1] / 500 + y, y, (y - lab[:, 2] / 200).clamp(min=0)], 1)
    xyz = f.clamp(min=_CUBE_FROM) ** 3 + (f.clamp(max=_CUBE_FROM) - _CUBE_FROM) / _SLOPE
    linear = _mix(_matrices(xyz.device, xyz.dtype)[1], xyz)
    rgb = 1.055 * _power(linear.clamp(min=_LINEAR_LINE), 1 / 2.4) - 0.055
    rgb = rgb + 12.92 * (linear.clamp(max=_LINEAR_LINE) - _LINEAR_LINE)
    return rgb.clamp(0, 1) * 2 - 1


@dataclass(frozen=True)
class Statistics:
    """Mean and population standard deviation of L, a, b over a frame's pixels: each [B, 3, T, 1, 1]."""

    mean: Tensor
    std: Tensor

    @staticmethod
    def of(lab: Tensor, tiles: Tiles = WHOLE) -> Statistics:
        """Measure L, a, b [B, 3, T, H, W], of whole frames or of this rank's tile of them.

        A tile's moments about zero add up to the frame's. They are summed in float64, where nothing is lost to
        cancellation, nor to the number of threads that share a sum.
        """
        mean = lab.mean(dim=(3, 4), keepdim=True, dtype=torch.float64)
        var = (lab - mean.to(lab.dtype)).square().mean(dim=(3, 4), keepdim=True, dtype=torch.float64)
        moments = torch.stack([torch.ones_like(mean), mean, var + mean.square()])
        pixels, first, second = tiles.sum(moments * (lab.shape[3] * lab.shape[4]))
        mean = first / pixels
        std = (second / pixels - mean.square()).clamp(min=0).sqrt()
        return Statistics(mean.to(lab.dtype), std.to(lab.dtype))


def match_colour(video: Tensor, target: Statistics, strength: float, tiles: Tiles = WHOLE) -> Tensor:
    """Move each frame's colours to the target's, blended by strength in 0..1.

    video: [B, 3, T, H, W] in [-1, 1], this rank's tile; target: of one whole frame (T = 1). Returns float32.
    A frame of one flat colour keeps its (zero) contrast: nothing is divided by zero.
    """
    if strength == 0:
        return video.float()
    lab = to_lab(video)
    own = Statistics.of(lab, tiles)
    moved = (lab - own.mean) * (target.std / own.std.clamp(min=1e-6)) + target.mean
    return torch.lerp(video.float(), from_lab(moved), strength)
