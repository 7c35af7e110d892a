"""What people wear that has a shape of its own: collars, glasses, earrings. Clothes thicken the body.

Pieces are tubes: a closed or open line of points with a round section. Like hair they have the
same triangles on everyone; a piece that is not worn has no thickness and vanishes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import normalize

from flashtalk_cli.distill.people.fabric import bare
from flashtalk_cli.distill.people.hair import Ribbons
from flashtalk_cli.distill.people.head import Head
from flashtalk_cli.distill.people.palette import People, linear, ramp

RIM_POINTS, SECTION = 24, 5
CLOTH_THICKNESS = {
    "crew": 0.05,
    "v_neck": 0.05,
    "shirt": 0.06,
    "suit": 0.11,
    "turtleneck": 0.10,
    "tank": 0.035,
    "hoodie": 0.16,
}


def dress(people: People, rest: Tensor, normals: Tensor, place: Tensor, head: Head) -> Tensor:
    """Bodies [B, V, 3] thickened where cloth covers them; `place` [V, 3] is the canonical head's."""
    thickness = torch.tensor([CLOTH_THICKNESS[spec.garment] for spec in people.specs], device=rest.device)[
        :, None
    ]
    cover = ramp(bare(place[: head.n_vertices], people), 0.05, -0.10)
    padded = torch.zeros_like(rest[..., 0])
    padded[:, : head.n_vertices] = cover * thickness
    return rest + normals * padded[..., None]


def tube(
    path: Tensor, radius: Tensor, colour: Tensor, anchor: Tensor, *, closed: bool, flat: float = 1.0
) -> Ribbons:
    """A tube along points [B, P, 3] of radius [B, P]; `flat` squeezes its section in z."""
    batch, points, _ = path.shape
    if closed:
        ahead = path.roll(-1, 1) - path.roll(1, 1)
    else:
        ahead = torch.cat([path[:, 1:], path[:, -1:]], 1) - torch.cat([path[:, :1], path[:, :-1]], 1)
    tangent = normalize(ahead, dim=-1)
    up = torch.tensor([0.13, 0.21, 0.97], device=path.device).expand_as(tangent)
    first = normalize(torch.linalg.cross(tangent, up), dim=-1)
    second = torch.linalg.cross(tangent, first)
    angles = torch.arange(SECTION, device=path.device) * (2 * math.pi / SECTION)
    normal = first[:, :, None] * torch.cos(angles)[:, None] + second[:, :, None] * torch.sin(angles)[:, None]
    squeeze = torch.tensor([1.0, 1.0, flat], device=path.device)
    place = path[:, :, None] + normal * radius[:, :, None, None] * squeeze
    ring = torch.arange(points if closed else points - 1, device=path.device)
    nxt, turn = (ring + 1) % points, torch.arange(SECTION, device=path.device)
    around = (turn + 1) % SECTION
    a, b = ring[:, None] * SECTION + turn, ring[:, None] * SECTION + around
    c, d = nxt[:, None] * SECTION + turn, nxt[:, None] * SECTION + around
    faces = torch.cat([torch.stack([a, b, c], -1), torch.stack([c, b, d], -1)]).reshape(-1, 3)
    n = points * SECTION
    return Ribbons(
        place.reshape(batch, n, 3),
        normal.reshape(batch, n, 3),
        torch.zeros_like(place).reshape(batch, n, 3),
        colour[:, None].expand(-1, n, -1),
        anchor.expand(n),
        faces,
    )


def glasses(people: People, rest: Tensor, head: Head, place: Tensor) -> list[Ribbons]:
    """Two rims, a bridge and two temples [B people]."""
    device = rest.device
    worn = (people("glasses") > 0).float()
    square = (people("glasses") == 2).float()[:, None]
    half = (people("glasses") == 3).float()[:, None]
    colour = people.colour("glasses_colour")[:, 0]
    nose = torch.argmin(
        (place[: head.n_vertices] - torch.tensor([0.0, 0.0, 0.23], device=device)).norm(dim=-1)
    )
    ear = torch.argmin(
        (place[: head.n_vertices] - torch.tensor([0.74, 0.05, -0.6], device=device)).norm(dim=-1)
    )
    bridge = rest[:, nose]
    angle = torch.arange(RIM_POINTS, device=device) * (2 * math.pi / RIM_POINTS)
    power = 1.0 - 0.55 * square
    x = torch.sign(torch.cos(angle)) * torch.cos(angle).abs() ** power * (0.225 + 0.02 * square)
    y = torch.sign(torch.sin(angle)) * torch.sin(angle).abs() ** power * (0.20 - 0.035 * square)
    thin = (0.014 + 0.006 * square) * (1 - 0.92 * half * (y < 0.02)) * worn[:, None]
    pieces = []
    anchor = nose
    hinges = []
    for sign, name in ((1.0, "l-eye"), (-1.0, "r-eye")):
        eye = head.joint(rest, name)
        centre = torch.stack([eye[:, 0] + 0.01 * sign, eye[:, 1] - 0.035, bridge[:, 2] + 0.10], -1)
        rim = centre[:, None] + torch.stack(
            [x * sign, y, -0.22 * (x.clamp_min(-1) + 0.1).clamp_min(0) ** 1.5], -1
        )
        pieces.append(tube(rim, thin, colour, anchor, closed=True))
        hinges.append(centre + torch.tensor([0.24 * sign, 0.07, -0.06], device=device))
        temple = torch.stack(
            [hinges[-1], rest[:, ear] * torch.tensor([sign * 1.03, 1.0, 1.0], device=device)], 1
        )
        pieces.append(tube(temple, (0.016 * worn)[:, None].expand(-1, 2), colour, anchor, closed=False))
    span = torch.linspace(-1, 1, 5, device=device)
    gap = head.joint(rest, "l-eye")[:, :1] - 0.21
    arch = torch.stack(
        [
            gap * span,
            head.joint(rest, "l-eye")[:, 1:2] + 0.02 - 0.03 * span**2,
            bridge[:, 2:3] + 0.10 + 0.03 * (1 - span**2),
        ],
        -1,
    )
    pieces.append(tube(arch, (0.014 * worn)[:, None].expand(-1, 5), colour, anchor, closed=False))
    return pieces


def earrings(people: People, rest: Tensor, head: Head, place: Tensor) -> list[Ribbons]:
    """A small ring in each earlobe."""
    angle = torch.arange(10, device=rest.device) * (2 * math.pi / 10)
    radius = 0.016 * people("earrings")[:, None].expand(-1, len(angle))
    gold = linear(torch.tensor([0.85, 0.70, 0.40], device=rest.device)).expand(len(people.specs), 3)
    ears = torch.nonzero(head.mask("ears") > 0.5).squeeze(1)
    pieces = []
    for sign in (1.0, -1.0):
        side = ears[place[ears, 0] * sign > 0]
        lobe = side[torch.argmin(place[side, 1])]
        ring = torch.stack(
            [0.02 * sign + 0 * angle, 0.055 * torch.cos(angle) - 0.03, 0.055 * torch.sin(angle)], -1
        )
        pieces.append(tube(rest[:, lobe, None] + ring, radius, gold, lobe, closed=True))
    return pieces


COLLARS = {  # height of the edge on the neck, how much lower in front, thickness; dm
    "turtleneck": (-1.40, 0.05, 0.06),
    "hoodie": (-1.66, 0.16, 0.09),
    "shirt": (-1.52, 0.20, 0.055),
    "suit": (-1.52, 0.20, 0.05),
}
COLLAR_POINTS = 28


def collar(people: People, rest: Tensor, head: Head, place: Tensor) -> list[Ribbons]:
    """The rolled edge of a turtleneck, a hood or a shirt: a tube laid on the skin round the neck."""
    device = rest.device
    angle = torch.arange(COLLAR_POINTS, device=device) * (2 * math.pi / COLLAR_POINTS)
    front = 0.5 + 0.5 * torch.cos(angle)
    paths, radii = [], []
    skin = head.faces[head.of_part("skin")].unique()
    skin = skin[(place[skin, 1] < -1.2) & (place[skin, 1] > -2.3) & (place[skin, 0].abs() < 1.1)]
    for row, spec in enumerate(people.specs):
        height, drop, radius = COLLARS.get(spec.garment, (-1.6, 0.0, 0.0))
        wanted = torch.stack(
            [0.62 * torch.sin(angle), height - drop * front, -0.9 + 0.6 * torch.cos(angle)], -1
        )
        nearest = torch.cdist(wanted, place[skin]).topk(4, largest=False).indices
        path = rest[row, skin[nearest]].mean(1)
        for _ in range(2):
            path = 0.5 * path + 0.25 * (path.roll(1, 0) + path.roll(-1, 0))
        opening = torch.exp(-((torch.sin(angle) / 0.30) ** 2)) * (front > 0.5)
        opening = opening * float(spec.garment in ("shirt", "suit"))
        paths.append(path)
        radii.append(radius * (1 - opening))
    colour = people.colour("cloth")[:, 0]
    white = torch.tensor([0.75, 0.77, 0.8], device=device)
    colour = torch.lerp(colour, white.expand_as(colour), people.has("garment", "suit"))
    middle = torch.tensor([0.0, -1.6, -0.48], device=device)
    anchor = torch.argmin((place[: head.n_vertices] - middle).norm(dim=-1))
    return [tube(torch.stack(paths), torch.stack(radii), colour, anchor, closed=True)]
