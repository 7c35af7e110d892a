"""The embedded model on air for a given number of minutes: what it says of itself, and what is left of it.

    python -m tests.soak MINUTES

Prints a line of JSON at the end. Fails when its memory grows by more than 0.2 MB a minute over the second half
(at first the allocator still learns how much is needed at once), when the recording's picture and sound differ
in length by more than a frame, or when it does not end in order.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from flashtalk_cli.media.probe import probe

ROOT = Path(__file__).resolve().parent.parent
ASSETS = ROOT / "flashtalk_cli/assets"
GROWTH_BYTES_PER_MINUTE = 0.2e6
WARM_S = 120.0


def resident_bytes(parent: int) -> int:
    """Memory of a process and of all that it started."""
    listing = subprocess.run(
        ["ps", "-e", "-o", "pid=,ppid=,rss="], capture_output=True, text=True, check=True
    )
    rows = [tuple(map(int, line.split())) for line in listing.stdout.splitlines()]
    family, before = {parent}, 0
    while len(family) > before:
        before = len(family)
        family |= {pid for pid, ppid, _ in rows if ppid in family}
    return 1024 * sum(rss for pid, _, rss in rows if pid in family)


def main(minutes: float) -> int:
    """Stream, watch, end, and judge."""
    with tempfile.TemporaryDirectory() as folder:
        recording = Path(folder, "soak.mkv")
        words = ["stream", str(ASSETS / "portraits/maya.png"), "--audio", str(ASSETS / "speech/story.wav")]
        words += ["--loop", "-o", str(recording), "--hls", f"{folder}/hls", "--json"]
        words += ["--control", f"{folder}/control.sock"]
        stream = subprocess.Popen(
            [sys.executable, "-m", "flashtalk_cli", *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        last, memory = watch(stream, minutes)
        code = stream.wait(60)
        found = probe(recording)
    assert found.video
    assert found.audio
    half = memory[len(memory) // 2 :]
    grown = (half[-1] - half[0]) / max(1, len(half) - 1) if half else 0.0
    apart_s = abs(found.video.duration_s - found.audio.duration_s)
    figures = {
        "minutes": minutes,
        "exit_code": code,
        "realtime": last["realtime"],
        "repeated_frames": last["repeated_frames"],
        "jumps": last["jumps"],
        "delay": last["latency"]["total"],
        "grown_bytes_per_minute": round(grown),
        "memory_mb": [round(each / 1e6) for each in memory],  # a minute after another, warm
        "apart_s": round(apart_s, 4),
        "machine": f"{os.cpu_count()} cores",
    }
    sys.stdout.write(json.dumps(figures) + "\n")
    return int(code != 0 or grown > GROWTH_BYTES_PER_MINUTE or apart_s > 1 / 25)


def watch(stream: subprocess.Popen[str], minutes: float) -> tuple[dict[str, Any], list[int]]:
    """The last status, and the memory at each minute once it is warm."""
    last: dict[str, Any] = {}
    memory: list[int] = []
    began_s: float | None = None
    assert stream.stdout
    for line in stream.stdout:
        happened = json.loads(line)
        if happened["event"] != "live":
            continue
        last = happened
        now_s = time.monotonic()
        began_s = began_s or now_s
        if now_s - began_s > WARM_S + 60 * len(memory):
            memory.append(resident_bytes(stream.pid))
        if now_s - began_s > 60 * minutes:
            stream.send_signal(signal.SIGTERM)
            minutes = float("inf")
    return last, memory


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1])))
