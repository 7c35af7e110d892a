"""The z-buffer of `raster` as one Triton kernel, for CUDA devices.

A program takes 32 neighbouring triangles of one frame, a lane each, and walks their boxes in
step; lanes whose box is done wait for the largest. Triangles are a few samples large, so that
little is lost, and the maximum over (nearness, triangle) is one 64-bit atomic a covered sample,
spared where something nearer is already there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashtalk_cli.distill.people.raster import unpack

LANES = 32


@triton.jit
def _scan(screen, faces, best, n_vertices, n_faces, height, width, LANES: tl.constexpr):  # type: ignore[no-untyped-def]
    frame = tl.program_id(0).to(tl.int64)
    face = tl.program_id(1) * LANES + tl.arange(0, LANES)
    valid = face < n_faces
    base = screen + frame * n_vertices * 3
    a = base + tl.load(faces + face * 3, valid, other=0) * 3
    b = base + tl.load(faces + face * 3 + 1, valid, other=0) * 3
    c = base + tl.load(faces + face * 3 + 2, valid, other=0) * 3
    ax, ay, az = tl.load(a), tl.load(a + 1), tl.load(a + 2)
    bx, by, bz = tl.load(b), tl.load(b + 1), tl.load(b + 2)
    cx, cy, cz = tl.load(c), tl.load(c + 1), tl.load(c + 2)
    x0 = tl.maximum(tl.ceil(tl.minimum(ax, tl.minimum(bx, cx)) - 0.5), 0.0).to(tl.int32)
    y0 = tl.maximum(tl.ceil(tl.minimum(ay, tl.minimum(by, cy)) - 0.5), 0.0).to(tl.int32)
    x1 = tl.minimum(tl.floor(tl.maximum(ax, tl.maximum(bx, cx)) - 0.5), width - 1.0).to(tl.int32)
    y1 = tl.minimum(tl.floor(tl.maximum(ay, tl.maximum(by, cy)) - 0.5), height - 1.0).to(tl.int32)
    ux, uy, vx, vy = bx - ax, by - ay, cx - ax, cy - ay
    area = ux * vy - uy * vx
    valid = valid & (tl.minimum(az, tl.minimum(bz, cz)) > 0) & (tl.abs(area) > 1e-9)
    wide = tl.maximum(x1 - x0 + 1, 0)
    count = tl.where(valid, wide * tl.maximum(y1 - y0 + 1, 0), 0)
    scale = 1.0 / tl.where(valid, area, 1.0)
    wide = tl.maximum(wide, 1)
    picture = best + frame * height * width
    low_bits = (0x7FFFFFFF - face).to(tl.int64)
    for step in range(0, tl.max(count, 0)):
        x = x0 + step % wide
        y = y0 + step // wide
        px, py = x + 0.5 - ax, y + 0.5 - ay
        v = (px * vy - py * vx) * scale
        w = (ux * py - uy * px) * scale
        u = 1.0 - v - w
        inside = (step < count) & (u >= 0) & (v >= 0) & (w >= 0)
        nearness = u * az + v * bz + w * cz
        packed = (nearness.to(tl.int32, bitcast=True).to(tl.int64) << 32) | low_bits
        at = picture + y * width + x
        inside = inside & (packed > tl.load(at, inside, other=0))
        tl.atomic_max(at, packed, inside, sem="relaxed")


def rasterise(screen: Tensor, faces: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """The same as `raster.rasterise`, for float32 tensors on a CUDA device."""
    batch, n_vertices, _ = screen.shape
    best = torch.full((batch, height, width), -1, dtype=torch.int64, device=screen.device)
    grid = (batch, triton.cdiv(faces.shape[0], LANES))
    corners = faces.to(torch.int32).contiguous()
    _scan[grid](
        screen.contiguous(),
        corners,
        best,
        n_vertices,
        faces.shape[0],
        height,
        width,
        LANES=LANES,
        num_warps=1,
    )
    return unpack(best)
