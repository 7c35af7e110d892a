"""The video VAE against the reference cases, against diffusers, and against itself in pieces."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from flashtalk_cli.models.vae import Vae, VaeParams

REFERENCE = Path(
    os.environ.get("FLASHTALK_REFERENCE", Path(__file__).resolve().parents[1] / "../shared/reference")
).resolve()
SMALL = VaeParams(dim=8, dim_mult=(1, 2, 2, 2), num_res_blocks=1)


def reference() -> ModuleType:
    """The loader beside the reference cases."""
    if not (REFERENCE / "reference.py").exists():
        pytest.skip(f"no reference cases in {REFERENCE} (set FLASHTALK_REFERENCE)")
    spec = importlib.util.spec_from_file_location("flashtalk_reference", REFERENCE / "reference.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def cases(kind: str) -> list[str]:
    """Names of all cases of that kind."""
    found = sorted(p for p in REFERENCE.glob("*.json") if p.with_suffix(".npz").exists())
    return [p.stem for p in found if json.loads(p.read_text()).get("kind") == kind]


def case_vae(case) -> Vae:
    config = case.config
    params = VaeParams(
        dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
    )
    vae = Vae(params)
    vae.load_state_dict({k: torch.from_numpy(v) for k, v in case.state_dict().items()})
    return vae.eval()


def assert_agrees(ours: torch.Tensor, theirs: np.ndarray) -> None:
    """Largest difference, relative to the largest value."""
    tolerance = 2e-3 if theirs.dtype == np.float16 else 1e-4
    theirs = torch.from_numpy(theirs.astype(np.float32))
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("name", cases("vae_decode") or ["none"])
def test_decode_equals_the_reference(name):
    """Parity: every decode case."""
    case = reference().load(name, REFERENCE)
    latent = torch.from_numpy(case.inputs()["latent"])
    with torch.no_grad():
        video, _ = case_vae(case).decode(latent[None])
    assert_agrees(video, case.arrays["output"])


@pytest.mark.parametrize("name", cases("vae_encode") or ["none"])
def test_encode_equals_the_reference(name):
    """Parity: every encode case."""
    case = reference().load(name, REFERENCE)
    video = torch.from_numpy(np.clip(0.5 * case.inputs()["video"], -1, 1))
    with torch.no_grad():
        latents, _ = case_vae(case).encode(video)
    assert_agrees(latents[0], case.arrays["output"])
