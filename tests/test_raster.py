"""The rasteriser of the generator of talking people."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtalk_cli.distill.people import raster


def brute_force(
    screen: np.ndarray, faces: np.ndarray, height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Every sample against every triangle, in double precision."""
    best, found = np.zeros((height, width)), np.full((height, width), raster.NOTHING)
    y, x = np.mgrid[0:height, 0:width] + 0.5
    for number, face in enumerate(faces):
        (ax, ay, az), (bx, by, bz), (cx, cy, cz) = screen[face].astype(np.float64)
        area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
        if min(az, bz, cz) <= 0 or abs(area) < 1e-9:
            continue
        v = ((x - ax) * (cy - ay) - (y - ay) * (cx - ax)) / area
        w = ((bx - ax) * (y - ay) - (by - ay) * (x - ax)) / area
        near = (1 - v - w) * az + v * bz + w * cz
        nearer = (v >= 0) & (w >= 0) & (v + w <= 1) & (near > best)
        best[nearer], found[nearer] = near[nearer], number
    return found, best


@settings(max_examples=20)
@given(seed=st.integers(0, 2**31), height=st.integers(8, 40), width=st.integers(8, 40))
def test_rasteriser_sees_what_brute_force_sees(seed: int, height: int, width: int) -> None:
    """Parity: the nearest triangle of each sample, with triangles off the screen, behind the camera and flat."""
    rng = np.random.default_rng(seed)
    screen = rng.uniform(-15, 50, (1, 30, 3)).astype(np.float32)
    screen[..., 2] = rng.uniform(0.05, 1, (1, 30))
    screen[0, 0, 2] = -1
    faces = rng.integers(0, 30, (25, 3))
    index, near = raster.rasterise_plain(torch.from_numpy(screen), torch.from_numpy(faces), height, width)
    truth, truly_near = brute_force(screen[0], faces, height, width)
    # triangles of the same corners cover each other: either may be named, but as near as the truth
    astray = ((index[0].numpy() != truth) & (np.abs(near[0].numpy() - truly_near) > 1e-5)).sum()
    assert astray <= 2 + 0.005 * height * width  # samples on an edge may fall to either side
    assert ((near > 0) == (index != raster.NOTHING)).all()


def test_rasteriser_keeps_batches_apart() -> None:
    """Property: a batch is its members one by one."""
    screen = torch.rand(3, 20, 3) * torch.tensor([30.0, 30.0, 1.0])
    faces = torch.randint(0, 20, (15, 3))
    together = raster.rasterise_plain(screen, faces, 30, 30)[0]
    for number in range(3):
        alone = raster.rasterise_plain(screen[number : number + 1], faces, 30, 30)[0]
        assert torch.equal(together[number], alone[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_triton_rasteriser_agrees_with_the_plain_one() -> None:
    """Parity: the kernel against its oracle, up to samples exactly on an edge."""
    screen = (torch.rand(4, 3000, 3) * torch.tensor([200.0, 200.0, 1.0])).cuda()
    faces = torch.randint(0, 2990, (5000, 1)) + torch.randint(0, 10, (5000, 3))
    plain, truly_near = raster.rasterise_plain(screen, faces.cuda(), 200, 200)
    chosen, near = raster.rasterise(screen, faces.cuda(), 200, 200)
    # of two triangles as near as each other in float32 either may be named
    right = (plain == chosen) | ((near - truly_near).abs() < 1e-5)
    assert right.float().mean() > 0.9995
