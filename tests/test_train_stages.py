"""Both stages on a toy: losses fall, every parameter gets its gradient, what is left out is left out
(properties); a run resumed is the run uninterrupted, bit for bit; guidance, options and times as told
(contracts); diverged runs, other numbers of ranks, small machines are told in one line (faults)."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_training import SIDE_PX, load_presets, write_presets

from flashtalk_cli import presets
from flashtalk_cli.config import Canvas, Sampling
from flashtalk_cli.distill import adapt, checkpoint, dmd, memory, networks, shards, trainer
from flashtalk_cli.distill.config import Distill, Network, Optimiser, TrainPreset
from flashtalk_cli.distill.metrics import Running
from flashtalk_cli.distill.optimise import Trained, learning_rate
from flashtalk_cli.distill.pool import Pool, Talk, open_pool
from flashtalk_cli.errors import DeviceError, FlashtalkError, InputError, ModelError, OutputError
from flashtalk_cli.events import Emitter
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.tensors import MemorySource
from flashtalk_cli.models.weights import load_vae
from flashtalk_cli.parallel.ranks import Ranks

CPU = torch.device("cpu")
ALONE = Ranks(CPU)
LATENT_PX = SIDE_PX // 8


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainPreset, DitParams]:
    """A folder with a model and smooth invented examples that a network can learn something about."""
    folder = tmp_path_factory.mktemp("toy")
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
            chunk_frames=13, motion_frames=5, fps=25, hearing=base.hearing, encoders={}, prompts=["x"]
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


def distill_stage(toy: tuple[Path, TrainPreset, DitParams], **options: object) -> dmd.DistillStage:
    folder, preset, params = toy
    stage = Distill.model_validate(preset.distill.model_dump() | options)
    student, critic = (Trained(network(params), stage.student, 10, ema) for ema in (stage.ema_decay, None))
    teacher = network(params).requires_grad_(False)
    with torch.no_grad():  # a head of zeros makes all networks alike: let the teacher have something to teach
        teacher.head.head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(5))
        student.dit.head.head.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(6))
    student.adopt()
    vae = load_vae(find(str(folder / "presets" / "model")), CPU, torch.float32)
    sampling = Sampling(chunk_frames=13, motion_frames=5)
    generators = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
    return dmd.DistillStage(student, critic, teacher, vae, pool_of(toy), stage, sampling, 1, *generators)


def course(toy: tuple[Path, TrainPreset, DitParams], out: Path, **changes: object) -> trainer.Course:
    fields = {
        "out": out, "keeping": toy[1].keeping, "ranks": ALONE, "emitter": Emitter(None),
        "stop": threading.Event(), "max_seconds": None, "resume": True, "note": {"stage": "test"},
    }  # fmt: skip
    return trainer.Course(**(fields | changes))  # type: ignore[arg-type]


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


@pytest.mark.parametrize("kind", ["adapt", "distill"])
def test_a_resumed_run_is_the_run_uninterrupted(toy, tmp_path: Path, kind: str) -> None:
    """Parameters, moments, average, draws: bit for bit, through a checkpoint on disk."""
    make = {"adapt": adapt_stage, "distill": lambda toy: distill_stage(toy, carry=0.6)}[kind]
    torch.manual_seed(0)
    whole = make(toy)
    for _ in range(4):
        whole.step()
    begun = make(toy)
    for _ in range(2):
        begun.step()
    trainer._save(begun, course(toy, tmp_path))
    resumed = make(toy)
    torch.manual_seed(99)  # nothing may depend on torch's own generator
    trainer._begin(resumed, course(toy, tmp_path))
    assert resumed.step_count == 2
    for _ in range(2):
        resumed.step()
    wanted, found = whole.state(), resumed.state()
    assert_same(wanted, found)
    assert torch.equal(whole.own.get_state(), resumed.own.get_state())
    assert torch.equal(whole.shared.get_state(), resumed.shared.get_state())


def assert_same(wanted: object, found: object) -> None:
    if isinstance(wanted, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert torch.equal(wanted, found)
    elif isinstance(wanted, dict):
        assert wanted.keys() == found.keys()  # type: ignore[attr-defined]
        for key in wanted:
            assert_same(wanted[key], found[key])  # type: ignore[index]
    elif isinstance(wanted, (list, tuple)):
        for one, other in zip(wanted, found, strict=True):  # type: ignore[call-overload]
            assert_same(one, other)
    else:
        assert wanted == found


def test_stage_2_moves_the_student_alone_by_its_updates(toy) -> None:
    """An update of the critic leaves the student as it is and the other way round; the teacher never moves."""
    stage = distill_stage(toy)

    def copies() -> list[list[torch.Tensor]]:
        return [[p.detach().clone() for p in dit.parameters()] for dit in
                (stage.student.dit, stage.critic.dit, stage.teacher)]  # fmt: skip

    def moved(before: list[list[torch.Tensor]]) -> list[bool]:
        return [
            any(not torch.equal(a, b) for a, b in zip(old, new, strict=True))
            for old, new in zip(before, copies(), strict=True)
        ]

    before = copies()
    stage.update_critic()
    assert moved(before) == [False, True, False]
    before = copies()
    stage.update_student()
    assert moved(before) == [True, False, False]


def test_stage_2_brings_the_student_to_the_teacher(toy) -> None:
    """The distance between teacher and critic on the student's chunks shrinks, as does that of their heads."""
    rates = {"learning_rate": 1e-2, "beta1": 0.0, "beta2": 0.99, "warmup_steps": 0, "weight_decay": 0.0}
    stage = distill_stage(toy, chunks=1, critic_updates=4, student=rates, critic=rates, audio_guidance=1.0,
                          text_guidance=1.0, batch=4, micro_batch=4)  # fmt: skip

    def miss() -> float:
        """Error of the student's one-step guess against the teacher's."""
        bucket = stage.pool.buckets[0]
        talk = bucket.talk_of(bucket.draw_people(8, 1, torch.Generator().manual_seed(3)), 1)
        x = torch.randn(8, 16, 4, LATENT_PX, LATENT_PX, generator=torch.Generator().manual_seed(4))
        with torch.no_grad():
            guesses = [dmd.predictor(dit, talk, 0)(x, 0.9) for dit in (stage.student.dit, stage.teacher)]
        return (guesses[0] - guesses[1]).square().mean().item()

    before = miss()
    for _ in range(40):
        stage.step()
    assert miss() < 0.8 * before


@pytest.mark.parametrize("clean", [True, False])
@pytest.mark.parametrize("align", [True, False])
def test_motion_options(toy, clean: bool, align: bool) -> None:
    """What teacher and critic are shown of the motion: clean or noised, the student's or the clip's own."""
    stage = distill_stage(toy, clean_motion=clean, align_motion=align, first_motion="picture", chunks=2)
    where = dmd.Course(stage.pool.buckets[0], 2, kept=1, from_picture=True)
    start = dmd.Carried(
        where.bucket.draw_people(2, 2, stage.own), torch.randn(2, 16, 1, LATENT_PX, LATENT_PX)
    )
    talk = where.bucket.talk_of(start.people, 2)
    with torch.no_grad():
        made = stage.roll_out(where, talk, start.motion)
    seen = stage.noised(made, talk, where)
    wanted = made.motion if align else talk.real[1]
    assert torch.equal(seen.clean[:, :, :2], wanted)
    assert torch.equal(seen.x[:, :, :2], wanted) == clean
    assert torch.equal(seen.clean[:, :, 2:], made.clean[:, :, 2:])
    assert seen.weight[:, 0, :, 0, 0].tolist() == [[0, 0, 1, 1]] * 2
    low, high = made.interval
    assert (low, high) == (stage.points[2].item(), stage.points[1].item())
    assert low - 1e-5 <= seen.time.min()
    assert seen.time.max() <= high + 1e-5


def test_rollouts_go_on_where_earlier_ones_had_come_to(toy) -> None:
    """With `carry` the same people come again with what they had come to; what waits is bounded; without, nobody."""
    assert not distill_stage(toy, chunks=2).carried
    stage = distill_stage(toy, chunks=2, carry=0.8, batch=2, micro_batch=1)
    begun: list[tuple[dmd.Course, torch.Tensor, torch.Tensor]] = []

    def at_once(course: dmd.Course, talk: Talk, motion: torch.Tensor) -> dmd.Rollout:
        """A rollout without networks: it comes to a motion of its own."""
        begun.append((course, motion, torch.randn(1, 16, 2, LATENT_PX, LATENT_PX)))
        return dmd.Rollout(torch.randn(1, 16, 4, LATENT_PX, LATENT_PX), begun[-1][2], (0.1, 0.9))

    stage.roll_out = at_once  # type: ignore[method-assign]
    for _ in range(20):
        stage.update_critic()
    again = [(course, motion) for course, motion, _ in begun if course.carried]
    assert 0.5 < len(again) / len(begun) < 1
    assert len(stage.carried) == min(dmd.CARRIED_UPDATES, (len(begun) - len(again)) // 2)
    came_to = [made for _, _, made in begun]
    for course, motion in again:
        assert len(course.carried) == 2
        assert any(motion is made for made in came_to)
    assert stage.carried[-1][1][1].motion is came_to[-1]


def test_guidance_of_one_is_the_teacher_itself(toy) -> None:
    """And the three evaluations are those of one network with something left out."""
    stage = distill_stage(toy)
    where = dmd.Course(stage.pool.buckets[0], 1, kept=0, from_picture=True)
    talk = where.bucket.talk_of(where.bucket.draw_people(2, 1, stage.own), 1)
    with torch.no_grad():
        seen = stage.noised(stage.roll_out(where, talk, talk.picture_latent), talk, where)

        def plain(text: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
            return adapt.velocity_of(stage.teacher, seen.x, seen.time, talk.y, text, talk.tokens, windows)

        full = plain(talk.text, talk.windows[0])
        unsaid = plain(0 * talk.text, talk.windows[0])
        neither = plain(0 * talk.text, 0 * talk.windows[0])
        one = dmd.guided(stage.teacher, dmd.losses.Guidance(1.0, 1.0), seen, talk, 0)
        strong = dmd.guided(stage.teacher, dmd.losses.Guidance(3.0, 4.0), seen, talk, 0)
    torch.testing.assert_close(one, full, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        strong, neither + 4 * (unsaid - neither) + 3 * (full - unsaid), rtol=1e-4, atol=1e-4
    )


def test_draws_of_a_course_cover_what_they_may(toy) -> None:
    """k from 1 to K, every step, both beginnings; the same from the same shared generator."""
    stage, other = (
        distill_stage(toy, chunks=2, first_motion="mixed"),
        distill_stage(toy, chunks=2, first_motion="mixed"),
    )
    other.own.manual_seed(77)
    drawn = [stage.draw_course() for _ in range(60)]
    assert {c.n_chunks for c in drawn} == {1, 2}
    assert {c.kept for c in drawn} == {0, 1, 2, 3}
    assert {c.from_picture for c in drawn} == {True, False}
    again = [other.draw_course() for _ in range(60)]
    assert [(c.n_chunks, c.kept, c.from_picture) for c in drawn] == [
        (c.n_chunks, c.kept, c.from_picture) for c in again
    ]


def test_a_run_writes_weights_metrics_and_keeps_few_checkpoints(toy, tmp_path: Path) -> None:
    """What is asked for at the end is there; a second call has nothing left to do."""
    stage = adapt_stage(toy)
    assert trainer.train(stage, course(toy, tmp_path)) == 0
    rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert len(rows) == 1 + toy[1].adapt.steps
    assert rows[0].startswith("step,gradient_norm,hearing,loss")
    again = adapt_stage(toy)
    assert trainer.train(again, course(toy, tmp_path)) == 0
    assert again.step_count == toy[1].adapt.steps
    assert (tmp_path / "metrics.csv").read_text().splitlines() == rows
    assert [path.name for path in checkpoint.found_in(tmp_path)] == ["checkpoint-00000006"]
    source = networks.open_files([tmp_path / "weights.safetensors"])
    loaded = network(toy[2], seed=9)
    networks.read_weights(loaded, source)
    for average, parameter in zip(stage.trained.average, loaded.parameters(), strict=True):
        assert torch.equal(average.to(torch.bfloat16).float(), parameter)


def test_a_run_that_is_stopped_or_out_of_time_is_kept(toy, tmp_path: Path) -> None:
    """Exit code 130 and 0; both go on from where they were."""
    stopped = course(toy, tmp_path)
    stopped.stop.set()
    assert trainer.train(adapt_stage(toy), stopped) == 130
    late = adapt_stage(toy)
    assert trainer.train(late, course(toy, tmp_path, max_seconds=1e-9)) == 0
    assert late.step_count == 2
    assert (tmp_path / "weights.safetensors").is_file()


def test_faults_of_a_run(toy, tmp_path: Path) -> None:
    """A folder in use, another number of ranks, a broken checkpoint, a run that diverged: one line each."""
    trainer._save(adapt_stage(toy), course(toy, tmp_path))
    with pytest.raises(OutputError, match="holds a run"):
        trainer._begin(adapt_stage(toy), course(toy, tmp_path, resume=False))
    path = checkpoint.found_in(tmp_path)[-1]
    with pytest.raises(InputError, match="written by 1 ranks, this run has 2"):
        checkpoint.load(path, Ranks(CPU, 2, 0))
    (path / "rank-0.pt").write_bytes(b"cut off")
    with pytest.raises(InputError, match="broken"):
        checkpoint.load(path, ALONE)
    running = Running()
    running.add({"loss": torch.tensor(float("nan"))})
    with pytest.raises(FlashtalkError, match="diverged: loss is nan at step 3"):
        running.flush(ALONE, 3)
    wrong = {name: p for name, p in network(toy[2]).named_parameters() if name != "head.head.bias"}
    with pytest.raises(ModelError, match=r"1 tensors differ, first head\.head\.bias"):
        networks.read_weights(network(toy[2]), MemorySource(wrong))


def test_a_machine_too_small_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The 14B run on one 141 GB device: how much it needs for what, and how many devices would do."""
    network = Network(recompute=True)
    canvas = Canvas(width_px=448, height_px=768)
    monkeypatch.setattr(memory, "available_bytes", lambda device: 140 * memory.GIB)

    def need(world: int, **counts: int) -> memory.Need:
        return memory.need_of(DitParams(), network, canvas, Sampling(), 1, world, **counts)

    with pytest.raises(DeviceError, match=r"needs 39\d\.\d GiB a device .*moments.* such devices would do"):
        memory.check(need(1, trained=1, frozen=0, averaged=1), ALONE, "stage 1")
    with pytest.raises(DeviceError, match=r"stage 2 needs"):
        memory.check(need(4, trained=2, frozen=1, averaged=1), Ranks(CPU, 4, 0), "stage 2")
    memory.check(need(8, trained=1, frozen=0, averaged=1), Ranks(CPU, 8, 0), "stage 1")
    memory.check(need(8, trained=2, frozen=1, averaged=1), Ranks(CPU, 8, 0), "stage 2")


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
    assert presets.load(preset.render).sampling.shift == preset.adapt.shift == preset.distill.shift
    assert TrainPreset.model_validate(yaml.safe_load(presets.dump(preset))) == preset


def test_the_14b_preset_has_the_papers_figures() -> None:
    preset = presets.load("soulx-14b", (), presets.Kind(TrainPreset, "train"))
    stage_1, stage_2 = preset.adapt, preset.distill
    assert (stage_1.steps, stage_1.batch, stage_1.optimiser.learning_rate) == (1000, 32, 2e-6)
    assert (stage_2.steps, stage_2.chunks, stage_2.critic_updates) == (200, 5, 5)
    assert (stage_2.student.learning_rate, stage_2.critic.learning_rate) == (2e-6, 4e-7)
    assert (stage_2.text_guidance, stage_2.audio_guidance) == (3.0, 4.0)
