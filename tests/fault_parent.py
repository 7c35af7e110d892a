"""The parent of a run whose rank 1 fails: `fault_parent.py FOLDER HOW DEVICE`, for tests/test_faults.py.

Prints what happens, a line of JSON each, with the seconds of the clock that all processes share.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from flashtalk_cli import launch
from flashtalk_cli.config import (
    Canvas,
    Compute,
    Hearing,
    ModelChoice,
    Precision,
    Preset,
    RenderJob,
    Sampling,
    Speech,
)
from flashtalk_cli.errors import FlashtalkError

RANKS = 2
SIZES = {
    **{"dim": 48, "ffn_dim": 64, "num_heads": 4, "num_layers": 2, "freq_dim": 16, "vae_dim": 8},
    **{"text_dim": 32, "text_len": 24, "image_dim": 32, "audio_layers": 3, "audio_dim": 32},
    **{"intermediate_dim": 8, "output_dim": 16, "context_tokens": 4},
}


def say(**fields: Any) -> None:
    sys.stdout.write(
        json.dumps({"at_s": time.monotonic(), **fields}) + "\n"
    )  # in one piece: logs come from other threads
    sys.stdout.flush()


def job(folder: Path, how: str, device: str) -> RenderJob:
    """A render of 10 s of sound in chunks of 8 frames, to `how`.mp4, by random weights."""
    changes = {
        "model": ModelChoice(name=str(folder / "model"), weights="random"),
        "compute": Compute(device=device, gpus=RANKS),
        "canvas": Canvas(width_px=80, height_px=64),
        "sampling": Sampling(steps=1, chunk_frames=13),
        "hearing": Hearing(context_s=2),
        "precision": Precision(dit="float32", vae="float32"),
    }
    sound = folder / "s.wav"
    return RenderJob(
        preset=Preset(name=how, description="", **changes),
        picture=folder / "p.png",  # is not there: it is not looked at
        speech=Speech(samples_path=sound, n_samples=160_000, loudness_lufs=None),
        audio=sound,
        output=folder / f"{how}.mp4",
    )


def faulty(command: list[str]) -> list[str]:
    return ["rank_faults" if part == "flashtalk_cli.worker" else part for part in command]


def main(folder: Path, how: str, device: str) -> None:
    command = launch.worker_command
    launch.worker_command = lambda *arguments: faulty(command(*arguments))
    try:
        code = launch.run(
            job(folder, how, device),
            lambda event: say(**event),
            on_log=lambda line: say(log=line),
            processes=RANKS,
        )
        say(code=code)
    except FlashtalkError as error:
        say(error=type(error).__name__, text=str(error))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
