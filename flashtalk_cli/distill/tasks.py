"""The tasks of `flashtalk train`, each from a job to its end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Generator

from flashtalk_cli.distill import memory, networks, shards
from flashtalk_cli.distill.adapt import AdaptStage
from flashtalk_cli.distill.config import Optimiser, TrainJob
from flashtalk_cli.distill.dmd import DistillStage
from flashtalk_cli.distill.encoding import Encoders, origin_of
from flashtalk_cli.distill.export import export, note_of, weights_of
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Pool, open_pool
from flashtalk_cli.distill.trainer import Course, train
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, InputError, OutputError
from flashtalk_cli.events import Emitter
from flashtalk_cli.models.attention import choose_kernel
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.folder import ModelFolder, find
from flashtalk_cli.models.tensors import open_files
from flashtalk_cli.models.weights import load_vae
from flashtalk_cli.parallel.ranks import Ranks


@dataclass(frozen=True)
class Work:
    """A job, who does it, and how it speaks."""

    job: TrainJob
    ranks: Ranks
    emitter: Emitter
    stop: threading.Event

    @cached_property
    def folder(self) -> ModelFolder:
        """The model whose encoders are used; it may be without a diffusion transformer."""
        choice = self.job.base.model
        return find(choice.name, choice.speech_encoder)

    @cached_property
    def params(self) -> DitParams:
        """Sizes of the diffusion transformer."""
        return networks.params_of(self.folder.config())

    def say(self, name: str, detail: str) -> None:
        """Report that a part of the work begins."""
        self.emitter.emit("stage", name=name, detail=detail)

    def generators(self) -> tuple[Generator, Generator]:
        """One that all ranks share, on the CPU, and one of this rank's own, on its device."""
        seed = self.job.preset.seed
        shared = torch.Generator("cpu").manual_seed(seed)
        own = torch.Generator(self.ranks.device).manual_seed(seed + 1_000_003 * (1 + self.ranks.rank))
        return shared, own

    def build(self) -> DiT:
        """A diffusion transformer without memory, computing as the preset says."""
        network = self.job.preset.network
        name = self.job.base.compute.attention
        if name == "auto":
            name = "sdpa"  # torch chooses among those that have a backward pass
        dtype = networks.DTYPES[network.dtype]
        return networks.build(self.params, network, choose_kernel(name, self.ranks.device, dtype))

    def place(self, dit: DiT, *, trained: bool) -> None:
        """Give it memory."""
        networks.place(dit, self.job.preset.network, self.ranks.device, self.ranks.size, trained=trained)

    def check_memory(self, what: str, micro_batch: int, *, trained: int, frozen: int, averaged: int) -> None:
        """Refuse a run that this machine cannot hold."""
        base = self.job.base
        need = memory.need_of(
            self.params,
            self.job.preset.network,
            base.canvas,
            base.sampling,
            micro_batch,
            self.ranks.size,
            trained=trained,
            frozen=frozen,
            averaged=averaged,
        )
        memory.check(need, self.ranks, what)

    def open_pool(self) -> Pool:
        """The examples, held to the model and the preset."""
        job, sampling = self.job, self.job.base.sampling
        assert job.data is not None
        found = shards.read_origin(job.data)
        shards.check_origin(job.data, found, origin_of(self.folder, job.base, found.prompts))
        pool = open_pool(
            job.data, sampling.motion_frames, sampling.new_frames, self.ranks.device, job.preset.data.resident
        )
        where = self.ranks.device if pool.resident else "disk"
        self.say("examples", f"{len(pool)} windows of {found.clips} clips, on {where}")
        return pool

    def course(self) -> Course:
        """How the trainer is to run."""
        job = self.job
        return Course(
            out=job.out,
            keeping=job.preset.keeping,
            ranks=self.ranks,
            emitter=self.emitter,
            stop=self.stop,
            max_seconds=job.max_seconds,
            resume=job.resume,
            note={"stage": job.task, "preset": job.preset.name, "settings": job.preset.model_dump_json()},
        )


def run(work: Work) -> int:
    """Do the job's task; the exit code."""
    _fast_matrices(work.ranks.device)
    found: dict[str, Callable[[Work], int]] = {
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


def make_people(work: Work) -> int:
    """`train people`: shards of generated people, going on where an earlier run ended."""
    from flashtalk_cli.distill.people_data import Cast, make_people

    job, base = work.job, work.job.base
    assert job.source is not None
    started_s = time.monotonic()
    encoders = Encoders(work.folder, base, work.ranks.device)
    cast = Cast.of(job.preset, base, job.preset.data.clip_chunks, job.held_out)
    origin, first, number = _going_on(work, encoders, [base.sampling.prompt])
    workers = max(0, min(24, (os.cpu_count() or 1) - 2))
    work.say("people", f"clips {first} to {job.clips} of {cast.n_frames} frames, {workers} planners")
    made = first
    size_px = (cast.height_px, cast.width_px)
    parts = (
        make_people(encoders, job.preset, job.source, cast, first, job.clips, workers)
        if first < job.clips
        else ()
    )
    for tensors, done in parts:
        shards.write_shard(job.out, size_px, number, tensors)
        number, made = number + 1, made + done.clips
        origin = replace_counts(origin, made, base.sampling.fps, cast.n_frames)
        shards.write_origin(job.out, origin)
        rate = (made - first) / max(1e-9, time.monotonic() - started_s)
        work.emitter.emit(
            "progress", name="people", done=made, total=job.clips, unit=f"clips, {rate:.1f} a second"
        )
        if work.stop.is_set():
            work.emitter.emit("interrupted", path=job.out)
            return INTERRUPTED_EXIT_CODE
        if job.max_seconds is not None and time.monotonic() - started_s > job.max_seconds:
            break
    work.emitter.emit("done", path=job.out, elapsed_s=time.monotonic() - started_s)
    return 0


def replace_counts(origin: shards.Origin, clips: int, fps: int, n_frames: int) -> shards.Origin:
    """The same with how much there is by now."""
    return origin.model_copy(update={"clips": clips, "seconds": clips * n_frames / fps})


def _going_on(work: Work, encoders: Encoders, prompts: list[str]) -> tuple[shards.Origin, int, int]:
    """What the folder says of itself, clips that are there, and the next shard's number."""
    out = work.job.out
    origin = encoders.origin(prompts)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{out} cannot be made ({error.strerror}): choose another") from None
    if (out / shards.INDEX).exists():
        found = shards.read_origin(out)
        shards.check_origin(out, found, origin)
        if found.prompts != prompts:
            raise InputError(
                f"{out} was made with the prompts {found.prompts}, now they are {prompts}: choose another"
            )
        paths = [path for some in shards.shard_paths(out).values() for path in some]
        return found, sum(map(shards.clips_in, paths)), len(paths)
    shards.write_texts(out, encoders.encode_prompts(prompts))
    return origin, 0, 0


def adapt(work: Work) -> int:
    """`train adapt`: stage 1."""
    preset = work.job.preset
    work.check_memory("stage 1", preset.adapt.micro_batch, trained=1, frozen=0, averaged=1)
    pool = work.open_pool()
    dit = work.build()
    work.place(dit, trained=True)
    trained = Trained(dit, preset.adapt.optimiser, preset.adapt.steps, preset.adapt.ema_decay)
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
    work.check_memory("stage 2", stage.micro_batch, trained=2, frozen=1, averaged=1)
    pool = work.open_pool()
    pool.check_chains(work.job.data, stage.chunks)
    path = weights_of(work.job.teacher)

    def network(*, trained: bool) -> DiT:
        dit = work.build()
        work.place(dit, trained=trained)
        networks.read_weights(dit, open_files([path]))
        return dit

    def learning(optimiser: Optimiser, steps: int, ema_decay: float | None) -> Trained:
        found = Trained(network(trained=True), optimiser, steps, ema_decay)
        found.adopt()
        return found

    n_critic = stage.critic_warmup + stage.critic_updates * stage.steps
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
    """`train eval`: teacher and students on held-out people."""
    from flashtalk_cli.distill import report
    from flashtalk_cli.distill.drive import Method
    from flashtalk_cli.distill.evaluate import Bench, Candidate, Interrupted, of_truth
    from flashtalk_cli.distill.losses import Guidance
    from flashtalk_cli.distill.measures import Reference
    from flashtalk_cli.distill.panel import draw_panel

    job, device = work.job, work.ranks.device
    plan, stage = job.preset.evaluation, job.preset.distill
    assert job.source is not None
    started_s = time.monotonic()
    encoders = Encoders(work.folder, job.base, device)
    work.say("panel", f"{plan.people} held-out people, {plan.long_chunks} chunks each")
    panel = draw_panel(encoders, job.source, plan)
    vae = load_vae(work.folder, device, networks.DTYPES[job.base.precision.vae])

    def network(run: Path) -> Callable[[], DiT]:
        path = weights_of(run)

        def load() -> DiT:
            dit = work.build()
            settings = job.preset.network.model_copy(
                update={"compile": False, "dtype": "bfloat16" if device.type == "cuda" else "float32"}
            )
            networks.place(dit, settings, device, 1, trained=False)
            networks.read_weights(dit, open_files([path]))
            return dit

        return load

    candidates = []
    if job.teacher is not None:
        steered = Method(plan.teacher_steps, Guidance(stage.text_guidance, stage.audio_guidance))
        teacher = network(job.teacher)
        candidates += [
            Candidate(f"teacher, {plan.teacher_steps} steps", teacher, steered, plan.long_chunks),
            Candidate("teacher, 4 steps, not distilled", teacher, Method(4), plan.short_chunks),
        ]
    for run in job.students:
        student = network(run)
        candidates += [
            Candidate(f"{run.name}, 4 steps", student, Method(4), plan.long_chunks),
            Candidate(f"{run.name}, 2 steps", student, Method(2), plan.short_chunks),
        ]
    if not candidates:
        raise InputError("nothing to evaluate: give --teacher, --student, or both")

    def told(name: str, done: int, total: int) -> None:
        work.emitter.emit("progress", name="eval", done=done, total=total, unit=f"chunks of {name}")

    reference = Reference.of(panel.pictures, encoders.image, device)
    bench = Bench(panel, vae, reference, plan, work.stop, told)
    results = []
    try:
        for candidate in candidates:
            work.say("eval", candidate.name)
            results.append(bench.run(candidate))
    except Interrupted:
        work.emitter.emit("interrupted", path=None)
        return INTERRUPTED_EXIT_CODE
    truth = of_truth(panel, job.base.sampling.fps)
    about = {"preset": job.preset.name, "evaluation": plan.model_dump(), "device": device_name(device)}
    path = report.write(job.out, results, truth, panel, about)
    work.emitter.emit("done", path=path, elapsed_s=time.monotonic() - started_s)
    return 0


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
