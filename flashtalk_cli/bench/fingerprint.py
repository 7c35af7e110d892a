"""What a bench's figures hold for: this machine, these programs, this day."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from flashtalk_cli import __version__
from flashtalk_cli.media.ffmpeg import version

ASK_S = 10.0  # that another program gets to answer
PACKAGE = Path(__file__).resolve().parent.parent


def fingerprint(device: torch.device) -> dict[str, Any]:
    """Of this process; what cannot be found out is None. Names of people and hosts are not in it."""
    gpu = device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "flashtalk": __version__,
        "commit": commit(),
        "device": torch.cuda.get_device_name(device) if gpu else _processor(),
        "device_memory_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if gpu else None,
        "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if gpu
        else None,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "ffmpeg": version(),
    }


def commit() -> str | None:
    """The git commit that this program runs from, with + when files differ from it; None for an installed one."""
    if _asked("git", "-C", str(PACKAGE), "rev-parse", "--show-toplevel") != str(PACKAGE.parent):
        return None
    found = _asked("git", "-C", str(PACKAGE), "rev-parse", "--short=12", "HEAD")
    changed = _asked("git", "-C", str(PACKAGE), "status", "--porcelain", "--untracked-files=no", "--", ".")
    return found and f"{found}+" if changed else found


def _asked(*command: str) -> str | None:
    """The first line that a program answers; None when it is absent, fails, or says nothing."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(ended.stdout.strip().splitlines()), None)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
