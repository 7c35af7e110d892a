"""The bench itself: chunks of a video that nobody sees, made as a render makes them, and timed."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.bench import report
from flashtalk_cli.bench.ceiling import Probe, probe_dit, probe_vae, tokens_of
from flashtalk_cli.bench.fingerprint import fingerprint
from flashtalk_cli.bench.sink import NullSink
from flashtalk_cli.bench.timers import ExchangeTimer, Timer
from flashtalk_cli.bench.work import Work, dit_step, vae_decode, vae_encode
from flashtalk_cli.config import BenchJob
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE
from flashtalk_cli.models.vae import FRAMES_PER_LATENT, STRIDE_PX
from flashtalk_cli.pipeline.delivery import Delivery
from flashtalk_cli.pipeline.session import Conditions, Models, State, begin, prepare, step, to_bytes
from flashtalk_cli.rendering import Worker


@dataclass
class Once:
    """What happens once a run, in seconds, in order."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, name: str, device: torch.device) -> Iterator[None]:
        """Time what is done inside, the device's work included."""
        begun_s = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[name] = time.perf_counter() - begun_s


def bench(worker: Worker, job: BenchJob, stop: threading.Event) -> int:
    """Time chunks and report; the exit code."""
    once = Once({"process": max(0.0, time.time() - job.launched_unix_s)})
    began_s = time.perf_counter()
    worker.ranks.pulse.anew()
    with once.timed("inputs", worker.device):
        picture, text, image = worker.inputs()
    timer = Timer(worker.device)
    with once.timed("load", worker.device):
        models = worker.load_models()
        hear = worker.hearing(timer.mark)
    with once.timed("prepare", worker.device):
        conditions = prepare(models, picture, text, image)
    exchanges = ExchangeTimer(worker.device)
    worker.ranks.traffic.timer = exchanges
    drain_s = run_chunks(worker, job, models, conditions, hear, timer, stop)
    worker.ranks.traffic.timer = None
    if drain_s is None:
        worker.emitter.emit("interrupted", path=None, frames=0)
        return INTERRUPTED_EXIT_CODE
    parts = timer.chunks()
    each = worker.ranks.to_leader(of_rank(worker, exchanges, job.warmup_chunks))
    worker.emitter.emit("stage", name="ceilings", detail="what this machine's arithmetic can reach")
    with worker.ranks.pulse.resting():
        probes = ceilings(worker, models)
    if worker.ranks.leads:
        found = report.Measured(
            chunks=parts,
            loop_s=timer.between_s(job.warmup_chunks),
            drain_s=drain_s,
            once=once.seconds,
            ranks=each,
            work=work_of(worker, models, conditions),
            ceilings=[probe.as_dict() for probe in probes],
            fingerprint=fingerprint(worker.device),
            setting=setting(worker, models),
        )
        worker.emitter.emit("report", data=report.build(job, found))
    worker.emitter.emit("done", path=None, frames=None, elapsed_s=time.perf_counter() - began_s)
    return 0


def run_chunks(
    worker: Worker,
    job: BenchJob,
    models: Models,
    conditions: Conditions,
    hear: Callable[[int], Tensor],
    timer: Timer,
    stop: threading.Event,
) -> float | None:
    """Make all chunks; how long the encoder still had to work afterwards, in seconds, None when asked to stop."""
    n_chunks = job.warmup_chunks + job.chunks
    exchanges = worker.ranks.traffic.timer
    assert isinstance(exchanges, ExchangeTimer)
    state = begin(conditions, job.preset.sampling.seed)
    delivery = Delivery(worker.device, timer.mark)
    worker.emitter.emit(
        "stage", name="measure", detail=f"{job.chunks} chunks after {job.warmup_chunks} to warm up"
    )
    with NullSink(job.preset) if worker.ranks.leads else nullcontext() as sink:
        for index in range(n_chunks):
            exchanges.start()
            if worker.ranks.any(stop.is_set()):
                return None
            timer.start()
            windows = hear(index)
            pieces = step(models, conditions, state, windows, timer.mark)
            state = deliver(pieces, models, delivery, sink, timer)
            worker.emitter.emit("progress", name="measure", done=index + 1, total=n_chunks, unit="chunks")
        if worker.device.type == "cuda":
            torch.cuda.synchronize(worker.device)
        made_s = time.perf_counter()
        if sink is not None:
            with worker.ranks.pulse.resting():
                sink.finish()
        return time.perf_counter() - made_s


def deliver(
    pieces: Generator[Tensor, None, State],
    models: Models,
    delivery: Delivery,
    sink: NullSink | None,
    timer: Timer,
) -> State:
    """Bring a chunk's frames to rank 0's memory and to the encoder, as they come; the state after it."""

    def hand_over(frames: Tensor | None) -> None:
        if frames is not None and sink is not None:
            begun_s = time.perf_counter()
            sink.write(frames.numpy())
            timer.mark_host("deliver", begun_s)

    while True:
        try:
            video = next(pieces)
        except StopIteration as end:
            hand_over(delivery.flush())
            return end.value
        frames = models.tiles.collect(to_bytes(video))
        timer.mark("bytes")
        hand_over(delivery.push(frames))


def of_rank(worker: Worker, exchanges: ExchangeTimer, warmup_chunks: int) -> dict[str, Any]:
    """What one rank adds to the report: its memory, and of each chunk the seconds in exchanges with others."""
    device = worker.device
    gpu = device.type == "cuda"
    return {
        "rank": worker.ranks.rank,
        "host": socket.gethostname(),
        "peak_memory_gib": (torch.cuda.max_memory_allocated(device) if gpu else _peak_host_bytes()) / 2**30,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / 2**30 if gpu else None,
        "exchange_s": exchanges.totals_s()[warmup_chunks:],
        "exchanges": max(exchanges.counts(), default=0),
    }


def ceilings(worker: Worker, models: Models) -> list[Probe]:
    """This rank's rates, for its share of the work."""
    dit, ranks, canvas = models.dit, worker.ranks.size, worker.preset.canvas
    tokens = tokens_of(dit.params, models.sampling.chunk_latents, canvas)
    vae_dtype = models.vae.conv1.weight.dtype
    eight_bits = worker.preset.precision.dit == "fp8"
    return [
        *probe_dit(dit, tokens, ranks, worker.device, eight_bits=eight_bits),
        probe_vae(models.vae.params, canvas, ranks, vae_dtype, worker.device),
    ]


def work_of(worker: Worker, models: Models, conditions: Conditions) -> dict[str, Work]:
    """The arithmetic of one occurrence, or of a chunk's together, of each part that has much of it: all ranks."""
    sampling, canvas = models.sampling, worker.preset.canvas
    height, width = canvas.height_px // STRIDE_PX, canvas.width_px // STRIDE_PX
    tokens = tokens_of(models.dit.params, sampling.chunk_latents, canvas)
    image_tokens = conditions.context.blocks[0].image.k.shape[1]
    primed = 1 + (sampling.motion_frames - 1) // FRAMES_PER_LATENT
    vae = models.vae.params
    return {
        "step": dit_step(models.dit.params, tokens, image_tokens),
        "prime": vae_decode(vae, primed, height, width),
        "decode": vae_decode(vae, sampling.chunk_latents, height, width, first=primed),
        "motion": vae_encode(vae, primed, height, width),
    }


def setting(worker: Worker, models: Models) -> dict[str, Any]:
    """What this run chose by itself: of everything else the preset says enough."""
    return {
        "ranks": worker.ranks.size,
        "split": str(worker.split()) if worker.ranks.size > 1 else None,
        "attention": models.dit.kernel.name,
        "dit_dtype": str(models.dit.dtype).removeprefix("torch."),
        "vae_dtype": str(models.vae.conv1.weight.dtype).removeprefix("torch."),
    }


def _peak_host_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
