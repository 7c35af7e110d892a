"""The example portraits and speeches of the package: `python -m flashtalk_cli.distill.people.assets`.

All are held out: seeds and voices that training never meets.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from flashtalk_cli.config import SAMPLE_RATE_HZ
from flashtalk_cli.distill.people.figure import Motion
from flashtalk_cli.distill.people.head import load_head
from flashtalk_cli.distill.people.person import PersonSpec
from flashtalk_cli.distill.people.render import Detail, film, prepare
from flashtalk_cli.distill.people.spec import HELD_OUT_FROM, draw_person
from flashtalk_cli.distill.people.voices import Voice, say
from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.log import setup

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parents[2] / "assets"
SIDE_PX = 512
PORTRAIT = Detail(texture=1536, strands=9000, sky_directions=48, shadow_side=320)
PLEASANT = {"mouthSmileLeft": 0.22, "mouthSmileRight": 0.22, "eyeBlinkLeft": 0.02, "eyeBlinkRight": 0.02}
PEOPLE: dict[str, tuple[int, dict]] = {
    "oscar": (HELD_OUT_FROM + 18, {}),
    "maya": (HELD_OUT_FROM + 1, {}),
    "henry": (HELD_OUT_FROM + 11, {}),
    "amara": (HELD_OUT_FROM + 31, {}),
}
SPEECHES = {
    "welcome": (
        "af_heart",
        "Hello, and welcome. This portrait never moved before today. A small model listens to my voice, "
        "and it moves the lips, the eyes and the head, one second at a time. Everything you see was made on this very machine.",
    ),
    "story": (
        "am_michael",
        "Above the harbour there stood an old blue house. Every Wednesday morning, a puppy and a white mouse opened the window "
        "and waved at the boats. Nobody believed it, of course.",
    ),
}


def portrait_spec(name: str) -> PersonSpec:
    """The person of that name, framed for a portrait."""
    seed, changes = PEOPLE[name]
    spec = draw_person(seed)
    turn = tuple(float(np.clip(angle, -0.12, 0.12)) for angle in spec.turn)
    framed = {
        "face_height": 0.72,
        "place": (0.5, 0.48),
        "turn": turn,
        "body_turn": spec.body_turn / 2,
        "softness": 0.0,
        "grain": 0.004,
        "vignette": 0.12,
        "exposure": 0.05,
    }
    return dataclasses.replace(spec, **{**framed, **changes})


def still(spec: PersonSpec, units: dict[str, float], side_px: int, detail: Detail) -> np.ndarray:
    """One frame uint8 [side, side, 3] of a person with that face, made at twice the size."""
    head = load_head("cpu")
    curves = torch.zeros(1, 1, len(head.unit_names))
    for unit, value in units.items():
        curves[..., head.unit_names.index(unit)] = value
    look = -torch.tensor([spec.turn[0] + spec.body_turn, spec.turn[1]]).reshape(1, 1, 2)
    motion = Motion(curves, torch.zeros(1, 1, 3), look, torch.zeros(1, 1, 3), torch.zeros(1, 1))
    frame = film(prepare([spec], 2 * side_px, 2 * side_px, "cpu", detail), motion).frames[0, 0].numpy()
    return np.asarray(Image.fromarray(frame).resize((side_px, side_px), Image.Resampling.BOX))


def speak(name: str, into: Path) -> None:
    """Writes a speech and its text."""
    voice, text = SPEECHES[name]
    samples = say(Voice("kokoro", voice), text).samples
    soundfile.write(
        into / f"{name}.wav", samples * (0.7 / np.abs(samples).max()), SAMPLE_RATE_HZ, subtype="PCM_16"
    )
    (into / f"{name}.txt").write_text(text + "\n")
    log.info("%s: %.1f s", into / f"{name}.wav", len(samples) / SAMPLE_RATE_HZ)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=[*SPEECHES, *PEOPLE])
    parser.add_argument("--into", type=Path, default=FOLDER)
    given = parser.parse_args()
    setup(debug=True)
    for folder in ("portraits", "speech"):
        (given.into / folder).mkdir(parents=True, exist_ok=True)
    for name in given.names:
        if name in SPEECHES:
            speak(name, given.into / "speech")
            continue
        path = given.into / "portraits" / f"{name}.png"
        Image.fromarray(still(portrait_spec(name), PLEASANT, SIDE_PX, PORTRAIT)).save(path, optimize=True)
        log.info("%s: %d bytes", path, path.stat().st_size)


if __name__ == "__main__":
    told_in_a_line(main)
