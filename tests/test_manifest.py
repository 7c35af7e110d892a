"""A manifest, held to: every line is looked at before anything slow; a bad one is named with its number and costs
its own clip; what would be done twice or lose a file is refused; options land in the clip (contract, fault, and
a property over what a line may be)."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from flashtalk_cli.batch.run import Record
from flashtalk_cli.cli import batch, batch_display, manifest
from flashtalk_cli.cli.app import run
from flashtalk_cli.cli.request import Request
from flashtalk_cli.config import Compute
from flashtalk_cli.errors import DeviceError, InputError, WorkerError
from flashtalk_cli.events import Event, event

GOOD = {"picture": "p.png", "speech": "s.wav", "output": "a.mp4"}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a picture of 64x96 and a sound."""
    Image.fromarray(np.zeros((96, 64, 3), np.uint8)).save(tmp_path / "p.png")
    soundfile.write(tmp_path / "s.wav", np.zeros(1600), 16_000)
    (tmp_path / "text.wav").write_text("no sound")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub.mp4").mkdir()
    return tmp_path


def request(**options: Any) -> Request:
    size, overwrite = options.pop("size", None), options.pop("overwrite", False)
    given_ = {f"--{key}": (manifest.OPTIONS[key], value) for key, value in options.items()}
    return Request(Path(), Path(), None, "mini", (), given_, size, overwrite)


def planned(place: Path, *lines: dict[str, Any] | str, common: Request | None = None) -> manifest.Plan:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (place / "clips.jsonl").write_text(text, encoding="utf-8")
    return manifest.plan(place / "clips.jsonl", common or request(), lambda done, of: None)


@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        ("{", "InputError", "not JSON"),
        ("[1]", "InputError", "not an object but [1]"),
        (
            {"picture": "p.png", "speech": "s.wav"},
            "InputError",
            'key "output" is missing; give at least picture',
        ),
        ({**GOOD, "speech": 3}, "InputError", "speech is 3; give a text"),
        ({**GOOD, "picture": ""}, "InputError", "picture is ''"),
        ({**GOOD, "sed": 3}, "InputError", "unknown key 'sed'; keys are picture, speech, output, size, seed"),
        ({**GOOD, "model": "other"}, "InputError", "unknown key 'model'"),
        ({**GOOD, "size": 64}, "InputError", "size is 64"),
        ({**GOOD, "size": "64*64"}, "ConfigError", "--size is '64*64'"),
        ({**GOOD, "seed": "x"}, "ConfigError", "seed"),
        ({**GOOD, "steps": 0}, "ConfigError", "steps"),
        ({**GOOD, "picture": "q.png"}, "InputError", "q.png: no such file"),
        ({**GOOD, "picture": "s.wav"}, "InputError", "s.wav"),
        ({**GOOD, "speech": "text.wav"}, "InputError", "text.wav: not a sound"),
        ({**GOOD, "speech": "p.png"}, "InputError", "p.png"),
        ({**GOOD, "output": "a.txt"}, "OutputError", "cannot write a '.txt' file"),
        ({**GOOD, "output": "none/a.mp4"}, "OutputError", "none does not exist"),
        ({**GOOD, "output": "sub.mp4"}, "OutputError", "sub.mp4: is a folder"),
        ({**GOOD, "output": "sub"}, "OutputError", "sub: is a folder"),
        ({**GOOD, "codec": "h266"}, "ConfigError", "unknown codec 'h266'"),
        ({**GOOD, "output": "a" * 300 + ".mp4"}, "OutputError", "name too long"),
        ({**GOOD, "picture": "a" * 300 + ".png"}, "InputError", "name too long"),
        ({**GOOD, "prompt": "\ud800"}, "InputError", "not JSON"),
        ("[" * 20_000, "InputError", "not JSON"),
        ({**GOOD, "seed": 10**400}, "ConfigError", "seed"),
        ('{"seed": NaN, ' + json.dumps(GOOD)[1:], "ConfigError", "seed"),
    ],
)
def test_a_bad_line_is_named_and_costs_its_own_clip(
    place: Path, line: dict[str, Any] | str, kind: str, says: str
) -> None:
    found = planned(place, {**GOOD, "output": "1.mp4"}, "", line, {**GOOD, "output": "4.mp4"})
    assert [clip.line for clip in found.clips] == [1, 4]
    (failed,) = found.ended
    assert (failed["line"], failed["state"], failed["type"]) == (3, "failed", kind)
    assert says in failed["message"]
    assert "\n" not in failed["message"]


@pytest.mark.parametrize(
    ("line", "output"),
    [
        ({**GOOD, "output": "m3.mp4", "speech": 3}, "m3.mp4"),
        ({"output": "m3.mp4"}, "m3.mp4"),
        ({**GOOD, "output": "m3.mp4", "sed": 1}, "m3.mp4"),
        ({**GOOD, "output": 3}, None),
        ({**GOOD, "output": "a\0b"}, None),
        ({"picture": "p.png"}, None),
        ('{"output": "m3.mp4"', None),
    ],
)
def test_a_bad_line_has_its_output_where_it_is_known(
    place: Path, capsys: pytest.CaptureFixture[str], line: dict[str, Any] | str, output: str | None
) -> None:
    """Contract: the event has the whole path, the table the name, or `?`."""
    (failed,) = planned(place, line).ended
    assert failed.get("output") == (str(place / output) if output else None)
    record = Record(place / "r.jsonl", lambda happened: None, 1)
    record.add(failed)
    batch_display.show_summary(record)
    assert f" {output or '?'} " in capsys.readouterr().err


def test_a_manifest_of_many_lines_is_read_in_one_pass(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Property: no line is compared with all others, which took minutes for some ten thousand."""
    compared: list[manifest.Line] = []
    monkeypatch.setattr(manifest.Line, "__eq__", lambda self, other: bool(compared.append(self)))
    for number in range(20):
        (place / f"{number}.mp4").write_bytes(b"whole")
    found = planned(place, *({**GOOD, "output": f"{number}.mp4"} for number in range(30)))
    assert (len(found.clips), len(found.ended)) == (10, 20)
    assert not compared


def test_options_of_a_line_win_over_those_of_all(place: Path) -> None:
    """Contract: paths are relative to the manifest, values land in the clip's preset."""
    line = {**GOOD, "seed": 7, "prompt": "yes: no", "size": "auto", "background": None}
    other = {**GOOD, "output": "sub/b.mkv"}
    common = request(seed=3, steps=2, prompt="all", size="96x64")
    first, second = planned(place, line, other, common=common).clips
    assert (first.picture, first.output) == (place / "p.png", place / "a.mp4")
    assert (first.preset.sampling.seed, second.preset.sampling.seed) == (7, 3)
    assert (first.preset.sampling.prompt, second.preset.sampling.prompt) == ("yes: no", "all")
    assert (first.preset.sampling.steps, second.preset.sampling.steps) == (2, 2)
    (width_px, height_px), size = (
        (c.preset.canvas.width_px, c.preset.canvas.height_px) for c in (first, second)
    )
    assert size == (96, 64)
    assert 0.6 < width_px / height_px < 0.75, "as the picture, which is 64x96"
    assert first.preset.model == second.preset.model


@pytest.mark.parametrize("twin", ["a.mp4", "./a.mp4", "sub/../a.mp4"])
def test_of_lines_with_one_output_the_first_is_rendered(place: Path, twin: str) -> None:
    """Fault: each other one is named, and costs its own clip alone."""
    other = {**GOOD, "output": "b.mp4"}
    found = planned(place, GOOD, {**GOOD, "output": twin, "seed": 1}, other, {**GOOD, "picture": "none"})
    assert [(clip.line, clip.preset.sampling.seed) for clip in found.clips] == [(1, 42), (3, 42)]
    assert [(e["line"], e["state"], e["type"]) for e in found.ended] == [
        (2, "failed", "InputError"),
        (4, "failed", "InputError"),
    ]
    assert all("a.mp4: same output as line 1; give each its own" in e["message"] for e in found.ended)


def test_a_twin_fails_also_when_the_first_is_done(place: Path) -> None:
    """Fault: a manifest run again says the same of its bad line, and does not call it done."""
    (place / "a.mp4").write_bytes(b"whole")
    found = planned(place, GOOD, GOOD)
    assert [(e["line"], e["state"]) for e in found.ended] == [(1, "skipped"), (2, "failed")]


def test_what_exists_is_skipped_unless_it_is_to_be_replaced(place: Path) -> None:
    """Contract: also when its inputs are gone since."""
    (place / "a.mp4").write_bytes(b"whole")
    found = planned(place, {**GOOD, "picture": "gone.png"})
    assert [(e["line"], e["state"]) for e in found.ended] == [(1, "skipped")]
    assert planned(place, GOOD, common=request(overwrite=True)).clips[0].overwrite


def test_an_output_that_is_an_input_is_refused(place: Path) -> None:
    """Fault: with --overwrite it would be lost."""
    Image.fromarray(np.zeros((96, 64, 3), np.uint8)).save(place / "b.mp4", "PNG")
    lines = {**GOOD, "picture": "b.mp4"}, {**GOOD, "output": "b.mp4"}
    found = planned(place, *lines, common=request(overwrite=True))
    assert [clip.line for clip in found.clips] == [1]
    assert "is an input of line 1" in found.ended[0]["message"]


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot be read"), (b"", "has no clips"), (b"\xff{}", "is not UTF-8 at byte 0")],
)
def test_a_manifest_that_is_none(place: Path, content: bytes | None, says: str) -> None:
    path = place / "clips.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=says):
        manifest.plan(path, request(), lambda done, of: None)


words = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.dictionaries(st.sampled_from((*manifest.KEYS, "x")), words) | words, min_size=1, max_size=4)
)
def test_every_line_comes_to_an_end(place: Path, values: list[Any]) -> None:
    """Property: whatever a line holds, it is a clip or one named failure, and never a crash."""
    lines = [
        json.dumps({**value, "output": f"{i}.mp4"} if isinstance(value, dict) else value)
        for i, value in enumerate(values)
    ]
    found = planned(place, *lines)
    ended = [clip.line for clip in found.clips] + [e["line"] for e in found.ended]
    assert sorted(ended) == list(range(1, len(values) + 1))
    assert all(e["state"] == "skipped" or e["message"] for e in found.ended)


# The command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["p.png", "s.wav", "--manifest", "m"], "leave out PICTURE and SPEECH"),
        (["--manifest", "m", "-o", "a.mp4"], "leave out -o"),
        (["p.png", "s.wav", "--replicas", "2"], "--replicas is for the clips of a --manifest"),
        (["p.png", "s.wav", "--ray", "auto"], "--ray is for"),
        (
            ["--manifest", "m", "--nnodes", "2", "--node-rank", "0", "--rdzv-endpoint", "a:1"],
            "for a --manifest on several hosts use --ray",
        ),
        (["--manifest", "m", "--replicas", "0"], "--replicas is 0; accepted: 1 to 1024"),
        (["p.png"], "missing argument 'SPEECH'"),
    ],
    ids=str,
)
def test_a_command_that_contradicts_itself(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["render", *arguments]) == 2
    assert says in capsys.readouterr().err


def test_options_that_are_wrong_for_all_are_wrong_at_once(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Contract: one error, and no results."""
    (place / "clips.jsonl").write_text(json.dumps(GOOD))
    assert run(["render", "--manifest", str(place / "clips.jsonl"), "--steps", "0"]) == 3
    assert "--steps" in capsys.readouterr().err
    assert not (place / "clips.results.jsonl").exists()


def test_a_clip_that_its_replica_cannot_share_is_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: 64x64 has 8 x 8 latents; no worker is started when no clip is left."""
    (place / "clips.jsonl").write_text(json.dumps({**GOOD, "size": "64x64"}))
    arguments = ["render", "--manifest", str(place / "clips.jsonl"), "--device", "cpu", "--gpus", "1000"]
    assert run(arguments) == 9
    (result,) = (place / "clips.results.jsonl").read_text().splitlines()
    assert json.loads(result)["type"] == "ConfigError"


def test_nothing_to_do_needs_no_model(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Contract: exit code 0, the results say so, and so does the table."""
    (place / "a.mp4").write_bytes(b"whole")
    (place / "clips.jsonl").write_text(json.dumps(GOOD))
    assert run(["render", "--manifest", str(place / "clips.jsonl"), "--model", "nowhere"]) == 0
    assert "1 skipped" in capsys.readouterr().err
    (result,) = (place / "clips.results.jsonl").read_text().splitlines()
    assert json.loads(result)["state"] == "skipped"


class Stub:
    """A replica that takes 0.2 s for a clip and calls it 10 s, or dies of every clip."""

    deadly = False

    def __init__(self, *_: Any) -> None:
        self.alive = False

    def start(self) -> None:
        self.alive = True

    def render(self, clip: Any) -> Event:
        if self.deadly:
            self.alive = False
            raise WorkerError("killed")
        time.sleep(0.2)
        return event("clip", state="done", frames=1, duration_s=0.04, elapsed_s=10.0)

    def close(self) -> None:
        self.alive = False


@pytest.fixture
def stubs(place: Path, monkeypatch: pytest.MonkeyPatch) -> type[Stub]:
    """What renders instead of workers, and a manifest of five clips, the first of which is bad."""
    monkeypatch.setattr(batch, "check_machine", lambda preset: None)
    monkeypatch.setattr(batch, "resolve", lambda *names, random: None)
    monkeypatch.setattr(batch, "LocalReplica", Stub)
    monkeypatch.setattr(Stub, "deadly", False)
    lines = [{**GOOD, "picture": "none"}, *({**GOOD, "output": f"{number}.mp4"} for number in range(2, 6))]
    (place / "clips.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return Stub


def test_the_time_of_a_run_is_a_clocks(
    place: Path, stubs: type[Stub], capsys: pytest.CaptureFixture[str]
) -> None:
    """Contract: replicas work at once, so what each clip took does not add up to it."""
    Image.fromarray(np.zeros((96, 64, 3), np.uint8)).save(place / "none", "PNG")
    assert run(["render", "--manifest", str(place / "clips.jsonl"), "--replicas", "2", "--json"]) == 0
    done = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert done["event"] == "done"
    assert 0.6 <= done["elapsed_s"] < 10


def test_a_run_that_loses_its_replicas_says_what_became_of_its_clips(
    place: Path, stubs: type[Stub], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: the error is the last line, the table and the results come before it."""
    monkeypatch.setattr(stubs, "deadly", True)
    assert run(["render", "--manifest", str(place / "clips.jsonl")]) == WorkerError.exit_code
    errors = capsys.readouterr().err
    assert "4 failed, 1 not begun" in errors
    assert "3 times in a row, the last at line 4" in errors.splitlines()[-1]
    results = [json.loads(line) for line in (place / "clips.results.jsonl").read_text().splitlines()]
    assert [(e["line"], e["state"], e["type"]) for e in results] == [
        (1, "failed", "InputError"),
        *((line, "failed", "WorkerError") for line in (2, 3, 4)),
    ]


@pytest.mark.parametrize(
    ("device", "gpus", "here", "replicas", "expected"),
    [
        ("cpu", 2, 8, 3, 2),
        ("cpu", "all", 8, 3, 1),
        ("auto", 2, 0, 3, 2),
        ("auto", 2, 8, 4, 2),
        ("auto", "all", 8, 3, 2),
        ("cuda", 4, 8, 3, None),
        ("auto", "all", 2, 3, None),
    ],
)
def test_replicas_share_the_gpus(
    monkeypatch: pytest.MonkeyPatch, device: Any, gpus: Any, here: int, replicas: int, expected: int | None
) -> None:
    """Contract: a replica has GPUs of its own, or there are none; too few is an error with the numbers."""
    monkeypatch.setattr(batch, "probe", lambda: {"gpus": [{}] * here})
    compute = Compute(device=device, gpus=gpus)
    if expected is not None:
        assert batch.processes_each(compute, replicas) == expected
        return
    with pytest.raises(DeviceError, match=f"this machine has {here}; lower --replicas"):
        batch.processes_each(compute, replicas)


CLIPS: list[Event] = [
    event("stage", name="ready", detail="mini on cpu") | {"replica": 1},
    event("warning", message="untrained") | {"replica": 0},
    event("warning", message="untrained") | {"replica": 1},
    event("chunk", index=0, chunks=2, frames_done=28, frames_total=56, fps=3.0) | {"replica": 1, "line": 2},
    event("clip", line=2, output="/x/b.mp4", state="done", frames=56, duration_s=2.24, elapsed_s=4.48)
    | {"replica": 1, "tries": 2},
    event("clip", line=1, output="/x/a.mp4", state="failed", type="InputError", message="no\x1b sound"),
]


def test_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Golden: a line a clip, a warning once, and the table in the manifest's order."""
    lines = batch_display.ClipLines()
    record = Record(tmp_path / "r.jsonl", lines.show, 5)
    for happened in CLIPS:
        (record.add if happened["event"] == "clip" else record.show)(happened)
    assert capsys.readouterr().err.splitlines() == [
        "replica 1: ready: mini on cpu",
        "warning: untrained",
        "line 2: /x/b.mp4: 56 frames, 2.24 s of video in 4.5 s, 0.50 times real time",
        "line 1: /x/a.mp4: InputError: no\\x1b sound",
    ]
    batch_display.show_summary(record)
    table = capsys.readouterr().err
    assert "1 done, 1 failed, 3 not begun" in table
    assert table.index("a.mp4") < table.index("b.mp4")
    assert "0.50x" in table


def test_a_terminal_shows_a_line_a_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    """Golden: live lines of who does what; what ended stays above them."""
    import io
    import sys

    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    with batch_display.choose(json=False) as shown:
        assert isinstance(shown, batch_display.ClipBars)
        for happened in CLIPS:
            shown.show(happened)
            shown._live.refresh()
    for text in ("render line 2", "replica 1", "3.0 fps", "line 1: /x/a.mp4"):
        assert text in terminal.getvalue(), text
