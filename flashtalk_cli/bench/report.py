"""What a bench measured, as plain data: the JSON that `flashtalk bench -o` writes, version SCHEMA.

    schema       version of this form
    fingerprint  what the figures hold for: fingerprint.py
    setting      preset, model, weights, canvas, steps, fps, chunk_frames, new_frames, precision, ranks, split,
                 attention, dit_dtype, vae_dtype, engine, offload, codec, chunks, warmup_chunks
    speed        fps: frames over seconds, from the first timed chunk's sound to its last frame encoded, all
                 counted; realtime: fps over the video's; drain_s: what the encoder still had to do at the end
    chunk        a chunk, from its sound being there to its last frame handed to the encoder and its motion
                 frames encoded: a spread
    parts        of each part: name, lane, count in a chunk, its time in a chunk (a spread), share of the
                 chunk's lane; of "step" each one also alone
    once         seconds of what happens once: process, inputs, load, prepare, warm_up (what the first chunks
                 took beyond a median one: compilation, capture, tuning)
    live         audio_fill_s and lookahead_s (not measured: from the preset), first_frame (a spread, from the
                 sound being there to the first frame in host memory), start_warm_s, start_cold_s, holds,
                 spare_s (of a chunk's duration, at p95)
    work         of each stage with much arithmetic: tflop, seconds, tflops a rank, ceiling_tflops, share
    ceilings     measured rates of single operations: kind, what, tflops
    ranks        of each rank: rank, host, peak_memory_gib, peak_reserved_gib, exchange (a spread of a chunk's
                 exchanges and waiting for peers), exchanges (their count)
    timeline     parts of the chunk nearest to the median: name, lane, start_s, end_s
    memory       peak_gib of the rank that took most

A spread is p50_s, p95_s, p99_s, mean_s and the samples_s they are made of, warm-up left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from flashtalk_cli.bench.parts import HOST, MAIN, Part
from flashtalk_cli.bench.work import Work
from flashtalk_cli.config import BenchJob, Preset

SCHEMA = 1
EACH = "step"  # the part whose occurrences are also told one by one
COPY = "to host"  # frames are there when this is over, on whichever stream it runs
MICRO = 6  # digits after the point of a second


@dataclass(frozen=True)
class Measured:
    """Everything that a run found out, before it is summed up."""

    chunks: Sequence[Sequence[Part]]  # of all chunks, those to warm up included
    loop_s: float  # from the first timed chunk's start to the last one's
    drain_s: float
    once: Mapping[str, float]
    ranks: Sequence[Mapping[str, Any]]
    work: Mapping[str, Work]
    ceilings: Sequence[Mapping[str, Any]]
    fingerprint: Mapping[str, Any]
    setting: Mapping[str, Any]


def build(job: BenchJob, found: Measured) -> dict[str, Any]:
    """The whole report."""
    chunk_s = [_end_s(chunk) for chunk in found.chunks]
    timed, timed_s = found.chunks[job.warmup_chunks :], chunk_s[job.warmup_chunks :]
    sampling = job.preset.sampling
    fps = len(timed) * sampling.new_frames / (found.loop_s + timed_s[-1] + found.drain_s)
    chunk = spread(timed_s)
    warm_up_s = sum(max(0.0, took_s - chunk["p50_s"]) for took_s in chunk_s[: job.warmup_chunks])
    once = {**found.once, "warm_up": warm_up_s}
    parts = _parts(timed)
    median = min(range(len(timed)), key=lambda i: abs(timed_s[i] - chunk["p50_s"]))
    return {
        "schema": SCHEMA,
        "fingerprint": dict(found.fingerprint),
        "setting": {
            **setting_of(job.preset),
            "chunks": job.chunks,
            "warmup_chunks": job.warmup_chunks,
            **found.setting,
        },
        "speed": {"fps": fps, "realtime": fps / sampling.fps, "drain_s": found.drain_s},
        "chunk": chunk,
        "parts": parts,
        "once": once,
        "live": _live(job, found, once, chunk),
        "work": _rates(found, parts),
        "ceilings": [dict(probe) for probe in found.ceilings],
        "ranks": [_rank(rank) for rank in found.ranks],
        "memory": {"peak_gib": max(rank["peak_memory_gib"] for rank in found.ranks)},
        "timeline": [
            {**part._asdict(), "start_s": round(part.start_s, MICRO), "end_s": round(part.end_s, MICRO)}
            for part in (part.later(_ahead_s(timed[median])) for part in timed[median])
        ],
    }


def _ahead_s(chunk: Sequence[Part]) -> float:
    """How long before the main lane had it a chunk was begun: its sound is encoded beside the chunk before."""
    return max(0.0, *(-part.start_s for part in chunk))


def _end_s(chunk: Sequence[Part]) -> float:
    """When a chunk is over: what runs beside it for the next one is not waited for."""
    return max(part.end_s for part in chunk if part.lane in (MAIN, HOST) or part.name == COPY)


def spread(samples_s: Sequence[float]) -> dict[str, Any]:
    """Median, tail and mean of some durations, and the durations."""
    p50, p95, p99 = np.percentile(samples_s, [50, 95, 99])
    return {
        "p50_s": float(p50),
        "p95_s": float(p95),
        "p99_s": float(p99),
        "mean_s": float(np.mean(samples_s)),
        "samples_s": [round(float(sample_s), MICRO) for sample_s in samples_s],
    }


def setting_of(preset: Preset) -> dict[str, Any]:
    """What a preset says of what is measured, before anything is."""
    sampling, canvas, compute = preset.sampling, preset.canvas, preset.compute
    return {
        "preset": preset.name,
        "model": preset.model.name,
        "weights": preset.model.weights,
        "canvas": f"{canvas.width_px}x{canvas.height_px}",
        "steps": sampling.steps,
        "fps": sampling.fps,
        "chunk_frames": sampling.chunk_frames,
        "new_frames": sampling.new_frames,
        "precision": preset.precision.model_dump(),
        "engine": compute.engine,
        "offload": compute.offload,
        "codec": preset.encoding.codec,
    }


def _parts(chunks: Sequence[Sequence[Part]]) -> list[dict[str, Any]]:
    """Each part's time in a chunk, in the order of their first appearance."""
    keys = list(dict.fromkeys((part.name, part.lane) for chunk in chunks for part in chunk))
    main_s = sum(part.duration_s for chunk in chunks for part in chunk if part.lane == MAIN)
    found = []
    for name, lane in keys:
        each = [[p.duration_s for p in chunk if (p.name, p.lane) == (name, lane)] for chunk in chunks]
        sums_s = [sum(durations) for durations in each]
        row = {
            "name": name,
            "lane": lane,
            "count": max(map(len, each)),
            "time": spread(sums_s),
            "share": sum(sums_s) / main_s if lane == MAIN else None,
        }
        if name == EACH:
            row["each"] = [spread(durations) for durations in zip(*each, strict=True)]
        found.append(row)
    return found


def _live(
    job: BenchJob, found: Measured, once: Mapping[str, float], chunk: Mapping[str, Any]
) -> dict[str, Any]:
    """What somebody who speaks into it would meet."""
    fill_s, lookahead_s = job.preset.sampling.new_s, job.preset.live.lookahead_s
    first_s = [_ahead_s(parts) + next(p.end_s for p in parts if p.name == COPY) for parts in found.chunks]
    first = spread(first_s[job.warmup_chunks :])
    loading_s = sum(once[name] for name in ("process", "inputs", "load", "prepare"))
    heard_s = fill_s + lookahead_s
    return {
        "audio_fill_s": fill_s,
        "lookahead_s": lookahead_s,
        "first_frame": first,
        "start_warm_s": heard_s + first["p50_s"],
        "start_cold_s": max(heard_s, loading_s) + first_s[0],
        "holds": chunk["p95_s"] <= fill_s,
        "spare_s": fill_s - chunk["p95_s"],
    }


def _rates(found: Measured, parts: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What each stage achieves on one rank, and what it could at the measured rates."""
    rates = {probe["kind"]: probe["tflops"] for probe in found.ceilings}
    rows = []
    for name, work in found.work.items():
        part = next((part for part in parts if part["name"] == name), None)
        if part is None:
            continue
        took_s = float(
            np.median([one["p50_s"] for one in part["each"]] if name == EACH else part["time"]["p50_s"])
        )
        own = {kind: getattr(work, kind) * 1e-12 / len(found.ranks) for kind in rates}
        tflop, least_s = sum(own.values()), sum(own[kind] / rates[kind] for kind in rates)
        rows.append(
            {
                "stage": name,
                "tflop": work.total * 1e-12,
                "seconds": took_s,
                "tflops": tflop / took_s,
                "ceiling_tflops": tflop / least_s,
                "share": least_s / took_s,
            }
        )
    return rows


def _rank(rank: Mapping[str, Any]) -> dict[str, Any]:
    own = {key: rank[key] for key in ("rank", "host", "peak_memory_gib", "peak_reserved_gib", "exchanges")}
    return {**own, "exchange": spread(rank["exchange_s"])}
