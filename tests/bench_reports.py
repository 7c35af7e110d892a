"""Reports of benches that never ran, on a GPU that does not exist, and where those of real ones are; for tests.

`python -m tests.bench_reports` writes the golden files anew, after a change of the form that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from flashtalk_cli.bench import report
from flashtalk_cli.bench.page import page
from flashtalk_cli.bench.parts import HOST, MAIN, Part
from flashtalk_cli.bench.work import Work
from flashtalk_cli.config import BenchJob, ModelChoice, Preset, Speech

GOLDEN = Path(__file__).parent / "golden" / "bench_form"
KEPT = Path(__file__).parent / "golden" / "bench"  # of real machines
REPORTS = sorted(path for path in KEPT.glob("*.json") if "schema" in json.loads(path.read_text()))
SPEECH = Speech(samples_path=Path("/none"), n_samples=16_000, loudness_lufs=None)
FINGERPRINT = {
    "date": "2031-05-06T07:08:09+00:00",
    "flashtalk": "0.0.0",
    "commit": "0123456789ab",
    "device": "Imaginary <GPU> & Co",
    "device_memory_gib": 100.0,
    "driver": "1.2.3",
    "processor": "Imaginary CPU",
    "cores": 8,
    "threads": 4,
    "system": "Linux 0",
    "python": "3.0",
    "torch": "9.9",
    "cuda": "99.0",
    "cudnn": 1,
    "ffmpeg": "5",
}


def chunk(ranks: int, slower: float) -> list[Part]:
    """A chunk's parts, on three lanes: times of one rank, divided where ranks share the work."""
    found: list[Part] = []
    now_s = 0.0

    def then(name: str, seconds: float) -> None:
        nonlocal now_s
        found.append(Part(name, MAIN, now_s, now_s + seconds * slower))
        now_s += seconds * slower

    then("speech", 0.012)
    then("keys", 0.003)
    for _ in range(4):
        then("noise", 0.001)
        then("step", 0.7 / ranks)
    found.append(Part("prime", "side 1", 0.1, 0.1 + 0.05 / ranks))
    then("noise", 0.001)
    for _ in range(7):
        then("decode", 0.028 / ranks)
        then("colour", 0.001 / ranks)
        then("bytes", 0.0004)
        found.append(Part("to host", "side 2", now_s, now_s + 0.0006))
        found.append(Part("deliver", HOST, now_s + 0.0007, now_s + 0.0011))
    then("motion", 0.03 / ranks)
    return found


def job(chunks: int) -> BenchJob:
    """A bench of so many chunks after two to warm up; the preset's values are the program's own defaults."""
    preset = Preset(name="soulx-14b", description="", model=ModelChoice(name="soulx-14b"))
    return BenchJob(preset=preset, picture=Path("/none.png"), speech=SPEECH, chunks=chunks)


def make(
    ranks: int = 1,
    chunks: int = 20,
    *,
    noise: float = 0.01,
    slower: float = 1.0,
    seed: int = 0,
    alike: float = 0.0,
) -> dict[str, Any]:
    """A report. Chunks vary by `noise`, the share `alike` of which a chunk has from the one before."""
    generator = np.random.default_rng(seed)
    deviations = [0.0]
    for _ in range(chunks + 1):
        fresh = generator.standard_normal() * (1 - alike**2) ** 0.5
        deviations.append(alike * deviations[-1] + fresh)
    made = [chunk(ranks, slower * float(np.exp(noise * z))) for z in deviations]
    ends_s = [max(part.end_s for part in parts) for parts in made]
    measured = report.Measured(
        chunks=made,
        loop_s=sum(ends_s[2:-1]),
        drain_s=0.05,
        once={"process": 5.0, "inputs": 3.0, "load": 20.0, "prepare": 0.5},
        ranks=[
            {
                "rank": rank,
                "host": "here",
                "peak_memory_gib": 40.0 + rank,
                "peak_reserved_gib": 44.0,
                "exchange_s": [0.06 * (ranks > 1)] * chunks,
                "exchanges": 340 * (ranks > 1),
            }
            for rank in range(ranks)
        ],
        work={
            "step": Work(gemm=340e12, attention=128e12),
            "prime": Work(convolution=15e12),
            "decode": Work(convolution=82e12),
            "motion": Work(convolution=9e12),
        },
        ceilings=[
            {"kind": "gemm", "what": "a x b", "tflops": 700.0},
            {"kind": "attention", "what": "40 heads", "tflops": 650.0},
            {"kind": "convolution", "what": "96 of 448 x 768", "tflops": 500.0},
        ],
        fingerprint=FINGERPRINT,
        setting={
            "ranks": ranks,
            "split": None,
            "attention": "fa3",
            "dit_dtype": "bfloat16",
            "vae_dtype": "bfloat16",
        },
    )
    return report.build(job(chunks), measured)


def table_text(made: dict[str, Any]) -> str:
    """The table of a report as a terminal of 100 columns shows it, without colours."""
    import io

    from rich.console import Console

    from flashtalk_cli.bench.table import tables

    written = io.StringIO()
    Console(file=written, width=100, color_system=None).print(tables(made))
    return "\n".join(line.rstrip() for line in written.getvalue().splitlines()) + "\n"


def golden() -> dict[str, str]:
    """File name: text, of everything that is kept."""
    one, two = make(1, 4), make(2, 4)
    return {
        "report.json": json.dumps(one, indent=1) + "\n",
        "table.txt": table_text(two),
        "page.html": page(two, [one]),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(parents=True, exist_ok=True)
    for name, text in golden().items():
        (GOLDEN / name).write_text(text, encoding="utf-8")
