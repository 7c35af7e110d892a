"""Runs of training on a toy: one resumed is the one uninterrupted, bit for bit (property); what is written, and
diverged runs, other numbers of ranks, small machines told in one line (faults)."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import pytest
import tiny_model
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from toy_stages import ALONE, CPU, adapt_stage, distill_stage, make_toy, network

from flashtalk_cli.config import Canvas, Sampling
from flashtalk_cli.distill import checkpoint, export, memory, networks, shards, trainer
from flashtalk_cli.distill.config import Network, TrainPreset
from flashtalk_cli.distill.metrics import Running
from flashtalk_cli.errors import DeviceError, FlashtalkError, InputError, ModelError, OutputError
from flashtalk_cli.events import Emitter
from flashtalk_cli.models import export as models_export
from flashtalk_cli.models.dit import DitParams
from flashtalk_cli.models.folder import find
from flashtalk_cli.models.tensors import MemorySource
from flashtalk_cli.parallel.ranks import Ranks


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainPreset, DitParams]:
    return make_toy(tmp_path_factory.mktemp("toy"))


def course(toy: tuple[Path, TrainPreset, DitParams], out: Path, **changes: object) -> trainer.Course:
    fields = {
        "out": out, "keeping": toy[1].keeping, "ranks": ALONE, "emitter": Emitter(None),
        "stop": threading.Event(), "max_seconds": None, "resume": True, "note": {"stage": "test"},
        "identity": {"stage": "test", "teacher": "one"},
    }  # fmt: skip
    return trainer.Course(**(fields | changes))  # type: ignore[arg-type]


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


def test_what_has_diverged_is_not_kept(toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses are looked at when they are logged, and only what was looked at becomes a checkpoint."""
    stage = adapt_stage(toy)
    step = stage.step

    def diverging() -> dict[str, torch.Tensor]:
        found = step()
        return found if stage.step_count < 3 else {**found, "loss": torch.tensor(float("nan"))}

    monkeypatch.setattr(stage, "step", diverging)
    keeping = toy[1].keeping.model_copy(update={"log_every_steps": 2, "save_every_s": 1e-9})
    with pytest.raises(FlashtalkError, match="diverged"):
        trainer.train(stage, course(toy, tmp_path, keeping=keeping))
    assert [path.name for path in checkpoint.found_in(tmp_path)] == ["checkpoint-00000002"]


def test_encoders_go_with_the_weights(toy, tmp_path: Path) -> None:
    """Those of another model are replaced, whatever else lies there stays; what is absent comes along."""
    models = [tmp_path / name for name in ("new", "old")]
    for path in models:
        tiny_model.write(path)
    new, old = models
    vae = next(iter(find(new).files("vae")))
    vae.write_bytes(vae.read_bytes() + b"trained on")
    (old / "README.md").write_text("a card")
    (new / "README.md").write_text("another")
    find(old).files("image")[0].unlink()
    (old / "Wan2.1_VAE.pth").write_bytes(b"of the same, in another format")
    sizes = find(new).speech_path / "config.json"
    sizes.write_text(sizes.read_text() + " ")
    voices = find(new).files("speech")[0]
    voices.write_bytes(voices.read_bytes() + b"trained on")
    with export._encoders(old, find(new)):
        assert shards.digest_of(find(old)) != shards.digest_of(find(new)), "not before the weights are there"
    assert shards.digest_of(find(old)) == shards.digest_of(find(new))
    assert (old / "README.md").read_text() == "a card"
    assert not (old / "Wan2.1_VAE.pth").exists()
    assert (find(old).speech_path / "config.json").read_text() == sizes.read_text()
    assert not list(old.rglob("*.part"))


@pytest.mark.parametrize("full_at", range(4))
def test_a_full_disk_leaves_a_model_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, full_at: int
) -> None:
    """Encoders and network stay together whichever file does not fit, of two encoders, sizes and the network."""
    new, old, run = (tmp_path / name for name in ("new", "old", "run"))
    for path in (new, old):
        tiny_model.write(path)
    for component in ("vae", "speech"):
        (file,) = find(new).files(component)  # type: ignore[arg-type]
        file.write_bytes(file.read_bytes() + b"trained on")
    run.mkdir()
    trained = {key: tensor + 1 for key, tensor in load_file(find(old).files("dit")[0]).items()}
    save_file(trained, run / "weights.safetensors")
    before = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    written, write = [], shutil.copyfile

    def full(source: Path, target: Path) -> None:
        if len(written) == full_at:
            target.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(write(source, target))

    def no_room(*_: object) -> None:
        raise SafetensorError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", full)
        patch.setattr(models_export, "save_file", no_room)
        with pytest.raises(OutputError, match="No space left on device"):
            export.export(run, old, find(new))
    assert len(written) == full_at
    kept = {path: path.read_bytes() for path in old.rglob("*") if path.is_file()}
    assert kept == before
    export.export(run, old, find(new))
    assert shards.digest_of(find(old)) == shards.digest_of(find(new))
    name, tensor = next(iter(load_file(find(old).files("dit")[0]).items()))
    assert torch.equal(tensor, trained[name].to(torch.bfloat16))


def test_faults_of_a_run(toy, tmp_path: Path) -> None:
    """A folder in use, another number of ranks, a broken checkpoint, a run that diverged: one line each."""
    trainer._save(adapt_stage(toy), course(toy, tmp_path))
    with pytest.raises(OutputError, match="holds a run"):
        trainer._begin(adapt_stage(toy), course(toy, tmp_path, resume=False))
    other = {"stage": "test", "teacher": "another"}
    with pytest.raises(InputError, match="is of another run: teacher differ"):
        trainer._begin(adapt_stage(toy), course(toy, tmp_path, identity=other))
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
        memory.check(need(1, trained=1, frozen=0, averaged=1), CPU, 1, "stage 1")
    with pytest.raises(DeviceError, match=r"stage 2 needs"):
        memory.check(need(4, trained=2, frozen=1, averaged=1), CPU, 4, "stage 2")
    memory.check(need(8, trained=1, frozen=0, averaged=1), CPU, 8, "stage 1")
    memory.check(need(8, trained=2, frozen=1, averaged=1), CPU, 8, "stage 2")
