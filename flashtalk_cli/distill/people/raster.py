"""A batched z-buffer in plain torch: which triangle covers each sample, and where in it.

Pixel centres lie at half-integers; x grows to the right and y downwards, in samples. A vertex
carries its reciprocal distance from the camera as third coordinate: it is linear on the screen,
so the nearest surface is the one with the largest value and perspective-correct interpolation
needs nothing else. A vertex behind the camera has a reciprocal distance <= 0: its triangles go.

`rasterise_plain` is the oracle; `raster_triton.rasterise` computes the same on a CUDA device, and
`rasterise` takes it where it can. Both pack (nearness, triangle) into one int64 a sample and take the maximum, so
that the result does not depend on the order of the triangles.
"""

from __future__ import annotations

import importlib.util
from itertools import pairwise

import torch
from torch import Tensor

NOTHING = -1  # the triangle index of a sample that no triangle covers
CANDIDATES_AT_ONCE = {"cuda": 1 << 23, "cpu": 1 << 17}
HAS_TRITON = importlib.util.find_spec("triton") is not None


def rasterise(screen: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """`rasterise_plain`, by the Triton kernel on a CUDA device."""
    if screen.is_cuda and HAS_TRITON:
        from flashtalk_cli.distill.people import raster_triton

        return raster_triton.rasterise(screen, faces, height, width)
    return rasterise_plain(screen, faces, height, width)


def rasterise_plain(screen: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The nearest triangle of every sample, and how near it is there.

    screen: float32 [B, V, 3], columns (x, y, reciprocal distance); faces: int64 [F, 3], wound in
    any direction. Returns int64 [B, height, width], an index into `faces` or `NOTHING`, and
    float32 [B, height, width], the reciprocal distance, 0 where nothing is.
    """
    batch, n_faces = screen.shape[0], faces.shape[0]
    best = torch.full((batch * height * width,), -1, dtype=torch.int64, device=screen.device)
    corners = screen[:, faces].reshape(batch * n_faces, 3, 3)
    lowest, highest = corners.amin(1), corners.amax(1)
    limit = torch.tensor([width, height], device=screen.device, dtype=torch.int64)
    first = (lowest[:, :2] - 0.5).ceil().clamp_min(0).long()
    last = torch.minimum((highest[:, :2] - 0.5).floor().long(), limit - 1)
    box = (last - first + 1).clamp_min(0)
    count = torch.where((lowest[:, 2] > 0) & _has_area(corners), box[:, 0] * box[:, 1], 0)
    seen = torch.nonzero(count).squeeze(1)
    ends = count[seen].cumsum(0)
    cuts = torch.arange(
        0, int(ends[-1]) if len(ends) else 0, CANDIDATES_AT_ONCE[screen.device.type], device=ends.device
    )
    bounds = [*torch.searchsorted(ends, cuts).tolist(), len(seen)]
    for start, end in pairwise(bounds):
        some = seen[start:end]
        if len(some):
            _scatter(
                best, corners[some], first[some], box[some, 0], count[some], some, n_faces, height, width
            )
    return unpack(best.reshape(batch, height, width))


def _has_area(corners: Tensor) -> Tensor:
    one, two = corners[:, 1, :2] - corners[:, 0, :2], corners[:, 2, :2] - corners[:, 0, :2]
    return (one[:, 0] * two[:, 1] - one[:, 1] * two[:, 0]).abs() > 1e-9


def _scatter(
    best: Tensor,
    corners: Tensor,
    first: Tensor,
    wide: Tensor,
    count: Tensor,
    which: Tensor,
    n_faces: int,
    height: int,
    width: int,
) -> None:
    """Tests every sample in the box of each triangle; keeps the nearest at each sample."""
    owner = torch.repeat_interleave(torch.arange(len(which), device=which.device), count)
    within = torch.arange(len(owner), device=which.device) - (count.cumsum(0) - count)[owner]
    x = first[owner, 0] + within % wide[owner]
    y = first[owner, 1] + within // wide[owner]
    weights = edge_weights(corners[owner], x + 0.5, y + 0.5)
    inside = torch.nonzero(weights.amin(-1) >= 0).squeeze(1)
    owner, x, y, weights = owner[inside], x[inside], y[inside], weights[inside]
    nearness = (weights * corners[owner, :, 2]).sum(-1)
    target = (which[owner] // n_faces * height + y) * width + x
    best.scatter_reduce_(0, target, pack(nearness, which[owner] % n_faces), "amax")


def pack(nearness: Tensor, face: Tensor) -> Tensor:
    """One int64 that orders by nearness (positive float32), then by the lower triangle index."""
    return (nearness.contiguous().view(torch.int32).long() << 32) | (0x7FFFFFFF - face)


def unpack(best: Tensor) -> tuple[Tensor, Tensor]:
    """The triangle index (`NOTHING` for -1) and the nearness (0) of packed values."""
    index = 0x7FFFFFFF - (best & 0x7FFFFFFF)
    nearness = (best >> 32).to(torch.int32).view(torch.float32)
    covered = best >= 0
    return torch.where(covered, index, NOTHING), torch.where(covered, nearness, 0.0)


def edge_weights(corners: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Barycentric weights [..., 3] on the screen of points (x, y) [...] in triangles [..., 3, 3].

    A triangle without area gives weights of -1: no sample is inside it.
    """
    ax, ay = corners[..., 0, 0], corners[..., 0, 1]
    bx, by = corners[..., 1, 0] - ax, corners[..., 1, 1] - ay
    cx, cy = corners[..., 2, 0] - ax, corners[..., 2, 1] - ay
    px, py = x - ax, y - ay
    area = bx * cy - by * cx
    flat = area.abs() < 1e-9
    scale = 1.0 / torch.where(flat, torch.ones_like(area), area)
    v = (px * cy - py * cx) * scale
    w = (bx * py - by * px) * scale
    v, w = torch.where(flat, -torch.ones_like(v), v), torch.where(flat, -torch.ones_like(w), w)
    return torch.stack([1.0 - v - w, v, w], dim=-1)
