"""What tests of the command line share: a model that is complete and empty, a run's events, the line of an error."""

from __future__ import annotations

from pathlib import Path

from flashtalk_cli import events
from flashtalk_cli.models import folder

ROOT = Path(__file__).parent.parent
RENDER = ["render", "portrait.png", "hello.wav", "--model", "model"]
RUN = [
    events.event("stage", name="weights", detail="mini on cpu"),
    events.event("progress", name="weights", done=5, total=10, unit="MB"),
    *(
        events.event(
            "chunk", index=i, chunks=3, frames_done=28 * i + 28, frames_total=84, fps=27.1, realtime=1.08,
            elapsed_s=i, eta_s=None if i == 0 else 62.4,
        )
        for i in range(3)
    ),
    events.event("warning", message="the avatar is untrained"),
    events.event("report", data={"fps": 27.1}),
    events.event("done", path="/tmp/x.mp4", frames=84, duration_s=3.36, elapsed_s=3.1),
]  # fmt: skip


def model_folder(path: Path) -> Path:
    """A model whose files are all there, and empty: enough for every check before weights are read."""
    names = [
        "config.json",
        "diffusion_pytorch_model.safetensors",
        *(f"{s}.pth" for s in folder.STEMS.values()),
    ]
    speech = [f"{folder.SPEECH_FOLDER}/config.json", f"{folder.SPEECH_FOLDER}/pytorch_model.bin"]
    for name in [*names, *speech, f"{folder.TOKENIZER}/spiece.model"]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_text("{}")
    return path


def error_line(capsys) -> str:
    """The one error line on stderr, without `error: `."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0].removeprefix("error: ")
