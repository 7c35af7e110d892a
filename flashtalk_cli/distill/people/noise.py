"""Smooth random functions of a place in space, one field a person, for paint and cloth and light."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import grid_sample, pad

CELLS = 24


def lattices(seeds: list[int], device: str) -> Tensor:
    """One periodic lattice of random values a seed: [B, 1, C+1, C+1, C+1]."""
    fields = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed % (1 << 62))
        fields.append(torch.rand(1, CELLS, CELLS, CELLS, generator=generator) * 2 - 1)
    return pad(torch.stack(fields), (0, 1, 0, 1, 0, 1), mode="circular").to(device)


def noise(
    lattice: Tensor, place: Tensor, cells: float | tuple[float, float, float], shift: float = 0.0
) -> Tensor:
    """Values about -1..1 at `place` [N, 3] or [B, N, 3] -> [B, N]; `cells` lattice cells a dm, an axis."""
    scale = torch.as_tensor(cells, device=place.device, dtype=place.dtype) / CELLS
    turns = place * scale + shift * 0.381
    turns = turns - turns.floor()
    where = turns * 2 - 1
    where = where.expand(lattice.shape[0], *where.shape[-2:])[:, None, None]
    return grid_sample(lattice, where, mode="bilinear", align_corners=True)[:, 0, 0, 0]


def fractal(lattice: Tensor, place: Tensor, cells: float, octaves: int, shift: float = 0.0) -> Tensor:
    """Octaves of `noise`, each twice as fine and half as strong, about -1..1."""
    total = noise(lattice, place, cells, shift)
    for octave in range(1, octaves):
        total = total + 0.5**octave * noise(lattice, place, cells * 2**octave, shift + octave)
    return total / (2 - 0.5 ** (octaves - 1))
