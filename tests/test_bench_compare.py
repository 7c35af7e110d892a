"""When a bench counts as slower, with invented chunks whose truth is known: no false alarm from noise, from
neighbours that are alike, or from another day; no slow-down of a tenth that goes unnoticed. And what the
command line makes of it: exit codes, and one line for what cannot be compared."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashtalk_cli.bench.compare import DRIFT, _student, compare, ratio_bounds
from flashtalk_cli.bench.form import read
from flashtalk_cli.bench.report import spread
from flashtalk_cli.cli.app import run
from flashtalk_cli.errors import InputError
from tests.bench_reports import KEPT, REPORTS, make


def chunks(rng: np.random.Generator, count: int, noise: float, alike: float) -> np.ndarray:
    """Durations around 1 s, log-normal, each like the one before to a degree; now and then one is late."""
    z = np.zeros(count)
    for i in range(count):
        z[i] = alike * z[i - 1] + rng.standard_normal() * (1 - alike**2) ** 0.5
    late = np.where(rng.random(count) < 0.05, 0.3, 0.0)
    return np.exp(noise * z + late)


def alarms(
    slower: float, *, trials: int = 100, count: int = 20, noise: float = 0.02, alike: float = 0.5
) -> float:
    """The share of pairs of runs, the second of which is so much slower, that are told apart by median or mean."""
    rng = np.random.default_rng(11)
    found = 0
    for _ in range(trials):
        days = np.exp(0.005 * rng.standard_normal(2))  # no two runs are quite alike
        old, new = (chunks(rng, count, noise, alike) * day for day in days)
        found += any(ratio_bounds(old, new * slower, mean=mean)[0] > 1 + DRIFT for mean in (False, True))
    return found / trials


@pytest.mark.parametrize(("noise", "at_most"), [(0.002, 0.02), (0.02, 0.02), (0.2, 0.03)])
@pytest.mark.parametrize("count", [3, 20])
def test_no_alarm_without_a_cause(noise, at_most, count):
    assert alarms(1.0, noise=noise, count=count) <= at_most


def test_no_alarm_for_what_two_runs_of_one_program_differ_by():
    assert alarms(1.02) <= 0.02


@pytest.mark.parametrize("noise", [0.002, 0.02])
def test_a_tenth_slower_is_noticed(noise):
    assert alarms(1.10, noise=noise) >= 0.95


def every_third_late(report: dict[str, Any]) -> dict[str, Any]:
    """The same with every third chunk taking twice as long; what is made of its chunks is made anew."""
    samples_s = [sample_s * (1 + (i % 3 == 0)) for i, sample_s in enumerate(report["chunk"]["samples_s"])]
    return {**report, "chunk": spread(samples_s)}


def test_a_run_of_which_every_third_chunk_is_late_is_slower_though_its_median_is_the_same():
    """A real report, so changed: 27.5 frames a second become 20.7, which is live no longer."""
    old = read(KEPT / "h200x2-fp8-attention.json")
    for late, report in ((every_third_late(old), old), (every_third_late(make(seed=2)), make(seed=1))):
        found = compare(report, late)
        verdicts = {row.name: row.verdict for row in found.rows if row.decides}
        assert verdicts["chunk"] == "same"
        assert [row.name for row in found.regressions] == ["mean chunk"]
        assert compare(late, report).rows[1].verdict == "faster"


@pytest.mark.parametrize("path", REPORTS, ids=lambda path: path.stem)
def test_the_halves_of_a_real_run_raise_no_alarm(path):
    """What one program does in the same minute, on real machines, quiet and shared."""
    report = read(path)
    samples_s = report["chunk"]["samples_s"]
    middle = len(samples_s) // 2
    halves = [{**report, "chunk": spread(half)} for half in (samples_s[:middle], samples_s[middle:])]
    assert not compare(*halves).regressions
    assert not compare(*reversed(halves)).regressions


def test_a_tenth_faster_is_noticed_too():
    old, new = make(seed=1), make(seed=2, slower=0.9)
    assert compare(old, new).rows[0].verdict == "faster"
    assert not compare(old, new).regressions


def test_a_slow_down_within_noise_is_said_to_be_unclear():
    row = compare(make(chunks=5, noise=0.2, seed=1), make(chunks=5, noise=0.2, seed=1, slower=1.1)).rows[0]
    assert row.verdict == "unclear"


def test_how_small_a_slow_down_would_have_been_noticed_is_told():
    quiet = compare(make(seed=1, noise=0.002), make(seed=2, noise=0.002)).noticed
    loud = compare(make(seed=1, noise=0.2), make(seed=2, noise=0.2)).noticed
    assert DRIFT < quiet < 0.05
    assert loud > 0.2
    slower = make(seed=3, noise=0.002, slower=1 + quiet)
    assert compare(make(seed=1, noise=0.002), slower).regressions


def test_memory_that_grows_is_a_regression():
    old, new = make(), make()
    new["memory"]["peak_gib"] *= 1.1
    assert [row.name for row in compare(old, new).regressions] == ["peak memory"]


def test_a_single_part_does_not_decide():
    """Ten parts at 99 % each would cry wolf once in ten runs."""
    old, new = make(), make()
    part = next(part for part in new["parts"] if part["name"] == "motion")
    part["time"]["samples_s"] = [2 * sample_s for sample_s in part["time"]["samples_s"]]
    found = compare(old, new)
    assert next(row for row in found.rows if row.name == "motion").verdict == "slower"
    assert not found.regressions


def test_student_quantiles_are_those_of_tables():
    for freedom, expected in ((4, 4.604), (10, 3.169), (38, 2.712)):
        assert _student(0.995, freedom) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r["setting"].update(steps=2), "steps is 4 in the old report and 2 now"),
        (lambda r: r["setting"].update(ranks=2), "ranks is 1 in the old report and 2 now"),
        (lambda r: r["fingerprint"].update(device="Other"), "the new one of Other"),
        (lambda r: r["chunk"].update(samples_s=[1.0, 1.0]), "has 2 chunks"),
    ],
)
def test_what_cannot_be_compared_is_refused(change, said):
    new = make()
    change(new)
    with pytest.raises(InputError, match=said):
        compare(make(), new)


def test_other_versions_of_programs_are_told_and_compared():
    new = make()
    new["fingerprint"] = {**new["fingerprint"], "torch": "10.0", "date": "later"}
    assert compare(make(), new).changed == ("torch: 9.9 -> 10.0",)


def test_other_settings_are_told_one_a_line_and_compared():
    new = make()
    new["setting"] = {**new["setting"], "codec": "av1", "precision": {"dit": "fp8", "vae": "bfloat16"}}
    new["setting"] |= {"attention": "fa3-fp8", "engine": "xfuser"}
    found = compare(make(), new)
    assert set(found.settings) == {
        "codec: auto -> av1",
        "precision.dit: bfloat16 -> fp8",
        "attention: fa3 -> fa3-fp8",
        "engine: torch -> xfuser",
    }
    assert found.changed == ()
    assert compare(make(), make()).settings == ()


# The command line


def write(path, report) -> str:
    path.write_text(json.dumps(report))
    return str(path)


def test_exit_codes_of_a_comparison(tmp_path, capsys):
    old, same = write(tmp_path / "old.json", make(seed=1)), write(tmp_path / "same.json", make(seed=2))
    slow = write(tmp_path / "slow.json", make(seed=3, slower=1.1))
    assert run(["bench", "--from", same, "--compare", old]) == 0
    shown = capsys.readouterr()
    assert "would have been noticed" in " ".join(shown.out.split())
    assert shown.err == ""
    assert run(["bench", "--from", slow, "--compare", old]) == 10
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1
    assert "a regression beyond noise" in shown.err
    assert "chunk 1.1" in shown.err


def test_an_error_of_a_slower_run_names_the_settings_that_differ(tmp_path, capsys):
    new = make(seed=3, slower=1.1)
    new["setting"] = {**new["setting"], "codec": "av1"}
    old, slow = write(tmp_path / "old.json", make(seed=1)), write(tmp_path / "slow.json", new)
    assert run(["bench", "--from", slow, "--compare", old]) == 10
    shown = capsys.readouterr()
    assert "differs: codec: auto -> av1" in shown.out
    assert shown.err.endswith("; differs: codec: auto -> av1\n")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[]", "is no bench report of version 1"),
        ('{"schema": 2}', "its schema is 2"),
        ('{"schema": 1}', "is no whole report of flashtalk bench (fingerprint is missing); measure again"),
        (None, "cannot be read"),
    ],
)
def test_what_is_no_report_is_said_in_one_line_before_anything_is_measured(tmp_path, capsys, text, said):
    path = tmp_path / "old.json"
    if text is not None:
        path.write_text(text)
    assert run(["bench", "--compare", str(path)]) == InputError.exit_code
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    with pytest.raises(InputError):
        read(path)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--preset mini", "preset is soulx-14b in the old report and mini now"),
        ("--weights random", "weights is released in the old report and random now"),
        ("--set canvas.width_px=512", "canvas is 448x768 in the old report and 512x768 now"),
        ("--set sampling.motion_frames=9", "new_frames is 28 in the old report and 24 now"),
        ("--set compute.offload=true", "offload is False in the old report and True now"),
        ("--gpus 2", "ranks is 1 in the old report and 2 now"),
        ("--chunks 2", "the new report has 2 chunks"),
        ("--chunks 3", "the old report has 2 chunks"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_measured(
    tmp_path, capsys, monkeypatch, options, said
):
    monkeypatch.setattr("flashtalk_cli.cli.bench._measure", lambda *_, **__: pytest.fail("measured"))
    old = write(tmp_path / "old.json", make(chunks=2 if "old report has" in said else 3))
    command = ["bench", "--preset", "soulx-14b", "--compare", old, *options.split()]
    assert run(command) == InputError.exit_code
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_where_nothing_can_be_written_is_said_in_one_line(tmp_path, capsys):
    old = write(tmp_path / "old.json", make())
    assert run(["bench", "--from", old, "--html", str(tmp_path / "no" / "page.html")]) == 6
    assert capsys.readouterr().err.count("\n") == 1
    began_s = time.monotonic()
    assert run(["bench", "-o", str(tmp_path / "no" / "report.json")]) == 6
    assert run(["bench", "-o", str(tmp_path)]) == 6
    assert time.monotonic() - began_s < 5, "before anything is measured"


def test_how_to_measure_is_refused_where_nothing_is_measured(tmp_path, capsys):
    old = write(tmp_path / "old.json", make())
    for words in (["--chunks", "3"], ["--gpus", "2"], ["--preset", "mini"], ["--set", "sampling.steps=2"]):
        assert run(["bench", "--from", old, *words]) == 2
        assert f"{words[0]}: --from measures nothing" in capsys.readouterr().err


def test_a_report_is_whole_or_as_it_was(tmp_path, monkeypatch):
    """Fault: a disk that fills up while a report is written leaves the one that was there."""
    old, out = write(tmp_path / "old.json", make()), tmp_path / "kept.json"
    out.write_text("before")
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "kept.json.part").symlink_to(full)
    assert run(["bench", "--from", old, "-o", str(out)]) == 6
    assert out.read_text() == "before"
    assert run(["bench", "--from", old, "-o", str(out)]) == 0
    assert json.loads(out.read_text())
