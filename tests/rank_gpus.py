"""What GPUs together must show at the 14B model's full size, for scripts/gpu-check:

    torchrun --nproc-per-node N tests/rank_gpus.py FIGURES.json SECONDS [PART ...]

Parts, in this order; figures are written after each, so that what comes later can spoil nothing:

    alone      a chunk by each GPU alone, with one attention kernel and with another: the noise of bfloat16
    together   the same chunk by all: its difference from one GPU's, the same seed twice, time, peak of memory
    exchange   one DiT step, and how much of it goes by in exchanges; the all-to-alls and halos one by one
    trace      the longest kernels of such a step, in FIGURES.trace.txt
    graph      steps recorded as CUDA graphs, collectives included
    fp8        the same in eight bits, attention included where it can be: time, recorded, and a trace in FIGURES.trace-fp8.txt
    parity     float32: small networks over NCCL equal one GPU's, for all splits

Random weights, drawn alike on every GPU. Differences are relative root mean squares. Limits are those that
follow from arithmetic; what has none yet is printed as measured. After SECONDS every rank says where it
stands and ends. On a CPU (`--standalone` torchrun, with SMALL=1) it shows that the program itself is sound.
"""

from __future__ import annotations

import faulthandler
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import rank_checks
import torch
from attending import attend
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from flashtalk_cli.bench.timers import ExchangeTimer
from flashtalk_cli.config import Canvas, Sampling
from flashtalk_cli.models import weights
from flashtalk_cli.models.attention import SDPA, AttentionKernel, choose_kernel
from flashtalk_cli.models.device import choose_device
from flashtalk_cli.models.dit import DiT
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.models.vae import Vae
from flashtalk_cli.parallel.mesh import Mesh, make_mesh
from flashtalk_cli.parallel.pulse import Verdict
from flashtalk_cli.parallel.ranks import Ranks, join
from flashtalk_cli.parallel.sequence import UlyssesRing
from flashtalk_cli.parallel.shelf import Shelf, shelf_of
from flashtalk_cli.parallel.split import split
from flashtalk_cli.pipeline.session import Models, begin, hear, prepare, step
from flashtalk_cli.pipeline.streams import Graphs

SMALL = os.environ.get("SMALL") == "1"  # networks of a few kB, to try this program without a GPU
RESULTS = ("velocity", "video", "motion")
UNRELATED = 1.4  # of two results that have nothing to do with each other: the square root of 2
FAR = 0.5  # a wrong token, halo or head is far more than this in velocity; rounding is far less
EXACT = 1e-3  # of float32, largest difference to largest value: other algorithms for other sizes
Figures = dict[str, Any]


@dataclass
class Check:
    """All that the parts share."""

    ranks: Ranks
    path: Path
    figures: Figures = field(default_factory=dict)
    failed: list[str] = field(default_factory=list)
    one: Figures = field(default_factory=dict)

    def __post_init__(self) -> None:
        device = self.ranks.device
        dtype = torch.float32 if SMALL else torch.bfloat16
        if SMALL:
            self.canvas, self.sampling = Canvas(width_px=96, height_px=64), Sampling(steps=2, chunk_frames=13)
            dit, vae = rank_checks.tiny_dit(4, device), rank_checks.tiny_vae(device)
            self.kernels: list[AttentionKernel] = [SDPA, SDPA]
        else:
            self.canvas, self.sampling = Canvas(), Sampling()
            folder = resolve("soulx-14b", None, random=True)
            first = choose_kernel("auto", device, dtype)
            other = "sdpa" if first.name == "cudnn" else "cudnn"
            self.kernels = [first, choose_kernel(other, device, dtype)]
            dit = weights.load_dit(folder, device, dtype, kernel=self.kernels[0], random=True)
            vae = weights.load_vae(folder, device, dtype, random=True)
        self.dit: DiT = dit
        self.vae: Vae = vae
        height, width = self.canvas.height_px // 8, self.canvas.width_px // 8
        self.mesh = make_mesh(self.ranks, split(self.ranks.size, dit.params.num_heads, height, width))
        self.alone = Models(dit, vae, self.sampling, device, Mesh().sequence)
        self.shared = replace(self.alone, sequence=self.mesh.sequence, tiles=self.mesh.tiles)

    def say(self, text: str) -> None:
        if self.ranks.leads:
            print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)

    def held(self, holds: bool, text: str) -> None:
        """Say what has a limit, and remember what is beyond it."""
        self.say(f"{'ok' if holds else 'FAILED'}: {text}")
        if not holds:
            self.failed.append(text)

    def measured(self, text: str) -> None:
        self.say(f"measured, no limit set yet: {text}")

    def write(self) -> None:
        if self.ranks.leads:
            self.path.write_text(json.dumps({**self.figures, "failed": self.failed}, indent=1) + "\n")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def milliseconds(check: Check, run: Callable[[], object], repeats: int = 10, warm: int = 2) -> float:
    """Median of the time between two moments at which the device has nothing left to do."""
    times = []
    for _ in range(warm + repeats):
        synchronize(check.ranks.device)
        begun_s = time.perf_counter()
        run()
        synchronize(check.ranks.device)
        times.append(1000 * (time.perf_counter() - begun_s))
    return statistics.median(times[warm:])


def apart(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return ((found - expected).float().square().mean() / expected.float().square().mean()).sqrt().item()


@dataclass
class Given:
    """What a chunk is made from, the same on every rank."""

    conditions: Any
    windows: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, check: Check, models: Models) -> Given:
        p, draw = check.dit.params, torch.Generator("cpu").manual_seed(0)
        picture = 0.1 * torch.rand(3, check.canvas.height_px, check.canvas.width_px, generator=draw)
        text = torch.randn(min(20, p.text_len), p.text_dim, generator=draw)
        image = torch.randn(1, 257, p.image_dim, generator=draw)
        shape = (1, check.sampling.chunk_frames, p.audio_window, p.audio_layers, p.audio_dim)
        return cls(prepare(models, picture, text, image), torch.randn(shape, generator=draw))


@torch.no_grad()
def one_step(check: Check, models: Models, given: Given) -> Callable[[], Tensor]:
    """One step of the DiT from fixed noise: differences before chunks amplify them."""
    draw, y, device = torch.Generator("cpu").manual_seed(1), given.conditions.y, models.device
    x = torch.randn(1, 16, *y.shape[2:], generator=draw).to(device)
    t = torch.full((1,), 750.0, device=device)
    heard = hear(models, given.windows.to(device), given.conditions.picture_latent)

    @torch.no_grad()
    def run() -> Tensor:
        return models.dit(x, t, y, given.conditions.context, heard, models.sequence)

    return run


def chunks(check: Check, models: Models, count: int) -> Figures:
    """A chunk's results on the CPU, milliseconds of each of `count`, and the peak of this GPU's memory in GiB."""
    device = check.ranks.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    given = Given.of(check, models)
    found: Figures = {"velocity": one_step(check, models, given)().cpu(), "ms": []}
    for _ in range(count):
        synchronize(device)
        began_s = time.perf_counter()
        pieces, videos = step(models, given.conditions, begin(given.conditions, 42), given.windows), []
        while True:
            try:
                videos.append(models.tiles.join(next(pieces)))
            except StopIteration as end:
                found["motion"] = end.value.motion.cpu()
                break
        synchronize(device)
        found["ms"].append(round((time.perf_counter() - began_s) * 1000, 1))
    found["video"] = torch.cat(videos, 2).cpu()
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else 0.0
    return found


def alone(check: Check) -> None:
    """Every GPU by itself."""
    check.one = chunks(check, check.alone, 2)
    check.dit.kernel = check.kernels[1]
    other = chunks(check, check.alone, 1)
    check.dit.kernel = check.kernels[0]
    noise = {part: apart(other[part], check.one[part]) for part in RESULTS}
    peaks = check.ranks.to_leader(check.one["peak_gib"])
    check.figures["alone"] = {"ms": check.one["ms"], "noise": noise, "peak_gib": peaks}
    check.held(all(check.one[part].isfinite().all() for part in RESULTS), "one GPU's results are finite")
    check.measured(f"one GPU: {check.one['ms']} ms a chunk, peak {max(peaks or [0]):.1f} GiB; noise {noise}")


def together(check: Check) -> None:
    """All of them, in the same number formats."""
    found = chunks(check, check.shared, 3)
    again = chunks(check, check.shared, 1)
    same = all(torch.equal(found[part], again[part]) for part in RESULTS)
    sums = check.ranks.to_leader([found[part].double().sum().item() for part in RESULTS])
    peaks = check.ranks.to_leader(found["peak_gib"])
    figures: Figures = {"ms": found["ms"], "repeated": same, "peak_gib": peaks}
    check.figures["together"] = figures
    check.held(all(found[part].isfinite().all() for part in RESULTS), "results are finite")
    check.held(same, "the same seed gives the same bits")
    check.held(all(each == sums[0] for each in sums), "all ranks hold the same results")
    check.measured(f"{check.ranks.size} GPUs: {found['ms']} ms a chunk")
    check.measured("peak of each GPU: " + ", ".join(f"{gib:.1f} GiB" for gib in peaks))
    if check.one:
        difference = {part: apart(found[part], check.one[part]) for part in RESULTS}
        figures["difference"] = difference
        figures["gain"] = min(check.one["ms"]) / min(found["ms"])
        text = f"velocity {difference['velocity']:.2e} from one GPU's, relative (unrelated: {UNRELATED})"
        check.held(difference["velocity"] < FAR, text)
        check.measured(f"difference from one GPU {difference}; {figures['gain']:.2f} times as fast")


@contextmanager
def timed_exchanges(check: Check) -> Iterator[ExchangeTimer]:
    timer = ExchangeTimer(check.ranks.device)
    timer.start()
    check.ranks.traffic.timer = timer
    try:
        yield timer
    finally:
        check.ranks.traffic.timer = None


@torch.no_grad()
def exchange(check: Check) -> None:
    """What a step and what a decoded latent spend in exchanges, and what these cost one by one."""
    run = one_step(check, check.shared, Given.of(check, check.shared))
    run()
    step_ms = milliseconds(check, run, 3, 1)
    began_s = time.perf_counter()
    run()
    host_ms = 1000 * (time.perf_counter() - began_s)  # what launching takes, if the device is slower
    with timed_exchanges(check) as timer:
        run()
    figures: Figures = {
        "step_ms": step_ms,
        "host_ms": host_ms,
        "exchange_ms": timer.totals_s()[0] * 1000,
        "exchanges": timer.counts()[0],
    }
    check.figures["exchange"] = figures
    share = figures["exchange_ms"] / step_ms
    check.measured(
        f"a step {step_ms:.1f} ms, launched in {host_ms:.1f} ms; {figures['exchanges']} exchanges "
        f"{figures['exchange_ms']:.1f} ms, {share:.0%}"
    )
    sequence, p = check.mesh.sequence, check.dit.params
    assert isinstance(sequence, UlyssesRing)
    t, h, w = check.sampling.chunk_latents, check.canvas.height_px // 16, check.canvas.width_px // 16
    length, device = t * h * w, check.ranks.device
    whole = torch.randn(3, 1, length, p.num_heads, p.head_dim, device=device).to(check.dit.dtype)
    parts = [sequence.shard(x, 1) for x in whole]
    everyone, own = check.ranks.everyone, parts[0].flatten(2)
    packed = torch.cat(parts, 2).flatten().unflatten(0, (everyone.size, -1)).clone()
    shelves = {"by a collective": Shelf(everyone), "": shelf_of(everyone, reached=check.ranks.reached)}

    def kept(shelf: Shelf) -> None:
        shelf.share(shelf.room((*own.shape[:2], 2, own.shape[2]), own.dtype, device))

    shape = (1, 4, check.canvas.height_px // 2, check.canvas.width_px, 96)
    tile = torch.randn(shape, device=device).to(own.dtype)
    heads = [x[:, :, : p.num_heads // check.ranks.size] for x in whole]  # as much work as one rank has
    each = {
        "all-to-all of q, k, v": lambda: everyone.all_to_all(packed),
        "all-to-all of the result": lambda: everyone.all_to_all(packed[:, : own.numel() // everyone.size]),
        **{f"keys and values {how or 'to all'}": partial(kept, shelf) for how, shelf in shelves.items()},
        "attention with its exchanges, parts copied": lambda: attend(
            sequence, check.dit.kernel, *parts, length
        ),
        "attention without": lambda: check.dit.kernel(*heads),
        "halo of 4 frames, 96 channels": lambda: check.mesh.tiles.halo(tile, 1, 1),
        "the padding alone": lambda: torch.nn.functional.pad(tile, (0, 0, 1, 1, 1, 1)),
    }
    for name, work in each.items():
        figures[name] = milliseconds(check, work)
        check.measured(f"{name} {figures[name]:.3f} ms")


def graph(check: Check, name: str = "graph") -> None:
    """Steps as CUDA graphs: NCCL's kernels are recorded like any other."""
    if check.ranks.device.type != "cuda":
        return
    plain = chunks(check, check.shared, 1)
    graphs = Graphs(check.ranks.traffic.count, check.ranks.any)
    given = Given.of(check, check.shared)
    models = replace(check.shared, graphs=graphs)
    times = []
    for _ in range(3):  # the first step runs as it is, the second is recorded
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        pieces, videos = step(models, given.conditions, begin(given.conditions, 42), given.windows), []
        videos = [models.tiles.join(piece) for piece in pieces]
        torch.cuda.synchronize()
        times.append(round((time.perf_counter() - began_s) * 1000, 1))
    works = [held.graph is not None for held in graphs._recordings.values()]
    same = torch.equal(torch.cat(videos, 2).cpu(), plain["video"])
    check.figures[name] = {"ms": times, "plain_ms": plain["ms"], "recorded": works, "same": same}
    check.held(same, f"{name}: a recorded step gives the same bits")
    check.measured(f"{name}: with graphs {times} ms a chunk, without {plain['ms']}; recorded: {works}")
    graphs.clear()  # before the communicator that they use is ended


@torch.no_grad()
def trace(check: Check, name: str = "trace") -> None:
    """The longest kernels of a step of rank 0, beside the figures in a file of their own."""
    run = one_step(check, check.shared, Given.of(check, check.shared))
    run()
    on_gpu = check.ranks.device.type == "cuda"
    kinds, spent = (ProfilerActivity.CUDA, "device") if on_gpu else (ProfilerActivity.CPU, "cpu")
    synchronize(check.ranks.device)
    with profile(activities=[kinds]) as found:
        run()
        synchronize(check.ranks.device)
    rows = [(e.key, e.count, getattr(e, f"self_{spent}_time_total") / 1e3) for e in found.key_averages()]
    rows = sorted((row for row in rows if row[2] > 0), key=lambda row: -row[2])
    lines = [f"{ms:10.3f} ms {n:6} x {1e3 * ms / n:9.1f} us  {name[:150]}" for name, n, ms in rows[:40]]
    total_ms, count = sum(ms for *_, ms in rows), sum(n for _, n, _ in rows)
    check.figures[name] = {"device_ms": total_ms, "kernels": count}
    check.measured(
        f"{name}: a step of rank 0: {total_ms:.1f} ms in {count} kernels, exchanges' waiting counted"
    )
    if check.ranks.leads:
        check.path.with_suffix(f".{name}.txt").write_text("\n".join(lines) + "\n")


def fp8(check: Check) -> None:
    """Time in eight bits, attention included where it can be, and a step's kernels; from here on the weights are no others."""
    if check.ranks.device.type != "cuda" or SMALL:
        return
    check.dit.arrange(True)
    if find_spec("fa3_fwd_interface"):
        check.dit.kernel = choose_kernel("fa3-fp8", check.ranks.device, check.dit.dtype)
    torch.cuda.empty_cache()
    found = chunks(check, check.shared, 3)
    peaks = check.ranks.to_leader(found["peak_gib"])
    check.figures["fp8"] = {"ms": found["ms"], "peak_gib": peaks}
    check.held(all(found[part].isfinite().all() for part in RESULTS), "fp8: results are finite")
    check.measured(f"fp8: {found['ms']} ms a chunk, peak {max(peaks or [0]):.1f} GiB")
    graph(check, "graph-fp8")
    trace(check, "trace-fp8")


def parity(check: Check) -> None:
    """Float32 over this run's collectives, against this rank alone."""
    torch.backends.cudnn.allow_tf32 = False
    device, made = check.ranks.device, {}

    def mesh_of(wanted: Any) -> Mesh:
        if wanted not in made:
            made[wanted] = make_mesh(check.ranks, wanted)
        return made[wanted]

    one = rank_checks.parts(1, device, lambda _: Mesh(), 3)
    found = rank_checks.parts(check.ranks.size, device, mesh_of, 3)
    worst: Figures = {}
    for name, x in found.items():
        expected = one[name.partition(" ulysses")[0]]
        if x.dtype == torch.uint8:
            error = float((x.int() - expected.int()).abs().max())
            check.held(error <= 1, f"frames of {name} differ by {error:.0f} levels; allowed 1")
            continue
        error = float((x - expected).abs().max() / expected.abs().max())
        kind = name.split()[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
    each = check.ranks.to_leader(worst)
    check.figures["parity"] = each
    for kind, error in worst.items():
        check.held(error < EXACT, f"float32 {kind}: {error:.1e} from one GPU's; allowed {EXACT:.0e}")


PARTS = (alone, together, exchange, trace, graph, fp8, parity)


def end(verdict: Verdict) -> None:
    print(f"cannot go on: {verdict.text}", file=sys.stderr, flush=True)
    faulthandler.dump_traceback()
    os._exit(1)


def main(path: Path, limit_s: float, names: list[str]) -> int:
    faulthandler.dump_traceback_later(limit_s, exit=True)
    ranks = join(choose_device("auto"))
    ranks.pulse.start(end)
    began_s = time.monotonic()
    try:
        check = Check(ranks, path)
        check.figures |= {"gpus": ranks.size, "torch": torch.__version__}
        if ranks.device.type == "cuda":
            check.figures |= {"gpu": torch.cuda.get_device_name(), "nccl": torch.cuda.nccl.version()}
        check.say(f"networks after {time.monotonic() - began_s:.1f} s")
        for part in PARTS:
            if not names or part.__name__ in names:
                check.say(f"-- {part.__name__}")
                part(check)
                check.write()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        ranks.pulse.end(f"rank {ranks.rank} raised an error, which is above")
        os._exit(1)
    failed = ranks.from_leader(check.failed if ranks.leads else None)
    faulthandler.cancel_dump_traceback_later()
    ranks.leave()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]))
