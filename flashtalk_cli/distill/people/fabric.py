"""Clothes as paint: where a garment ends, and what its cloth looks like."""

from __future__ import annotations

import torch
from torch import Tensor

from flashtalk_cli.distill.people.noise import fractal, noise
from flashtalk_cli.distill.people.palette import People, ramp
from flashtalk_cli.distill.people.person import GARMENTS


def bare(place: Tensor, people: People) -> Tensor:
    """Signed distance from the garment's edge (dm, positive: skin shows), [B, N]."""
    x, y, z = place[:, 0].abs(), place[:, 1], place[:, 2]
    ring = y + 1.60 + 0.14 * z - 0.22 * x  # a loop round the base of the neck
    front = ramp(z, -0.9, -0.3)
    edges = {
        "crew": ring + 0.10 * front,
        "v_neck": ring + 0.06 + (0.85 - 1.7 * x).clamp_min(0) * front,
        "shirt": ring + (0.42 - 1.6 * x).clamp_min(0) * front,
        "suit": ring + (0.16 - 0.9 * x).clamp_min(0) * front,
        "turtleneck": ring - 0.19,
        "tank": torch.maximum(ring + 0.55 * front + 0.1, (x - 1.25) * 0.8),
        "hoodie": ring + 0.12 * front,
    }
    chosen = torch.stack([edges[name] for name in GARMENTS])
    rows = torch.tensor([GARMENTS.index(spec.garment) for spec in people.specs], device=place.device)
    return chosen[rows]


def cloth(people: People, place: Tensor, lattice: Tensor) -> tuple[Tensor, Tensor]:
    """The garment: linear colour [B, N, 3] and cover [B, N]."""
    x, y = place[:, 0], place[:, 1]
    first, second = people.colour("cloth"), people.colour("cloth_second")
    pattern = people.column("cloth_pattern")
    stripes = ramp(torch.sin(y * 21)[None], -0.15, 0.15)
    checks = 0.5 * ramp(torch.sin(x * 17)[None], -0.1, 0.1) + 0.5 * ramp(torch.sin(y * 17)[None], -0.1, 0.1)
    mottled = ramp(fractal(lattice, place, 3.5, 3, 15.0), -0.15, 0.2)
    amount = (pattern == 1) * stripes + (pattern == 2) * checks + (pattern == 3) * 0.7 * mottled
    colour = first + (second - first) * (amount * 0.8)[..., None]
    opening = torch.exp(-((x.abs() / 0.03) ** 2)) * (y < -1.9)
    colour = colour * (1 - 0.4 * people.has("garment", "shirt") * opening)[..., None]
    lapel = (0.36 + 0.20 * (y + 1.6)).clamp_min(0.0)  # the suit opens on a shirt and a tie
    shirt_front = ramp(x.abs() - lapel, 0.012, -0.012) * (place[:, 2] > -0.6)
    tie = ramp(x.abs() - (0.10 + 0.03 * (-1.9 - y)), 0.01, -0.01) * (y < -1.72)
    shirt = torch.tensor([0.75, 0.77, 0.8], device=place.device) * (1 - tie[:, None]) + second * tie[:, None]
    fold = lapel + 0.30 * ramp(y, -3.0, -2.0) * ramp(y, -1.45, -1.75)
    edge = torch.exp(-(((x.abs() - lapel) / 0.02) ** 2)) + 0.8 * torch.exp(-(((x.abs() - fold) / 0.018) ** 2))
    suit = colour * (1 - 0.5 * edge * (place[:, 2] > -0.6))[..., None]
    suit = suit + (shirt - suit) * shirt_front[:, None]
    is_suit = people.has("garment", "suit")[..., None]
    colour = colour * (1 - is_suit) + suit * is_suit
    folds = 1 + 0.16 * fractal(lattice, place, 1.6, 3, 17.0) + 0.08 * noise(lattice, place, 40.0, 18.0)
    away = bare(place, people)
    hem = 1 - 0.35 * torch.exp(-(((away + 0.09) / 0.02) ** 2))
    return colour * (folds * hem)[..., None], ramp(away, 0.012, -0.012)
