"""What was measured on real machines, kept as it came in tests/golden/bench, held to: reports have the form that
is written today and add up (contract); `bench --from`, `--html` and `--compare` take them; and README and docs/speed.md
quote them, so that a figure in README that no file has, or that another run has overtaken, fails (golden).

    h200x*-*.json             reports of `flashtalk bench -o`, named by machine and number format
    h200x2-gpu-check.json     figures of `scripts/gpu-check ranks`: several GPUs against one
    h200x1-offload.json       figures of `scripts/gpu-check offload`: one chunk
    h200x2-engines.json       what `scripts/gpu-check ranks xfuser` printed

A report put here has to be quoted: the test that fails says with which row.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtalk_cli import presets
from flashtalk_cli.bench import words
from flashtalk_cli.bench.form import read
from flashtalk_cli.bench.parts import MAIN
from flashtalk_cli.cli.app import run
from tests.bench_reports import KEPT, REPORTS, make

ROOT = Path(__file__).parent.parent
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in ("README.md", "docs/speed.md"))
BF16, FP8 = KEPT / "h200x2-bf16.json", KEPT / "h200x2-fp8-attention.json"
ALONE, ALONE_FP8 = KEPT / "h200x1-bf16.json", KEPT / "h200x1-fp8-attention.json"
PRESETS = {"h200x1-fp8": ALONE_FP8, "h200x2-bf16": BF16, "h200x2-realtime": FP8}


def ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f} ms"


def part_s(report: dict[str, Any], *names: str) -> float:
    """Median seconds of a chunk that these parts take together."""
    return sum(part["time"]["p50_s"] for part in report["parts"] if part["name"] in names)


# Reports


def unlike(wanted: Any, found: Any, place: str = "report") -> list[str]:
    """Where a report's keys and kinds of values are not the wanted ones; null stands for any value.

    A row of a list has the form of one of the wanted rows.
    """
    if wanted is None or found is None:
        return []
    if isinstance(wanted, dict) and isinstance(found, dict):
        odd = [f"{place}.{key}" for key in wanted.keys() ^ found.keys()]
        both = wanted.keys() & found.keys()
        return odd + [line for key in both for line in unlike(wanted[key], found[key], f"{place}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list):
        reasons = [[unlike(one, row, f"{place}[]") for one in wanted] for row in found]
        return [line for tried in reasons for line in min(tried, key=len)]
    kinds = [(int, float) if isinstance(value, (int, float)) else type(value) for value in (wanted, found)]
    return [] if kinds[0] == kinds[1] else [place]


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_has_the_form_that_is_written_today(path):
    """Every key of every level, none more, with values of their kinds: else it is to be measured again."""
    assert unlike(make(2, 4), read(path)) == []


def test_another_form_is_told_from_it():
    """What the test above is worth: a key less, a key more and a text for a number are found."""
    for change in ({"memory": {}}, {"more": 1}, {"chunk": {**make(2, 4)["chunk"], "p50_s": "fast"}}):
        assert unlike(make(2, 4), {**make(2, 4), **change})


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_adds_up(path):
    """Spreads are of their samples, a chunk is the sum of its parts, frames over seconds are no more than that."""
    report = read(path)
    spreads = [report["chunk"], report["live"]["first_frame"], *(part["time"] for part in report["parts"])]
    for spread in spreads:
        assert len(spread["samples_s"]) == report["setting"]["chunks"]
        assert spread["p50_s"] == pytest.approx(np.median(spread["samples_s"]), abs=1e-6)
        assert spread["p50_s"] <= spread["p95_s"] <= spread["p99_s"]
    on_main = sum(part["time"]["mean_s"] for part in report["parts"] if part["lane"] == MAIN)
    assert on_main == pytest.approx(report["chunk"]["mean_s"], rel=0.01)
    assert report["speed"]["fps"] < report["setting"]["new_frames"] / report["chunk"]["mean_s"]
    assert report["speed"]["realtime"] == pytest.approx(report["speed"]["fps"] / report["setting"]["fps"])
    assert report["live"]["first_frame"]["p50_s"] < report["chunk"]["p50_s"]
    assert report["memory"]["peak_gib"] == max(rank["peak_memory_gib"] for rank in report["ranks"])


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_a_kept_report_is_shown_drawn_and_no_slower_than_itself(path, tmp_path, capsys):
    page = tmp_path / "page.html"
    assert run(["bench", "--from", str(path), "--html", str(page), "--compare", str(path)]) == 0
    assert words.readme_line(read(path)) in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count("<svg") == (4 if "NVIDIA" in path.read_text() else 3)


def test_eight_bits_are_found_faster_and_sixteen_slower():
    """Two runs on one machine that are known to differ: which is which, and exit code 10 for the slower."""
    assert run(["bench", "--from", str(FP8), "--compare", str(BF16)]) == 0
    assert run(["bench", "--from", str(BF16), "--compare", str(FP8)]) == 10


# README


def quoted(*texts: str) -> None:
    """README or docs/speed.md has all of these, as they stand."""
    lacking = [text for text in texts if text not in README]
    assert not lacking, "README does not say: " + "; ".join(lacking)


def row_of(report: dict[str, Any]) -> str:
    chunk_s, first_s = report["chunk"]["p50_s"], report["live"]["first_frame"]["p50_s"]
    return (
        f"| {words.hardware(report)}, {words.number_format(report)} | {report['fingerprint']['date'][:10]} "
        f"| {report['speed']['fps']:.1f} "
        f"| {chunk_s:.2f} s | {first_s:.2f} s | {report['memory']['peak_gib']:.1f} GiB |"
    )


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_readme_quotes_every_report(path):
    """Frames a second, chunk, first frame and memory as a row; when it was measured, and with what."""
    report = read(path)
    seen = report["fingerprint"]
    quoted(row_of(report), f"torch {seen['torch'].partition('+')[0]}", seen["driver"] or "")


def test_readme_quotes_what_the_parts_of_a_chunk_take():
    """One and two H200s, in sixteen and in eight bits, beside the authors' program."""
    reports = [read(path) for path in (ALONE, ALONE_FP8, BF16, FP8)]

    def row(name: str, *values: str) -> str:
        return f"| {name} | {' | '.join(values)} |"

    quoted(
        row("four DiT steps", *(ms(part_s(report, "step")) for report in reports)),
        row("VAE decode, 7 new latents", *(ms(part_s(report, "decode")) for report in reports)),
        row("motion encode", *(ms(part_s(report, "motion")) for report in reports)),
        row("chunk", *(ms(report["chunk"]["p50_s"]) for report in reports)),
        row("peak memory a GPU", *(f"{report['memory']['peak_gib']:.1f} GiB" for report in reports)),
    )


def test_readme_quotes_what_offload_takes():
    """Memory and speed with blocks in host memory, and that it is what was promised."""
    found = json.loads((KEPT / "h200x1-offload.json").read_text())
    quoted(
        f"{found['peak_gb']} GB at {found['fps']:.1f} frames a second on one H200 in bfloat16",
        f"the allocator held {found['reserved_gb']} GB",
        f"a chunk in bfloat16 then took {found['chunk_ms'] / 1000:.2f} s and {found['peak_gb']} GB",
    )
    assert found["peak_gb"] <= 24


def test_readme_quotes_how_far_gpu_counts_differ():
    check = json.loads((KEPT / "h200x2-gpu-check.json").read_text())
    assert check["failed"] == []
    assert check["together"]["repeated"]
    assert check["graph"]["same"]
    assert check["graph-fp8"]["same"]
    difference, parity = check["together"]["difference"], check["parity"][0]
    kernels = check["alone"]["noise"]["velocity"]
    exchange = check["exchange"]
    quoted(
        f"| velocity of a step, 2 GPUs for 1 | {100 * difference['velocity']:.2f} % |",
        f"| velocity of a step, one GPU, cuDNN's attention for fa3's | {100 * kernels:.2f} % |",
        f"| frames of a chunk, 2 GPUs for 1 | {100 * difference['video']:.2f} % |",
        *(f"| {name} | {parity[part]:.1e} |" for name, part in FLOAT32.items()),
        f"{exchange['exchange_ms']:.1f} ms of a step's {exchange['step_ms']:.0f}",
    )


def test_readme_quotes_which_engine_is_faster():
    found = json.loads((KEPT / "h200x2-engines.json").read_text())
    each = (found[name] for name in ("heads swapped", "ring"))
    quoted(
        *(f"{row['torch_ms']} ms, against {row['xfuser_ms']} ms" for row in each), f"xfuser {found['xfuser']}"
    )


@pytest.mark.parametrize(("name", "path"), PRESETS.items(), ids=PRESETS)
def test_presets_say_what_was_measured(name, path):
    """The description has the frames a second of a report whose settings are the preset's."""
    preset, report = presets.load(name), read(path)
    setting, canvas = report["setting"], preset.canvas
    assert f"{report['speed']['fps']:.1f} frames a second measured" in preset.description
    assert setting["ranks"] == preset.compute.gpus
    assert (setting["model"], setting["steps"]) == (preset.model.name, preset.sampling.steps)
    assert setting["canvas"] == f"{canvas.width_px}x{canvas.height_px}"
    assert setting["precision"] == preset.precision.model_dump()
    assert preset.compute.attention in ("auto", setting["attention"])


FLOAT32 = {
    "float32, small DiT": "dit",
    "float32, small VAE": "vae",
    "float32, small model, whole session": "session",
}
