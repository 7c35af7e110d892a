"""Hair and beards as ribbons: thousands of narrow strips that grow from the scalp step by step.

Every person of a batch has the same number of ribbons from the same canonical roots, so that the
triangles are shared; a ribbon that does not grow on someone has length zero and vanishes.
A strand takes its course from a comb direction (by style), gravity and lift, and is pushed out of
an ellipsoid that stands for the skull.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flashtalk_cli.distill.people.charts import canonical
from flashtalk_cli.distill.people.head import Head, load_head
from flashtalk_cli.distill.people.paint import (
    People,
    beard_cover,
    beard_zone,
    hair_zone,
    moustache_zone,
    ramp,
)

STEPS, BEARD_STEPS = 9, 3
BUN = (0.0, 0.55, -1.75)


@dataclass(frozen=True)
class Style:
    """How a head of hair grows. Lengths in dm; weights of directions are relative."""

    top_length: float
    side_length: float
    lift: float  # straight out of the scalp at the root
    back: float
    side: float  # away from the parting
    forward: float
    gravity: float
    curl: float  # radius of the curls, dm
    volume: float  # distance of the outer layer from the skull, dm
    mess: float


STYLES = {
    "bald": Style(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
    "buzz": Style(0.07, 0.05, 0.6, 0.0, 0.0, 0.3, 0.2, 0, 0.01, 0.3),
    "short": Style(0.42, 0.16, 0.42, -0.1, 0.50, 0.40, 0.30, 0.0, 0.10, 0.18),
    "swept": Style(0.85, 0.20, 0.36, 1.1, 0.30, 0.0, 0.45, 0.0, 0.14, 0.10),
    "fringe": Style(0.75, 0.45, 0.24, -0.2, 0.25, 0.9, 0.60, 0.0, 0.10, 0.10),
    "bob": Style(2.1, 1.55, 0.05, 0.25, 0.95, 0.0, 1.5, 0.0, 0.17, 0.05),
    "long": Style(4.2, 3.6, 0.04, 0.35, 0.95, 0.0, 1.9, 0.0, 0.16, 0.05),
    "waves": Style(3.5, 3.0, 0.06, 0.35, 0.95, 0.0, 1.7, 0.05, 0.22, 0.07),
    "tied": Style(1.7, 1.5, 0.05, 1.0, 0.0, 0.0, 0.0, 0.0, 0.05, 0.05),
    "curly": Style(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.26, 0.0),
    "afro": Style(1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.55, 0.0),
}
BEARD_LENGTH = {"moustache": 0.09, "goatee": 0.14, "short": 0.08, "full": 0.26}


@dataclass(frozen=True)
class Ribbons:
    """Strips ready to be drawn: B people, N vertices, shared faces.

    place, normal, tangent, colour [B, N, 3]; anchor int64 [N], the head vertex whose expression
    each vertex follows; faces int64 [F, 3] into these N.
    """

    place: Tensor
    normal: Tensor
    tangent: Tensor
    colour: Tensor
    anchor: Tensor
    faces: Tensor


@lru_cache(maxsize=8)
def _roots(kind: str, count: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Canonical roots: corner vertices [R, 3], weights [R, 3], place [R, 3], random numbers [R, 8]."""
    head = load_head("cpu")
    place = canonical(head)
    skin = head.faces[head.of_part("skin")]
    corners = place[skin]
    centre = corners.mean(1)
    none = torch.zeros(1, 1)
    if kind == "scalp":
        wanted = hair_zone(centre, none - 0.3)[0] > -0.02
        density = 0.35 + 0.65 * ramp(centre[:, 2], -1.6, -0.6)
    else:
        wanted = torch.maximum(beard_zone(centre), moustache_zone(centre)) > 0.25
        wanted &= head.mask("lips")[skin].amax(1) < 0.3
        density = 1 + 1.5 * moustache_zone(centre)
    wanted &= head.mask("inside-mouth")[skin].amax(1) < 0.3
    area = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]).norm(dim=-1)
    generator = torch.Generator().manual_seed(11 if kind == "scalp" else 12)
    face = torch.multinomial(area * wanted * density, count, replacement=True, generator=generator)
    u = torch.rand(count, 2, generator=generator)
    u = torch.where(u.sum(1, keepdim=True) > 1, 1 - u, u)
    weights = torch.stack([1 - u.sum(1), u[:, 0], u[:, 1]], 1)
    where = (corners[face] * weights[..., None]).sum(1)
    chance = torch.rand(count, 8, generator=generator)
    return skin[face].to(device), weights.to(device), where.to(device), chance.to(device)


def _strip_faces(count: int, points: int, device: torch.device) -> Tensor:
    step = torch.arange(points - 1, device=device) * 2
    quad = torch.stack([step, step + 1, step + 2, step + 2, step + 1, step + 3], -1).reshape(-1, 3)
    return (torch.arange(count, device=device)[:, None, None] * points * 2 + quad).reshape(-1, 3)


def _ribbons(
    path: Tensor, outward: Tensor, width: Tensor, colour: Tensor, anchor: Tensor, twist: Tensor
) -> Ribbons:
    """Strips along paths [B, R, P, 3], facing `outward`; width [B, R, P]; colour [B, R, P, 3]."""
    batch, count, points, _ = path.shape
    ahead = torch.cat([path[:, :, 1:], path[:, :, -1:]], 2) - torch.cat([path[:, :, :1], path[:, :, :-1]], 2)
    tangent = normalize(ahead, dim=-1)
    across = normalize(torch.linalg.cross(tangent, outward), dim=-1)
    leaning = normalize(outward + twist[None, :, None, None] * across, dim=-1)
    flat = normalize(torch.linalg.cross(tangent, leaning), dim=-1) * (width / 2)[..., None]
    place = torch.stack([path - flat, path + flat], 3).reshape(batch, -1, 3)

    def doubled(values: Tensor) -> Tensor:
        return values[:, :, :, None].expand(-1, -1, -1, 2, -1).reshape(batch, -1, 3)

    return Ribbons(
        place,
        doubled(leaning),
        doubled(tangent),
        doubled(colour),
        anchor[:, None].expand(-1, points * 2).reshape(-1),
        _strip_faces(count, points, path.device),
    )


def _style(people: People, field: str) -> Tensor:
    values = [getattr(STYLES[spec.hair_style], field) for spec in people.specs]
    return torch.tensor(values, device=people.device)[:, None]


class Skull:
    """The ellipsoid that hair lies on, fitted to each person's scalp: [B, 3] centre and radii."""

    def __init__(self, rest: Tensor, head: Head) -> None:
        scalp = torch.unique(_roots("scalp", 2000, str(rest.device))[0])
        points = rest[:, scalp]
        upper = points[:, :, 1] > 0.25
        big = torch.full_like(points, 1e3)
        lowest = torch.where(upper[..., None], points, big).amin(1)
        highest = torch.where(upper[..., None], points, -big).amax(1)
        self.centre = (lowest + highest) / 2
        self.centre[:, 1] = 0.12
        self.radii = (highest - lowest) / 2
        self.radii[:, 1] = highest[:, 1] - 0.12

    def outward(self, place: Tensor) -> Tensor:
        """Unit normal of the ellipsoid through each place [B, R, 3]."""
        return normalize((place - self.centre[:, None]) / self.radii[:, None] ** 2, dim=-1)

    def push_out(self, place: Tensor, distance: Tensor) -> Tensor:
        """Places moved at least `distance` [B, R] off the skull; below the jaw, off the neck."""
        radii = self.radii[:, None] + distance[..., None]
        offset = place - self.centre[:, None]
        below = offset[..., 1:2] < 0
        scaled = offset / radii
        scaled = torch.where(below, scaled * torch.tensor([1.0, 0.25, 1.0], device=place.device), scaled)
        depth = scaled.norm(dim=-1, keepdim=True).clamp_min(1e-4)
        pushed = self.centre[:, None] + offset / depth
        kept_height = torch.cat([pushed[..., :1], place[..., 1:2], pushed[..., 2:]], -1)
        return torch.where(depth < 1, torch.where(below, kept_height, pushed), place)


def _part_curtain(place: Tensor, side: Tensor, amount: Tensor) -> Tensor:
    """Sweeps strands [B, R, 3] off the face towards their side of the parting [B, R]."""
    x, y, z = place.unbind(-1)
    before_face = ramp(z, -0.75, -0.35) * ramp(y, 0.62, 0.30) * amount
    aside = torch.where(side < 0, -1.0, 1.0) * x.abs().clamp_min(0.66)
    back = torch.minimum(z, torch.full_like(z, -0.25))
    return torch.stack([torch.lerp(x, aside, before_face), y, torch.lerp(z, back, before_face)], -1)


def _curls(
    people: People, roots: Tensor, outward: Tensor, top: Tensor, chance: Tensor, length: Tensor, t: Tensor
) -> Tensor:
    """Small rings of hair [B, R, P, 3] that fill a layer round the scalp; `curly` hair also droops."""
    depth = _style(people, "volume") * people.column("hair_volume") * chance[:, 2] ** 0.6
    centre = roots + outward * depth[..., None]
    droop = people.has("hair_style", "curly") * chance[:, 2] * (1.2 - top) * 0.75 * length
    centre = centre - torch.stack([torch.zeros_like(droop), droop, torch.zeros_like(droop)], -1)
    axis = normalize(chance[:, 3:6] - 0.5, dim=-1).expand_as(outward)
    first = normalize(torch.linalg.cross(axis, outward), dim=-1)
    second = torch.linalg.cross(axis, first)
    radius = (0.035 + 0.06 * people.column("hair_curl") + 0.03 * chance[:, 6]) * (length > 0)
    angle = 6.28 * (chance[:, 7, None] + 1.15 * t)
    ring = first[:, :, None] * torch.cos(angle)[..., None] + second[:, :, None] * torch.sin(angle)[..., None]
    slide = axis[:, :, None] * ((t - 0.5) * 0.12)[:, None]
    return centre[:, :, None] + (ring + slide) * radius[..., None, None] * (length > 0)[..., None, None]


def grow(people: People, rest: Tensor, head: Head, count: int) -> Ribbons:
    """Hair on heads at rest [B, V, 3]: `count` ribbons each."""
    corners, weights, where, chance = _roots("scalp", count, str(rest.device))
    roots = (rest[:, corners] * weights[..., None]).sum(2)
    skull = Skull(rest, head)
    top = ramp(where[:, 1], 0.25, 0.65)[None]
    inside = hair_zone(where, people.column("hairline")) + 0.05 * (chance[:, 0] - 0.5)
    length = _style(people, "side_length") * (1 - top) + _style(people, "top_length") * top
    length = length * people.column("hair_length") * (0.75 + 0.5 * chance[:, 1]) * (inside > 0.015).float()
    tied = people.has("hair_style", "tied")
    layer = chance[:, 2].expand(len(roots), -1)
    volume = _style(people, "volume") * people.column("hair_volume")
    curl = _style(people, "curl") * (0.4 + 1.2 * people.column("hair_curl"))
    mess = (chance[:, 3:6] - 0.5) * 2
    part = people.column("parting") * 0.30
    side = torch.tanh((roots[..., 0] - part) / 0.03)
    fringe = people.has("hair_style", "fringe", "short", "curly", "afro", "buzz")
    path, outward = [roots], [skull.outward(roots)]
    place = roots
    for step in range(1, STEPS):
        part_way = step / (STEPS - 1)
        normal = skull.outward(place)
        comb = torch.stack(
            [
                side * _style(people, "side") * (0.2 + 0.8 * top) * torch.exp(-2.2 * part_way * length),
                -_style(people, "gravity") * (0.15 + 0.6 * (1 - top) + (part_way * length).clamp_max(1.5))
                + 0 * side,
                _style(people, "forward") * ramp(where[:, 2], -1.3, -0.4)
                - _style(people, "back") * (1.1 - part_way)
                + 0 * side,
            ],
            -1,
        )
        to_bun = torch.tensor(BUN, device=rest.device) - place
        arrived = to_bun.norm(dim=-1, keepdim=True) < 0.34
        orbit = torch.linalg.cross(to_bun, normalize(mess, dim=-1).expand_as(to_bun))
        comb = torch.where(tied[..., None] > 0, normalize(torch.where(arrived, orbit, to_bun), dim=-1), comb)
        along = comb - (comb * normal).sum(-1, keepdim=True) * normal * 0.85 * (1 - part_way)
        direction = (
            along
            + normal
            * (_style(people, "lift") * (1 - part_way) ** 2 * (0.4 + layer) * (0.4 + 0.6 * top))[..., None]
        )
        direction = direction + mess * _style(people, "mess")[..., None]
        phase = 6.28 * (
            chance[:, 6] + part_way * (1.2 + 2.2 * people.column("hair_curl")) * length.clamp(0.8, 3.0)
        )
        swing = (
            torch.stack([torch.cos(phase), torch.sin(phase) * 0.3, torch.sin(phase)], -1)
            * (curl * 7)[..., None]
        )
        direction = normalize(direction, dim=-1) + swing * 0.6
        place = place + direction * (length / (STEPS - 1))[..., None]
        afro = people.has("hair_style", "afro")
        distance = (0.015 + volume * layer * (1 - afro) * (0.35 + 0.65 * min(1.0, 2 * part_way))) * (
            length > 0
        )
        place = _part_curtain(skull.push_out(place, distance), side, 1 - fringe)
        place = torch.where((length > 0)[..., None], place, roots)
        path.append(place)
        outward.append(skull.outward(place))
    line, normals = torch.stack(path, 2), torch.stack(outward, 2)
    t = torch.linspace(0, 1, STEPS, device=rest.device)
    cloud = people.has("hair_style", "curly", "afro")[..., None, None]
    line = torch.where(cloud > 0, _curls(people, roots, normals[:, :, 0], top, chance, length, t), line)
    coarse = 0.62 * (4000 / count) ** 0.5
    width = (
        coarse
        * 0.055
        * (0.7 + 0.6 * chance[:, 7, None])
        * (1 - 0.75 * t**3)
        * (0.6 + 0.4 * length.clamp(0, 1.5))[..., None]
    )
    shade = (0.72 + 0.5 * chance[:, 1, None] ** 2) * (0.7 + 0.45 * t)
    return _ribbons(
        line,
        normals,
        width,
        people.colour("hair")[:, :, None] * shade[..., None],
        corners[:, 0],
        (chance[:, 5] - 0.5) * 1.2,
    )


def grow_beard(people: People, rest: Tensor, normals: Tensor, count: int) -> Ribbons:
    """Beards on heads at rest: short ribbons that follow the skin they grow from."""
    corners, weights, where, chance = _roots("beard", count, str(rest.device))
    roots = (rest[:, corners] * weights[..., None]).sum(2)
    outward = normalize((normals[:, corners] * weights[..., None]).sum(2), dim=-1)
    cover = beard_cover(where, people)
    length = torch.tensor([BEARD_LENGTH.get(spec.beard, 0.0) for spec in people.specs], device=rest.device)[
        :, None
    ]
    length = length * (cover > 0.35 + 0.4 * chance[:, 0]) * (0.6 + 0.8 * chance[:, 1])
    down = torch.tensor([0.0, -1.0, 0.15], device=rest.device)
    sideways = torch.zeros_like(where)
    sideways[:, 0] = torch.sign(where[:, 0]) * moustache_zone(where) * 0.9
    path, place = [roots], roots
    for step in range(1, BEARD_STEPS + 1):
        part_way = step / BEARD_STEPS
        direction = (
            outward * (0.7 - 0.4 * part_way)
            + down * (0.5 + 0.5 * part_way)
            + sideways
            + (chance[:, 2:5] - 0.5) * 0.9
        )
        place = place + normalize(direction, dim=-1) * (length / BEARD_STEPS)[..., None]
        path.append(place)
    line = torch.stack(path, 2)
    facing = outward[:, :, None].expand_as(line)
    t = torch.linspace(0, 1, BEARD_STEPS + 1, device=rest.device)
    width = (length > 0)[..., None] * 0.022 * (2000 / count) ** 0.5 * (1 - 0.7 * t)
    shade = ((0.6 + 0.7 * chance[:, 5, None]) * (0.75 + 0.35 * t))[None, ..., None]
    colour = people.colour("beard_colour")[:, :, None] * shade
    return _ribbons(line, facing, width, colour, corners[:, 0], (chance[:, 6] - 0.5) * 1.2)
