"""A microphone, as ffmpeg reads it on this system."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import ffmpeg

from flashtalk_cli.errors import InputError
from flashtalk_cli.media.ffmpeg import cause, command, find_ffmpeg, listed

DEVICE_S = 5.0  # what a microphone gets to give its first sound, or to fail
DEFAULTS = {"avfoundation": ":0", "dshow": "audio=Microphone"}  # the others have one of that name
PIPED = "arecord -t raw -f S16_LE -r 16000 | flashtalk stream ... --audio -"


def microphone(device: str) -> Any:
    """The ffmpeg-python input of a microphone; without a name the system's default."""
    driver = _driver()
    named = f"audio={device}" if driver == "dshow" and device else device
    return ffmpeg.input(named or DEFAULTS.get(driver, "default"), format=driver)


def check_microphone(device: str) -> None:
    """Raises `InputError` when no sound can be had from it."""
    driver, shown = _driver(), device or "the microphone"
    if driver == "alsa" and driver not in listed(find_ffmpeg(), "-devices"):
        raise InputError(
            f"{shown}: the ffmpeg at {find_ffmpeg()} has no alsa: install the system's ffmpeg, or pipe {PIPED}"
        )
    words = command(microphone(device).output("-", format="null", map="0:a:0", t=0.1))
    try:
        tried = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=DEVICE_S)
    except subprocess.TimeoutExpired:  # it is there, and silent
        return
    if tried.returncode:
        lines = tried.stderr.decode(errors="replace").splitlines()
        raise InputError(
            f"{shown}: no sound can be had from it ({cause(tried.returncode, lines)}); "
            "plug one in, or name another with --audio mic:DEVICE"
        )


def _driver() -> str:
    if sys.platform.startswith("darwin"):
        return "avfoundation"
    if sys.platform.startswith("win32"):
        return "dshow"
    return "pulse" if _pulse_runs() else "alsa"


def _pulse_runs() -> bool:
    with suppress(OSError):
        return any(Path(f"/run/user/{os.getuid()}/pulse").iterdir())
    return False
