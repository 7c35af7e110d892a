"""What `flashtalk bench` tells programs, whose last line is always how it ended (contract), and what it refuses:
a report of another form, options that do nothing, a machine that others use."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flashtalk_cli import events
from flashtalk_cli.bench.form import fault
from flashtalk_cli.cli.app import run
from flashtalk_cli.errors import InputError, UsageError
from tests.bench_reports import make


def write(path: Path, report: dict[str, Any]) -> str:
    path.write_text(json.dumps(report))
    return str(path)


def told(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, list[events.Event], str]:
    """Of `flashtalk bench ... --json`: its exit code, its lines, and what is on stderr."""
    code = run(["bench", *words, "--json"])
    shown = capsys.readouterr()
    return code, [json.loads(line) for line in shown.out.splitlines()], shown.err


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, Any]], None]:
    """Replaces the worker by one that reports what it is given."""

    def replace(report: dict[str, Any]) -> None:
        def measure(job: Any, on_event: Callable[[events.Event], None], **_: Any) -> int:
            on_event(events.event("report", data=report))
            on_event(events.event("done", path=None, frames=None, elapsed_s=1.0))
            return 0

        monkeypatch.setattr("flashtalk_cli.launch.run", measure)

    return replace


def of_mini(**options: Any) -> dict[str, Any]:
    """A report that the embedded model's preset can be compared with."""
    from flashtalk_cli import presets
    from flashtalk_cli.bench.report import setting_of

    found = make(**options)
    found["setting"] = {**found["setting"], **setting_of(presets.load("mini", []))}
    return found


# Programs


def test_a_program_is_told_the_comparison_and_how_it_ended(tmp_path, capsys):
    old, same = write(tmp_path / "old.json", make(seed=1)), write(tmp_path / "same.json", make(seed=2))
    slow = write(tmp_path / "slow.json", make(seed=3, slower=1.1))
    code, (report, done), err = told(capsys, "--from", same, "--compare", old)
    assert (code, report["event"], done["event"], err) == (0, "report", "done", "")
    rows = {row["name"]: row for row in report["comparison"]["rows"]}
    assert {name for name, row in rows.items() if row["decides"]} == {
        *("chunk", "mean chunk", "first frame", "peak memory"),
    }
    assert rows["chunk"]["verdict"] == "same"
    assert report["data"] == json.loads(Path(same).read_text())
    code, (report, error), err = told(capsys, "--from", slow, "--compare", old)
    assert (code, error["event"], error["type"], error["exit_code"]) == (10, "error", "SlowerError", 10)
    assert report["comparison"]["rows"][0]["verdict"] == "slower"
    assert error["message"] in err
    code, (report, done), _ = told(capsys, "--from", slow, "-o", str(tmp_path / "copy.json"))
    assert (code, report["comparison"], done["path"]) == (0, None, str(tmp_path / "copy.json"))


def test_a_program_is_told_that_measuring_was_slower_and_not_that_it_is_done(tmp_path, capsys, worker):
    old = write(tmp_path / "old.json", of_mini(seed=1))
    for slower, code, last in ((1.0, 0, "done"), (1.1, 10, "error")):
        worker(of_mini(seed=2, slower=slower))
        ended, lines, _ = told(capsys, "--compare", old)
        assert ended == code
        kinds = [line["event"] for line in lines if line["event"] in ("report", *events.LAST)]
        assert kinds == ["report", last]


def test_what_was_measured_is_shown_also_where_it_cannot_be_compared(tmp_path, capsys, worker):
    """Of another device, which is known only afterwards."""
    new = of_mini()
    new["fingerprint"] = {**new["fingerprint"], "device": "Other"}
    worker(new)
    old = write(tmp_path / "old.json", of_mini())
    code, lines, _ = told(capsys, "--compare", old)
    assert code == InputError.exit_code
    assert [line["event"] for line in lines[-2:]] == ["report", "error"]
    assert (lines[-2]["data"], lines[-2]["comparison"]) == (new, None)
    assert run(["bench", "--compare", old]) == InputError.exit_code
    shown = capsys.readouterr()
    assert "frames a second with everything counted" in shown.out
    assert "cannot be compared" in shown.err


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        (["--compare", "nope.json"], "InputError"),
        (["--from", "nope.json"], "InputError"),
        (["--from", "OLD", "--html", "no/page.html", "--also", "nope.json"], "InputError"),
        (["--from", "OLD", "-o", "no/report.json"], "OutputError"),
        (["--from", "OLD", "--chunks", "3"], "UsageError"),
        (["--from", "OLD", "--also", "OLD"], "UsageError"),
        (["--preset", "nope"], "ConfigError"),
    ],
)
def test_a_program_is_told_what_is_wrong_with_its_command_line(tmp_path, capsys, monkeypatch, words, kind):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "OLD", make())
    code, [error], err = told(capsys, *words)
    assert (error["event"], error["type"], error["exit_code"]) == ("error", kind, code)
    assert err.count("\n") == 1


# What is refused, and warned of


def test_other_reports_without_a_page_are_refused(tmp_path, capsys):
    old = write(tmp_path / "old.json", make())
    assert run(["bench", "--from", old, "--also", old]) == UsageError.exit_code
    assert "give --html FILE" in capsys.readouterr().err
    assert run(["bench", "--from", old, "--also", old, "--html", str(tmp_path / "page.html")]) == 0


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda r: r.pop("memory"), "memory is missing"),
        (lambda r: r["chunk"].pop("samples_s"), "chunk.samples_s is missing"),
        (lambda r: r["chunk"].update(samples_s=[]), "chunk.samples_s is no list with something in it"),
        (lambda r: r["chunk"].update(p50_s="fast"), "chunk.p50_s is not a number"),
        (lambda r: r["chunk"].update(p50_s=float("nan")), "chunk.p50_s is not a number"),
        (lambda r: r["setting"].update(precision="fp8"), "setting.precision has no keys"),
        (lambda r: r["parts"][1].pop("lane"), "parts[1].lane is missing"),
        (lambda r: r["parts"][3]["each"][2].pop("p95_s"), "parts[3].each[2].p95_s is missing"),
        (lambda r: r["live"].update(holds=1), "live.holds is not true or false"),
        (lambda r: r["fingerprint"].update(commit=7), "fingerprint.commit is not a text or null"),
    ],
)
@pytest.mark.parametrize("option", ["--from", "--compare", "--also"])
def test_a_report_of_another_form_is_refused_in_one_line(tmp_path, capsys, option, change, said):
    report = copy.deepcopy(make())
    change(report)
    bad, good = write(tmp_path / "bad.json", report), write(tmp_path / "good.json", make())
    words = [] if option == "--from" else ["--from", good]
    assert run(["bench", *words, option, bad, "--html", str(tmp_path / "page.html")]) == InputError.exit_code
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert said in err


def test_a_report_that_says_less_than_it_may_is_whole():
    report = copy.deepcopy(make())
    report["fingerprint"].update(commit=None, driver=None, cuda=None, device_memory_gib=None)
    report["more"] = 1
    assert fault(report) is None


@pytest.mark.parametrize(("used_percent", "warned"), [(3.0, False), (60.0, True)])
def test_that_others_use_the_machine_is_said(capsys, monkeypatch, worker, used_percent, warned):
    monkeypatch.setattr("psutil.cpu_percent", lambda interval: used_percent)
    worker(of_mini())
    _, lines, _ = told(capsys)
    said = [line["message"] for line in lines if line["event"] == "warning"]
    assert any("other programs use 60 %" in text for text in said) == warned
