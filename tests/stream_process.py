"""A stream in a process of its own, through the real command line and the real worker, on a tiny seeded model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import tiny_model
from PIL import Image

from flashtalk_cli.live.control import ask

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--model", "model", "--size", "64x64", "--steps", "1", "--set", "hearing.context_s=4"]


def furnish(folder: Path) -> Path:
    """Put a model, two pictures and a sound into a folder."""
    tiny_model.write(folder / "model")
    rng = np.random.default_rng(0)
    for name in ("p.png", "other.png"):
        Image.fromarray(rng.integers(0, 255, (90, 70, 3), dtype=np.uint8)).save(folder / name)
    speech = np.sin(np.arange(44_100 * 4) / 30) * rng.uniform(0, 0.3, 44_100 * 4)
    soundfile.write(folder / "speech.wav", speech[: round(44_100 * 2.5)], 44_100)
    return folder


class Stream:
    """A stream in a process of its own; its events as they come."""

    def __init__(self, place: Path, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "flashtalk_cli", "stream", "p.png", *SMALL, "--json", *arguments]
        self.control = place / f"{os.getpid()}-{id(self)}.sock"
        self.process = subprocess.Popen(
            [*command, "--control", str(self.control)],
            cwd=place,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.events: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.events.append({**json.loads(line), "at_s": time.monotonic()})

    def wait_for(self, true: Any, limit_s: float = 60.0) -> dict[str, Any]:
        """The first status for which it is true."""
        end_s = time.monotonic() + limit_s
        while time.monotonic() < end_s and self.process.poll() is None:
            if found := next((e for e in self.events if e["event"] == "live" and true(e)), None):
                return found
            time.sleep(0.05)
        raise AssertionError(f"it did not happen: {self.events[-3:]} {self.process.poll()}")

    def ask(self, **request: str) -> dict[str, Any]:
        """Steer it."""
        return ask(self.control, request)

    def end(self, limit_s: float = 60.0) -> int:
        """Wait for its end; the exit code."""
        code = self.process.wait(limit_s)
        self._reader.join(5)
        return code

    def close(self) -> None:
        """Leave nothing behind."""
        self.process.kill()
        self.process.communicate()
