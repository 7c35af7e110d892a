"""The command line, held to: help is instant and loads nothing heavy; options land in the job; checks
come in the order of their cost and before torch; every way to end has its exit code and at most one
line; a program that reads along is told everything."""

from __future__ import annotations

import inspect
import json
import re
import resource
import subprocess
import sys
import time

import numpy as np
import pytest
import soundfile
from cli_parts import RENDER, ROOT, RUN, error_line, model_folder
from PIL import Image

from flashtalk_cli import errors, events, launch, presets
from flashtalk_cli.cli import machine, request
from flashtalk_cli.cli.app import run
from flashtalk_cli.config import RenderJob
from flashtalk_cli.errors import FlashtalkError, WorkerError

COMMANDS = [
    [],
    ["render"],
    ["stream"],
    ["ctl"],
    ["demo"],
    ["presets"],
    ["presets", "show"],
    ["models"],
    ["models", "pull"],
    ["doctor"],
    ["bench"],
    ["train"],
    ["train", "adapt"],
]


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    """A folder with portrait.png, hello.wav (1 s) and a model, which is also the current folder."""
    Image.fromarray(np.full((96, 64, 3), 120, np.uint8)).save(tmp_path / "portrait.png")
    soundfile.write(tmp_path / "hello.wav", np.zeros(16000, np.float32), 16000)
    model_folder(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that commands launched; nothing is rendered."""
    launched: list[RenderJob] = []

    def fake(job, on_event, **options):
        assert job.speech.samples_path.stat().st_size == 4 * job.speech.n_samples  # prepared and still there
        launched.append(RenderJob.model_validate_json(job.model_dump_json()))
        on_event(events.event("done", path=job.output, frames=job.n_frames, duration_s=1.0, elapsed_s=0.5))
        return 0

    monkeypatch.setattr(launch, "run", fake)
    return launched


# Help and start-up


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_says_what_it_does_in_eighty_columns(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert run([*command, "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage: flashtalk" in text
    assert max(map(len, text.splitlines())) <= 80


def test_nothing_given_is_help(capsys):
    assert run([]) == 0
    assert "Usage: flashtalk" in capsys.readouterr().out


def test_help_of_render_groups_its_options_and_shows_examples(capsys):
    run(["render", "--help"])
    text = capsys.readouterr().out
    for word in (
        "Result",
        "Picture and motion",
        "Model and machine",
        "Reports",
        "flashtalk render portrait.png",
    ):
        assert word in text


def test_help_of_size_has_an_example_for_the_default_and_the_limits(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    run(["render", "--help"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "WxH" in line]
    for words in ("from 64 on", "144x160 for mini", "up to 4:1"):
        assert words in line


def test_help_documents_every_exit_code(capsys):
    run(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    classes = [c for c in vars(errors).values() if isinstance(c, type) and issubclass(c, FlashtalkError)]
    for code in {c.exit_code for c in classes} | {errors.INTERRUPTED_EXIT_CODE}:
        assert re.search(rf"\b{code} \w", text), code


@pytest.mark.parametrize("arguments", [["--help"], ["render", "--help"], ["presets", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(arguments):
    heavy = ["torch", "numpy", "transformers", "PIL", "yaml", "soundfile", "flashtalk_cli.config"]
    code = (
        f"import sys; from flashtalk_cli.cli.app import run; run({arguments!r});"
        f"found = [name for name in {heavy!r} if name in sys.modules]; assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_help_takes_at_most_three_times_what_its_libraries_take():
    def cpu_s(*arguments: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    libraries, ours = [], []
    for _ in range(20):  # processor time, the least of several: others share the machine
        libraries.append(cpu_s("-c", "import typer, rich"))
        ours.append(cpu_s("-m", "flashtalk_cli", "--help"))
        if len(ours) >= 3 and min(ours) <= 3 * min(libraries):
            return
    pytest.fail(f"--help takes {min(ours):.3f} s, its libraries {min(libraries):.3f} s")


def test_version(capsys):
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("flashtalk ")


# Render: what lands in the job


def test_a_plain_render(inputs, jobs):
    assert run(["render", "portrait.png", "hello.wav", "--model", "model"]) == 0
    job = jobs[0]
    assert job.output == inputs / "hello-portrait.mp4"
    assert (job.picture, job.audio) == (inputs / "portrait.png", inputs / "hello.wav")
    assert (job.n_frames, job.overwrite) == (25, False)
    expected = presets.load("mini", [presets.Override("model.name", "model", "--model")])
    assert job.preset == expected


@pytest.mark.parametrize(
    ("options", "path", "value"),
    [
        (["--steps", "2"], "sampling.steps", 2),
        (["--seed", "0"], "sampling.seed", 0),
        (["--prompt", "yes: no"], "sampling.prompt", "yes: no"),
        (["--fit", "pad"], "canvas.fit", "pad"),
        (["--background", "#00ff00"], "canvas.background", "#00ff00"),
        (["--device", "cpu"], "compute.device", "cpu"),
        (["--gpus", "3"], "compute.gpus", 3),
        (["--gpus", "all"], "compute.gpus", "all"),
        (["--codec", "libx264"], "encoding.codec", "libx264"),
        (["--crf", "30"], "encoding.crf", 30),
        (["--weights", "random"], "model.weights", "random"),
        (["--size", "96x128"], "canvas.width_px", 96),
        (["--size", "96x128"], "canvas.height_px", 128),
        (["--size", "auto"], "canvas.width_px", 112),  # 64x96 at 144x144's area
        (["--size", "auto"], "canvas.height_px", 160),
        (["--set", "sampling.shift=3"], "sampling.shift", 3.0),
        (["--set", "sampling.steps=3", "--steps", "2"], "sampling.steps", 2),
    ],
    ids=str,
)
def test_options_land_in_the_job(inputs, jobs, options, path, value):
    assert run(["render", "portrait.png", "hello.wav", "--model", "model", *options]) == 0
    found: object = jobs[0].preset
    for key in path.split("."):
        found = getattr(found, key)
    assert found == value


def test_offload_lands_in_the_job_where_there_may_be_a_gpu(inputs, jobs, monkeypatch):
    monkeypatch.setattr(machine, "most_gpus", lambda: None)
    assert run([*RENDER, "--offload", "--device", "auto"]) == 0
    assert jobs[0].preset.compute.offload


def test_the_prepared_sound_does_not_outlive_the_run(inputs, jobs):
    run(["render", "portrait.png", "hello.wav", "--model", "model"])
    assert not jobs[0].speech.samples_path.exists()


@pytest.mark.parametrize("ready_s", [90, 0])
def test_a_long_sound_shows_how_much_is_ready(inputs, jobs, monkeypatch, capsys, ready_s):
    whole = request.prepare_speech

    def slow(path, folder):
        (folder / "half").write_bytes(bytes(request.BYTES_PER_SECOND * ready_s))
        time.sleep(0.3)
        return whole(path, folder)

    monkeypatch.setattr(request, "prepare_speech", slow)
    monkeypatch.setattr(request, "PROGRESS_EVERY_S", 0.05)
    assert run([*RENDER, "--json"]) == 0
    seen = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    reports = [e for e in seen if e["event"] == "progress"]
    if not ready_s:
        assert reports == [], "0 s would read as the length of the sound"
    else:
        expected = {"event": "progress", "name": "sound", "done": 90.0, "total": None, "unit": "s"}
        assert reports[0] == expected
    assert [e["event"] for e in seen if e["event"] != "progress"][-1] == "done"


def test_the_demos_defaults_are_packaged():
    from flashtalk_cli.cli import demo

    defaults = {
        name: parameter.default for name, parameter in inspect.signature(demo.demo).parameters.items()
    }
    assert defaults["portrait"] in demo._portraits
    assert defaults["speech"] in demo._speeches


def test_demo_takes_packaged_inputs_by_name(inputs, jobs, monkeypatch, capsys):
    from flashtalk_cli.cli import demo

    monkeypatch.setattr(demo, "_portraits", {"maya": inputs / "portrait.png", "bob": inputs / "none.png"})
    monkeypatch.setattr(demo, "_speeches", {"welcome": inputs / "hello.wav"})
    assert run(["demo", "--set", "model.name=model"]) == 0
    assert jobs[0].output == inputs / "demo.mp4"
    assert jobs[0].picture == inputs / "portrait.png"
    assert run(["demo", "--portrait", "eve"]) == 4
    assert "no portrait named 'eve'; there are maya, bob" in error_line(capsys)


# The order of checks: everything is wrong at first, and mended one by one


def test_checks_come_in_the_order_of_their_cost(inputs, jobs, capsys):
    arguments = {
        "picture": "no.png",
        "speech": "no.wav",
        "--preset": "no",
        "-o": "out.txt",
        "--model": "none",
    }
    mends = [
        ("--preset", "mini", 3),
        ("-o", "out.mp4", 6),
        ("picture", "portrait.png", 4),
        ("speech", "hello.wav", 4),
    ]
    for name, mended, code in [*mends, ("--model", "model", 5)]:
        options = [word for pair in list(arguments.items())[2:] for word in pair]
        assert run(["render", arguments["picture"], arguments["speech"], *options]) == code, name
        error_line(capsys)
        arguments[name] = mended
    assert not jobs
    options = [word for pair in list(arguments.items())[2:] for word in pair]
    assert run(["render", arguments["picture"], arguments["speech"], *options]) == 0


@pytest.mark.parametrize(
    ("gpus", "options", "said"),
    [
        (0, ["--preset", "soulx-14b"], "soulx-14b needs a GPU and this machine has none: take --preset mini"),
        (0, ["--preset", "h200x2-realtime"], "machine has none: take --preset mini, which is for a CPU"),
        (0, ["--device", "cuda", "--model", "model"], "or --device cpu, or --set compute.device=cpu where"),
        (0, ["--device", "cuda"], "this machine has no GPU, and mini needs none: leave out --device cuda"),
        (1, ["--preset", "h200x2-realtime"], "needs 2 GPUs, this machine has 1: lower --gpus"),
        (0, ["--device", "auto", "--set", "precision.dit=fp8"], "--set precision.dit=auto"),
        (0, ["--device", "auto", "--offload"], "leave it out"),
    ],
    ids=str,
)
def test_a_machine_that_cannot_run_it_is_told_before_a_model_is_missed(
    inputs, jobs, monkeypatch, capsys, gpus, options, said
):
    """Fault: nobody fetches 55 GB to learn that there is no GPU for them."""
    monkeypatch.setattr(machine, "most_gpus", lambda: gpus)
    assert run(["render", "portrait.png", "hello.wav", *options]) == 7
    told = error_line(capsys)
    assert said in told
    assert "--device cpu" not in told or "--model" in options, "the released model on a CPU takes days"
    assert not jobs


@pytest.mark.parametrize("gpus", [None, 2, 8])
def test_gpus_that_may_be_enough_are_not_doubted(inputs, jobs, monkeypatch, gpus):
    monkeypatch.setattr(machine, "most_gpus", lambda: gpus)
    assert (
        run(["render", "portrait.png", "hello.wav", "--preset", "h200x2-realtime", "--weights", "random"])
        == 0
    )
    assert jobs


# What is worth a warning, and no reason to end

SLOW = "mini was trained for 144x144; at 512x512 it is slow and hardly speaks: take --preset mini --size auto"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], []),
        (["--gpus", "2"], []),
        (["--gpus", "3"], ["3 processes on the 2 cores of this CPU take turns: lower --gpus"]),
        (["--size", "288x288"], []),
        (["--size", "512x512"], [SLOW]),
        (["--size", "512x512", "--model", "model"], []),
    ],
    ids=str,
)
def test_a_warning_is_a_line_or_an_event(inputs, jobs, monkeypatch, capsys, options, said):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda pid: {0, 1})
    command = ["render", "portrait.png", "hello.wav", *options]
    assert run(command) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("warning")] == [f"warning: {text}" for text in said]
    assert run([*command, "--json"]) == 0
    captured = capsys.readouterr()
    told = [json.loads(line) for line in captured.out.splitlines()]
    assert [e["message"] for e in told if e["event"] == "warning"] == said
    assert captured.err == ""


def test_checks_import_no_torch(inputs):
    code = (
        "import sys; from flashtalk_cli import launch; from flashtalk_cli.cli.app import run\n"
        "launch.run = lambda *a, **k: 0\n"
        "assert run(['render', 'portrait.png', 'hello.wav', '--model', 'model']) == 0\n"
        "assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    )
    path = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
    subprocess.run([sys.executable, "-c", path + code], cwd=inputs, check=True, capture_output=True)


# Ways to end


def ending(monkeypatch, problem: BaseException) -> None:
    def fake(*args: object, **options: object) -> int:
        raise problem

    monkeypatch.setattr(launch, "run", fake)


def test_an_error_of_the_worker_is_one_line_and_its_exit_code(inputs, monkeypatch, capsys):
    ending(monkeypatch, WorkerError("the worker died\nof\x1b[31m something"))
    assert run(RENDER) == 8
    assert error_line(capsys) == "the worker died of\\x1b[31m something"


def test_an_unexpected_error_is_one_line_that_asks_for_debug(inputs, monkeypatch, capsys):
    ending(monkeypatch, TypeError("odd\nthing"))
    assert run(RENDER) == 1
    captured = capsys.readouterr().err
    assert "error: internal error TypeError: odd thing; run again with --debug" in captured
    assert "Traceback" not in captured


def test_debug_shows_tracebacks_the_workers_too(inputs, monkeypatch, capsys):
    problem = FlashtalkError("internal error KeyError: x")
    problem.__cause__ = launch.WorkerTraceback("Traceback of the worker")
    ending(monkeypatch, problem)
    assert run([*RENDER, "--debug"]) == 1
    captured = capsys.readouterr().err
    assert "Traceback of the worker" in captured
    assert "Traceback (most recent call last)" in captured


def test_interrupted_is_130(inputs, monkeypatch, capsys):
    ending(monkeypatch, KeyboardInterrupt())
    assert run(RENDER) == 130
    assert "interrupted: nothing was rendered" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rendr"], "no such command 'rendr'"),
        (["render"], "missing argument 'PICTURE'; see flashtalk render --help"),
        (["render", "a", "b", "c"], "flashtalk render --help"),
        (["render", "a", "b", "--nope"], "no such option: --nope"),
        (["render", "a", "b", "--steps", "x"], "'--steps'"),
        (["presets", "show"], "missing argument"),
    ],
    ids=str,
)
def test_a_wrong_command_line_is_exit_code_2_and_one_line(arguments, said, capsys):
    assert run(arguments) == 2
    assert said in error_line(capsys)


def test_a_reader_that_goes_away_is_no_traceback():
    command = f"{sys.executable} -m flashtalk_cli presets show mini | true"
    ended = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert ended.stderr == ""


def test_terminated_while_it_checks_leaves_nothing(inputs, tmp_path_factory):
    """A SIGTERM during the preparation of a sound ends with 130 and removes the temporary folder."""
    temporary = tmp_path_factory.mktemp("temporary")
    code = (
        f"import sys, os, signal, tempfile; sys.path.insert(0, {str(ROOT)!r}); tempfile.tempdir = {str(temporary)!r}\n"
        "from flashtalk_cli.cli import request\n"
        "from flashtalk_cli import __main__\n"
        "request.prepare_speech = lambda path, folder: os.kill(os.getpid(), signal.SIGTERM)\n"
        f"sys.argv[1:] = {RENDER!r}\n"
        "__main__.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=inputs, capture_output=True, text=True)
    assert ended.returncode == 130
    assert "interrupted" in ended.stderr
    assert list(temporary.iterdir()) == []


def test_interrupted_while_it_loads_says_nothing():
    """A Ctrl-C while the commands are imported: no traceback."""
    code = (
        f"import sys, os, signal; sys.path.insert(0, {str(ROOT)!r})\n"
        "class Interrupt:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'flashtalk_cli.cli.app': signal.raise_signal(signal.SIGINT)\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "sys.meta_path.insert(0, Interrupt())\n"
        "from flashtalk_cli import __main__; __main__.main()"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


# What a program is told


def test_json_lines_are_the_events(inputs, monkeypatch, capsys):
    def fake(job, on_event, **options):
        for happened in RUN:
            on_event(happened)
        return 0

    monkeypatch.setattr(launch, "run", fake)
    assert run([*RENDER, "--json"]) == 0
    captured = capsys.readouterr()
    seen = [json.loads(line) for line in captured.out.splitlines()]
    assert seen[-len(RUN) :] == RUN
    assert [e["name"] for e in seen[: -len(RUN)]] == ["picture", "sound", "model", "start"]
    assert captured.err == ""
    assert run([*RENDER, "--json", "-o", "-"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [json.loads(line) for line in captured.err.splitlines()] == seen


def test_json_ends_with_the_error(inputs, capsys):
    assert run(["render", "portrait.png", "no.wav", "--json"]) == 4
    captured = capsys.readouterr()
    last = json.loads(captured.out.splitlines()[-1])
    assert (last["event"], last["type"], last["exit_code"]) == ("error", "InputError", 4)
    assert captured.err == f"error: {last['message']}\n"


def test_request_knows_standard_output(inputs):
    assert not request.Request(inputs / "a", inputs / "b", None, "mini", (), {}, None, False).to_stdout
