"""Pictures unlike any person: they keep the video VAE from learning faces and nothing else.

Procedural, so that nothing is licensed by anybody: fallen leaves (shapes that cover each other,
whose edges and sizes follow the statistics of photographs), noise of many spectra, rows of glyphs,
gratings and gradients, and mixtures of two through the shape of a third. `film` moves a camera over
them, or holds it still.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Generator, Tensor

LEAVES = 120


def draw_stills(count: int, side_px: int, generator: Generator) -> Tensor:
    """Pictures float32 [count, 3, side, side] in [0, 1], every kind in turn, on the generator's device."""
    kinds = (fallen_leaves, noise, fallen_leaves, glyphs, gratings)
    sizes = [len(range(kind, count, len(kinds))) for kind in range(len(kinds))]
    drawn = [draw(n, side_px, generator) for draw, n in zip(kinds, sizes, strict=True) if n]
    pictures = torch.cat(drawn)
    order = torch.randperm(count, generator=generator, device=generator.device)
    return _mixed(pictures[order], generator).clamp_(0, 1)


def fallen_leaves(count: int, side_px: int, generator: Generator) -> Tensor:
    """Ellipses and boxes on top of each other, a few large and many small ones, shaded, striped, rough."""
    y, x = _plane(side_px, generator)
    rough = noise(count, side_px, generator) - 0.5
    vivid = _uniform((count, 1, 1, 1), generator, 0.1, 0.9) ** 2

    def colour() -> Tensor:
        grey, tint = _uniform((count, 1, 1, 1), generator), _uniform((count, 3, 1, 1), generator)
        return grey + vivid * (tint - grey)

    picture = colour().expand(-1, -1, side_px, side_px).clone()
    for leaf in range(LEAVES):
        # Sizes as in photographs: the number of shapes falls with the cube of their radius.
        radius = (0.25 if leaf < LEAVES // 3 else 0.04) / _uniform((count, 1, 1), generator, 0.02, 1).sqrt()
        cx, cy = _uniform((2, count, 1, 1), generator, -1.1, 1.1)
        angle = _uniform((count, 1, 1), generator, 0, math.pi)
        u = ((x - cx) * angle.cos() + (y - cy) * angle.sin()) / radius
        v = ((y - cy) * angle.cos() - (x - cx) * angle.sin()) / radius
        v = v * _uniform((count, 1, 1), generator, 1, 3)
        boxed = _uniform((count, 1, 1), generator) < 0.3
        distance = torch.where(boxed, torch.maximum(u.abs(), v.abs()), torch.hypot(u, v))
        softness = radius * side_px / 2 / _uniform((count, 1, 1), generator, 0.4, 2.5)
        cover = ((1 - distance) * softness).clamp(0, 1)[:, None]
        slope = (0.3 * u * _uniform((count, 1, 1), generator, -1, 1))[:, None].clamp(-0.3, 0.3)
        stripes = (u * _uniform((count, 1, 1), generator, 0, 14)).sin()[:, None]
        stripes = stripes * 0.2 * (_uniform((count, 1, 1, 1), generator) < 0.2)
        surface = colour() + slope + stripes + rough * _uniform((count, 1, 1, 1), generator, 0, 0.8)
        picture += cover * (surface - picture)
    return picture


def noise(count: int, side_px: int, generator: Generator) -> Tensor:
    """Noise whose amplitude falls as frequency to a power of 0.8 .. 2.2, in correlated colours."""
    white = torch.randn(count, 3, side_px, side_px, generator=generator, device=generator.device)
    fy = torch.fft.fftfreq(side_px, device=white.device)[:, None]
    fx = torch.fft.rfftfreq(side_px, device=white.device)
    power = _uniform((count, 1, 1, 1), generator, 0.8, 2.2)
    falloff = torch.hypot(fy, fx).clamp_min(1 / side_px) ** -power
    found = torch.fft.irfft2(torch.fft.rfft2(white) * falloff, s=(side_px, side_px))
    found = found / found.std((1, 2, 3), keepdim=True)
    mixing = torch.eye(3, device=white.device) * 0.4 + _uniform((count, 3, 3), generator, -0.3, 0.9)
    found = torch.einsum("ncd,ndhw->nchw", mixing, found)
    return 0.5 + found * _uniform((count, 1, 1, 1), generator, 0.04, 0.3)


def glyphs(count: int, side_px: int, generator: Generator) -> Tensor:
    """Rows of small invented letters of one colour on another, in several sizes."""
    cells = 16
    strokes = (_uniform((count, 1, cells * 8, cells * 8), generator) < 0.5).float()
    inside = torch.zeros(8, 8, device=strokes.device)
    inside[1:7, 1:6] = 1  # gaps between letters and between rows
    strokes = strokes * inside.repeat(cells, cells)
    strokes = strokes * (_uniform((count, 1, cells, cells), generator) < 0.85).float().repeat_interleave(
        8, 2
    ).repeat_interleave(8, 3)
    turned = torch.where(_uniform((count, 1, 1, 1), generator) < 0.5, strokes, strokes.flip(3))
    zoom = _uniform((count,), generator, 0.35, 1)
    grid = _camera(
        zoom, torch.zeros_like(zoom), torch.zeros_like(zoom), torch.zeros_like(zoom), side_px, side_px
    )
    ink = F.grid_sample(turned, grid, mode="bilinear", align_corners=False)
    first, second = _uniform((2, count, 3, 1, 1), generator)
    return first + (ink > 0.5) * (second - first)


def gratings(count: int, side_px: int, generator: Generator) -> Tensor:
    """Sums of a gradient and two waves, some of them cut to edges."""
    y, x = _plane(side_px, generator)
    picture = _uniform((count, 3, 1, 1), generator).expand(-1, -1, side_px, side_px).clone()
    for _ in range(3):
        angle = _uniform((count, 1, 1), generator, 0, math.pi)
        rate = _uniform((count, 1, 1), generator, 0.2, 6).square()
        bend = _uniform((count, 1, 1), generator, -1, 1)
        wave = (rate * (x * angle.cos() + y * angle.sin() + bend * x * y)).sin()[:, None]
        cut = _uniform((count, 1, 1, 1), generator) < 0.4
        wave = torch.where(cut, (wave * 8).clamp(-1, 1), wave)
        picture += wave * _uniform((count, 3, 1, 1), generator, -0.3, 0.3)
    return picture


def film(stills: Tensor, n_frames: int, height_px: int, width_px: int, generator: Generator) -> Tensor:
    """Clips float32 [N, 3, T, height, width] in [0, 1]: a camera that drifts, turns and zooms, or rests."""
    count, side_px = len(stills), stills.shape[-1]
    view = max(height_px, width_px) / side_px
    times = torch.linspace(0, 1, n_frames, device=stills.device)
    moving = (_uniform((count, 1), generator) < 0.6).float()

    def path(low: float, high: float, change: float) -> Tensor:
        began = _uniform((count, 1), generator, low, high)
        speed = _uniform((count, 1), generator, -1, 1) ** 3
        return began + moving * speed * change * times

    zoom = (path(-0.35, 0.25, 0.3)).exp() * view
    grid = _camera(
        zoom.flatten(), path(-0.6, 0.6, 0.5).flatten(), path(-0.3, 0.3, 0.3).flatten(),
        path(-0.3, 0.3, 0.3).flatten(), height_px, width_px,
    )  # fmt: skip
    grid = rearrange(grid, "(n t) h w c -> n (t h) w c", n=count)
    clips = F.grid_sample(stills, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return rearrange(clips, "n c (t h) w -> n c t h w", t=n_frames)


def vary_colours(clips: Tensor, generator: Generator, turned: float = 0.5, share: float = 0.6) -> Tensor:
    """Clips [N, 3, T, H, W] in [0, 1] in other contrast, brightness and colours; the rest as they are.

    A part `turned` of them has its colours turned or mirrored about grey, any of the three axes to
    any place; of all, a part `share` changes a little.
    """
    count = len(clips)
    chosen = (_uniform((count, 1, 1, 1, 1), generator) < share).float()
    identity = torch.eye(3, device=clips.device)
    mixing = identity + _uniform((count, 3, 3), generator, -0.15, 0.15)
    gain = _uniform((count, 1, 1, 1, 1), generator, 0.6, 1.35)
    lift = _uniform((count, 3, 1, 1, 1), generator, -0.15, 0.15)
    varied = (torch.einsum("ncd,ndthw->ncthw", mixing, clips) - 0.5) * gain + 0.5 + lift
    clips = clips + chosen * (varied - clips)
    n = int(count * turned)
    turns = 0.75 * _turns(n, generator)
    about_grey = torch.einsum("ncd,ndthw->ncthw", turns, clips[:n] - 0.5) + 0.5
    return torch.cat([about_grey, clips[n:]]).clamp(0, 1)


def _turns(count: int, generator: Generator) -> Tensor:
    """Random orthogonal matrices [count, 3, 3], by Gram and Schmidt."""
    a, b, c = torch.randn(3, count, 3, generator=generator, device=generator.device)
    a = F.normalize(a, dim=-1)
    b = F.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    mirrored = torch.cross(a, b, dim=-1)
    return torch.stack([a, b, mirrored * (mirrored * c).sum(-1, keepdim=True).sign()], 1)


def _mixed(pictures: Tensor, generator: Generator) -> Tensor:
    """A third of the pictures show another one where a third one is bright."""
    other, mask = pictures.roll(1, 0), pictures.roll(2, 0).mean(1, keepdim=True)
    threshold = mask.mean((2, 3), keepdim=True)
    where = ((mask - threshold) * 12 + 0.5).clamp(0, 1)
    chosen = (_uniform((len(pictures), 1, 1, 1), generator) < 0.33).float()
    return pictures + chosen * where * (other - pictures)


def _camera(zoom: Tensor, angle: Tensor, dx: Tensor, dy: Tensor, height_px: int, width_px: int) -> Tensor:
    """Sampling grids [N, height, width, 2] of cameras that see a share `zoom` [N] of a picture."""
    y = torch.linspace(-1, 1, height_px, device=zoom.device)[None, :, None]
    x = torch.linspace(-1, 1, width_px, device=zoom.device)[None, None, :] * (width_px / height_px)
    cos, sin, zoom = angle.cos()[:, None, None], angle.sin()[:, None, None], zoom[:, None, None]
    return torch.stack(
        [zoom * (x * cos - y * sin) + dx[:, None, None], zoom * (x * sin + y * cos) + dy[:, None, None]], -1
    )


def _plane(side_px: int, generator: Generator) -> tuple[Tensor, Tensor]:
    axis = torch.linspace(-1, 1, side_px, device=generator.device)
    return axis[:, None], axis[None, :]


def _uniform(shape: tuple[int, ...], generator: Generator, low: float = 0.0, high: float = 1.0) -> Tensor:
    return torch.rand(shape, generator=generator, device=generator.device) * (high - low) + low
