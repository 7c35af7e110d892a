"""What a bench measured, as plain data for JSON and tables.

    {"machine": {...}, "preset": NAME, "canvas": "WxH", "precision": {...}, "chunks": n, "new_frames": 28,
     "parts": {NAME: {"p50_s": , "p95_s": , "p99_s": }}, "chunk": the same of the whole chunk,
     "fps": , "realtime": , "load_s": , "prepare_s": , "peak_memory_gib": of the rank that took most,
     "ranks": [{"rank": , "host": , "peak_memory_gib": , "exchange": the spread of a chunk's exchanges}]}

A chunk's time is from its sound being there to its last frame being bytes in host memory, the
motion frames for the next one included: everything but ffmpeg.
"""

from __future__ import annotations

import platform
import socket
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from flashtalk_cli import __version__
from flashtalk_cli.config import BenchJob


def spread(durations_s: Sequence[float]) -> dict[str, float]:
    """Median and tail of some durations."""
    p50, p95, p99 = np.percentile(durations_s, [50, 95, 99])
    return {"p50_s": float(p50), "p95_s": float(p95), "p99_s": float(p99)}


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures hold for."""
    return {
        "flashtalk": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "threads": torch.get_num_threads(),
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def of_rank(job: BenchJob, device: torch.device, rank: int, exchange_s: Sequence[float]) -> dict[str, Any]:
    """What one rank adds to the report: its memory, and of each chunk the seconds in exchanges with others."""
    peak_bytes = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _peak_host_bytes()
    return {
        "rank": rank,
        "host": socket.gethostname(),
        "peak_memory_gib": peak_bytes / 2**30,
        "exchange": spread(exchange_s[job.warmup_chunks :]),
    }


def report(
    job: BenchJob,
    device: torch.device,
    parts: dict[str, list[float]],
    once: dict[str, float],
    ranks: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """The whole report.

    Args:
        job: what was measured.
        device: of rank 0.
        parts: durations of each part of a chunk, on rank 0.
        once: what happens once a run.
        ranks: what `of_rank` gave on each.
    """
    parts = {name: durations[job.warmup_chunks :] for name, durations in parts.items()}
    chunk_s = [sum(of_chunk) for of_chunk in zip(*parts.values(), strict=True)]
    sampling, canvas = job.preset.sampling, job.preset.canvas
    fps = sampling.new_frames / float(np.mean(chunk_s))
    return {
        "machine": machine(device),
        "preset": job.preset.name,
        "weights": job.preset.model.weights,
        "canvas": f"{canvas.width_px}x{canvas.height_px}",
        "precision": job.preset.precision.model_dump(),
        "steps": sampling.steps,
        "chunks": len(chunk_s),
        "new_frames": sampling.new_frames,
        "parts": {name: spread(durations) for name, durations in parts.items()},
        "chunk": spread(chunk_s),
        "fps": fps,
        "realtime": fps / sampling.fps,
        **once,
        "peak_memory_gib": max(rank["peak_memory_gib"] for rank in ranks),
        "ranks": list(ranks),
    }


def _peak_host_bytes() -> int:
    import resource
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
