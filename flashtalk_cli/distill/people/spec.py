"""Who a person is: every choice that makes one talking head, drawn from a seed.

`draw_person(seed)` is deterministic: the same seed gives the same `PersonSpec` on any machine.
Seeds from `HELD_OUT_FROM` on are people that training never sees. Colours are sRGB in 0..1,
lengths decimetres, angles radians, unless a name says otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from flashtalk_cli.distill.people.bake import HEAD_FILE
from flashtalk_cli.distill.people.person import BACKDROPS, BEARDS, GARMENTS, Colour, PersonSpec

HELD_OUT_FROM = 1_000_000_000

OPPOSITES = {
    "incr": "decr",
    "up": "down",
    "out": "in",
    "forward": "backward",
    "uncompress": "compress",
    "convex": "concave",
}
FACE_SHAPES = ("diamond", "invertedtriangular", "oval", "rectangular", "round", "square", "triangular")
LOCAL_SPREAD = {  # how far a feature strays, as a standard deviation; by the beginning of its name
    "head-scale": 0.25,
    "head-fat": 0.35,
    "head-age": 0.3,
    "head-angle": 0.25,
    "head-back": 0.4,
    "neck": 0.35,
    "mouth-scale": 0.3,
    "mouth": 0.35,
    "nose": 0.36,
    "eyebrows": 0.4,
    "cheek": 0.4,
    "eye-scale": 0.25,
    "eye-bag": 0.35,
    "eye": 0.35,
    "forehead": 0.35,
    "chin": 0.35,
    "ear": 0.4,
    "measure": 0.3,
}
LOCAL_MEAN = {  # where the source's average looks unlike a photograph
    "eye-scale-incr": 0.18,
    "eye-height2-incr": 0.15,
    "nose-volume-incr": -0.2,
    "nose-scale-horiz-incr": -0.1,
    "head-scale-horiz-incr": -0.15,
}
SKIN_TONES: tuple[Colour, ...] = tuple(
    (r / 255, g / 255, b / 255)
    for r, g, b in (
        (243, 216, 200),
        (235, 199, 178),
        (225, 184, 156),
        (208, 162, 130),
        (190, 143, 108),
        (168, 120, 87),
        (140, 95, 67),
        (108, 72, 51),
        (80, 54, 41),
    )
)
HAIR_TONES: tuple[Colour, ...] = tuple(
    (r / 255, g / 255, b / 255)
    for r, g, b in (
        (24, 20, 20),
        (38, 27, 22),
        (62, 41, 29),
        (92, 60, 38),
        (128, 88, 54),
        (176, 134, 84),
        (214, 178, 122),
        (150, 70, 36),
        (124, 120, 118),
        (214, 210, 204),
    )
)
EYE_TONES: tuple[Colour, ...] = tuple(
    (r / 255, g / 255, b / 255)
    for r, g, b in (
        (58, 34, 20),
        (84, 52, 28),
        (112, 82, 44),
        (96, 112, 70),
        (86, 122, 132),
        (112, 146, 176),
        (120, 130, 138),
    )
)


@lru_cache(maxsize=1)
def target_names() -> tuple[str, ...]:
    """Names of the baked identity targets."""
    with np.load(HEAD_FILE) as stored:
        return tuple(str(name) for name in stored["identity_names"])


@lru_cache(maxsize=1)
def feature_pairs() -> tuple[tuple[str, str | None], ...]:
    """Local features as (one way, the other way), sides left out: `nose-hump-incr`, `nose-hump-decr`."""
    names = set(target_names())
    pairs = []
    for name in sorted(names):
        stem, _, ending = name.rpartition("-")
        if ending in OPPOSITES and not name.startswith("r-"):
            other = f"{stem}-{OPPOSITES[ending]}"
            pairs.append((name, other if other in names else None))
    return tuple(pairs)


def _spread(name: str) -> float:
    bare = name.removeprefix("l-").removeprefix("r-")
    return next((spread for start, spread in LOCAL_SPREAD.items() if bare.startswith(start)), 0.3)


def _macro_targets(rng: np.random.Generator, female: float, age: float) -> dict[str, float]:
    races = rng.dirichlet((0.45, 0.45, 0.45))
    heavy = float(np.clip(rng.normal(0.0, 0.45), -1, 1))
    muscle = float(np.clip(rng.normal(0.15, 0.3), 0, 1))
    ages = {"young": 1 - age, "old": age}
    if age < 0.05 and rng.random() < 0.4:
        childlike = float(rng.uniform(0.1, 0.5))
        ages = {"child": childlike, "young": 1 - childlike}
    weights = {"averageweight": 1 - abs(heavy), "maxweight": max(heavy, 0.0), "minweight": max(-heavy, 0.0)}
    found: dict[str, float] = {}
    for gender, g in (("female", female), ("male", 1 - female)):
        for years, a in ages.items():
            for race, r in zip(("african", "asian", "caucasian"), races, strict=True):
                found[f"{race}-{gender}-{years}"] = float(g * a * r)
            for weight, w in weights.items():
                found[f"universal-{gender}-{years}-averagemuscle-{weight}"] = g * a * w * (1 - muscle)
                found[f"universal-{gender}-{years}-maxmuscle-{weight}"] = g * a * w * muscle
    return found


def _shape(rng: np.random.Generator, female: float, age: float) -> tuple[tuple[str, float], ...]:
    found = _macro_targets(rng, female, age)
    caricature = rng.uniform(0.4, 0.9)
    for name, other in feature_pairs():
        amount = rng.normal(0, _spread(name)) * caricature + LOCAL_MEAN.get(name.removeprefix("l-"), 0.0)
        amount = float(np.clip(amount, -0.9, 0.9))
        chosen = name if amount > 0 else other
        if chosen is None or abs(amount) < 0.04:
            continue
        found[chosen] = abs(amount)
        if chosen.startswith("l-"):
            found["r-" + chosen[2:]] = abs(amount) * float(rng.uniform(0.85, 1.15))
    for shape in rng.choice(FACE_SHAPES, size=2, replace=False):
        found[f"head-{shape}"] = float(rng.uniform(0, 0.6))
    lopsided = [name for name in target_names() if name.startswith("asym-")]
    for name in rng.choice(lopsided, size=8, replace=False):
        found[str(name)] = float(rng.uniform(0, 0.35))
    names = set(target_names())
    return tuple(sorted((name, round(value, 4)) for name, value in found.items() if value and name in names))


def mix(first: Colour, second: Colour, amount: float) -> Colour:
    """A colour between two."""
    r, g, b = (float(x + (y - x) * amount) for x, y in zip(first, second, strict=True))
    return r, g, b


def jitter(rng: np.random.Generator, colour: Colour, amount: float) -> Colour:
    """A colour nearby, within 0..1."""
    r, g, b = (float(np.clip(x + rng.normal(0, amount), 0.01, 0.99)) for x in colour)
    return r, g, b


def _on_scale(tones: tuple[Colour, ...], place: float) -> Colour:
    low = int(np.clip(place, 0, len(tones) - 1.001))
    return mix(tones[low], tones[low + 1], float(np.clip(place - low, 0, 1)))


def any_colour(rng: np.random.Generator, value: tuple[float, float], chroma: float) -> Colour:
    """A colour of random hue with a lightness in `value` and saturation up to `chroma`."""
    import colorsys

    r, g, b = colorsys.hsv_to_rgb(
        rng.random(), float(rng.beta(1.2, 2.2)) * chroma, float(rng.uniform(*value))
    )
    return float(r), float(g), float(b)


def _skin_and_hair(rng: np.random.Generator, targets: dict[str, float], female: float, age: float) -> dict:
    share = {
        race: sum(v for k, v in targets.items() if k.startswith(race))
        for race in ("african", "asian", "caucasian")
    }
    tone = share["african"] * 6.6 + share["asian"] * 2.4 + share["caucasian"] * 1.0
    tone = float(np.clip(tone + rng.normal(0, 1.1), 0, 7.99))
    skin = jitter(rng, _on_scale(SKIN_TONES, tone), 0.012)
    dark_hair = tone > 2.6 or share["asian"] > 0.5
    hair_place = rng.uniform(0, 2.4) if dark_hair else rng.uniform(0.6, 7.2)
    hair = jitter(rng, _on_scale(HAIR_TONES[:8], float(hair_place)), 0.015)
    if age > 0.35 and rng.random() < 0.75:
        hair = mix(
            hair, HAIR_TONES[8 if rng.random() < 0.5 else 9], float(np.clip(rng.normal(age, 0.25), 0, 1))
        )
    elif rng.random() < 0.03:
        hair = any_colour(rng, (0.35, 0.8), 0.9)
    made_up = float(rng.random() < 0.5 * female) * rng.uniform(0.3, 1.0)
    lip = mix(skin, (0.70, 0.30, 0.30), float(rng.uniform(0.35, 0.7)))
    if tone > 4.5:
        lip = mix(skin, (0.48, 0.24, 0.24), float(rng.uniform(0.3, 0.7)))
    if made_up > 0.5:
        lip = mix(
            lip,
            (float(rng.uniform(0.45, 0.8)), 0.10, float(rng.uniform(0.14, 0.32))),
            float(rng.uniform(0.3, 0.8)),
        )
    eye_place = rng.uniform(0, 1.6) if dark_hair else rng.uniform(0, 5.9)
    return {
        "skin": skin,
        "redness": float(rng.uniform(0.15, 1.0)),
        "freckles": float(max(0, rng.normal(-0.2, 0.5))) * (tone < 3),
        "unevenness": float(rng.uniform(0.3, 1.0)),
        "wrinkles": float(np.clip(age * 1.1 + rng.normal(0.05, 0.1), 0, 1)),
        "shine": float(rng.uniform(0.25, 1.0)),
        "lip": lip,
        "lip_strength": float(rng.uniform(0.65, 1.0)),
        "makeup": float(made_up),
        "iris": jitter(rng, _on_scale(EYE_TONES, float(eye_place)), 0.02),
        "iris_size": float(rng.uniform(0.9, 1.08)),
        "brow_strength": float(rng.uniform(0.45, 1.0)),
        "brow_width": float(rng.uniform(0.75, 1.35)) * (1.15 - 0.35 * female),
        "lash_strength": float(np.clip(rng.normal(0.4 + 0.4 * female, 0.15), 0.1, 1)),
        "hair": hair,
    }


def _hair_style(rng: np.random.Generator, female: float, age: float, hair: Colour) -> dict:
    if female > 0.5:
        odds = {
            "short": 8,
            "swept": 6,
            "fringe": 10,
            "bob": 22,
            "long": 24,
            "tied": 16,
            "curly": 10,
            "afro": 5,
            "waves": 16,
            "buzz": 1.5,
            "bald": 0.5,
        }
    else:
        odds = {
            "short": 32,
            "swept": 22,
            "fringe": 12,
            "buzz": 12,
            "bald": 6 + 10 * age,
            "curly": 9,
            "afro": 5,
            "bob": 3,
            "long": 3,
            "tied": 3,
            "waves": 3,
        }
    chance = np.asarray(list(odds.values()), dtype=float)
    style = str(rng.choice(list(odds), p=chance / chance.sum()))
    beard = "none"
    if female < 0.5:
        beard = str(rng.choice(BEARDS, p=(0.34, 0.2, 0.16, 0.05, 0.07, 0.1, 0.08)))
    return {
        "hair_style": style,
        "hair_length": float(rng.uniform(0.7, 1.35)),
        "hair_volume": float(rng.uniform(0.6, 1.4)),
        "hair_curl": float(rng.beta(1.2, 3.0)),
        "hairline": float(np.clip(rng.normal(0.2 * (1 - female) * age, 0.14), -0.3, 0.4)),
        "parting": float(rng.uniform(-0.8, 0.8)),
        "beard": beard,
        "beard_colour": jitter(rng, mix(hair, (0.2, 0.13, 0.1), 0.3), 0.02),
    }


def _wear(rng: np.random.Generator, female: float) -> dict:
    dark_frames = any_colour(rng, (0.04, 0.25), 0.5)
    return {
        "garment": str(rng.choice(GARMENTS, p=(0.27, 0.15, 0.18, 0.15, 0.1, 0.07, 0.08))),
        "cloth": any_colour(rng, (0.08, 0.95), 0.9),
        "cloth_second": any_colour(rng, (0.1, 0.98), 0.8),
        "cloth_pattern": int(rng.choice(4, p=(0.6, 0.14, 0.1, 0.16))),
        "glasses": int(rng.choice(4, p=(0.76, 0.08, 0.1, 0.06))),
        "glasses_colour": dark_frames if rng.random() < 0.8 else any_colour(rng, (0.4, 0.8), 0.5),
        "earrings": bool(rng.random() < 0.35 * female),
    }


def _light(rng: np.random.Generator) -> dict:
    warm, cool = (1.0, 0.86, 0.70), (0.80, 0.90, 1.0)
    soft = rng.uniform(0, 1)
    tint = rng.normal(0, 0.45)
    key = mix((1.0, 1.0, 1.0), warm if tint > 0 else cool, min(1.0, abs(float(tint))))
    return {
        "key_angle": (float(rng.normal(0, 0.75)), float(rng.uniform(0.05, 1.0))),
        "key": key,
        "key_strength": float(rng.uniform(0.5, 1.5) * (1.25 - 0.6 * soft)),
        "fill_strength": float(rng.uniform(0.05, 0.5)),
        "rim_strength": float(rng.uniform(0, 0.9)) * float(rng.random() < 0.6),
        "rim": jitter(rng, mix((1, 1, 1), cool, 0.4), 0.1),
        "ambient_top": jitter(rng, (0.92, 0.95, 1.0), 0.06),
        "ambient_bottom": jitter(rng, (0.62, 0.56, 0.52), 0.08),
        "ambient_strength": float(rng.uniform(0.35, 0.75) + 0.25 * soft),
    }


def _exposed(light: dict, skin: Colour) -> dict:
    """Lights dimmed or raised halfway to what a photographer would choose for that skin."""
    brightness = sum(weight * channel**2.2 for weight, channel in zip((0.25, 0.65, 0.10), skin, strict=True))
    level = brightness * (
        light["key_strength"] * (0.75 + 0.4 * light["fill_strength"]) + light["ambient_strength"]
    )
    gain = float(np.clip((0.36 / level) ** 0.5, 0.6, 1.7))
    return {
        **light,
        "key_strength": light["key_strength"] * gain,
        "ambient_strength": light["ambient_strength"] * gain,
    }


def _picture(rng: np.random.Generator) -> dict:
    base = any_colour(rng, (0.05, 0.95), 0.7)
    other = mix(base, any_colour(rng, (0.05, 0.95), 0.8), float(rng.uniform(0.15, 0.9)))
    face_height = float(rng.uniform(0.56, 0.9))  # close: at 144 pixels, eyes and mouth need their share
    return {
        "backdrop": str(rng.choice(BACKDROPS, p=(0.1, 0.18, 0.14, 0.14, 0.18, 0.06, 0.1, 0.1))),
        "backdrop_colours": (base, other, any_colour(rng, (0.2, 1.0), 0.8)),
        "distance": float(rng.uniform(8, 22)),
        "face_height": face_height,
        "place": (
            float(rng.normal(0.5, 0.035)),
            float(np.clip(0.22 + 0.42 * face_height + rng.normal(0, 0.025), 0.3, 0.54)),
        ),
        "turn": (float(rng.normal(0, 0.17)), float(rng.normal(0.0, 0.06)), float(rng.normal(0, 0.035))),
        "body_turn": float(rng.normal(0, 0.2)),
        "exposure": float(rng.normal(0, 0.16)),
        "contrast": float(rng.uniform(0.92, 1.15)),
        "warmth": float(rng.normal(0, 0.035)),
        "grain": float(rng.uniform(0, 0.003)),  # less than one level: noise is what a VAE cannot keep
        "softness": float(rng.beta(1.1, 2.2)),
        "vignette": float(rng.uniform(0, 0.35)),
    }


def draw_person(seed: int) -> PersonSpec:
    """The person of that seed. Seeds from `HELD_OUT_FROM` on are kept from training."""
    rng = np.random.default_rng((20_250_101, seed))
    female = float(np.clip(rng.normal(1.0 if rng.random() < 0.5 else 0.0, 0.12), 0, 1))
    age = float(np.clip(rng.beta(1.1, 2.2), 0, 1))
    targets = _shape(rng, female, age)
    looks = _skin_and_hair(rng, dict(targets), female, age)
    return PersonSpec(
        seed=seed,
        female=female,
        age=age,
        targets=targets,
        **looks,
        **_hair_style(rng, female, age, looks["hair"]),
        **_wear(rng, female),
        **_exposed(_light(rng), looks["skin"]),
        **_picture(rng),
    )
