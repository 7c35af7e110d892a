"""A person as geometry: the head of the right shape, its hair, clothes and glasses, and its poses.

`build` makes everything that stays the same over a clip, for B people at once; `pose` moves it.
Vertices are those of the baked head followed by those of ribbons and tubes ("extras"), which
follow the head and the expression of the vertex that they are anchored to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashtalk_cli.distill.people import hair, wear
from flashtalk_cli.distill.people.charts import canonical
from flashtalk_cli.distill.people.head import Head, vertex_normals
from flashtalk_cli.distill.people.palette import People, linear, ramp

SKIN, EYE, HAIR, THING, MOUTH = range(5)
TONGUE, CAVITY, LASH = (0.70, 0.36, 0.36), (0.42, 0.17, 0.17), (0.10, 0.07, 0.06)
UPPER_LIP = (455, 466, 467, 509, 468, 474, 520)  # vertices on the midline, outside to inside
LOWER_LIP = (491, 492, 496, 495, 513, 494, 493, 523)
TEETH_SHIFT = (0.0, -0.045, -0.035)  # the source hides the upper teeth behind the lip
TONGUE_SHIFT = (0.0, -0.075, -0.06)


@dataclass(frozen=True)
class Figure:
    """B people at rest. V vertices in all, H of the head (joints included); faces are shared.

    rest, normals, tangents, colour [B, V, 3]; head_weight [B, V]; anchor int64 [V - H]; kind and
    light [V], the latter how much light reaches a vertex inside the mouth (1 elsewhere).
    """

    head: Head
    rest: Tensor
    normals: Tensor
    tangents: Tensor
    colour: Tensor
    kind: Tensor
    light: Tensor
    head_weight: Tensor
    anchor: Tensor
    faces: Tensor
    eyes: tuple[Tensor, Tensor]

    @property
    def n_head(self) -> int:
        """Vertices that belong to the baked head, joints included."""
        return self.head.mean.shape[0]


def shape(people: People, head: Head) -> Tensor:
    """Bare heads at rest [B, V, 3], origin between the eyes."""
    rows = {name: row for row, name in enumerate(head.target_names)}
    weights = torch.zeros(len(people.specs), len(rows))
    for person, spec in enumerate(people.specs):
        for name, value in spec.targets:
            weights[person, rows[name]] = value
    rest = head.mean + torch.einsum("bi,ivc->bvc", weights.to(head.mean.device), head.targets)
    return rest - ((head.joint(rest, "l-eye") + head.joint(rest, "r-eye")) / 2)[:, None]


def _shorten_lashes(rest: Tensor, head: Head, people: People) -> Tensor:
    lashes = head.faces[head.of_part("lashes")].unique()
    skin = torch.nonzero(head.mask("eyelids") > 0.2).squeeze(1)
    place = canonical(head)
    root = skin[torch.cdist(place[lashes], place[skin]).argmin(1)]
    rest = rest.clone()
    keep = 0.03 + 0.17 * people.column("lash_strength")[..., None]
    rest[:, lashes] = rest[:, root] + keep * (rest[:, lashes] - rest[:, root])
    return rest


def _settle_mouth(rest: Tensor, head: Head) -> Tensor:
    rest = rest.clone()
    for part, shift in (
        ("upper_teeth", TEETH_SHIFT),
        ("tongue", TONGUE_SHIFT),
        ("lower_teeth", (0.0, -0.05, -0.03)),
    ):
        rest[:, head.faces[head.of_part(part)].unique()] += torch.tensor(shift, device=rest.device)
    return rest


def _colours(people: People, head: Head, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    n, device = head.mean.shape[0], head.mean.device
    colour = torch.ones(len(people.specs), n, 3, device=device)
    kind = torch.full((n,), SKIN, device=device)
    light = torch.ones(n, device=device)
    white = (1.0, 1.0, 1.0)
    painted = {"upper_teeth": white, "lower_teeth": white, "tongue": TONGUE, "lashes": LASH}
    for part, tone in painted.items():
        vertices = head.faces[head.of_part(part)].unique()
        colour[:, vertices] = linear(torch.tensor(tone, device=device))
        kind[vertices] = MOUTH if part != "lashes" else THING
    inside = torch.nonzero(head.mask("inside-mouth") > 0.5).squeeze(1)
    colour[:, inside] = linear(torch.tensor(CAVITY, device=device))
    kind[inside] = MOUTH
    mouth = torch.nonzero(kind == MOUTH).squeeze(1)
    depth = (0.27 - place[mouth, 2]).clamp_min(0)
    light[mouth] = torch.exp(-3.0 * (depth - 0.08).clamp_min(0)) * ramp(place[mouth, 0].abs(), 0.40, 0.06)
    for part in ("left_eye", "right_eye"):
        kind[head.faces[head.of_part(part)].unique()] = EYE
    return colour, kind, light


def build(people: People, head: Head, *, strands: int) -> Figure:
    """Everything about B people that does not move. `strands`: ribbons of hair on each."""
    place = canonical(head)
    rest = _settle_mouth(_shorten_lashes(shape(people, head), head, people), head)
    normals = vertex_normals(rest, head.faces)
    rest = wear.dress(people, rest, normals, place, head)
    normals = vertex_normals(rest, head.faces)
    colour, kind, light = _colours(people, head, place)
    extras = [(hair.grow(people, rest, head, strands), HAIR)]
    extras.append((hair.grow_beard(people, rest, normals, max(64, strands // 3)), HAIR))
    for made in (wear.glasses, wear.collar, wear.earrings):
        extras += [(piece, THING) for piece in made(people, rest, head, place)]
    weights = torch.cat([head.head_weight, torch.ones(len(head.joints), device=rest.device)])
    anchor = torch.cat([piece.anchor for piece, _ in extras])
    offset, faces = rest.shape[1], [head.faces]
    for piece, _ in extras:
        faces.append(piece.faces + offset)
        offset += piece.place.shape[1]
    extra_place = torch.cat([piece.place for piece, _ in extras], 1)
    falling = ramp(extra_place[..., 1], -2.4, -0.9)  # long hair rests on the shoulders
    return Figure(
        head=head,
        rest=torch.cat([rest, extra_place], 1),
        normals=torch.cat([normals, *(piece.normal for piece, _ in extras)], 1),
        tangents=torch.cat([torch.zeros_like(rest), *(piece.tangent for piece, _ in extras)], 1),
        colour=torch.cat([colour, *(piece.colour for piece, _ in extras)], 1),
        kind=torch.cat([kind, *(torch.full((p.place.shape[1],), k, device=rest.device) for p, k in extras)]),
        light=torch.cat([light, torch.ones(extra_place.shape[1], device=rest.device)]),
        head_weight=torch.cat([weights.expand(len(rest), -1), torch.minimum(weights[anchor], falling)], 1),
        anchor=anchor,
        faces=torch.cat(faces),
        eyes=(head.faces[head.of_part("left_eye")].unique(), head.faces[head.of_part("right_eye")].unique()),
    )


def rotation(yaw: Tensor, pitch: Tensor, roll: Tensor) -> Tensor:
    """Rotations [..., 3, 3]: yaw to the person's left, pitch down, roll to the person's left shoulder."""
    cy, sy, cp, sp, cr, sr = (f(angle) for angle in (yaw, pitch, roll) for f in (torch.cos, torch.sin))
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    turn = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy], -1).unflatten(-1, (3, 3))
    nod = torch.stack([one, zero, zero, zero, cp, -sp, zero, sp, cp], -1).unflatten(-1, (3, 3))
    tilt = torch.stack([cr, sr, zero, -sr, cr, zero, zero, zero, one], -1).unflatten(-1, (3, 3))
    return turn @ nod @ tilt


@dataclass(frozen=True)
class Motion:
    """How B people move over T frames.

    curves [B, T, U] in the order of `Head.unit_names`; turn [B, T, 3] yaw, pitch, roll of the head
    in radians; gaze [B, T, 2] yaw, pitch of the eyes; sway [B, T, 3] dm; breath [B, T] in 0..1.
    """

    curves: Tensor
    turn: Tensor
    gaze: Tensor
    sway: Tensor
    breath: Tensor


def pose(figure: Figure, motion: Motion, body_turn: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Vertices, normals and tangents of every frame, each [B * T, V, 3]; body_turn [B] radians."""
    head, n = figure.head, figure.n_head
    batch, frames = motion.turn.shape[:2]
    shift = torch.einsum("btu,uvc->btvc", motion.curves, head.units)
    vertices = figure.rest[:, None, :n] + shift
    extras = figure.rest[:, None, n:] + shift[:, :, figure.anchor]
    for side, vertex in enumerate(figure.eyes):
        centre = head.joint(figure.rest[:, :n], "lr"[side] + "-eye")[:, None, None]
        look = rotation(motion.gaze[..., 0], motion.gaze[..., 1], torch.zeros_like(motion.gaze[..., 0]))
        ball = figure.rest[:, None, vertex] - centre
        vertices[:, :, vertex] = (
            torch.einsum("btij,btvj->btvi", look, ball.expand(-1, frames, -1, -1)) + centre
        )
    vertices = vertices.reshape(batch * frames, n, 3)
    normals = vertex_normals(vertices, head.faces)
    still = figure.normals[:, None, n:].expand(-1, frames, -1, -1).reshape(batch * frames, -1, 3)
    normals = torch.cat([normals, still], 1)
    tangents = figure.tangents[:, None].expand(-1, frames, -1, -1).reshape(batch * frames, -1, 3)
    everything = torch.cat([vertices, extras.reshape(batch * frames, -1, 3)], 1)

    still_part = (1 - figure.head_weight) * ramp(figure.rest[..., 2], -1.4, -0.2)
    chest = still_part.repeat_interleave(frames, 0)[..., None]
    breath = motion.breath.reshape(-1, 1, 1) * torch.tensor([0.0, 0.022, 0.035], device=chest.device)
    everything = everything + breath * chest + breath * torch.tensor([0.0, 0.3, 0.0], device=chest.device)
    turn = rotation(*motion.turn.reshape(-1, 3).unbind(-1))
    pivot = head.joint(figure.rest[:, :n], "neck").repeat_interleave(frames, 0)[:, None]
    weight = figure.head_weight.repeat_interleave(frames, 0)[..., None]
    turned = (everything - pivot) @ turn.transpose(1, 2) + pivot
    everything = everything + weight * (turned - everything)
    normals = torch.nn.functional.normalize(
        torch.lerp(normals, normals @ turn.transpose(1, 2), weight), dim=-1
    )
    tangents = torch.lerp(tangents, tangents @ turn.transpose(1, 2), weight)

    none = torch.zeros_like(body_turn)
    body = rotation(body_turn, none, none).repeat_interleave(frames, 0)
    centre = torch.tensor([0.0, 0.0, -0.9], device=everything.device)
    everything = (everything - centre) @ body.transpose(1, 2) + centre + motion.sway.reshape(-1, 1, 3)
    return everything, normals @ body.transpose(1, 2), tangents @ body.transpose(1, 2)


def lip_gap(figure: Figure, curves: Tensor) -> Tensor:
    """Visible gap between the lips on the midline [B, T] dm, 0 when they touch; curves [B, T, U]."""
    gaps = []
    for lip in (UPPER_LIP, LOWER_LIP):
        shift = torch.einsum("btu,uv->btv", curves, figure.head.units[:, list(lip), 1])
        gaps.append(figure.rest[:, None, list(lip), 1] + shift)
    upper, lower = gaps
    return (upper.amin(-1) - lower.amax(-1)).clamp_min(0)
