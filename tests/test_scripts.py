"""The scripts, held to without installing anything: in a copy of their folder, on a PATH of stand-ins that write
down how they are called (contract and fault)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import multiprocessing.dummy
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from flashtalk_cli.distill.people import bank
from flashtalk_cli.distill.people.voices import Utterance, Voice
from flashtalk_cli.media import ffmpeg

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("bash", "sh", "env", "dirname", "mkdir", "cp", "chmod", "touch", "cat", "date", "rm")

# An interpreter of a version: what pip is asked for is written down, what ends in one of MISSING is not found, and
# IMPORT_TORCH is the exit code of importing torch.
PYTHON = f"""#!/bin/sh
case "$*" in
  *"import torch"*) exit "${{IMPORT_TORCH:-1}}" ;;
  -c*) exec {sys.executable} -c "import sys; sys.version_info = (VERSION, 0); $2" ;;
  "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  "-m pip --version") [ "VERSION" != "3, 13" ] ;;
  *) echo "$*" >> "$CALLS"; for each in $MISSING; do case "$*" in *"$each") exit 1 ;; esac; done ;;
esac
exit
"""
FLASHTALK = """#!/bin/sh
echo "flashtalk $* in $PWD" >> "$CALLS"
echo '{"event": "done"}'
exit "${CODE:-0}"
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def interpreter(path: Path, version: str) -> Path:
    """A stand-in for Python; 3.13 has no pip."""
    return program(path, PYTHON.replace("VERSION", version.replace(".", ", ")))


class Place:
    """A copy of the scripts, with no .venv yet."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.calls = folder / "flashtalk", folder / "bin", folder / "calls"
        shutil.copytree(ROOT / "scripts", self.root / "scripts")
        shutil.copy2(ROOT / "pyproject.toml", self.root)
        for tool in TOOLS:
            found = shutil.which(tool)
            assert found
            program(self.bin / tool, f'#!/bin/sh\nexec {found} "$@"\n')
        program(self.bin / "uname", "#!/bin/sh\necho Linux\n")
        program(self.bin / "flashtalk", FLASHTALK)
        interpreter(self.bin / "python3", "3.12")

    def install(self) -> None:
        """As after a first run."""
        interpreter(self.root / ".venv/bin/python", "3.12")
        (self.root / ".venv/.installed").touch()

    def call(
        self, script: str, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        return subprocess.run(
            [self.root / "scripts" / script, *arguments],
            cwd=cwd or self.root,
            env={"PATH": str(self.bin), "CALLS": str(self.calls), **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )

    def called(self) -> list[str]:
        """Programs and arguments of the last call."""
        quiet = "-m pip --disable-pip-version-check install --quiet "
        return [line.replace(quiet, "pip ") for line in self.calls.read_text().splitlines()]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_options_of_the_demo_are_its_own(place: Place) -> None:
    """Fault: what is sourced without arguments has the script's, and pip was asked for `.[--portrait]`."""
    ended = place.call("demo", "--portrait", "ben")
    assert ended.returncode == 0, ended.stderr
    *_, install, demo = place.called()
    assert install == "pip -e ."
    assert demo == f"flashtalk demo --overwrite --portrait ben in {place.root}"
    assert place.call("demo", "--json").returncode == 0
    assert place.called() == [f"flashtalk demo --overwrite --json in {place.root}"], "installed once"


@pytest.mark.parametrize("script", ["test", "soak", "check"])
def test_other_scripts_have_the_extras_that_they_name(place: Place, script: str) -> None:
    place.call(script, "7")
    assert "pip -e .[dev]" in place.called()


def test_the_demo_lands_where_the_user_stands(place: Place, tmp_path: Path) -> None:
    """Contract: and the way on is told only after a plain success, on stderr, by a path that is right there."""
    place.install()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    on = "then flashtalk render YOUR.png YOUR.wav"
    for cwd, activate in (
        (place.root, ".venv/bin/activate"),
        (tmp_path, "flashtalk/.venv/bin/activate"),
        (elsewhere, f"{place.root}/.venv/bin/activate"),
    ):
        ended = place.call("demo", cwd=cwd)
        assert place.called() == [f"flashtalk demo --overwrite in {cwd}"]
        assert ended.stdout == '{"event": "done"}\n'
        assert ended.stderr == f"next: source {activate}, {on}\n"
    for arguments, code in ((["-o", "x.mp4"], 0), ([], 6), (["--json"], 4)):
        ended = place.call("demo", *arguments, cwd=elsewhere, CODE=str(code))
        assert (ended.returncode, ended.stdout, ended.stderr) == (code, '{"event": "done"}\n', "")
        assert place.called()[0].endswith(f"in {elsewhere}")


@pytest.mark.parametrize(
    ("version", "found"), [("3.9", "Python 3.9"), ("2.7", "Python 2.7"), (None, "missing")]
)
def test_an_interpreter_that_will_not_do_is_told_in_a_line(
    place: Place, version: str | None, found: str
) -> None:
    """Fault: nothing is made or asked of pip; a newer one heals it."""
    old = place.bin / "other"
    if version:
        interpreter(old, version)
    ended = place.call("demo", PYTHON=str(old))
    assert ended.returncode == 1
    needs = "and flashtalk needs Python 3.10 or later: PYTHON=python3.12"
    assert ended.stderr == f"{old} is {found}, {needs} {place.root}/scripts/demo\n"
    assert not (place.root / ".venv").exists()
    assert not place.called()
    assert place.call("demo").returncode == 0


@pytest.mark.parametrize("state", ["old", "without pip", "gone", "old and installed"])
def test_an_environment_that_will_not_do_is_made_anew(place: Place, state: str) -> None:
    """Fault: it was taken for good, whatever PYTHON was given."""
    inside = place.root / ".venv/bin/python"
    if state != "gone":
        interpreter(inside, "3.13" if state == "without pip" else "3.9")
    else:
        inside.parent.mkdir(parents=True)
        inside.symlink_to("/nowhere/python3")
    if "installed" in state:
        (place.root / ".venv/.installed").touch()
    ended = place.call("demo", PYTHON=str(interpreter(place.bin / "newer", "3.11")))
    assert ended.returncode == 0, ended.stderr
    assert "sys.version_info = (3, 11, 0)" in inside.read_text()
    assert place.called()[-2] == "pip -e ."


def test_a_good_environment_is_kept(place: Place) -> None:
    """Contract: also when something is to be installed, and no other interpreter is there."""
    place.install()
    (place.root / ".venv/.installed").unlink()
    (place.root / ".venv/kept").touch()
    assert place.call("demo", PYTHON="nowhere").returncode == 0
    assert (place.root / ".venv/kept").exists()


CPU = "pip --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu torch"


@pytest.mark.parametrize(
    ("system", "gpu", "environment", "expected"),
    [
        ("Linux", False, {}, ["pip torch==2.13.0+cpu"]),
        ("Linux", False, {"MISSING": "2.13.0+cpu"}, ["pip torch==2.13.0+cpu", CPU]),
        ("Linux", False, {"MISSING": "+cpu torch"}, ["pip torch==2.13.0+cpu", CPU, "pip torch==2.13.0"]),
        (
            "Linux",
            False,
            {"MISSING": "+cpu torch 2.13.0"},
            ["pip torch==2.13.0+cpu", CPU, "pip torch==2.13.0"],
        ),
        ("Linux", False, {"IMPORT_TORCH": "0"}, []),
        ("Linux", True, {}, []),
        ("Darwin", False, {}, []),
    ],
)
def test_without_a_gpu_no_cuda_is_fetched(
    place: Place, system: str, gpu: bool, environment: dict[str, str], expected: list[str]
) -> None:
    """Contract: what pip finds here comes first, then PyTorch's builds for CPUs; where neither is, any will do."""
    program(place.bin / "uname", f"#!/bin/sh\necho {system}\n")
    if gpu:
        program(place.bin / "nvidia-smi", "#!/bin/sh\n")
    ended = place.call("demo", **environment)
    assert ended.returncode == 0, ended.stderr
    assert place.called()[:-1] == [*expected, "pip -e ."]


@pytest.mark.parametrize("absolute", [False, True])
def test_a_folder_to_train_in_is_where_the_user_stands(place: Place, tmp_path: Path, absolute: bool) -> None:
    """Fault: a relative one landed in the repository."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    folder = tmp_path / "other" if absolute else elsewhere / "runs/a b"
    given = str(folder) if absolute else "runs/a b"
    ended = place.call("train-mini", "--gpus", "1", given, "export", cwd=elsewhere, IMPORT_TORCH="0")
    assert ended.returncode == 0, ended.stderr
    assert folder.is_dir()
    (train,) = place.called()
    assert train.startswith(f"-m flashtalk_cli train export {folder}/student-5 flashtalk_cli/assets/mini")
    assert train.endswith(f"--model {folder}/model")
    assert not (place.root / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--help"], 0, "usage: gpu-speed"),
        (["dit", "vea"], 2, "error: no part vea; there are bench-bf16, bench-fp8, tests, dit, vae, kernels"),
        (["--parts"], 2, "unrecognized arguments: --parts"),
    ],
)
def test_gpu_speed_loses_no_results_to_a_slip(
    tmp_path: Path, arguments: list[str], code: int, says: str
) -> None:
    """Fault: names are looked at before anything is deleted."""
    kept = tmp_path / "gpu-speed.json"
    kept.write_text("{}")
    ended = subprocess.run(
        [sys.executable, ROOT / "scripts/gpu-speed", *arguments],
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == code
    assert says in ended.stdout + ended.stderr
    assert "Traceback" not in ended.stderr
    assert kept.read_text() == "{}"


def test_gpu_speed_has_all_parts_unless_some_are_named() -> None:
    loader = importlib.machinery.SourceFileLoader("gpu_speed", str(ROOT / "scripts/gpu-speed"))
    spec = importlib.util.spec_from_loader("gpu_speed", loader)
    assert spec
    script: ModuleType = importlib.util.module_from_spec(spec)
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    loader.exec_module(script)
    sys.dont_write_bytecode = before
    assert script.chosen([], script.parts(False)) == list(script.parts(False))
    assert script.chosen(["vae", "dit"], script.parts(False)) == ["vae", "dit"]


def test_a_bank_is_made_with_the_ffmpeg_that_the_package_brings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a system without one was told to install it."""

    def group(job: object) -> list[tuple[Voice, str, Utterance]]:
        tone = np.sin(np.arange(16_000) / 20).astype(np.float32)
        return [(Voice("espeak", "en", 1.0, 1.0), "aaa", Utterance(tone, (bank.Sound(1, 0.0, 1.0),)))]

    threads = SimpleNamespace(get_context=lambda method: multiprocessing.dummy)
    monkeypatch.setattr(bank, "multiprocessing", threads)
    monkeypatch.setattr(bank, "_voice_group", group)
    monkeypatch.setenv("PATH", str(tmp_path))
    ffmpeg.find_ffmpeg.cache_clear()
    try:
        bank.make(tmp_path, "train", hours=0.001, workers=1)
    finally:
        ffmpeg.find_ffmpeg.cache_clear()
    assert len(bank.SpeechBank(tmp_path, "train")) == 8


def test_what_the_demo_makes_is_no_change_of_the_repository() -> None:
    assert "/demo.mp4" in (ROOT / ".gitignore").read_text().splitlines()
