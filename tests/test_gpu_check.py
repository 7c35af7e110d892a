"""scripts/gpu-check without a GPU: a name that it does not know runs nothing and is an error, and so is a part
that was asked for by name and cannot run (contract)."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu-check"


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, of whose parts none is run; `ran` are those that would be."""
    loader = importlib.machinery.SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_check", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    module.OUT, module.ran = tmp_path, []
    monkeypatch.setattr(module.Run, "part", lambda self, name, *_, **__: bool(module.ran.append(name)))
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    return module


@pytest.mark.parametrize(
    "words", ["ranks fault", "ranks bench xfusr", "goal", "goals bench", "offload x", "all bench"]
)
def test_an_unknown_name_is_an_error(script: ModuleType, words: str) -> None:
    """It tells what there is."""
    with pytest.raises(SystemExit, match="gpu-check ranks"):
        script.main(words.split())
    assert not script.ran


def test_a_part_that_was_named_must_run(script: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out in silence only where all parts are run that can be."""
    assert script.main(["ranks", "xfuser"]) == 1
    assert "FAILED: xfuser is not installed here" in capsys.readouterr().out
    assert script.main(["ranks"]) == 0
    assert script.ran[-1] == "ranks that fail"
    assert "xfuser is not installed here: not compared" in capsys.readouterr().out


def test_kernels_are_checked_before_anything_is_timed(script: ModuleType) -> None:
    """What comes last may find no time left."""
    assert script.main(["goals"]) == 0
    assert script.ran[0] == "kernels against plain code"
    assert len(script.ran) == 6


@pytest.mark.parametrize("gpus", ["1", "2", "4"])
def test_goals_are_measured_on_as_many_gpus_as_there_are(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, gpus: str
) -> None:
    """Together, in every number format, and alone; one GPU has nobody to be together with."""
    monkeypatch.setattr(script, "GPUS", gpus)
    monkeypatch.setattr(script, "find_spec", lambda name: object())
    assert script.main(["goals"]) == 0
    formats = ["bf16", "fp8", "fp8 and its attention"]
    together = [] if gpus == "1" else [f"{name} on {gpus} GPUs" for name in formats]
    assert script.ran[: 1 + len(together)] == ["kernels against plain code", *together]
    assert sorted(script.ran[1 + len(together) : -1]) == sorted(f"{name} on one GPU" for name in formats)
    assert script.ran[-1] == f"a step's kernels on {gpus} GPUs"
