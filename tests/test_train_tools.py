"""The tools that are run as `python -m MODULE`: what is wrong with their input is said in one line."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from flashtalk_cli.distill.tool import told_in_a_line
from flashtalk_cli.errors import INTERRUPTED_EXIT_CODE, InputError, ModelError

DISTILL = "flashtalk_cli.distill"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules")  # imported by other tests before
@pytest.mark.parametrize(
    ("module", "words", "code", "said"),
    [
        ("people.measure", "{}/none", InputError.exit_code, "none/train.opus is missing"),
        (
            "components.train",
            "speech {}/none {}/out --seconds 1",
            InputError.exit_code,
            "train.opus is missing",
        ),
        ("components.transfer", "{} no-model {}/a {}/b", ModelError.exit_code, "no model 'no-model'"),
        ("average", "{}/out {}/none", InputError.exit_code, "none has no weights.safetensors"),
    ],
)
def test_wrong_input_is_one_line(
    module: str,
    words: str,
    code: int,
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", [module, *words.format(*[tmp_path] * 3).split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_module(f"{DISTILL}.{module}", run_name="__main__")
    assert end.value.code == code
    told = capsys.readouterr().err
    assert told.startswith("error: ")
    assert said in told
    assert told.count("\n") == 1


def test_interrupted_is_130_without_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as end:
        told_in_a_line(command)
    assert end.value.code == INTERRUPTED_EXIT_CODE
    assert capsys.readouterr().err == ""


def test_every_tool_ends_so() -> None:
    """Contract: no module that is run by itself forgets it."""
    folder = Path(__file__).parents[1] / "flashtalk_cli" / "distill"
    tools = [path for path in folder.rglob("*.py") if "argparse.ArgumentParser" in path.read_text()]
    assert len(tools) > 5
    for path in tools:
        assert path.read_text().endswith('if __name__ == "__main__":\n    told_in_a_line(main)\n'), path
