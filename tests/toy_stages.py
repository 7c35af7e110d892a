"""Both stages of training on a toy: a folder with a model and examples, and the stages made of it."""

from __future__ import annotations

from pathlib import Path

import torch
from toy_training import SIDE_PX, load_presets, write_presets

from flashtalk_cli.config import Sampling
from flashtalk_cli.distill import adapt, dmd, networks, shards
from flashtalk_cli.distill.config import Distill, Network, TrainPreset
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Pool, open_pool
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.weights import load_vae
from flashtalk_cli.parallel.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(CPU)
LATENT_PX = SIDE_PX // 8


def make_toy(folder: Path) -> tuple[Path, TrainPreset, DitParams]:
    """A folder with a model and smooth invented examples that a network can learn something about."""
    preset, base = load_presets(write_presets(folder / "presets"))
    model = find(base.model.name)
    params = DitParams.from_config(model.config())
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    tensors = {"start": [], "clip": [], "picture_clip": [], "picture_frame": []}
    for clip in range(3):
        tensors["start"] += [0, 8, 16, 24, 32]
        tensors["clip"] += [clip] * 5
        tensors["picture_clip"] += [clip] * 2
        tensors["picture_frame"] += [0, 32]
    n, m = 15, 6
    still = normal(3, 16, 1, LATENT_PX, LATENT_PX).repeat_interleave(5, 0)
    shard = {name: torch.tensor(values) for name, values in tensors.items()}
    shard |= {
        "latents": still.expand(-1, -1, 4, -1, -1) + 0.1 * normal(n, 16, 4, LATENT_PX, LATENT_PX),
        "heard": normal(n, 17, params.audio_layers, params.audio_dim),
        "text": torch.zeros(n),
        "box": torch.tensor([16.0, 16.0, 48.0, 48.0]).expand(n, 4),
        "picture": normal(m, 16, 4, LATENT_PX, LATENT_PX),
        "tokens": normal(m, 5, params.image_dim),
        "colour": normal(m, 2, 3).abs() * 10 + 20,
    }
    data = folder / "data"
    data.mkdir()
    shards.write_shard(data, (SIDE_PX, SIDE_PX), 0, shards.as_stored(shard))
    shards.write_texts(data, [normal(4, params.text_dim)])
    shards.write_origin(
        data,
        shards.Origin(
            chunk_frames=13,
            motion_frames=5,
            fps=25,
            area_px=SIDE_PX**2,
            shard_clips=4,
            held_out=False,
            hearing=base.hearing,
            encoders={},
            prompts=["x"],
        ),
    )
    return folder, preset, params


def pool_of(toy: tuple[Path, TrainPreset, DitParams]) -> Pool:
    return open_pool(toy[0] / "data", 5, 8, CPU, "never")


def network(params: DitParams, dtype: str = "float32", seed: int = 0) -> DiT:
    wanted = Network(init="random", dtype=dtype)  # type: ignore[arg-type]
    dit = networks.build(params, wanted, SDPA)
    networks.place(dit, wanted, CPU, 1, trained=True)
    networks.draw_weights(dit, seed)
    return dit


def adapt_stage(toy: tuple[Path, TrainPreset, DitParams], dtype: str = "float32") -> adapt.AdaptStage:
    _, preset, params = toy
    stage = preset.adapt
    trained = Trained(network(params, dtype), stage.optimiser, stage.steps, stage.ema_decay)
    trained.adopt()
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return adapt.AdaptStage(trained, pool_of(toy), stage, 1, *generators)


def distill_stage(
    toy: tuple[Path, TrainPreset, DitParams], *, shift: float = 5.0, **options: object
) -> dmd.DistillStage:
    folder, preset, params = toy
    stage = Distill.model_validate(preset.distill.model_dump() | options)
    student, critic = (Trained(network(params), stage.student, 10, ema) for ema in (stage.ema_decay, None))
    teacher = network(params).requires_grad_(False)
    with torch.no_grad():  # a head of zeros makes all networks alike: let the teacher have something to teach
        teacher.head.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
        student.dit.head.head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(6))
    student.adopt()
    vae = load_vae(find(str(folder / "presets" / "model")), CPU, torch.float32)
    sampling = Sampling(chunk_frames=13, motion_frames=5, shift=shift)
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return dmd.DistillStage(student, critic, teacher, vae, pool_of(toy), stage, sampling, 1, *generators)
