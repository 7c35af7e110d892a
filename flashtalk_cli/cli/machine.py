"""What this machine has of what a render needs, and which preset fits it: the findings of `flashtalk doctor`.

And what of it can be said before a run, without torch: what cannot go well, and what is worth a warning.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, cast

from flashtalk_cli import __version__, presets
from flashtalk_cli.cli.hosts import split_of
from flashtalk_cli.cli.needs import NEEDS, Needs
from flashtalk_cli.config import Canvas, Compute, Preset
from flashtalk_cli.errors import DeviceError, FlashtalkError
from flashtalk_cli.media.codecs import opens
from flashtalk_cli.media.ffmpeg import encoders, find_ffmpeg, version
from flashtalk_cli.models.folder import KNOWN, RELEASED_HEADS, home, list_models

PROBE_S = 120.0  # a cold torch with a GPU driver loads slowly
LOW_DISK_BYTES = 2e9

FAR_BEYOND = 4  # times the area that the embedded model was trained for: beyond, its mouth stays shut
# Device files of GPUs that torch may use and that are not counted here: AMD's, WSL's, Jetson's.
UNCOUNTED_GPUS = {"kfd", "dxg", "nvgpu", "nvhost-gpu", "nvmap"}
NVIDIA, DISPLAY = "0x10de", "0x03"  # a PCI device's vendor, and how its class begins

VIDEO_ENCODERS = ("libx264", "libx265", "libvpx-vp9", "libsvtav1", "h264_nvenc", "hevc_nvenc")
SOUND_ENCODERS = ("aac", "libopus")
LIBRARIES = ("transformers", "safetensors", "numpy", "pillow")

State = Literal["good", "note", "bad"]


@dataclass(frozen=True)
class Finding:
    """One line of the report. `bad` means that nothing can be rendered until it is mended."""

    topic: str
    state: State
    text: str


def examine(seen: dict[str, Any]) -> list[Finding]:
    """All findings, given what `probe` saw."""
    return [
        *(*_program(), *_ffmpeg(), *_torch(seen), *_disk(), *_models()),
        *(*_presets(seen), *_sharing(seen)),
    ]


def probe() -> dict[str, Any]:
    """What torch sees, from a process of its own; {"error": ...} when that fails."""
    command = [sys.executable, "-m", "flashtalk_cli.cli.probe"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_S, errors="replace")
    except subprocess.TimeoutExpired:
        return {"error": f"torch did not load within {PROBE_S:.0f} s"}
    if ended.returncode:
        last = ended.stderr.strip().splitlines()[-1:] or [f"exit code {ended.returncode}"]
        return {"error": last[0]}
    return dict(json.loads(ended.stdout))


def processes_of(compute: Compute) -> int:
    """Processes that a job needs, a GPU each; `all` are as many as torch sees, and one without any."""
    if compute.gpus != "all":
        return compute.gpus
    return 1 if compute.device == "cpu" else max(1, len(probe().get("gpus", [])))


def check_cpu(preset: Preset) -> None:
    """Whether a preset that runs on a CPU asks for what only a GPU does. Raises DeviceError when it does."""
    compute = preset.compute
    if preset.precision.dit == "fp8":
        problem = "precision.dit fp8 needs a GPU and this run uses the CPU: --set precision.dit=auto"
    elif compute.attention not in ("auto", "sdpa"):
        kernel = f"compute.attention {compute.attention}"
        problem = f"{kernel} needs a GPU and this run uses the CPU: --set compute.attention=auto"
    elif compute.offload:
        problem = "--offload saves memory of a GPU and this run uses the CPU: leave it out"
    else:
        return
    raise DeviceError(problem)


def check_machine(preset: Preset) -> None:
    """Whether this machine has the GPUs that a preset needs, as far as that can be told without torch.

    Raises DeviceError when it has not: better than after a model was fetched that cannot run here.
    """
    compute, most = preset.compute, most_gpus()
    if runs_on_cpu(compute):
        check_cpu(preset)
    elif compute.device == "cuda" and most == 0:
        raise DeviceError(_no_gpu(preset))
    elif most and compute.gpus != "all" and compute.gpus > most:
        raise DeviceError(
            f"preset {preset.name} needs {compute.gpus} GPUs, this machine has {most}: lower --gpus"
        )


def _no_gpu(preset: Preset) -> str:
    """What to say, and to do, where there is none: a model for a CPU, a released one, or somebody's own."""
    model = KNOWN.get(preset.model.name)
    if model is not None and model.repository is None:
        return f"this machine has no GPU, and {preset.model.name} needs none: leave out --device cuda"
    mend = "take --preset mini, which is for a CPU"
    if model is None:
        mend += ", or --device cpu, or --set compute.device=cpu where a command has no --device"
    return f"preset {preset.name} needs a GPU and this machine has none: {mend}"


def runs_on_cpu(compute: Compute) -> bool:
    """Whether it is certain that a run here uses the CPU."""
    return compute.device == "cpu" or (compute.device == "auto" and most_gpus() == 0)


def most_gpus(root: Path = Path("/")) -> int | None:
    """At most so many GPUs can torch see here, by what the kernel knows of; None where only torch can tell.

    A driver may make its device files when they are first asked for, and a container may be given a few of the
    GPUs that it sees on the bus: the largest count is the one that is not exceeded.
    """
    files = {path.name for path in (root / "dev").glob("*")}
    if files & UNCOUNTED_GPUS:
        return None
    present = sum(re.fullmatch(r"nvidia\d+", name) is not None for name in files)
    driven = len(list((root / "proc/driver/nvidia/gpus").glob("*")))
    return max(present, driven, sum(map(_is_nvidia_gpu, (root / "sys/bus/pci/devices").glob("*"))))


def _is_nvidia_gpu(device: Path) -> bool:
    try:
        vendor, kind = ((device / name).read_text() for name in ("vendor", "class"))
    except OSError:  # taken away meanwhile
        return False
    return vendor.strip() == NVIDIA and kind.startswith(DISPLAY)


def cautions(preset: Preset, processes: int) -> list[str]:
    """What is worth a warning before so many processes run a preset, a line each."""
    found = []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if processes > cores and runs_on_cpu(preset.compute):
        found.append(f"{processes} processes on the {cores} cores of this CPU take turns: lower --gpus")
    model, canvas = preset.model.name, preset.canvas
    if model in KNOWN and KNOWN[model].repository is None:  # what it was trained for is in its preset
        own: Canvas = presets.load(model).canvas
        if canvas.area_px > FAR_BEYOND * own.area_px:
            found.append(
                f"{model} was trained for {own.width_px}x{own.height_px}; at {canvas.width_px}x{canvas.height_px} "
                f"it is slow and hardly speaks: take --preset {model} --size auto"
            )
    return found


def _program() -> list[Finding]:
    system = f"Python {platform.python_version()}, {platform.system()} {platform.release()}"
    return [Finding("flashtalk", "good", f"{__version__}, {system}")]


def _ffmpeg() -> list[Finding]:
    try:
        found = find_ffmpeg()
    except FlashtalkError as error:
        return [Finding("ffmpeg", "bad", str(error))]
    wanted = (*VIDEO_ENCODERS, *SOUND_ENCODERS)
    have = [name for name in wanted if _usable(name)]
    lack = [name for name in wanted if name not in have]
    findings = [
        Finding("ffmpeg", "good", f"{version()} at {found}"),
        Finding("encoders", "good", ", ".join(have)),
    ]
    essential = not {"libx264", "h264_nvenc"}.isdisjoint(have) and "aac" in have
    if lack:
        findings.append(Finding("encoders", "note" if essential else "bad", f"not here: {', '.join(lack)}"))
    return findings


def _usable(encoder: str) -> bool:
    """Whether ffmpeg has it; a GPU's may be compiled in and still not open."""
    return opens(encoder) if encoder.endswith("_nvenc") else encoder in encoders()


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "absent"


def _torch(seen: dict[str, Any]) -> list[Finding]:
    if "error" in seen:
        return [Finding("torch", "bad", f"does not load: {seen['error']}")]
    build = f"CUDA {seen['cuda']}" if seen["cuda"] else "CPU build"
    findings = [
        Finding("torch", "good", f"{seen['torch']}, {build}, {seen['threads']} CPU threads"),
        Finding("libraries", "good", ", ".join(f"{name} {_version_of(name)}" for name in LIBRARIES)),
    ]
    for gpu in seen["gpus"]:
        memory = f"{gpu['free_bytes'] / 1e9:.0f} of {gpu['total_bytes'] / 1e9:.0f} GB free"
        findings.append(Finding("GPU", "good", f"{gpu['name']}, compute {gpu['capability']}, {memory}"))
    if not seen["gpus"]:
        findings.append(Finding("GPU", "note", "none that torch can use: only the embedded model runs well"))
    present = [name for name, reason in seen["attention"].items() if reason is None]
    findings.append(Finding("attention", "good", f"{', '.join(present)} (fastest first)"))
    findings += [
        Finding("attention", "note", f"{name}: {reason}")
        for name, reason in seen["attention"].items()
        if reason and seen["gpus"]
    ]
    return findings


def _disk() -> list[Finding]:
    places = {"models": home(), "temporary": Path(tempfile.gettempdir()), "here": Path.cwd()}
    findings = []
    for purpose, place in places.items():
        existing = next(folder for folder in (place, *place.parents) if folder.exists())
        free = shutil.disk_usage(existing).free
        state: State = "good" if free > LOW_DISK_BYTES else "note"
        findings.append(Finding("disk", state, f"{free / 1e9:.0f} GB free for {purpose} in {place}"))
    return findings


def _models() -> list[Finding]:
    findings = []
    for entry in list_models():
        state: State = "good" if entry.state == "ready" else "note"
        mend = f"; missing {', '.join(entry.missing[:3])}" if entry.missing else ""
        findings.append(Finding("model", state, f"{entry.name} is {entry.state}, {entry.path}{mend}"))
    return findings


def _presets(seen: dict[str, Any]) -> list[Finding]:
    """A line a preset: whether it fits, how, and why not."""
    findings = []
    for name in presets.names():
        text, fits = _fit(presets.load(name), seen)
        findings.append(Finding("preset", "good" if fits else "note", f"{name}: {text}"))
    return findings


def _sharing(seen: dict[str, Any]) -> list[Finding]:
    """What --gpus gives, for every model and size that presets have for GPUs, every count that doubles, and all."""
    count = len(seen.get("gpus", ()))
    counts = sorted({n for n in (2, 4, 8, 16, count) if 2 <= n <= count})
    made: list[Preset] = [presets.load(name) for name in presets.names()] if counts else []
    findings = []
    for preset in {(p.model.name, p.canvas): p for p in made if p.compute.device == "cuda"}.values():
        for n in counts:
            try:
                text, state = str(split_of(preset, n, RELEASED_HEADS)), "good"
            except FlashtalkError as error:
                text, state = str(error), "note"
            line = f"{preset.model.name} --gpus {n}: {text}"
            findings.append(Finding("sharing", cast("State", state), line))
    return findings


def _fit(preset: Preset, seen: dict[str, Any]) -> tuple[str, bool]:
    """How a preset fits this machine, or why it does not; and whether it does."""
    if "error" in seen:
        return "torch does not load", False
    if preset.compute.device == "cuda" and not seen["gpus"]:
        return "needs a GPU", False
    wanted_gpus, have_gpus = preset.compute.gpus, len(seen["gpus"])
    if preset.compute.device == "cuda" and wanted_gpus != "all" and wanted_gpus > have_gpus:
        return f"needs {wanted_gpus} GPUs; there {'is' if have_gpus == 1 else 'are'} {have_gpus}", False
    needs = NEEDS.get((preset.model.name, preset.precision.dit == "fp8"), Needs())
    largest, host = max((gpu["total_bytes"] for gpu in seen["gpus"]), default=0), host_memory_bytes()
    if largest >= needs.gpu:
        return "fits this machine", True
    if needs.gpu_offloaded is None or largest < needs.gpu_offloaded:
        offloaded = f", or {needs.gpu_offloaded / 1e9:.0f} GB with --offload" if needs.gpu_offloaded else ""
        have = f"the largest here has {largest / 1e9:.0f} GB"
        return f"needs a GPU with {needs.gpu / 1e9:.0f} GB{offloaded}; {have}", False
    if host < needs.host_offloaded:
        wanted = f"{needs.host_offloaded / 1e9:.0f} GB of host memory with --offload"
        return f"needs {wanted}; there are {host / 1e9:.0f} GB", False
    return "fits with --offload", True


def host_memory_bytes() -> float:
    """Memory of this machine."""
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
