"""A report in words: what the terminal, the page and the README say alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# What parts are called for people; others keep their names.
TITLES = {
    "speech": "audio encoding",
    "keys": "audio keys and values",
    "noise": "noise and stepping in time",
    "step": "DiT",
    "prime": "VAE decode, motion latents",
    "decode": "VAE decode, new latents",
    "colour": "colour",
    "bytes": "to bytes",
    "to host": "copy to host",
    "deliver": "delivery to ffmpeg",
    "motion": "motion encode",
}
ONCE = {
    "process": "process start",
    "inputs": "picture and prompt, encoders loaded",
    "load": "model load",
    "prepare": "session set-up",
    "warm_up": "compile, capture, tuning",
    "drain": "encoder, after the last frame",
}
CEILING = (
    "work: as the network defines it, so that an implementation which needs less of it shows as speed; "
    "ceiling: that work at rates of single operations, measured in this run:"
)


def milliseconds(seconds: float) -> str:
    """With the digits that matter."""
    ms = seconds * 1000
    return f"{ms:.2f}" if ms < 1 else f"{ms:.1f}" if ms < 100 else f"{ms:,.0f}"


def amount(tflop: float) -> str:
    """Operations, or with /s behind it a rate."""
    return f"{tflop:,.1f} TFLOP" if tflop >= 1 else f"{tflop * 1000:,.1f} GFLOP"


def title(report: Mapping[str, Any]) -> str:
    """What was measured."""
    setting = report["setting"]
    model = f", {setting['weights']} weights" if setting["weights"] == "random" else ""
    steps = f"{setting['steps']} step{'s' if setting['steps'] != 1 else ''}"
    return f"{setting['preset']} {setting['canvas']}, {steps}, {number_format(report)}{model}"


def number_format(report: Mapping[str, Any]) -> str:
    """Of the DiT, as the preset names it unless it left the choice to the machine; attention's where it is less."""
    setting = report["setting"]
    named = setting["precision"]["dit"]
    name = str(setting["dit_dtype"] if named == "auto" else named)
    return f"{name} with attention" if setting["attention"].endswith("-fp8") else name


def hardware(report: Mapping[str, Any]) -> str:
    """What it ran on."""
    device, ranks = report["fingerprint"]["device"], report["setting"]["ranks"]
    if report["fingerprint"]["device_memory_gib"] is None:
        return f"{device}, {report['fingerprint']['threads'] * ranks} threads"
    return f"{ranks} x {device}"


def programs(report: Mapping[str, Any]) -> str:
    """What ran, and when."""
    found = report["fingerprint"]
    commit = f" ({found['commit']})" if found["commit"] else ""
    cuda = f", CUDA {found['cuda']}, driver {found['driver']}" if found["driver"] else ""
    return f"flashtalk {found['flashtalk']}{commit}, torch {found['torch']}{cuda}, {found['date'][:10]}"


def verdict(report: Mapping[str, Any]) -> str:
    """What this machine can do live."""
    setting, live, chunk = report["setting"], report["live"], report["chunk"]
    allowed_s = live["audio_fill_s"]
    took = f"a chunk of {allowed_s:.2f} s takes {chunk['p50_s']:.2f} s, at worst {chunk['p95_s']:.2f} s (p95)"
    realtime = report["speed"]["realtime"]
    if realtime < 1:
        needed = f"it would have to be {1 / realtime:.1f} times as fast"
        return f"not live: {realtime:.2f} times real time at {setting['fps']} fps; {took}; {needed}"
    if not live["holds"]:
        return f"live, with hitches: {realtime:.2f} times real time, but {took}: later than it is shown"
    return f"live: {realtime:.2f} times real time at {setting['fps']} fps; {took}: {live['spare_s']:.2f} s to spare"


def start_up(report: Mapping[str, Any]) -> str:
    """How soon there is something to see."""
    live = report["live"]
    return (
        f"first frame {live['first_frame']['p50_s']:.2f} s after the chunk's sound; "
        f"from the first sample of sound {live['start_warm_s']:.2f} s, of which "
        f"{live['audio_fill_s'] + live['lookahead_s']:.2f} s is the sound itself (not measured: from the preset); "
        f"from a cold start {live['start_cold_s']:.1f} s"
    )


def readme_line(report: Mapping[str, Any]) -> str:
    """A row of the README's table: preset, hardware, frames a second, first frame, memory, when."""
    speed, live = report["speed"], report["live"]
    return (
        f"| {title(report)} | {hardware(report)} | {speed['fps']:.1f} fps, {speed['realtime']:.2f}x real time "
        f"| first frame {live['first_frame']['p50_s']:.2f} s | {report['memory']['peak_gib']:.1f} GiB "
        f"| {programs(report)} |"
    )
