"""What skin, lips, eyes, brows and clothes look like: the texture atlas of each person.

All painters take the texels' canonical places [N, 3] (see `charts`) and return values [B, N],
for B people at once. Colours are linear light from here on; specs speak sRGB.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from flashtalk_cli.distill.people.charts import ARCH_REACH_RAD, EYE, EYE_REACH_RAD, HEAD, TEETH, TORSO, Chart
from flashtalk_cli.distill.people.fabric import cloth
from flashtalk_cli.distill.people.noise import fractal, noise
from flashtalk_cli.distill.people.palette import People, bump, curve, linear, over, ramp

BROW = ((0.095, 0.165), (0.20, 0.215), (0.32, 0.235), (0.41, 0.205), (0.49, 0.135))
HAIRLINE = (  # azimuth around the skull from the front, rad -> height of the hairline, dm
    (0.0, 0.65),
    (0.35, 0.65),
    (0.62, 0.54),
    (0.85, 0.34),
    (1.05, 0.12),
    (1.25, -0.16),
    (1.42, -0.20),
    (1.50, 0.06),
    (1.95, 0.06),
    (2.10, -0.25),
    (2.4, -0.70),
    (3.15, -0.95),
)
GLOSS_SKIN, GLOSS_LIP, GLOSS_EYE, GLOSS_CLOTH, GLOSS_TEETH = 0.35, 0.6, 1.0, 0.04, 0.5


def hair_zone(place: Tensor, hairline: Tensor) -> Tensor:
    """Signed distance (dm, positive inside) from the hairline; place [N, 3], hairline [B, 1] -> [B, N]."""
    azimuth = torch.atan2(place[:, 0].abs(), place[:, 2] + 0.5)
    front = ramp(azimuth, 1.1, 0.3)
    temple = torch.exp(-(((azimuth - 0.62) / 0.25) ** 2))
    height = curve(azimuth, HAIRLINE)
    ear = ((place[:, 0].abs() > 0.66) & (place[:, 1] < 0.1) & (place[:, 2] > -1.0)).float()
    return place[:, 1] - height - hairline * (0.35 * front + 0.35 * temple) - 9 * ear


def beard_zone(place: Tensor) -> Tensor:
    """0..1 where a full beard grows: jaw, chin, cheeks below the cheekbone, moustache."""
    x, y, z = place[:, 0].abs(), place[:, 1], place[:, 2]
    top = curve(x, ((0.0, -0.52), (0.22, -0.56), (0.30, -0.62), (0.45, -0.50), (0.60, -0.25), (0.75, -0.1)))
    below = ramp(y - top, 0.06, -0.04)
    throat = ramp(y, -1.30, -1.12) * ramp(z, -0.62, -0.40)
    soul = 1 - 0.75 * bump(place, (0.13, -0.87, 0.25), (0.07, 0.05, 0.3))
    return below * throat * soul


def moustache_zone(place: Tensor) -> Tensor:
    """0..1 between the nose and the upper lip, reaching round the corners of the mouth."""
    x, y = place[:, 0].abs(), place[:, 1]
    return ramp(y, -0.47, -0.52) * ramp(y, -0.66, -0.60) * ramp(x, 0.30, 0.22) * (place[:, 2] > 0).float()


def goatee_zone(place: Tensor) -> Tensor:
    """0..1 on the chin."""
    return bump(place, (0.0, -1.0, 0.2), (0.2, 0.16, 0.4)).mul(1.8).clamp_max(1) * ramp(
        place[:, 1], -0.78, -0.88
    )


def beard_cover(place: Tensor, people: People) -> Tensor:
    """How much of a person's beard covers each place, [B, N] in 0..1."""
    all_over, lip, chin = beard_zone(place), moustache_zone(place), goatee_zone(place)
    full = people.has("beard", "shadow", "stubble", "short", "full") * torch.maximum(all_over, lip)
    part = people.has("beard", "moustache", "goatee") * lip + people.has("beard", "goatee") * chin
    return (full + part).clamp(0, 1)


def skin(
    people: People, chart: Chart, place: Tensor, masks: dict[str, Tensor], lattice: Tensor
) -> tuple[Tensor, Tensor]:
    """Skin with lips, brows, scalp and beard shadow: linear colour [B, N, 3] and gloss [B, N]."""
    base = people.colour("skin")
    colour = base.expand(-1, len(place), -1).clone()
    uneven = people.column("unevenness")
    colour *= (1 + 0.10 * uneven * fractal(lattice, place, 5.0, 3) + 0.05 * noise(lattice, place, 48.0, 5.0))[
        ..., None
    ]

    flush = bump(place, (0.40, -0.27, 0.1), (0.20, 0.17, 0.5)) + 0.8 * bump(
        place, (0.0, -0.36, 0.42), (0.10, 0.10, 0.2)
    )
    flush = flush + 0.5 * bump(place, (0.0, -1.0, 0.2), (0.2, 0.12, 0.3)) + 0.8 * masks["ears"]
    red = people.column("redness") * flush * (1 + 0.35 * fractal(lattice, place, 7.0, 2, 3.0))
    red = red + 0.6 * people.column("makeup") * bump(place, (0.46, -0.27, 0.0), (0.18, 0.12, 0.4))
    colour = colour * torch.stack([1 + 0.03 * red, 1 - 0.15 * red, 1 - 0.12 * red], -1)

    socket = bump(place, (0.29, 0.02, 0.1), (0.20, 0.12, 0.3)) + 0.7 * bump(
        place, (0.25, -0.13, 0.15), (0.16, 0.05, 0.3)
    )
    dark = socket * (0.10 + 0.12 * people.column("age"))
    colour = colour * torch.stack([1 - 0.9 * dark, 1 - 1.1 * dark, 1 - 1.0 * dark], -1)
    colour = colour * (1 - _lines(place, lattice) * 0.55 * people.column("wrinkles"))[..., None]

    spots = ramp(noise(lattice, place, 34.0, 9.0), 0.45, 0.75) * (
        bump(place, (0.25, -0.28, 0.2), (0.38, 0.25, 0.6)) + 0.15
    )
    colour = over(
        colour,
        colour * torch.tensor([0.72, 0.58, 0.46], device=place.device),
        spots * people.column("freckles"),
    )
    mole = ramp(noise(lattice, place, 9.0, 13.0), 0.86, 0.93)
    colour = over(colour, colour * 0.45, 0.8 * mole)
    gloss = GLOSS_SKIN * people.column("shine") * (0.7 + 0.6 * bump(place, (0.0, 0.2, 0.3), (0.25, 0.6, 0.4)))
    gloss = gloss * (1 + 0.3 * noise(lattice, place, 40.0, 1.0))

    colour, gloss = _lips(people, colour, gloss, place, masks["lips"], lattice)
    shadow = linear(people("hair") * 0.35)[:, None]
    colour = over(
        colour, shadow, 0.55 * people.column("makeup") * masks["eyelids"] * ramp(place[:, 1], -0.04, 0.02)
    )
    colour = _hairs_on_skin(people, colour, place, lattice)
    return colour, gloss


def _lines(place: Tensor, lattice: Tensor) -> Tensor:
    """Where wrinkles darken the skin, [B, N]: forehead, the corners of the eyes, beside the mouth."""
    x, y = place[:, 0].abs(), place[:, 1]
    wave = y + 0.03 * torch.cos(4 * place[:, 0]) + 0.012 * noise(lattice, place, 4.0, 21.0)
    forehead = (torch.cos(wave * 60).clamp_min(0) ** 6) * bump(place, (0.0, 0.47, 0.2), (0.34, 0.13, 0.3))
    feet = torch.cos(torch.atan2(y + 0.0, x - 0.30) * 14).clamp_min(0) ** 4 * bump(
        place, (0.55, -0.02, 0.0), (0.08, 0.10, 0.2)
    )
    fold = curve(-y, ((0.38, 0.16), (0.50, 0.24), (0.66, 0.31), (0.80, 0.32)))
    beside = torch.exp(-(((x - fold) / 0.016) ** 2)) * ramp(y, -0.36, -0.45) * ramp(y, -0.82, -0.70)
    below = (
        torch.exp(-(((y + 0.155 - 0.3 * (x - 0.28) ** 2) / 0.014) ** 2))
        * ramp(x, 0.12, 0.18)
        * ramp(x, 0.42, 0.34)
    )
    return (forehead * 0.45 + feet * 0.5 + beside * 0.6 + below * 0.5) * (place[:, 2] > -0.3).float()


def _lips(
    people: People, colour: Tensor, gloss: Tensor, place: Tensor, mask: Tensor, lattice: Tensor
) -> tuple[Tensor, Tensor]:
    edge = ramp(mask + 0.12 * noise(lattice, place, 14.0, 2.0), 0.15, 0.75) * ramp(mask, 0.02, 0.3)
    furrows = (
        1 + 0.16 * noise(lattice, place, (46.0, 6.0, 6.0), 4.0) + 0.06 * fractal(lattice, place, 12.0, 2, 6.0)
    )
    seam = 1 - 0.35 * torch.exp(-(((place[:, 1] + 0.675) / 0.018) ** 2))
    lips = people.colour("lip") * (furrows * seam)[..., None]
    cover = edge * people.column("lip_strength")
    return over(colour, lips, cover), gloss + cover * (
        GLOSS_LIP * (0.5 + 0.6 * people.column("makeup")) - gloss
    )


def _hairs_on_skin(people: People, colour: Tensor, place: Tensor, lattice: Tensor) -> Tensor:
    x, y = place[:, 0].abs(), place[:, 1]
    spine = curve(x, BROW)
    width = curve(x, ((0.09, 0.036), (0.2, 0.042), (0.34, 0.030), (0.49, 0.008))) * people.column(
        "brow_width"
    )
    strands = 0.85 + 0.4 * noise(lattice, place + 0.45 * place[:, [1, 0, 2]], (30.0, 60.0, 20.0), 7.0)
    brow = torch.exp(-(((y - spine) / width).abs() ** 2.6)) * ramp(x, 0.07, 0.13) * ramp(x, 0.51, 0.44)
    brow = brow * (place[:, 2] > -0.2).float() * strands.clamp(0, 1)
    brow_colour = (people.colour("hair") * 0.5 + 0.5 * people.colour("beard_colour")) * 0.55
    colour = over(colour, brow_colour, (1.3 * brow * people.column("brow_strength")).clamp(0, 0.96))

    inside = hair_zone(place, people.column("hairline")) + 0.06 * noise(lattice, place, 22.0, 8.0)
    cover = ramp(inside, -0.03, 0.10) * (1 - people.has("hair_style", "bald"))
    cover = cover * (1 - 0.35 * people.has("hair_style", "buzz")) + people.has(
        "hair_style", "bald"
    ) * 0.10 * ramp(inside, 0.0, 0.3)
    grain = (0.9 + 0.25 * noise(lattice, place, 52.0, 11.0))[..., None]
    colour = over(colour, people.colour("hair") * 0.6 * grain, cover * 0.95)

    amount = people.has("beard", "shadow") * 0.22 + people.has("beard", "stubble") * 0.5
    amount = amount + people.has("beard", "short", "full", "moustache", "goatee") * 0.72
    speckle = (0.75 + 0.5 * noise(lattice, place, 58.0, 12.0)).clamp(0, 1.2)
    stubble = beard_cover(place, people) * amount * speckle
    return over(colour, people.colour("beard_colour") * 0.5, stubble.clamp(0, 1))


def eye(people: People, disc: Tensor, lattice: Tensor) -> Tensor:
    """An eyeball seen from its front pole: disc [N, 2] in -1..1 -> linear colour [B, N, 3]."""
    angle = disc.norm(dim=-1) * EYE_REACH_RAD
    around = torch.atan2(disc[:, 1], disc[:, 0])
    spokes = torch.stack([torch.cos(around) * 2, torch.sin(around) * 2, angle * 1.5], -1)
    fibre = noise(lattice, spokes, 9.0, 31.0) * 0.6 + noise(lattice, spokes, 20.0, 32.0) * 0.4
    edge = 0.42 * people.column("iris_size")
    ring = ramp(angle[None] / edge, 0.78, 1.0)
    inner = torch.exp(-(((angle[None] / edge - 0.45) / 0.16) ** 2))
    iris = people.colour("iris") * (0.85 + 0.6 * fibre + 0.45 * inner)[..., None]
    iris = iris * (1 - 0.72 * ring)[..., None]
    pupil = ramp(angle[None] + 0.01 * fibre, edge * 0.46, edge * 0.36)
    iris = iris * (1 - 0.985 * pupil)[..., None]
    white = torch.tensor([0.62, 0.585, 0.56], device=disc.device).expand(len(people.specs), len(disc), 3)
    veins = ramp(noise(lattice, spokes, (12.0, 12.0, 3.0), 33.0), 0.45, 0.9) * ramp(angle, 0.6, 1.2)
    white = white * torch.stack([1 - 0.1 * veins, 1 - 0.35 * veins, 1 - 0.35 * veins], -1)
    return over(white, iris, ramp(angle[None], edge * 1.06, edge * 0.96))


TOOTH_EDGES_RAD = (0.0, 0.34, 0.61, 0.89, 1.15, 1.42, 1.80)


def teeth(people: People, along: Tensor, height: Tensor, lattice: Tensor) -> Tensor:
    """Teeth unrolled: along [N] in -1..1 round the arch, height [N] from gum to edge -> [B, N, 3]."""
    angle = along.abs() * ARCH_REACH_RAD
    gap, middle = torch.full_like(angle, 9.0), torch.zeros_like(angle)
    for left, right in pairwise(TOOTH_EDGES_RAD):
        inside = (angle >= left) & (angle < right)
        gap = torch.where(inside, torch.minimum(angle - left, right - angle), gap)
        middle = torch.where(inside, ((angle - left) / (right - left) - 0.5).abs() * 2, middle)
    enamel = linear(torch.tensor([0.93, 0.87, 0.79], device=along.device))
    tint = 1 + 0.10 * noise(lattice, torch.stack([along, height, along], -1), 5.0, 41.0)
    colour = (
        enamel * (tint * (1 - 0.5 * torch.exp(-((gap / 0.022) ** 2))) * (0.86 + 0.14 * height))[..., None]
    )
    gum = linear(torch.tensor([0.62, 0.33, 0.33], device=along.device))
    return over(
        colour, gum.expand_as(colour), ramp(height, 0.42 + 0.06 * middle**2, 0.36 + 0.06 * middle**2)[None]
    )


def atlas(people: People, chart: Chart, lattice: Tensor) -> Tensor:
    """The texture of each person: [B, 4, 1.5 size, size], linear colour and gloss."""
    rows, size = chart.which.shape
    texture = torch.ones(len(people.specs), rows, size, 4, device=chart.place.device)
    for number in (HEAD, TORSO):
        at = chart.which == number
        place = chart.place[at]
        masks = {name: mask[at] for name, mask in chart.masks.items()}
        colour, gloss = skin(people, chart, place, masks, lattice)
        fabric, cover = cloth(people, place, lattice)
        colour = over(colour, fabric, cover)
        gloss = gloss + cover * (GLOSS_CLOTH - gloss)
        texture[:, at] = torch.cat([colour, gloss[..., None]], -1)
    at = chart.which == EYE
    quarter = size // 4
    steps = (torch.arange(quarter, device=chart.place.device) + 0.5) / quarter * 2 - 1
    v, u = torch.meshgrid(steps, steps, indexing="ij")
    disc = torch.stack([u, -v], -1).reshape(-1, 2) * (0.125 / 0.12)
    texture[:, at] = torch.cat(
        [eye(people, disc, lattice), torch.full_like(texture[:, at][..., :1], GLOSS_EYE)], -1
    )
    at = chart.which == TEETH
    steps = (torch.arange(size // 2, device=chart.place.device) + 0.5) / (size // 2)
    rise = torch.arange(rows - size * 5 // 4, device=chart.place.device) / size
    height, along = torch.meshgrid(
        torch.where(rise < 0.125, rise - 0.005, rise - 0.13) / 0.115, steps, indexing="ij"
    )
    both_rows = teeth(people, (along.reshape(-1) - 0.5) / 0.48, height.reshape(-1).clamp(0, 1), lattice)
    texture[:, at] = torch.cat([both_rows, torch.full_like(both_rows[..., :1], GLOSS_TEETH)], -1)
    return texture.permute(0, 3, 1, 2).contiguous()
