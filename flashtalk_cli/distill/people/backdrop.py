"""What stands behind a person: out of focus, and still."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flashtalk_cli.distill.people.palette import linear, ramp
from flashtalk_cli.distill.people.person import PersonSpec


def _cloud(rng: np.random.Generator, cells: int, height: int, width: int) -> Tensor:
    coarse = torch.from_numpy(
        rng.random((1, 1, cells, max(2, round(cells * width / height)))).astype(np.float32)
    )
    return interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)[0, 0].clamp(0, 1)


def _box(x: Tensor, y: Tensor, rect: tuple[float, float, float, float], blur: float) -> Tensor:
    x0, x1, y0, y1 = rect
    across = ramp(x, x0 - blur, x0 + blur) * ramp(x, x1 + blur, x1 - blur)
    return across * ramp(y, y0 - blur, y0 + blur) * ramp(y, y1 + blur, y1 - blur)


def draw_backdrop(spec: PersonSpec, height: int, width: int) -> Tensor:
    """A linear picture [3, height, width] of the spec's kind; the seed decides the details."""
    rng = np.random.default_rng((77, spec.seed))
    first, second, third = (linear(torch.tensor(colour)).reshape(3, 1, 1) for colour in spec.backdrop_colours)
    y, x = torch.meshgrid(
        torch.linspace(0, 1, height), torch.linspace(0, width / height, width), indexing="ij"
    )
    angle = float(rng.uniform(0, 6.28))
    slope = ((x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle) + 0.5).clamp(0, 1)
    picture = first + (second - first) * (slope if spec.backdrop != "plain" else 0.25 * slope)
    if spec.backdrop in ("plain", "gradient"):
        centre = float(rng.uniform(0.3, 0.7))
        glow = torch.exp(-(((x - centre) ** 2 + (y - 0.4) ** 2) / 0.18))
        return picture * (0.75 + 0.45 * glow * float(rng.uniform(0.2, 1)))
    if spec.backdrop == "noise":
        amount = 0.65 * _cloud(rng, int(rng.integers(3, 7)), height, width) + 0.35 * _cloud(
            rng, 14, height, width
        )
        return first + (second - first) * amount
    if spec.backdrop == "foliage":
        green = linear(
            torch.tensor(
                [float(rng.uniform(0.2, 0.45)), float(rng.uniform(0.35, 0.55)), float(rng.uniform(0.1, 0.3))]
            )
        ).reshape(3, 1, 1)
        leaves = 0.5 * _cloud(rng, 6, height, width) + 0.5 * _cloud(rng, 17, height, width)
        return green * (0.25 + 1.6 * leaves**2) + 0.5 * second * _cloud(rng, 5, height, width) ** 4
    if spec.backdrop == "stripes":
        count = int(rng.integers(5, 16))
        wave = 0.5 + 0.5 * torch.tanh(3 * torch.sin(slope * count * 6.28))
        return first + (second - first) * wave * 0.7
    if spec.backdrop == "bokeh":
        return _bokeh(rng, picture * 0.5, (second, third), x, y)
    return _room(rng, picture, (second, third), x, y, window=spec.backdrop == "window")


def _bokeh(
    rng: np.random.Generator, picture: Tensor, colours: tuple[Tensor, Tensor], x: Tensor, y: Tensor
) -> Tensor:
    for _ in range(int(rng.integers(8, 30))):
        radius = float(rng.uniform(0.02, 0.11))
        away = ((x - float(rng.uniform(0, x.max()))) ** 2 + (y - float(rng.uniform(0, 1))) ** 2).sqrt()
        disc = ramp(away, radius * 1.1, radius * 0.85) * (0.75 + 0.25 * ramp(away, radius * 0.5, radius))
        tint = colours[int(rng.integers(2))] * float(rng.uniform(0.6, 2.0)) + 0.1
        picture = picture + tint * disc * float(rng.uniform(0.15, 0.7))
    return picture


def _room(
    rng: np.random.Generator,
    picture: Tensor,
    colours: tuple[Tensor, Tensor],
    x: Tensor,
    y: Tensor,
    *,
    window: bool,
) -> Tensor:
    blur = float(rng.uniform(0.008, 0.035))
    picture = picture * (0.7 + 0.5 * _cloud(rng, 3, *y.shape))
    for _ in range(int(rng.integers(3, 10))):
        x0, y0 = float(rng.uniform(-0.1, x.max())), float(rng.uniform(-0.1, 0.9))
        rect = (x0, x0 + float(rng.uniform(0.05, 0.4)), y0, y0 + float(rng.uniform(0.05, 0.5)))
        tone = colours[int(rng.integers(2))] * float(rng.uniform(0.3, 1.0))
        picture = torch.lerp(
            picture, tone.expand_as(picture), _box(x, y, rect, blur) * float(rng.uniform(0.4, 1.0))
        )
    if window:
        x0, wide = float(rng.uniform(-0.1, 0.8)), float(rng.uniform(0.25, 0.45))
        y0, tall = float(rng.uniform(-0.1, 0.2)), float(rng.uniform(0.4, 0.7))
        sky = torch.tensor([0.85, 0.93, 1.0]).reshape(3, 1, 1) * float(rng.uniform(0.7, 1.5))
        for column in range(2):
            for row in range(2):
                pane = (
                    x0 + wide * (column / 2 + 0.02),
                    x0 + wide * (column / 2 + 0.48),
                    y0 + tall * (row / 2 + 0.02),
                    y0 + tall * (row / 2 + 0.48),
                )
                picture = torch.lerp(picture, sky.expand_as(picture), _box(x, y, pane, blur))
    return picture
