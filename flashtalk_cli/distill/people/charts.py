"""The texture atlas of the head: where every triangle's paint lies, and what each texel is.

One picture holds all charts, `size` texels wide and 1.5 `size` high:

    head     rows 0 .. size        directions seen from inside the skull; the face takes the middle
    torso    below it, left        seen from the front
    eye      below it, right       the ball from its front pole outwards
    teeth    below that            upper row above, lower row below, seen along the arch
    blank    the rest              white: what sits there is coloured by its vertices

Paint is a function of the place on one canonical head, so that brows and lips lie right on all
people: `Chart.place` has that place for each texel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flashtalk_cli.distill.people.head import Head, load_head
from flashtalk_cli.distill.people.raster import NOTHING, edge_weights, rasterise

SKULL_CENTRE = (0.0, -0.12, -0.55)
HEAD_EXPONENT = 0.75  # below one: more texels for the face than for the back of the head
TORSO_SPAN = (-3.6, 3.6, -5.8, -0.6)  # x from, x to, y from, y to; dm
EYE_REACH_RAD = 2.0
NECK_TOP_Y = -1.28
ARCH_CENTRE_Z = -0.06
ARCH_REACH_RAD = 2.2

HEAD, TORSO, EYE, BLANK, TEETH = range(5)


def canonical(head: Head) -> Tensor:
    """The average young adult [V, 3], origin between the eyes."""
    weights = torch.zeros(len(head.target_names), device=head.mean.device)
    for row, name in enumerate(head.target_names):
        if name.endswith("-young"):
            weights[row] = 1 / 6
        elif "-young-averagemuscle-averageweight" in name:
            weights[row] = 1 / 2
    vertices = head.mean + torch.einsum("i,ivc->vc", weights, head.targets)
    return vertices - (head.joint(vertices, "l-eye") + head.joint(vertices, "r-eye")) / 2


@dataclass(frozen=True)
class Chart:
    """Texture coordinates, and what lies under each texel of an atlas `size` wide.

    uv [F, 3, 2] in texels of a unit-wide atlas (x in 0..1, y in 0..1.5); chart int [F];
    canonical [V, 3]. Texels [1.5 size, size]: which int64 chart; place [.., 3]; masks [M, ..].
    """

    size: int
    uv: Tensor
    chart: Tensor
    canonical: Tensor
    which: Tensor
    place: Tensor
    masks: dict[str, Tensor]


def head_uv(place: Tensor) -> Tensor:
    """Directions from the skull's centre, spread around the face's: [..., 3] -> [..., 2] in 0..1."""
    offset = place - torch.tensor(SKULL_CENTRE, device=place.device)
    angle = torch.atan2(offset[..., :2].norm(dim=-1), offset[..., 2])
    radius = 0.49 * (angle / math.pi).pow(HEAD_EXPONENT)
    across = torch.nn.functional.normalize(offset[..., :2], dim=-1)
    return 0.5 + torch.stack([across[..., 0], -across[..., 1]], -1) * radius[..., None]


def eye_uv(direction: Tensor) -> Tensor:
    """Directions [..., 3] from a ball's centre (z to the pupil) -> [..., 2] inside the eye chart."""
    angle = torch.atan2(direction[..., :2].norm(dim=-1), direction[..., 2])
    across = torch.nn.functional.normalize(direction[..., :2], dim=-1)
    disc = across * (angle / EYE_REACH_RAD).clamp_max(1.0)[..., None]
    return torch.stack([0.625 + 0.12 * disc[..., 0], 1.125 - 0.12 * disc[..., 1]], -1)


def teeth_uv(place: Tensor, *, upper: bool) -> Tensor:
    """Teeth [..., 3] unrolled along the arch: u from right to left, v from the gums to the edge."""
    angle = torch.atan2(place[..., 0], place[..., 2] - ARCH_CENTRE_Z)
    root, edge = (-0.47, -0.66) if upper else (-0.82, -0.62)
    along = 0.5 + 0.48 * (angle / ARCH_REACH_RAD)
    height = ((place[..., 1] - root) / (edge - root)).clamp(0, 1)
    return torch.stack([0.5 + 0.5 * along, (1.255 if upper else 1.38) + 0.115 * height], -1)


def _layout(head: Head, place: Tensor) -> tuple[Tensor, Tensor]:
    corners = place[head.faces]
    skin = head.of_part("skin")
    inside = head.mask("inside-mouth")[head.faces].amin(1) > 0.5
    low = corners[..., 1].mean(1) < NECK_TOP_Y
    chart = torch.full_like(head.faces[:, 0], BLANK)
    chart[skin & ~inside & ~low] = HEAD
    chart[skin & ~inside & low] = TORSO
    chart[head.of_part("left_eye", "right_eye")] = EYE
    x0, x1, y0, y1 = TORSO_SPAN
    torso = torch.stack(
        [0.5 * (corners[..., 0] - x0) / (x1 - x0), 1.5 - 0.5 * (corners[..., 1] - y0) / (y1 - y0)], -1
    )
    uv = torch.full_like(torso, 0.0)
    uv[..., 0], uv[..., 1] = 0.875, 1.125
    around = head_uv(corners)
    torn = (around.amax(1) - around.amin(1)).amax(-1) > 0.25  # across the seam at the back of the head
    around[torn] = around[torn][:, :1]
    uv[chart == HEAD] = around[chart == HEAD]
    uv[chart == TORSO] = torso[chart == TORSO]
    for part in ("upper_teeth", "lower_teeth"):
        chart[head.of_part(part)] = TEETH
        uv[head.of_part(part)] = teeth_uv(corners[head.of_part(part)], upper=part == "upper_teeth")
    for side in ("l", "r"):
        centre = head.joint(place, f"{side}-eye")
        eye = head.of_part("left_eye" if side == "l" else "right_eye")
        uv[eye] = eye_uv(corners[eye] - centre)
    return uv, chart


@lru_cache(maxsize=4)
def load_chart(size: int, device: str = "cpu") -> Chart:
    """The atlas for a texture `size` texels wide."""
    head = load_head(device)
    place = canonical(head)
    uv, chart = _layout(head, place)
    rows = size * 3 // 2
    painted = torch.nonzero((chart == HEAD) | (chart == TORSO)).squeeze(1)
    corners = place[head.faces[painted]]
    outermost = (corners - torch.tensor(SKULL_CENTRE, device=place.device)).norm(dim=-1)
    frontmost = corners[..., 2] + 9.0
    nearness = torch.where((chart[painted] == HEAD)[:, None], outermost, frontmost)
    screen = torch.cat([uv[painted] * size, nearness[..., None]], -1).reshape(1, -1, 3)
    own = torch.arange(screen.shape[1], device=place.device).reshape(-1, 3)
    nearest = rasterise(screen, own, rows, size)[0][0]
    covered = torch.nonzero(nearest != NOTHING)
    face = nearest[covered[:, 0], covered[:, 1]]
    weights = edge_weights(screen[0][own[face]], covered[:, 1] + 0.5, covered[:, 0] + 0.5)
    names = head.mask_names
    values = torch.cat([place[: head.n_vertices], head.masks.T], 1)
    texels = torch.zeros(rows, size, values.shape[1], device=place.device)
    texels[covered[:, 0], covered[:, 1]] = (values[head.faces[painted[face]]] * weights[..., None]).sum(1)
    texels = _spread_edges(texels, nearest != NOTHING)
    which = torch.full((rows, size), BLANK, device=place.device)
    which[:size] = HEAD
    which[size:, : size // 2] = TORSO
    which[size : size * 5 // 4, size // 2 : size * 3 // 4] = EYE
    which[size * 5 // 4 :, size // 2 :] = TEETH
    masks = {name: texels[..., 3 + row] for row, name in enumerate(names)}
    return Chart(size, uv, chart, place, which, texels[..., :3].contiguous(), masks)


def _spread_edges(texels: Tensor, known: Tensor) -> Tensor:
    """Fills texels that no triangle covers from a coarser copy, so that edges do not bleed."""
    values, weight = texels.permute(2, 0, 1)[None], known[None, None].float()
    coarse, mass = values * weight, weight
    filled, have = coarse.clone(), weight.clone()
    while min(coarse.shape[-2:]) > 4:
        coarse, mass = (torch.nn.functional.avg_pool2d(t, 2, ceil_mode=True) for t in (coarse, mass))
        up, m = (interpolate(t, size=texels.shape[:2], mode="bilinear") for t in (coarse, mass))
        take = (have == 0) & (m > 1e-4)
        filled = torch.where(take, up / m.clamp_min(1e-4), filled)
        have = torch.maximum(have, take.float())
    return filled[0].permute(1, 2, 0)
