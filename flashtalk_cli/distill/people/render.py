"""Clips of people: `render(people, motion)` makes frames and the true opening of the mouth.

A clip's still part (shape, hair, paint, shadows, backdrop) is made once for all its frames. Each
frame is then a z-buffer at twice the size, shaded where something is, and averaged down.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, interpolate, normalize

from flashtalk_cli.distill.people import raster
from flashtalk_cli.distill.people.backdrop import draw_backdrop
from flashtalk_cli.distill.people.charts import Chart, load_chart
from flashtalk_cli.distill.people.figure import EYE, HAIR, MOUTH, Figure, Motion, build, lip_gap, pose
from flashtalk_cli.distill.people.head import load_head
from flashtalk_cli.distill.people.light import ambient_occlusion, key_direction, seen_from, shade, soften
from flashtalk_cli.distill.people.noise import lattices
from flashtalk_cli.distill.people.paint import atlas
from flashtalk_cli.distill.people.palette import People
from flashtalk_cli.distill.people.person import PersonSpec

FACE_HEIGHT_DM = 2.15  # chin to crown of the average head
SUPERSAMPLES = 2
SAMPLES_AT_ONCE = {"cuda": 1 << 24, "cpu": 1 << 18}  # a processor likes what fits its cache


@dataclass(frozen=True)
class Detail:
    """How finely people are made; training uses less than a portrait."""

    texture: int
    strands: int
    sky_directions: int
    shadow_side: int

    @staticmethod
    def for_height(height_px: int) -> Detail:
        """What a frame of that height can show."""
        if height_px <= 224:
            return Detail(texture=512, strands=1500, sky_directions=14, shadow_side=128)
        if height_px <= 640:
            return Detail(texture=1024, strands=5000, sky_directions=48, shadow_side=256)
        return Detail(texture=2048, strands=9000, sky_directions=96, shadow_side=384)


@dataclass(frozen=True)
class Scene:
    """B people ready to be filmed at one size."""

    people: People
    figure: Figure
    chart: Chart
    texture: Tensor  # [B, 4, 1.5 size, size]
    still: Tensor  # [B, V, 7]: colour, light, key light, ambient, kind
    backdrop: Tensor  # [B, 3, H, W], linear
    grain: Tensor  # [B, 3, H, W]
    height_px: int
    width_px: int


@dataclass(frozen=True)
class Clip:
    """Frames uint8 [B, T, H, W, 3], and what is true of them.

    opening_px [B, T]: gap between the lips in pixels; opening [B, T]: the same over the distance
    between the eyes. mouth_box [B, 4]: x0, y0, x1, y1 in pixels around the mouth in all frames.
    """

    frames: Tensor
    opening_px: Tensor
    opening: Tensor
    mouth_box: Tensor


def prepare(
    specs: list[PersonSpec],
    height_px: int,
    width_px: int,
    device: str,
    detail: Detail | None = None,
    backdrops: list[Tensor] | None = None,
) -> Scene:
    """Shapes, paints and lights people for clips of one size; draws what stands behind them if not given."""
    detail = detail or Detail.for_height(height_px)
    people, head = People(specs, device), load_head(device)
    chart = load_chart(detail.texture, device)
    figure = build(people, head, strands=detail.strands)
    texture = atlas(people, chart, lattices([spec.seed for spec in specs], device))
    side = detail.shadow_side
    ambient = ambient_occlusion(
        figure.rest, figure.normals, figure.faces, count=detail.sky_directions, side=side // 2
    )
    lit = seen_from(figure.rest, figure.faces, key_direction(people), side, bias=0.05)
    mouth = figure.kind == MOUTH
    ambient = torch.where(mouth, 0.9 * figure.light, ambient)
    lit = torch.where(mouth, 0.75 * figure.light, lit)
    eye = figure.kind == EYE
    ambient = torch.where(eye, 0.35 + 0.65 * ambient, ambient)
    kind = figure.kind.float().expand_as(lit)
    still = torch.cat([figure.colour, torch.stack([figure.light.expand_as(lit), lit, ambient, kind], -1)], -1)
    backdrops = backdrops or [draw_backdrop(spec, height_px, width_px) for spec in specs]
    backdrop = torch.stack(backdrops).to(device)
    noise = _grain(height_px, width_px, device)
    rolls = [(spec.seed * 7919 % height_px, spec.seed * 104_729 % width_px) for spec in specs]
    grain = torch.stack([noise.roll(roll, (1, 2)) for roll in rolls])
    return Scene(people, figure, chart, texture, still, backdrop, grain, height_px, width_px)


@lru_cache(maxsize=4)
def _grain(height_px: int, width_px: int, device: str) -> Tensor:
    noise = torch.randn(3, height_px, width_px, generator=torch.Generator().manual_seed(1))
    return noise.to(device)


def project(scene: Scene, vertices: Tensor) -> Tensor:
    """Room coordinates [B * T, V, 3] -> pixels x, y and reciprocal distance."""
    people = scene.people
    frames = len(vertices) // len(people.specs)
    distance, face, place = people("distance"), people("face_height"), people("place")
    focal = face * scene.height_px * distance / FACE_HEIGHT_DM
    per_frame = torch.stack(
        [distance, focal, place[:, 0] * scene.width_px, place[:, 1] * scene.height_px], -1
    )
    d, f, cx, cy = per_frame.repeat_interleave(frames, 0)[:, :, None].unbind(1)
    near = 1 / (d - vertices[..., 2])
    return torch.stack([cx + f * vertices[..., 0] * near, cy - f * vertices[..., 1] * near, near], -1)


def film(scene: Scene, motion: Motion) -> Clip:
    """Films the scene's people; the motion's curves are [B, T, U]."""
    batch, frames = motion.turn.shape[:2]
    at_once = max(
        1,
        SAMPLES_AT_ONCE[scene.backdrop.device.type]
        // (SUPERSAMPLES**2 * scene.height_px * scene.width_px * batch),
    )
    pictures, gaps, screens = [], [], []
    for start in range(0, frames, at_once):
        some = Motion(
            *(getattr(motion, name)[:, start : start + at_once] for name in motion.__dataclass_fields__)
        )
        picture, screen, gap = _film(scene, some)
        pictures.append(rearrange(picture, "(b t) c h w -> b t h w c", b=batch))
        gaps.append(gap.reshape(batch, -1))
        screens.append(screen)
    gap = torch.cat(gaps, 1)
    between = scene.figure.head.joint(scene.figure.rest[:, : scene.figure.n_head], "l-eye")[:, :1] * 2
    scale = scene.people("face_height")[:, None] * scene.height_px / FACE_HEIGHT_DM
    return Clip(torch.cat(pictures, 1), gap * scale, gap / between, _mouth_box(scene, torch.cat(screens, 1)))


def _film(scene: Scene, motion: Motion) -> tuple[Tensor, Tensor, Tensor]:
    turn = motion.turn + scene.people("turn")[:, None]
    motion = Motion(motion.curves, turn, motion.gaze, motion.sway, motion.breath)
    vertices, normals, tangents = pose(scene.figure, motion, scene.people("body_turn"))
    screen = project(scene, vertices)
    dense = torch.cat([screen[..., :2] * SUPERSAMPLES, screen[..., 2:]], -1).contiguous()
    height, width = scene.height_px * SUPERSAMPLES, scene.width_px * SUPERSAMPLES
    triangle, _ = raster.rasterise(dense, scene.figure.faces, height, width)
    picture = _shade(scene, triangle, dense, vertices, normals, tangents)
    picture = avg_pool2d(_tone(picture), SUPERSAMPLES)
    lips = _lips(scene, screen).reshape(len(scene.people.specs), -1, 2)
    return _finish(scene, picture), lips, lip_gap(scene.figure, motion.curves)


def _lips(scene: Scene, screen: Tensor) -> Tensor:
    lips = torch.nonzero(scene.figure.head.mask("lips") > 0.5).squeeze(1)
    return torch.stack([screen[:, lips, :2].amin(1), screen[:, lips, :2].amax(1)], 1)


def _mouth_box(scene: Scene, lips: Tensor) -> Tensor:
    low, high = lips.amin(1), lips.amax(1)
    margin = (high - low)[:, :1] * 0.2
    return torch.cat([low - margin, high + margin], -1)


def _shade(
    scene: Scene, triangle: Tensor, screen: Tensor, vertices: Tensor, normals: Tensor, tangents: Tensor
) -> Tensor:
    """Linear pictures [N, 3, height, width] of a z-buffer's triangles."""
    figure, people = scene.figure, scene.people
    n, height, width = triangle.shape
    frames = n // len(people.specs)
    picture = interpolate(scene.backdrop, size=(height, width), mode="bilinear").repeat_interleave(frames, 0)
    picture = picture.permute(0, 2, 3, 1).contiguous()
    frame, row, column = torch.nonzero(triangle != raster.NOTHING, as_tuple=True)
    face = triangle[frame, row, column]
    corner = figure.faces[face]
    who = frame // frames
    on_screen = screen[frame[:, None], corner]
    weights = raster.edge_weights(on_screen, column + 0.5, row + 0.5) * on_screen[..., 2]
    weights = (weights / weights.sum(-1, keepdim=True))[..., None]

    def mixed(values: Tensor, index: Tensor) -> Tensor:
        return (values[index[:, None], corner] * weights).sum(1)

    still = mixed(scene.still, who)
    n_painted = scene.chart.uv.shape[0]
    uv = (scene.chart.uv[face.clamp_max(n_painted - 1)] * weights).sum(1)
    uv = torch.where((face < n_painted)[:, None], uv, torch.tensor([0.875, 1.125], device=uv.device))
    paint = _sample(scene.texture, who, uv)
    kind = scene.figure.kind[corner[:, 0]]
    gloss = torch.where(face < n_painted, paint[:, 3], torch.where(kind == HAIR, 0.0, 0.35))
    gloss = torch.where(kind == MOUTH, 0.4 * still[:, 3], gloss)
    there = mixed(vertices, frame)
    camera = torch.stack(
        [torch.zeros_like(there[:, 0]), torch.zeros_like(there[:, 0]), people("distance")[who]], -1
    )
    view = normalize(camera - there, dim=-1)
    normal = normalize(mixed(normals, frame), dim=-1)
    hidden = (normal * view).sum(-1, keepdim=True).clamp_max(0)
    normal = normalize(normal - 1.02 * hidden * view, dim=-1)
    tangent = normalize(mixed(tangents, frame), dim=-1)
    light = shade(
        people, who, kind, still[:, :3] * paint[:, :3], gloss, normal, tangent, view, still[:, 4], still[:, 5]
    )
    picture[frame, row, column] = light
    return picture.permute(0, 3, 1, 2)


def _sample(texture: Tensor, who: Tensor, uv: Tensor) -> Tensor:
    """Bilinear texture reads: texture [B, C, R, S], who [N], uv [N, 2] -> [N, C]."""
    batch, _, rows, size = texture.shape
    depth = (who.float() + 0.5) / batch * 2 - 1
    x, y = uv[:, 0] * 2 - 1, uv[:, 1] * size / rows * 2 - 1
    if batch == 1:
        where = torch.stack([x, y], -1)[None, None]
        return grid_sample(texture, where, align_corners=False)[0, :, 0].T
    where = torch.stack([x, y, depth], -1)[None, None, None]
    return grid_sample(texture.transpose(0, 1)[None], where, align_corners=False)[0, :, 0, 0].T


def _tone(picture: Tensor) -> Tensor:
    """Linear light -> display values, highlights rolled off."""
    shoulder = picture * (1 + picture / 6.0) / (1 + 0.55 * picture)
    low = shoulder * 12.92
    high = 1.055 * shoulder.clamp_min(1e-6).pow(1 / 2.4) - 0.055
    return torch.where(shoulder <= 0.0031308, low, high)


def _finish(scene: Scene, picture: Tensor) -> Tensor:
    """What a camera adds: exposure, contrast, warmth, softness, vignette, grain. -> uint8."""
    people = scene.people
    frames = len(picture) // len(people.specs)

    def each(values: Tensor) -> Tensor:
        return values.repeat_interleave(frames, 0)

    picture = soften(picture, each(people("softness")) * 0.55)
    warmth = people("warmth")[:, None] * torch.tensor([1.0, 0.1, -1.0], device=picture.device)
    gain = (people("exposure") * 0.5).exp()[:, None] * (1 + warmth)
    picture = picture * each(gain)[..., None, None]
    contrast = each(people("contrast"))[:, None, None, None]
    picture = (picture - 0.45) * contrast + 0.45
    y = torch.linspace(-1, 1, scene.height_px, device=picture.device)[:, None]
    x = torch.linspace(-1, 1, scene.width_px, device=picture.device)
    corner = ((x**2 + y**2) / 2)[None, None]
    picture = picture * (1 - each(people("vignette"))[:, None, None, None] * corner)
    picture = picture + each(scene.grain * people("grain")[:, None, None, None])
    return (picture.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
