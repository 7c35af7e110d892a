"""Parity: what the released model computes, case by case.

Every case of a known kind in the folder FLASHTALK_REFERENCE (default: ../shared/reference beside
the project) is run; a case is NAME.json and NAME.npz, and weights and inputs are drawn from names
by the folder's own reference.py. Held: 1e-4 relative to the largest value, 2e-3 for outputs stored
as float16.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
FOLDER = Path(os.environ.get("FLASHTALK_REFERENCE") or ROOT.parent / "shared" / "reference")


def _reference() -> ModuleType | None:
    path = FOLDER / "reference.py"
    if not path.is_file():
        return None
    spec = importlib.util.spec_from_file_location("flashtalk_reference_cases", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


reference = _reference()


def _names(kind: str) -> list[str]:
    if reference is None:
        return []
    return [
        n for n in reference.names(FOLDER) if json.loads((FOLDER / f"{n}.json").read_text())["kind"] == kind
    ]


def each_case(kind: str) -> pytest.MarkDecorator:
    names = _names(kind)
    absent = pytest.param(None, marks=pytest.mark.skip(reason=f"no {kind!r} case in {FOLDER}"))
    return pytest.mark.parametrize("name", names or [absent])


def load(name: str) -> Any:
    assert reference
    return reference.load(name, FOLDER)


def same(ours: Tensor | np.ndarray, case: Any, key: str = "output") -> None:
    theirs = case.arrays[key]
    ours = np.asarray(ours, dtype=np.float64)
    assert ours.shape == theirs.shape
    bound = 2e-3 if theirs.dtype == np.float16 else 1e-4
    expected = theirs.astype(np.float64)
    error = np.abs(ours - expected).max() / np.abs(expected).max()
    assert error < bound, f"{case.name}: relative error {error:.2e}, allowed {bound:.0e}"


def seeded_module(case: Any, module: nn.Module, prefix: str) -> nn.Module:
    """The module with the weights that the case's own rule draws from their names."""
    shapes = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    weights = case.state_dict(shapes, prefix)
    module.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    return module.eval()


def drawn(case: Any, text: str) -> Tensor:
    """An input given as a formula: numbers around seeded(NAME, [shape]), clipped to [-1, 1]."""
    found = re.fullmatch(
        r"clip\(([\d.]+)\*seeded\(([\w.]+),\s*(\[[\d,\s]+\])\)(?:\+([\d.]+))?,-1,1\)", text.replace(" ", "")
    )
    assert found, f"{case.name}: an input rule of a new form: {text}"
    scale, name, shape, offset = found.groups()
    value = float(scale) * case.seeded(name, json.loads(shape)) + float(offset or 0)
    return torch.from_numpy(np.clip(value, -1, 1).astype(np.float32))


@each_case("dit")
def test_dit(name: str) -> None:
    from flashtalk_cli.models.dit import DiT, DitParams
    from flashtalk_cli.parallel.sequence import Sequence

    case = load(name)
    dit = seeded_module(case, DiT(DitParams.from_config(case.config)), case.meta["weights_prefix"])
    i = {key: torch.from_numpy(value) for key, value in case.inputs().items()}
    with torch.no_grad():
        context = dit.condition(i["context"], i["clip_fea"])
        audio = dit.hear(i["audio"])
        velocity = dit(i["x"][None], torch.tensor([case.meta["t"]]), i["y"], context, audio, Sequence())
    same(velocity[0], case)


def _vae(case: Any, config: dict[str, Any]) -> Any:
    from flashtalk_cli.models.vae import Vae, VaeParams

    params = VaeParams(
        dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=tuple(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        temporal_downsample=tuple(config["temperal_downsample"]),
    )
    return seeded_module(case, Vae(params), case.meta.get("weights_prefix", "vae"))


@each_case("vae_decode")
def test_vae_decode(name: str) -> None:
    case = load(name)
    latent = torch.from_numpy(case.inputs()["latent"])[None]
    with torch.no_grad():
        video, _ = _vae(case, case.config).decode(latent)
    same(video.clamp(-1, 1), case)


@each_case("vae_encode")
def test_vae_encode(name: str) -> None:
    case = load(name)
    video = torch.from_numpy(np.clip(0.5 * case.inputs()["video"], -1, 1))
    with torch.no_grad():
        latent, _ = _vae(case, case.config).encode(video)
    same(latent[0], case)


@each_case("color")
def test_colour(name: str) -> None:
    from flashtalk_cli.pipeline.colour import Statistics, match_colour, to_lab

    case = load(name)
    source, target = (drawn(case, case.meta["inputs"][key]) for key in ("src", "ref"))
    same(match_colour(source, Statistics.of(to_lab(target)), case.meta["strength"]), case)


@each_case("centercrop")
def test_centre_crop(name: str) -> None:
    from flashtalk_cli.config import Canvas
    from flashtalk_cli.media.image import fit_picture

    case = load(name)
    height_px, width_px = case.meta["target"]
    canvas = Canvas.model_construct(
        width_px=width_px, height_px=height_px, fit="crop", background="#000000"
    )  # a case may be smaller than what a user may ask for
    fitted = fit_picture(case.arrays["image"], canvas)
    same(np.moveaxis(fitted, -1, 0)[None, :, None], case)


@each_case("loudness")
def test_loudness(name: str) -> None:
    from flashtalk_cli.media.loudness import normalise_loudness

    case = load(name)
    same(normalise_loudness(case.arrays["input"], -23.0), case)


@each_case("t5")
def test_text_encoder(name: str) -> None:
    from flashtalk_cli.models.text import encode_ids, text_module

    case = load(name)
    weights = {k: torch.from_numpy(v) for k, v in case.state_dict().items()}
    encoder = text_module(weights)
    with torch.no_grad():
        rows = encode_ids(
            encoder, torch.from_numpy(case.arrays["ids"]), torch.from_numpy(case.arrays["mask"])
        )
    same(rows[None] if rows.ndim == 2 else rows, case)


@each_case("clip")
def test_image_encoder(name: str) -> None:
    from flashtalk_cli.models.image import image_module, tokens

    case = load(name)
    weights = {k: torch.from_numpy(v) for k, v in case.state_dict().items()}
    encoder = image_module(weights, heads=case.config["num_heads"])
    with torch.no_grad():
        same(tokens(encoder, torch.from_numpy(case.inputs()["image"])), case)


@each_case("wav2vec")
def test_speech_encoder(name: str) -> None:
    from transformers import Wav2Vec2Config, Wav2Vec2Model

    from flashtalk_cli.models.speech import features_of

    case = load(name)
    config = Wav2Vec2Config(**case.config)
    model = seeded_module(case, Wav2Vec2Model(config), case.meta["weights_prefix"])
    wave = 0.1 * torch.from_numpy(case.inputs()["wave"])  # the rule that the case was made by
    with torch.no_grad():
        same(features_of(model, wave, case.meta["seq_len"])[0].reshape(case.arrays["output"].shape), case)


@each_case("pipeline")
def test_pipeline(name: str) -> None:
    """Chunks one after another: motion, colour, the order of the noise draws."""
    from flashtalk_cli.config import Sampling
    from flashtalk_cli.models.dit import DiT, DitParams
    from flashtalk_cli.parallel.sequence import Sequence
    from flashtalk_cli.pipeline.schedule import times
    from flashtalk_cli.pipeline.session import Models, begin, prepare, step

    case = load(name)
    meta = case.meta
    sampling = Sampling(
        steps=len(meta["timesteps"]) - 1,
        shift=float(meta["shift"]),
        seed=meta["seed"],
        chunk_frames=meta["frame_num"],
        motion_frames=meta["motion_frames_num"],
        colour_strength=float(meta["color_correction_strength"]),
    )
    np.testing.assert_allclose(times(sampling.steps, sampling.shift) * 1000, meta["timesteps"], rtol=1e-6)
    models = Models(
        dit=seeded_module(case, DiT(DitParams.from_config(meta["dit"])), "dit"),
        vae=_vae(case, meta["vae"]),
        sampling=sampling,
        device=torch.device("cpu"),
        sequence=Sequence(),
    )
    picture = torch.from_numpy(case.arrays["image"].astype(np.float32) / 127.5 - 1).permute(2, 0, 1)
    text = torch.from_numpy(case.seeded("pipe.context", (13, meta["dit"]["text_dim"])))
    image = torch.from_numpy(case.seeded("pipe.clip_fea", (1, 257, 1280)))
    conditions = prepare(models, picture, text, image)
    state = begin(conditions, sampling.seed)
    videos = []
    for chunk in range(len(case.arrays["output"])):
        windows = torch.from_numpy(case.seeded(f"pipe.audio{chunk}", (1, sampling.chunk_frames, 5, 12, 768)))
        pieces = step(models, conditions, state, windows)
        frames = []
        while True:
            try:
                frames.append(next(pieces))
            except StopIteration as end:
                state = end.value
                break
        videos.append(torch.cat(frames, dim=2)[0])
    same(torch.stack(videos), case)


def test_every_released_tensor_has_a_place() -> None:
    """The 14B model on the meta device has the released DiT and VAE keys, and no others."""
    path = FOLDER / "soulx_14b_keys.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    from flashtalk_cli.models.dit import DiT, DitParams
    from flashtalk_cli.models.vae import Vae, VaeParams

    keys = json.loads(path.read_text())
    with torch.device("meta"):
        built = {"dit": DiT(DitParams()), "vae": Vae(VaeParams())}
    for component, module in built.items():
        ours = {key: list(value.shape) for key, value in module.state_dict().items()}
        assert ours == keys[component]
