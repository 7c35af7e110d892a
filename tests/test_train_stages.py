"""Stage 1 on a toy, and what both share: losses fall, every parameter gets its gradient, what is left out is
left out (properties); rates, first weights and presets as told (contracts)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_stages import LATENT_PX, adapt_stage, make_toy, network

from flashtalk_cli import presets
from flashtalk_cli.distill import adapt, networks
from flashtalk_cli.distill.config import Optimiser, TrainPreset
from flashtalk_cli.distill.optimise import learning_rate
from flashtalk_cli.models.dit import DiT, DitParams


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainPreset, DitParams]:
    return make_toy(tmp_path_factory.mktemp("toy"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_loss_of_stage_1_falls(toy, dtype: str) -> None:
    """By a seventh in forty updates, also where the network computes in bfloat16 beside float32 masters."""
    stage = adapt_stage(toy, dtype)
    losses = [stage.step()["loss"].item() for _ in range(40)]
    assert sum(losses[-5:]) < 0.86 * sum(losses[:5])
    assert all(p.dtype == torch.float32 for p in stage.trained.parameters)
    assert stage.trained.dit.dtype == networks.DTYPES[dtype]


def test_every_parameter_learns(toy) -> None:
    """After an update that lets the head pass gradients on, none is left without one."""
    stage = adapt_stage(toy)
    stage.step()
    batch = stage.pool.buckets[0].draw(4, 0.5, stage.own)
    adapt.adapt_loss(stage.trained.dit, batch, stage.stage, stage.own).backward()
    for name, parameter in stage.trained.dit.named_parameters():
        assert parameter.grad is not None, name
        if not name.endswith("k.bias"):  # softmax does not change when all keys move alike
            assert parameter.grad.abs().max() > 0, name


def test_nothing_is_asked_of_given_latents(toy) -> None:
    """Velocities of the held latents have no gradient; those of the free ones have, more inside the box."""
    stage = adapt_stage(toy)
    batch = stage.pool.buckets[0].draw(4, 0.5, stage.own)
    outputs = []
    stage.trained.dit.register_forward_hook(
        lambda module, given, out: outputs.append(out) or out.retain_grad()
    )
    adapt.adapt_loss(stage.trained.dit, batch, stage.stage, stage.own).backward()
    gradient = outputs[0].grad.abs().sum((1, 3, 4))
    for i, held in enumerate(batch.held.tolist()):
        assert gradient[i, :held].max() == 0
        assert gradient[i, held:].min() > 0
    weight = adapt.face_weight(batch.box, batch.latents.shape, 3.0)
    assert weight.shape == (4, 1, 1, LATENT_PX, LATENT_PX)
    assert weight[0, 0, 0, 4, 4] == 3
    assert weight[0, 0, 0, 0, 0] == 1
    assert adapt.face_weight(torch.zeros(1, 4), batch.latents.shape, 3.0).max() == 1


def test_hearing_tells_who_listens(toy) -> None:
    """Nothing for a network whose head is zero, much for one whose mouth is the speech itself."""
    stage = adapt_stage(toy)
    batch = stage.pool.buckets[0].draw(8, 0.5, stage.own)
    generator = torch.Generator().manual_seed(0)
    assert adapt.hearing(stage.trained.dit, batch, 5.0, generator).item() == pytest.approx(0, abs=1e-6)
    before = stage.own.get_state()
    stage.probe()
    assert torch.equal(before, stage.own.get_state()), "a probe must not change the run"

    class Listener(torch.nn.Module):
        """Answers rightly when it hears what belongs to the example, else wrongly."""

        def condition(self, text: torch.Tensor, tokens: torch.Tensor) -> None:
            return None

        def hear(self, windows: torch.Tensor) -> torch.Tensor:
            return (windows == batch.windows).flatten(1).all(1)

        def forward(self, x: torch.Tensor, t: torch.Tensor, y: object, context: object, right: torch.Tensor,
                    par: object) -> torch.Tensor:  # fmt: skip
            time = (t / 1000).view(-1, 1, 1, 1, 1)
            truth = (x - batch.latents) / time
            return torch.where(right.view(-1, 1, 1, 1, 1), 1.1 * truth, 2 * truth)

    listener: DiT = Listener()  # type: ignore[assignment]
    assert adapt.hearing(listener, batch, 5.0, generator).item() > 10


@given(share=st.sampled_from([0.0, 0.3, 1.0]))
def test_what_is_left_out_is_zero(share: float) -> None:
    """About that share of a batch is zeros, the rest untouched."""
    values = torch.ones(400, 2, 3)
    left = adapt.left_out(values, share, torch.Generator().manual_seed(0))[:, 0, 0]
    assert set(left.tolist()) <= {0.0, 1.0}
    assert abs(1 - left.mean().item() - share) < 0.1
    assert share not in (0.0, 1.0) or left.mean().item() == 1 - share


def test_wear_is_of_continued_motion_only_and_of_its_strength() -> None:
    """What begins a video stays; of the rest half is worn, alike in all latents, no more than was asked."""
    clean = torch.zeros(400, 16, 3, 6, 8)
    held = torch.tensor([1, 2] * 200)
    made = adapt.worn(clean, held, 0.4, torch.Generator().manual_seed(0))
    assert made[held == 1].abs().max() == 0
    worn = made[held == 2].flatten(1).std(1)
    assert 0.4 < (worn > 0).float().mean() < 0.6
    assert 0.1 < worn[worn > 0].mean() < worn.max() < 0.4 * 3**0.5 * 1.2
    assert torch.equal(made[:, :, 0], made[:, :, 2])
    assert torch.equal(adapt.worn(clean, held, 0.0, torch.Generator().manual_seed(0)), clean)


@given(batch=st.integers(1, 300), micro=st.integers(1, 64), world=st.integers(1, 8))
def test_passes_hold_the_batch(batch: int, micro: int, world: int) -> None:
    """Passes of at most a micro-batch that together are at least the batch, and not much more."""
    n_passes, each = adapt.passes(batch, micro, world)
    assert each <= micro
    assert batch <= n_passes * each * world < batch + world * (1 + n_passes)


def test_learning_rate_rises_stays_and_falls() -> None:
    optimiser = Optimiser(learning_rate=1.0, warmup_steps=10, cooldown_share=0.2)
    rates = [learning_rate(step, 100, optimiser) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert set(rates[10:80]) == {1.0}
    assert rates[80:] == pytest.approx([(100 - step) / 20 for step in range(80, 100)])


@settings(max_examples=20)
@given(seed=st.integers(0, 1000))
def test_first_weights_follow_from_the_seed(seed: int) -> None:
    """And their velocity is zero everywhere: training begins from the mean."""
    params = DitParams(dim=16, ffn_dim=16, num_heads=2, num_layers=1, freq_dim=8, text_dim=8, text_len=2,
                       intermediate_dim=4, output_dim=8, context_tokens=2, audio_layers=1, audio_dim=8,
                       image_dim=8)  # fmt: skip
    one, other = network(params, seed=seed), network(params, seed=seed)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    velocity = adapt.velocity_of(one, torch.ones(1, 16, 2, 4, 4), torch.ones(1), torch.ones(1, 20, 2, 4, 4),
                                 torch.ones(1, 2, 8), torch.ones(1, 3, 8), torch.ones(1, 5, 5, 1, 8))  # fmt: skip
    assert velocity.abs().max() == 0


@pytest.mark.parametrize("name", presets.names(presets.Kind(TrainPreset, "train")))
def test_packaged_presets_load_and_name_a_render_preset(name: str) -> None:
    """Every file under presets/train is whole, and what it says comes back from what is dumped of it."""
    kind = presets.Kind(TrainPreset, "train")
    preset = presets.load(name, (), kind)
    assert preset.name == name
    assert presets.load(preset.render).sampling.shift == preset.adapt.shift
    assert TrainPreset.model_validate(yaml.safe_load(presets.dump(preset))) == preset


def test_the_14b_preset_has_the_papers_figures() -> None:
    preset = presets.load("soulx-14b", (), presets.Kind(TrainPreset, "train"))
    stage_1, stage_2 = preset.adapt, preset.distill
    assert (stage_1.steps, stage_1.batch, stage_1.optimiser.learning_rate) == (1000, 32, 2e-6)
    assert (stage_2.steps, stage_2.chunks, stage_2.critic_updates) == (200, 5, 5)
    assert (stage_2.student.learning_rate, stage_2.critic.learning_rate) == (2e-6, 4e-7)
    assert (stage_2.text_guidance, stage_2.audio_guidance) == (3.0, 4.0)
