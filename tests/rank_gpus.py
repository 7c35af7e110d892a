"""What two or more GPUs must show at the 14B model's full size: `torchrun --nproc-per-node N tests/rank_gpus.py FIGURES.json`.

Each rank makes a chunk alone, and then all make it together, from the same random weights and seed:

    noise        of bfloat16: one GPU with one attention kernel, beside one GPU with another
    difference   of all GPUs together to one GPU, which may be a few times the noise
    repeated     the same seed again: to the bit

Figures are relative root mean squares. Prints its progress; exit code 1 with a line for whatever does not hold.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.config import Canvas, Sampling
from flashtalk_cli.models import weights
from flashtalk_cli.models.attention import choose_kernel
from flashtalk_cli.models.folder import resolve
from flashtalk_cli.parallel.mesh import Mesh, make_mesh
from flashtalk_cli.parallel.ranks import Ranks, join
from flashtalk_cli.parallel.split import split
from flashtalk_cli.pipeline.session import Models, begin, prepare, step

# What the difference may be: so many times the noise, or this if that is less. Matrix products of another
# count of rows round otherwise (in bfloat16, two layers on a CPU already differ by 0.006 in velocity); that
# no halo and no token is wrong is held in float32, by tests/test_parallel.py.
TIMES_NOISE = 3.0
FLOOR = {"velocity": 0.02, "video": 0.06, "motion": 0.06}
PARTS = tuple(FLOOR)
WARM, CHUNKS = 1, 2


def say(ranks: Ranks, text: str) -> None:
    if ranks.leads:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def apart(found: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference, relative to that of what is expected."""
    return ((found - expected).float().square().mean() / expected.float().square().mean()).sqrt().item()


@torch.no_grad()
def velocity(models: Models, conditions: Any, windows: Tensor) -> Tensor:
    """One step of the DiT from fixed noise: differences before chunks amplify them."""
    sampling = models.sampling
    draw = torch.Generator("cpu").manual_seed(1)
    shape = (1, 16, sampling.chunk_latents, *conditions.y.shape[-2:])
    x = torch.randn(shape, generator=draw).to(models.device)
    t = torch.full((1,), 750.0, device=models.device)
    heard = models.dit.hear(windows.to(models.device))
    return models.dit(x, t, conditions.y, conditions.context, heard, models.sequence).cpu()


def chunk(models: Models) -> dict[str, Any]:
    """One chunk's results on the CPU, its milliseconds, and the peak of this GPU's memory in GiB."""
    dit, canvas, sampling = models.dit.params, Canvas(), models.sampling
    draw = torch.Generator("cpu").manual_seed(0)
    picture = torch.rand(3, canvas.height_px, canvas.width_px, generator=draw) * 2 - 1
    text = torch.randn(20, dit.text_dim, generator=draw)
    image = torch.randn(1, 257, dit.image_dim, generator=draw)
    shape = (1, sampling.chunk_frames, dit.audio_window, dit.audio_layers, dit.audio_dim)
    windows = torch.randn(shape, generator=draw)
    torch.cuda.reset_peak_memory_stats()
    conditions = prepare(models, picture, text, image)
    found: dict[str, Any] = {"velocity": velocity(models, conditions, windows)}
    for _ in range(WARM + CHUNKS):
        torch.cuda.synchronize()
        began_s = time.perf_counter()
        pieces, videos = step(models, conditions, begin(conditions, 42), windows), []
        while True:
            try:
                videos.append(models.tiles.join(next(pieces)))
            except StopIteration as end:
                found["motion"] = end.value.motion.cpu()
                break
        torch.cuda.synchronize()
        found["ms"] = (time.perf_counter() - began_s) * 1000
    found["video"] = torch.cat(videos, 2).cpu()
    found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found


def measure(ranks: Ranks) -> dict[str, Any]:
    """All figures; the same call on every rank."""
    device, sampling = ranks.device, Sampling()
    say(ranks, "random 14B weights")
    folder = resolve("soulx-14b", random=True)
    first, second = (choose_kernel(name, device, torch.bfloat16) for name in ("cudnn", "sdpa"))
    dit = weights.load_dit(folder, device, torch.bfloat16, kernel=first, random=True)
    vae = weights.load_vae(folder, device, torch.bfloat16, random=True)
    alone = Models(dit, vae, sampling, device, Mesh().sequence)
    say(ranks, "one GPU alone")
    one = chunk(alone)
    say(ranks, f"one GPU: {one['ms']:.0f} ms; another attention kernel")
    dit.kernel = second
    other = chunk(alone)
    dit.kernel = first
    canvas = Canvas()
    mesh = make_mesh(
        ranks, split(ranks.size, dit.params.num_heads, canvas.height_px // 8, canvas.width_px // 8)
    )
    say(ranks, f"{ranks.size} GPUs together")
    shared = replace(alone, sequence=mesh.sequence, tiles=mesh.tiles)
    together = chunk(shared)
    again = chunk(shared)
    say(ranks, f"{ranks.size} GPUs: {together['ms']:.0f} ms")
    return {
        "finite": all(bool(together[part].isfinite().all()) for part in PARTS),
        "noise": {part: apart(other[part], one[part]) for part in PARTS},
        "difference": {part: apart(together[part], one[part]) for part in PARTS},
        "repeated": all(torch.equal(together[part], again[part]) for part in PARTS),
        "ms": {"one": one["ms"], "together": together["ms"]},
        "peak_gib": {"one": one["peak_gib"], "together": together["peak_gib"]},
    }


def failures(figures: dict[str, Any]) -> list[str]:
    """What does not hold, a line each."""
    found = [] if figures["finite"] else ["a result is not finite"]
    found += [] if figures["repeated"] else ["the same seed gave another video"]
    for part in PARTS:
        limit = max(FLOOR[part], TIMES_NOISE * figures["noise"][part])
        if not figures["difference"][part] <= limit:
            found.append(f"{part}: {figures['difference'][part]:.2e} from one GPU; allowed {limit:.2e}")
    return found


def main(path: Path) -> int:
    ranks = join(torch.device("cuda"))
    figures = measure(ranks)
    each = ranks.to_leader(figures["peak_gib"])
    failed: list[str] = []
    if ranks.leads:
        failed = failures(figures)
        name = torch.cuda.get_device_name()
        figures |= {
            "peak_gib": each,
            "gpu": name,
            "gpus": ranks.size,
            "torch": torch.__version__,
            "failed": failed,
        }
        path.write_text(json.dumps(figures, indent=1) + "\n")
        say(ranks, json.dumps(figures))
        for line in failed:
            say(ranks, f"FAILED {line}")
    failed = ranks.from_leader(failed if ranks.leads else None)
    ranks.leave()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
