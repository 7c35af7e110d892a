"""The head as tensors: identity targets, face units, joints, and how a head turns.

Everything is linear until the neck bends: vertices = mean + identity @ targets + curves @ units.
After that the frame is centred: the origin lies between the eyes, so that people of all sizes
stand in the same place before the camera.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from flashtalk_cli.distill.people.bake import HEAD_FILE
from flashtalk_cli.errors import InputError


@dataclass(frozen=True)
class Head:
    """The baked head. V vertices, of which the last J are joints that no face uses.

    mean [V, 3] dm; targets [I, V, 3]; units [U, V, 3]; faces int64 [F, 3]; part uint8 [F] indexes
    `parts`; masks [M, V - J] in 0..1; head_weight [V - J], how far a vertex follows the head.
    """

    mean: Tensor
    targets: Tensor
    units: Tensor
    faces: Tensor
    part: Tensor
    masks: Tensor
    head_weight: Tensor
    arm_weight: Tensor
    parts: tuple[str, ...]
    joints: tuple[str, ...]
    target_names: tuple[str, ...]
    unit_names: tuple[str, ...]
    mask_names: tuple[str, ...]

    @property
    def n_vertices(self) -> int:
        """Vertices that faces use."""
        return self.mean.shape[0] - len(self.joints)

    def joint(self, vertices: Tensor, name: str) -> Tensor:
        """A joint's place [..., 3] among posed vertices [..., V, 3]."""
        return vertices[..., self.n_vertices + self.joints.index(name), :]

    def mask(self, name: str) -> Tensor:
        """A painted mask [V - J] in 0..1."""
        return self.masks[self.mask_names.index(name)]

    def of_part(self, *names: str) -> Tensor:
        """Which faces [F] belong to any of the parts."""
        numbers = torch.tensor([self.parts.index(name) for name in names], device=self.part.device)
        return torch.isin(self.part, numbers.to(self.part.dtype))


def _dense(stored: dict[str, np.ndarray], kind: str, n_rows: int) -> tuple[np.ndarray, tuple[str, ...]]:
    names = tuple(str(name) for name in stored[f"{kind}_names"])
    dense = np.zeros((len(names), n_rows, 3), dtype=np.float32)
    which = np.repeat(np.arange(len(names)), stored[f"{kind}_lengths"])
    dense[which, stored[f"{kind}_indices"]] = stored[f"{kind}_offsets"] * stored["quantum_dm"]
    return dense, names


@lru_cache(maxsize=1)
def unit_names() -> tuple[str, ...]:
    """Names of the face units, in the order of all curves."""
    with np.load(HEAD_FILE) as stored:
        return tuple(str(name) for name in stored["unit_names"])


@lru_cache(maxsize=2)
def load_head(device: str = "cpu") -> Head:
    """The packaged head on a device. Raises InputError when the file was never baked."""
    if not HEAD_FILE.exists():
        raise InputError(f"{HEAD_FILE} is missing: python -m flashtalk_cli.distill.people.bake")
    with np.load(HEAD_FILE) as file:
        stored = {key: file[key] for key in file.files}
    n_rows = len(stored["vertices"])
    targets, target_names = _dense(stored, "identity", n_rows)
    units, unit_names = _dense(stored, "unit", n_rows)

    def tensor(values: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(values).to(device=device, dtype=dtype)

    faces = tensor(stored["faces"].astype(np.int64), torch.int64)
    part = tensor(stored["part"], torch.uint8)
    parts = tuple(str(name) for name in stored["parts"])
    head_weight = tensor(stored["head_weight"].astype(np.float32))
    head_weight[faces[part != parts.index("skin")].unique()] = 1.0
    return Head(
        mean=tensor(stored["vertices"]),
        targets=tensor(targets),
        units=tensor(units),
        faces=faces,
        part=part,
        masks=tensor(stored["masks"].astype(np.float32) / 255),
        head_weight=head_weight,
        arm_weight=tensor(stored["arm_weight"].astype(np.float32)),
        parts=parts,
        joints=tuple(str(name) for name in stored["joints"]),
        target_names=target_names,
        unit_names=unit_names,
        mask_names=tuple(str(name) for name in stored["mask_names"]),
    )


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """Unit normals [B, V, 3], each the area-weighted mean of its triangles' normals."""
    a, b, c = (vertices[:, faces[:, corner]] for corner in range(3))
    across = torch.linalg.cross(b - a, c - a)
    normals = torch.zeros_like(vertices)
    for corner in range(3):
        normals.index_add_(1, faces[:, corner], across)
    return torch.nn.functional.normalize(normals, dim=-1)
