"""Small tools of all painters: colour spaces, soft edges and blobs, and people as tensors."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flashtalk_cli.distill.people.person import PersonSpec


def linear(colour: Tensor) -> Tensor:
    """sRGB -> linear light."""
    return torch.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055).clamp_min(0).pow(2.4))


def ramp(value: Tensor, start: float | Tensor, end: float | Tensor) -> Tensor:
    """0 before `start`, 1 after `end`, smooth between (`end` may be the smaller)."""
    t = ((value - start) / (end - start)).clamp(0, 1)
    return t * t * (3 - 2 * t)


def bump(place: Tensor, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> Tensor:
    """A soft blob, mirrored in x: 1 at the centre, 0 about two radii away."""
    there = torch.stack([place[..., 0].abs(), place[..., 1], place[..., 2]], -1)
    offset = (there - torch.tensor(centre, device=place.device)) / torch.tensor(radii, device=place.device)
    return torch.exp(-(offset**2).sum(-1))


def curve(x: Tensor, points: tuple[tuple[float, float], ...]) -> Tensor:
    """Piecewise linear interpolation, flat beyond the ends."""
    result = torch.full_like(x, points[0][1])
    for (x0, y0), (x1, y1) in pairwise(points):
        t = ((x - x0) / (x1 - x0)).clamp(0, 1)
        result = torch.where(x >= x0, y0 + (y1 - y0) * t, result)
    return result


class People:
    """Spec fields of B people as tensors on a device: `people('skin')` [B, 3], `people('age')` [B]."""

    def __init__(self, specs: list[PersonSpec], device: str) -> None:
        self.specs, self.device = specs, device
        self._fields: dict[str, Tensor] = {}

    def __call__(self, field: str) -> Tensor:
        """The field of every person, numbers or colours, float32."""
        if field not in self._fields:
            values = [getattr(spec, field) for spec in self.specs]
            self._fields[field] = torch.tensor(values, device=self.device, dtype=torch.float32)
        return self._fields[field]

    def colour(self, field: str) -> Tensor:
        """A colour field in linear light, [B, 1, 3]."""
        return linear(self(field))[:, None]

    def column(self, field: str) -> Tensor:
        """A number field as [B, 1]."""
        return self(field)[:, None]

    def has(self, field: str, *values: str) -> Tensor:
        """1.0 where a text field is one of `values`, [B, 1]."""
        found = [float(getattr(spec, field) in values) for spec in self.specs]
        return torch.tensor(found, device=self.device)[:, None]


def over(below: Tensor, above: Tensor, cover: Tensor) -> Tensor:
    """Paint over paint: colours [..., 3], cover [...] in 0..1."""
    return below + (above - below) * cover[..., None]
