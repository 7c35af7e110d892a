"""Light: what reaches each vertex at rest, and what a sample of surface sends to the camera.

Occlusion is found once a clip: orthographic depth pictures from many directions tell which
vertices see the sky there (ambient) and which see the key light (its shadow). Per frame only the
turning normals matter. The lights stand still in the room.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, grid_sample, normalize

from flashtalk_cli.distill.people.figure import EYE, HAIR, MOUTH, SKIN
from flashtalk_cli.distill.people.palette import People
from flashtalk_cli.distill.people.raster import rasterise

SPAN_DM = 6.4  # what a depth picture shows, about the head
CENTRE = (0.0, -0.9, -0.6)


def directions(count: int, device: torch.device) -> Tensor:
    """Unit vectors [count, 3] spread over the sphere's front and upper part (a Fibonacci spiral)."""
    step = torch.arange(count, device=device) + 0.5
    height = 1 - 1.45 * step / count
    angle = step * (math.pi * (3 - 5**0.5))
    radius = (1 - height**2).clamp_min(0).sqrt()
    around = torch.stack([radius * torch.cos(angle), height, radius * torch.sin(angle)], -1)
    return normalize(around + torch.tensor([0.0, 0.0, 0.25], device=device), dim=-1)


def _frame(direction: Tensor) -> Tensor:
    """Rows (right, up, towards the light) for each direction [..., 3] -> [..., 3, 3]."""
    up = torch.tensor([0.02, 1.0, -0.03], device=direction.device).expand_as(direction)
    right = normalize(torch.linalg.cross(up, direction), dim=-1)
    return torch.stack([right, torch.linalg.cross(direction, right), direction], -2)


def seen_from(vertices: Tensor, faces: Tensor, direction: Tensor, side: int, bias: float) -> Tensor:
    """How freely light from `direction` [B, 3] reaches vertices [B, V, 3]: [B, V] in 0..1."""
    centre = torch.tensor(CENTRE, device=vertices.device)
    local = (vertices - centre) @ _frame(direction).transpose(1, 2)
    x = (local[..., 0] / SPAN_DM + 0.5) * side
    y = (0.5 - local[..., 1] / SPAN_DM) * side
    near = (local[..., 2] + 16) / 32
    _, depth = rasterise(torch.stack([x, y, near], -1), faces, side, side)
    where = torch.stack([x, y], -1)[:, None] / side * 2 - 1
    lit = torch.zeros_like(near)
    for dx, dy in ((-0.7, -0.3), (0.7, 0.3), (0.3, -0.7), (-0.3, 0.7)):
        offset = torch.tensor([dx, dy], device=where.device) * (2 / side)
        blocker = grid_sample(depth[:, None], where + offset, mode="nearest", align_corners=False)[:, 0, 0]
        lit = lit + ((near + bias / 32 - blocker) / (0.06 / 32)).clamp(0, 1)
    return lit / 4


def ambient_occlusion(vertices: Tensor, normals: Tensor, faces: Tensor, *, count: int, side: int) -> Tensor:
    """Cosine-weighted share [B, V] of `count` directions that each vertex sees."""
    total = torch.zeros_like(vertices[..., 0])
    weight = torch.full_like(total, 1e-3)
    for direction in directions(count, vertices.device):
        facing = (normals @ direction).clamp_min(0) + 0.08
        lit = seen_from(vertices, faces, direction.expand(len(vertices), 3), side, bias=0.10)
        total, weight = total + facing * lit, weight + facing
    return total / weight


def key_direction(people: People) -> Tensor:
    """Towards the key light [B, 3]."""
    azimuth, elevation = people("key_angle").unbind(-1)
    flat = torch.cos(elevation)
    return torch.stack([torch.sin(azimuth) * flat, torch.sin(elevation), torch.cos(azimuth) * flat], -1)


WRAP = {SKIN: (0.34, 0.16, 0.10), HAIR: (0.35, 0.35, 0.35), MOUTH: (0.3, 0.2, 0.2)}


def shade(
    people: People,
    who: Tensor,
    kind: Tensor,
    albedo: Tensor,
    gloss: Tensor,
    normal: Tensor,
    tangent: Tensor,
    view: Tensor,
    key_lit: Tensor,
    ambient: Tensor,
) -> Tensor:
    """Light leaving N samples towards the camera, linear [N, 3].

    who int64 [N], the person; kind [N]; albedo, normal, tangent and view (unit, towards the
    camera) [N, 3]; gloss, key_lit and ambient [N] in 0..1.
    """
    key = key_direction(people)[who]
    device = albedo.device
    wraps = torch.tensor([WRAP.get(k, (0.05, 0.05, 0.05)) for k in range(5)], device=device)[kind]
    facing = (normal * key).sum(-1, keepdim=True)
    lambert = ((facing + wraps) / (1 + wraps)).clamp_min(0)
    skin_like = (kind == SKIN)[:, None]
    bleed = torch.tensor([0.75, 1.05, 1.12], device=device)
    lit = torch.where(skin_like, key_lit[:, None].clamp_min(1e-3) ** bleed, key_lit[:, None])
    key_light = people.colour("key")[:, 0][who] * people("key_strength")[who][:, None]
    height = (normal[:, 1:2] * 0.5 + 0.5).clamp(0, 1)
    top, bottom = people.colour("ambient_top")[:, 0][who], people.colour("ambient_bottom")[:, 0][who]
    sky = (bottom + (top - bottom) * height) * people("ambient_strength")[who][:, None]
    dim = torch.where(
        skin_like,
        ambient[:, None].clamp_min(1e-3) ** torch.tensor([0.85, 1.05, 1.1], device=device),
        ambient[:, None],
    )
    opposite = normalize(key * torch.tensor([-1.0, 0.35, 0.7], device=device) + 1e-3, dim=-1)
    fill = ((normal * opposite).sum(-1, keepdim=True) * 0.6 + 0.4).clamp_min(0) * people("fill_strength")[
        who
    ][:, None]
    back = normalize(
        key * torch.tensor([-0.9, 0.5, -1.0], device=device) - torch.tensor([0.0, 0.0, 0.35], device=device),
        dim=-1,
    )
    rim_facing = ((normal * back).sum(-1, keepdim=True) * 0.9 + 0.1).clamp_min(0)
    edge = 1 - (normal * view).sum(-1, keepdim=True).clamp(0, 1)
    rim = (
        people.colour("rim")[:, 0][who] * people("rim_strength")[who][:, None] * rim_facing * edge**1.5 * 1.6
    )
    received = key_light * lambert * lit + (sky + fill * key_light) * dim + rim * dim.sqrt()
    colour = albedo * received

    half = normalize(key + view, dim=-1)
    along = (normal * half).sum(-1).clamp_min(0)
    fresnel = 0.35 + 0.65 * edge.squeeze(-1) ** 3
    broad, sharp = along**14, along**60
    shine = gloss * (0.16 * broad + 0.22 * sharp) * fresnel * (facing.squeeze(-1) > -0.1)
    glint = (kind == EYE) * gloss * (2.6 * along**260 + 0.025 * along**20)
    bend = 1 - (tangent * half).sum(-1) ** 2
    streak = (kind == HAIR) * 0.20 * bend.clamp_min(0) ** 24 * (facing.squeeze(-1) * 0.5 + 0.5).clamp_min(0)
    colour = colour + key_light * ((shine + glint) * (0.25 + 0.75 * key_lit))[:, None]
    tinted = 0.25 + albedo.clamp(0, 1).sqrt()
    colour = colour + key_light * tinted * (streak * (0.15 + 0.85 * key_lit))[:, None]
    return colour + 0.06 * sky * (gloss * edge.squeeze(-1) ** 3 * ambient)[:, None]


def soften(picture: Tensor, amount: Tensor) -> Tensor:
    """Mixes pictures [N, 3, H, W] with a small blur of themselves; amount [N] in 0..1."""
    padded = torch.nn.functional.pad(picture, (1, 1, 1, 1), mode="replicate")
    return torch.lerp(picture, avg_pool2d(padded, 3, stride=1), amount[:, None, None, None])
