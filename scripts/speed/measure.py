"""What the parts of scripts/gpu-speed share: sizes, the clock, and a report that survives its process.

Without a CUDA device, or with FLASHTALK_SPEED_SMALL set, everything is tiny: a rehearsal, whose figures mean nothing.
"""

from __future__ import annotations

import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flashtalk_cli.models.dit import DitParams
from flashtalk_cli.models.vae import VaeParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
SMALL = not ON_GPU or "FLASHTALK_SPEED_SMALL" in os.environ
OUT = Path(os.environ.get("OUT", "/tmp"))
BF16 = torch.bfloat16
BUSY_CYCLES = 1_000_000  # half a millisecond of an H200

DIT = (
    DitParams(dim=64, ffn_dim=128, num_heads=2, num_layers=2, text_dim=32, text_len=8, image_dim=16,
              audio_dim=16, audio_layers=2, output_dim=32, context_tokens=4, intermediate_dim=16, freq_dim=16)
    if SMALL else DitParams()
)  # fmt: skip
VAE = VaeParams(dim=8, num_res_blocks=1) if SMALL else VaeParams()
LATENTS, H, W = (3, 4, 4) if SMALL else (9, 96, 56)  # of a chunk at 448 x 768
TOKENS = LATENTS * (H // 2) * (W // 2)


def draw(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    """Standard normal numbers on the device."""
    return torch.randn(shape, device=DEVICE, dtype=torch.float32).to(dtype)


def milliseconds(run: Callable[[], object], repeats: int = 10, warm: int = 2) -> float:
    """Median time of a call on the device, which is kept busy until the call is queued: launches are not in it."""
    for _ in range(warm):
        run()
    times = []
    for _ in range(repeats):
        if not ON_GPU:
            begun_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - begun_s) * 1e3)
            continue
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(BUSY_CYCLES)
        begun.record()
        run()
        ended.record()
        ended.synchronize()
        times.append(begun.elapsed_time(ended))
    return statistics.median(times)


def difference(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours.float() - theirs.float()).norm() / theirs.float().norm())


def say(text: str) -> None:
    """To the log, at once."""
    print(text, flush=True)


class Report:
    """One part's figures in OUT/gpu-speed.json, written with every figure: what is killed has lost nothing."""

    def __init__(self, part: str) -> None:
        self._part, self._path = part, OUT / "gpu-speed.json"
        self.failed: list[str] = []

    def add(self, name: str, **figures: Any) -> None:
        """Keep figures under a name, and say them."""
        say(f"{name:44}" + "   ".join(f"{key} {_short(value)}" for key, value in figures.items()))
        data = json.loads(self._path.read_text()) if self._path.is_file() else {}
        data.setdefault(self._part, {})[name] = figures
        self._path.with_suffix(".new").write_text(json.dumps(data, indent=1))
        self._path.with_suffix(".new").replace(self._path)

    def trying(self, name: str, measure: Callable[[], None]) -> None:
        """Measure one thing; what fails is reported and holds up nothing else."""
        try:
            measure()
        except Exception as error:
            traceback.print_exc()
            self.failed.append(name)
            self.add(name, failed=f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")

    def ended(self) -> int:
        """The exit code."""
        if self.failed:
            say(f"failed: {', '.join(self.failed)}")
        return 1 if self.failed else 0


def trace(title: str, run: Callable[[], object], rows: int = 40) -> list[tuple[str, int, float]]:
    """What runs on the device in one call, longest first, appended to OUT/gpu-traces.txt: (kernel, calls, ms)."""
    from torch.profiler import ProfilerActivity, profile

    run()
    activities = [ProfilerActivity.CUDA] if ON_GPU else [ProfilerActivity.CPU]
    with profile(activities=activities) as found:
        run()
        if ON_GPU:
            torch.cuda.synchronize()
    spent = "self_device_time_total" if ON_GPU else "self_cpu_time_total"
    events = [
        (e.key, e.count, getattr(e, spent) / 1e3) for e in found.key_averages() if getattr(e, spent) > 0
    ]
    events.sort(key=lambda event: -event[2])
    total = sum(ms for _, _, ms in events)
    with open(OUT / "gpu-traces.txt", "a") as file:
        file.write(f"\n== {title}: {total:.2f} ms in {sum(n for _, n, _ in events)} kernels\n")
        file.writelines(
            f"{ms:10.3f} ms {ms / total:7.1%} {n:6} x {1e3 * ms / n:10.1f} us  {name[:150]}\n"
            for name, n, ms in events[:rows]
        )
    return events


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
