"""A job of `flashtalk train` in a worker's hands: what all tasks need."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Generator

from flashtalk_cli.distill import memory, networks, shards
from flashtalk_cli.distill.adapt import passes
from flashtalk_cli.distill.config import Adapt, Distill, Optimiser, TrainJob
from flashtalk_cli.distill.encoding import origin_of
from flashtalk_cli.distill.export import weights_of
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.distill.pool import Pool, open_pool
from flashtalk_cli.distill.trainer import Course
from flashtalk_cli.events import Emitter
from flashtalk_cli.models.attention import choose_kernel
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.folder import ModelFolder, find
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

    @property
    def shards(self) -> int:
        """Parts that a network is cut into, one a rank."""
        return self.ranks.size if self.job.preset.network.shard else 1

    def place(self, dit: DiT, *, trained: bool) -> None:
        """Give it memory."""
        networks.place(dit, self.job.preset.network, self.ranks.device, self.shards, trained=trained)

    def trained(self, dit: DiT, optimiser: Optimiser, steps: int, ema_decay: float | None) -> Trained:
        """A placed network as one that learns; gradients of whole copies on several ranks are averaged."""
        copies = self.ranks.size // self.shards
        return Trained(dit, optimiser, steps, ema_decay, self.ranks.mean if copies > 1 else None)

    def check_memory(self, what: str, stage: Adapt | Distill, *, trained: int, frozen: int) -> None:
        """Refuse a run that this machine cannot hold. One of the trained networks keeps its average."""
        base = self.job.base
        _, per_pass = passes(stage.batch, stage.micro_batch, self.ranks.size)
        need = memory.need_of(
            self.params,
            self.job.preset.network,
            base.canvas,
            base.sampling,
            per_pass,
            self.shards,
            trained=trained,
            frozen=frozen,
            averaged=1,
        )
        memory.check(need, self.ranks.device, self.shards, what)

    def open_pool(self) -> Pool:
        """The examples, held to the model and the preset."""
        job, sampling = self.job, self.job.base.sampling
        assert job.data is not None
        found = shards.read_origin(job.data)
        wanted = origin_of(self.folder, job.base, job.preset.data.shard_clips, found.prompts)
        shards.check_origin(job.data, found, wanted)
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
            identity=self.identity(),
        )

    def identity(self) -> dict[str, str]:
        """What a run is of: with anything else of these, another run begins."""
        job = self.job
        assert job.data is not None
        found = {
            "stage": job.task,
            "network's sizes": str(self.params),
            "encoders": str(sorted(shards.read_origin(job.data).encoders.items())),
        }
        if job.task == "adapt":
            return found | {"optimiser": f"muon={job.preset.adapt.optimiser.muon}"}
        assert job.teacher is not None
        n_clips = shards.read_origin(job.data).clips  # people who wait to be gone on with have numbers
        return found | {"teacher": shards.fingerprint([weights_of(job.teacher)]), "clips": str(n_clips)}
