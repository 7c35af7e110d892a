"""What a person is: the value that everything about one talking head follows from."""

from __future__ import annotations

from dataclasses import dataclass

Colour = tuple[float, float, float]

HAIR_STYLES = ("bald", "buzz", "short", "swept", "fringe", "bob", "long", "tied", "curly", "afro", "waves")
GARMENTS = ("crew", "v_neck", "shirt", "suit", "turtleneck", "tank", "hoodie")
BEARDS = ("none", "shadow", "stubble", "moustache", "goatee", "short", "full")
BACKDROPS = ("plain", "gradient", "noise", "bokeh", "room", "stripes", "window", "foliage")


@dataclass(frozen=True)
class PersonSpec:
    """One person before one camera. Names in `targets` are the baked head's identity targets."""

    seed: int
    # the shape
    female: float
    age: float  # 0 young .. 1 old
    targets: tuple[tuple[str, float], ...]
    # skin
    skin: Colour
    redness: float
    freckles: float
    unevenness: float
    wrinkles: float
    shine: float
    lip: Colour
    lip_strength: float
    makeup: float
    # eyes and brows
    iris: Colour
    iris_size: float
    brow_strength: float
    brow_width: float
    lash_strength: float
    # hair
    hair_style: str
    hair: Colour
    hair_length: float  # around 1
    hair_volume: float
    hair_curl: float
    hairline: float
    parting: float  # -1 .. 1, where the hair parts
    beard: str
    beard_colour: Colour
    # clothes
    garment: str
    cloth: Colour
    cloth_second: Colour
    cloth_pattern: int  # 0 plain, 1 stripes, 2 checks, 3 mottled
    glasses: int  # 0 none, 1 round, 2 square, 3 half rim
    glasses_colour: Colour
    earrings: bool
    # light
    key_angle: tuple[float, float]  # azimuth, elevation
    key: Colour
    key_strength: float
    fill_strength: float
    rim_strength: float
    rim: Colour
    ambient_top: Colour
    ambient_bottom: Colour
    ambient_strength: float
    # what stands behind
    backdrop: str
    backdrop_colours: tuple[Colour, Colour, Colour]
    # camera and picture
    distance: float
    face_height: float  # of the frame's height
    place: tuple[float, float]  # the eyes' place in the frame, 0..1
    turn: tuple[float, float, float]  # resting yaw, pitch, roll of the head
    body_turn: float
    exposure: float
    contrast: float
    warmth: float
    grain: float
    softness: float
    vignette: float
