"""The tasks of `flashtalk train`, each from a job to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from flashtalk_cli.distill import networks
from flashtalk_cli.distill.adapt import AdaptStage
from flashtalk_cli.distill.config import Optimiser
from flashtalk_cli.distill.data_tasks import make_people, prepare
from flashtalk_cli.distill.dmd import DistillStage
from flashtalk_cli.distill.drive import Method
from flashtalk_cli.distill.encoding import Encoders
from flashtalk_cli.distill.evaluate import Bench, Candidate, Interrupted, share_out, yardsticks
from flashtalk_cli.distill.export import export, note_of, weights_of
from flashtalk_cli.distill.losses import Guidance
from flashtalk_cli.distill.measures import Reference
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.panel import draw_panel
from flashtalk_cli.distill.report import write as write_report
from flashtalk_cli.distill.trainer import train
from flashtalk_cli.distill.work import Work
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, InputError
from flashtalk_cli.models.device import choose_dtype
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.tensors import open_files
from flashtalk_cli.models.weights import load_vae


def run(work: Work) -> int:
    """Do the job's task; the exit code."""
    _fast_matrices(work.ranks.device)
    found: dict[str, Callable[[Work], int]] = {
        "prepare": prepare,
        "people": make_people,
        "adapt": adapt,
        "distill": distill,
        "eval": evaluate,
        "export": export_run,
    }
    return found[work.job.task](work)


def _fast_matrices(device: torch.device) -> None:
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True


def adapt(work: Work) -> int:
    """`train adapt`: stage 1."""
    preset = work.job.preset
    work.check_memory("stage 1", preset.adapt, trained=1, frozen=0)
    pool = work.open_pool()
    dit = work.build()
    work.place(dit, trained=True)
    trained = work.trained(dit, preset.adapt.optimiser, preset.adapt.steps, preset.adapt.ema_decay)
    if preset.network.init == "random":
        networks.draw_weights(dit, preset.seed)
    else:
        networks.read_released(dit, work.folder)
    trained.adopt()
    n_parameters = sum(parameter.numel() for parameter in dit.parameters())
    work.say(
        "adapt",
        f"{n_parameters / 1e6:.1f} million parameters, {preset.adapt.steps} steps of {preset.adapt.batch}",
    )
    shared, own = work.generators()
    stage = AdaptStage(trained, pool, preset.adapt, work.ranks.size, shared, own)
    return train(stage, work.course())


def distill(work: Work) -> int:
    """`train distill`: stage 2."""
    preset, ranks, sampling = work.job.preset, work.ranks, work.job.base.sampling
    stage = preset.distill
    assert work.job.data is not None
    assert work.job.teacher is not None
    work.check_memory("stage 2", stage, trained=2, frozen=1)
    pool = work.open_pool()
    pool.check_chains(work.job.data, stage.chunks)
    path = weights_of(work.job.teacher)

    def network(*, trained: bool) -> DiT:
        dit = work.build()
        work.place(dit, trained=trained)
        networks.read_weights(dit, open_files([path]))
        return dit

    def learning(optimiser: Optimiser, steps: int, ema_decay: float | None) -> Trained:
        found = work.trained(network(trained=True), optimiser, steps, ema_decay)
        found.adopt()
        return found

    n_critic = stage.critic_updates * (stage.critic_warmup + stage.steps)
    student = learning(stage.student, stage.steps, stage.ema_decay)
    critic = learning(stage.critic, n_critic, None)
    dtype = torch.bfloat16 if ranks.device.type == "cuda" else torch.float32
    vae = load_vae(work.folder, ranks.device, dtype)
    work.say(
        "distill",
        f"{stage.steps} steps of {stage.batch}, rollouts of 1 to {stage.chunks} chunks, from {path}",
    )
    shared, own = work.generators()
    teacher = network(trained=False)
    made = DistillStage(student, critic, teacher, vae, pool, stage, sampling, ranks.size, shared, own)
    return train(made, work.course())


def export_run(work: Work) -> int:
    """`train export`: a run's weights into a model folder."""
    job = work.job
    assert job.source is not None
    started_s = time.monotonic()
    note = note_of(job.source)
    work.say("export", f"{note.get('stage', '?')}, step {note.get('step', '?')}, into {job.out}")
    files = export(job.source, job.out, work.folder)
    work.emitter.emit("done", path=files[0], elapsed_s=time.monotonic() - started_s)
    return 0


def evaluate(work: Work) -> int:
    """`train eval`: teacher and students on held-out people, the candidates spread over the ranks."""
    job, ranks, device = work.job, work.ranks, work.ranks.device
    plan = job.preset.evaluation
    assert job.source is not None
    started_s = time.monotonic()
    candidates = _candidates(work)
    if not candidates:
        raise InputError("nothing to evaluate: give --teacher, --student, or both")
    encoders = Encoders(work.folder, job.base, device)
    work.say("panel", f"{plan.people} held-out people, {plan.long_chunks} chunks each")

    def drawn(done: int) -> None:
        if work.stop.is_set():
            raise Interrupted
        work.emitter.emit("progress", name="panel", done=done, total=plan.people, unit="people drawn")

    def told(name: str, done: int, total: int) -> None:
        work.emitter.emit("progress", name="eval", done=done, total=total, unit=f"chunks of {name}")

    mine = []
    try:
        panel = draw_panel(encoders, job.source, plan, drawn)
        vae = load_vae(work.folder, device, choose_dtype(job.base.precision.vae, device))
        reference = Reference.of(panel.pictures, panel.mouth_box, encoders.image, device)
        bench = Bench(panel, vae, reference, plan, work.stop, told)
        for place in share_out(candidates, ranks.size)[ranks.rank]:
            work.say("eval", candidates[place].name)
            mine.append((place, bench.run(candidates[place])))
    except Interrupted:
        mine = []
    if ranks.any(work.stop.is_set()):
        work.emitter.emit("interrupted", path=None)
        return INTERRUPTED_EXIT_CODE
    found = dict(pair for some in ranks.to_leader(mine) for pair in some)
    if not ranks.leads:
        return 0
    results = [found[place] for place in range(len(candidates))]
    about = {"preset": job.preset.name, "evaluation": plan.model_dump(), "device": device_name(device)}
    path = write_report(job.out, results, yardsticks(panel, vae, reference), panel, about)
    work.emitter.emit("done", path=path, elapsed_s=time.monotonic() - started_s)
    return 0


def _candidates(work: Work) -> list[Candidate]:
    """Teacher and students of a job, each in the ways that are compared."""
    job = work.job
    plan, stage = job.preset.evaluation, job.preset.distill
    found = []
    if job.teacher is not None:
        guidance = Guidance(stage.text_guidance, stage.audio_guidance)
        teacher = _frozen(work, job.teacher)
        name = f"teacher, {plan.teacher_steps} steps"
        found += [
            Candidate(name, teacher, Method(plan.teacher_steps, guidance), plan.long_chunks),
            Candidate("teacher, 4 steps, not distilled", teacher, Method(4), plan.short_chunks),
        ]
    for run in job.students:
        student = _frozen(work, run)
        found += [
            Candidate(f"{run.name}, 4 steps", student, Method(4), plan.long_chunks),
            Candidate(f"{run.name}, 2 steps", student, Method(2), plan.short_chunks),
        ]
    return found


def _frozen(work: Work, run: Path) -> Callable[[], DiT]:
    """A function that loads a run's weights."""
    path, device = weights_of(run), work.ranks.device
    dtype = "bfloat16" if choose_dtype(work.job.base.precision.dit, device) == torch.bfloat16 else "float32"
    settings = work.job.preset.network.model_copy(update={"compile": False, "dtype": dtype})

    def load() -> DiT:
        dit = work.build()
        networks.place(dit, settings, device, 1, trained=False)
        networks.read_weights(dit, open_files([path]))
        return dit

    return load


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
