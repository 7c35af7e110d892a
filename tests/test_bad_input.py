"""Bad input, held to: one error line that has the reason, the documented exit code, and nothing under the
final name; odd but good names work. Faults before the worker run through the command line in this
process and must not reach it; faults inside it run for real."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import cli_parts
import numpy as np
import pytest
import soundfile
from PIL import Image

from flashtalk_cli import launch
from flashtalk_cli.cli.app import run
from flashtalk_cli.media import probe as media_probe

ROOT = Path(__file__).parent.parent


def png(width_px: int = 64, height_px: int = 96) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height_px, width_px, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "PNG")
    return data.getvalue()


def png_that_claims(width_px: int, height_px: int) -> bytes:
    """A few bytes of PNG whose header promises a huge picture."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def wav(samples: np.ndarray, subtype: str = "PCM_16") -> bytes:
    data = io.BytesIO()
    soundfile.write(data, samples, 16000, format="WAV", subtype=subtype)
    return data.getvalue()


TONE = np.sin(np.arange(16000) * 0.2).astype(np.float32) * 0.1
NAN = np.where(np.arange(16000) == 8000, np.nan, TONE).astype(np.float32)
NO_CHANNELS = b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00\x01\x00\x00\x00\x80>\x00\x00\x00\x00\x00\x00\x00\x00\x10\x00data\x00\x00\x00\x00"


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Path:
    """Good and bad files, made once."""
    folder = tmp_path_factory.mktemp("bad input")
    for name, content in {
        "p.png": png(),
        "s.wav": wav(TONE),
        "empty.png": b"",
        "empty.wav": b"",
        "cut.png": png()[:4000],
        "cut.wav": wav(TONE)[:9000],
        "text.png": b"not a picture at all\n" * 9,
        "text.wav": b"not a sound at all\n" * 9,
        "bomb.png": png_that_claims(60000, 60000),
        "dot.png": png(1, 1),
        "strip.png": png(1000, 40),
        "nan.wav": wav(NAN, "FLOAT"),
        "inf.wav": wav(np.where(NAN == NAN, TONE, np.inf).astype(np.float32), "FLOAT"),
        "none.wav": wav(TONE[:0]),
        "channels.wav": NO_CHANNELS,
        "file": b"x",
        "bad.yaml": b"name: x\ndescription: y\nsampling: {step: 4}\n",
        "twice.yaml": b"name: x\nname: y\n",
        "old.mp4": b"somebody's video",
    }.items():
        (folder / name).write_bytes(content)
    cli_parts.model_folder(folder / "model")
    for broken in ("no dit", "no tokenizer", "no speech"):
        cli_parts.model_folder(folder / broken)
    (folder / "no dit" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "no tokenizer" / "google/umt5-xxl/spiece.model").unlink()
    (folder / "no tokenizer" / "google/umt5-xxl").rmdir()
    (folder / "no speech" / "chinese-wav2vec2-base/pytorch_model.bin").unlink()
    return folder


MODEL = ["--model", "model"]
GOOD = ["p.png", "s.wav"]
# what it is: (arguments of render, exit code, part of the line)
CASES: dict[str, tuple[list[str], int, str]] = {
    "picture missing": (["no.png", "s.wav", *MODEL], 4, "no.png: no such file"),
    "picture empty": (["empty.png", "s.wav", *MODEL], 4, "empty.png: is empty"),
    "picture cut short": (["cut.png", "s.wav", *MODEL], 4, "cut.png: broken or cut short"),
    "picture is text": (["text.png", "s.wav", *MODEL], 4, "text.png: not a picture"),
    "picture is a sound": (["s.wav", "s.wav", *MODEL], 4, "s.wav: not a picture"),
    "picture is a folder": (["model", "s.wav", *MODEL], 4, "model: is a folder"),
    "picture is a device": (["/dev/null", "s.wav", *MODEL], 4, "not a regular file"),
    "picture is a bomb": (["bomb.png", "s.wav", *MODEL], 4, "megapixels"),
    "picture of one pixel": (["dot.png", "s.wav", *MODEL], 4, "1x1 pixels are too few"),
    "picture is a strip": (["strip.png", "s.wav", *MODEL], 4, "too long a strip"),
    "sound missing": (["p.png", "no.wav", *MODEL], 4, "no.wav: no such file"),
    "sound empty": (["p.png", "empty.wav", *MODEL], 4, "empty.wav: is empty"),
    "sound cut short": (["p.png", "cut.wav", *MODEL], 4, "cut.wav: broken or cut short"),
    "sound is text": (["p.png", "text.wav", *MODEL], 4, "text.wav: not a sound"),
    "sound is a picture": (["p.png", "p.png", *MODEL], 4, "p.png: "),
    "sound is a folder": (["p.png", "model", *MODEL], 4, "model: is a folder"),
    "sound with NaN": (["p.png", "nan.wav", *MODEL], 4, "nan.wav: a sample at 0.500 s is NaN"),
    "sound with infinity": (["p.png", "inf.wav", *MODEL], 4, "inf.wav: a sample at 0.500 s"),
    "sound of no samples": (["p.png", "none.wav", *MODEL], 4, "none.wav: holds no samples"),
    "sound of no channels": (["p.png", "channels.wav", *MODEL], 4, "channels.wav: "),
    "output of no known kind": ([*GOOD, *MODEL, "-o", "out.txt"], 6, "'.txt'"),
    "output without a suffix": (
        [*GOOD, *MODEL, "-o", "out"],
        6,
        "has no suffix; end its name in one of .mp4",
    ),
    "output without a name": ([*GOOD, *MODEL, "-o", ""], 6, ".mp4"),
    "output exists": ([*GOOD, *MODEL, "-o", "old.mp4"], 6, "old.mp4: exists"),
    "output is a folder": ([*GOOD, *MODEL, "-o", "model"], 6, "model/s-p.mp4"),
    "output is this folder": ([*GOOD, *MODEL, "-o", "."], 6, "is a folder; name a file in it"),
    "output in no folder": ([*GOOD, *MODEL, "-o", "no/out.mp4"], 6, "does not exist; create it"),
    "output below a file": ([*GOOD, *MODEL, "-o", "file/out.mp4"], 6, "file/out.mp4: "),
    "output is an input": ([*GOOD, *MODEL, "-o", "s.wav/../old.mp4", "--overwrite"], 6, "old.mp4: "),
    "output name too long": ([*GOOD, *MODEL, "-o", "x" * 300 + ".mp4"], 6, "File name too long"),
    "codec unknown": (
        [*GOOD, *MODEL, "--codec", "h266"],
        3,
        "takes auto, h264, nvenc, hevc, hevc_nvenc, vp9, av1",
    ),
    "codec of another container": (
        [*GOOD, *MODEL, "--codec", "vp9", "-o", "out.mov"],
        6,
        "does not go into .mov",
    ),
    "quality beyond the codec": ([*GOOD, *MODEL, "--crf", "60"], 6, "crf 60"),
    "quality beyond all": ([*GOOD, *MODEL, "--crf", "64"], 3, "--crf: encoding.crf is 64"),
    "preset unknown": ([*GOOD, *MODEL, "--preset", "minni"], 3, "did you mean mini?"),
    "preset file missing": ([*GOOD, *MODEL, "--preset", "no.yaml"], 3, "no.yaml: no such preset file"),
    "preset with an unknown key": ([*GOOD, "--preset", "bad.yaml"], 3, "unknown key 'sampling.step'"),
    "preset with a key twice": ([*GOOD, "--preset", "twice.yaml"], 3, "given twice"),
    "preset is a picture": ([*GOOD, "--preset", "./p.png"], 3, "./p.png: not a preset"),
    "key unknown": ([*GOOD, "--set", "canvas.hight_px=64"], 3, "did you mean height_px?"),
    "value of the wrong type": ([*GOOD, "--set", "sampling.steps='4'"], 3, "sampling.steps is '4'"),
    "set without a value": ([*GOOD, "--set", "sampling.steps"], 3, "KEY=VALUE"),
    "no steps": ([*GOOD, "--steps", "0"], 3, "--steps: sampling.steps is 0"),
    "seed below zero": ([*GOOD, "--seed", "-1"], 3, "--seed: sampling.seed is -1"),
    "fit unknown": ([*GOOD, "--fit", "stretch"], 3, "accepted: crop, pad"),
    "background no colour": ([*GOOD, "--background", "red"], 3, "'red'; accepted: #RRGGBB, such as #336699"),
    "device unknown": ([*GOOD, "--device", "tpu"], 3, "accepted: auto, cpu, cuda"),
    "eight bits on a CPU": ([*GOOD, "--set", "precision.dit=fp8"], 7, "--set precision.dit=auto"),
    "attention of a GPU on a CPU": ([*GOOD, "--set", "compute.attention=fa3"], 7, "compute.attention=auto"),
    "offloading from a CPU": ([*GOOD, "--offload"], 7, "leave it out"),
    "weights unknown": ([*GOOD, "--weights", "best"], 3, "accepted: released, random"),
    "size not of sixteens": ([*GOOD, "--size", "100x160"], 3, "multiples of 16: take 96x160 or 112x160"),
    "picture is an address": (
        ["https://x.y/a.png", "s.wav"],
        4,
        "https://x.y/a.png: is an address, not a file; save it",
    ),
    "size too small": ([*GOOD, "--size", "48x64"], 3, "from 64 to 4096"),
    "size no size": ([*GOOD, "--size", "large"], 3, "WIDTHxHEIGHT"),
    "size upside down": ([*GOOD, "--size", "0x-16"], 3, "WIDTHxHEIGHT"),
    "model missing": ([*GOOD, "--model", "none"], 5, "no model 'none'"),
    "model is a file": ([*GOOD, "--model", "file"], 5, "file is a file, and a model is a folder"),
    "model without the DiT": ([*GOOD, "--model", "no dit"], 5, "diffusion_pytorch_model*.safetensors"),
    "model without a tokenizer": ([*GOOD, "--model", "no tokenizer"], 5, "google/umt5-xxl"),
    "model without speech weights": ([*GOOD, "--model", "no speech"], 5, "pytorch_model.bin"),
    "no arguments": ([], 2, "missing argument 'PICTURE'"),
    "one argument": (["p.png"], 2, "missing argument 'SPEECH'"),
    "dash taken for an option": (["-p.png", "s.wav"], 2, "no such option"),
}


@pytest.fixture
def never_launched(monkeypatch):
    def fail(*arguments: object, **options: object) -> int:
        raise AssertionError("launched")

    monkeypatch.setattr(launch, "run", fail)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("what", CASES)
def test_bad_input(what, workplace, monkeypatch, never_launched, capsys):
    arguments, code, said = CASES[what]
    monkeypatch.chdir(workplace)
    before = files(workplace)
    assert run(["render", *arguments]) == code
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert len(errors) == 1, lines
    assert said in errors[0]
    assert "internal error" not in errors[0]
    assert lines[-1] == errors[0]
    assert all(line.split(":")[0] in ("picture", "sound") for line in lines[:-1]), lines
    assert files(workplace) == before


def test_an_input_is_never_overwritten(workplace, monkeypatch, never_launched, capsys):
    monkeypatch.chdir(workplace)
    assert run(["render", "p.png", "old.mp4", *MODEL, "-o", "./model/../old.mp4", "--overwrite"]) == 6
    assert "is an input too" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(workplace, tmp_path, monkeypatch, never_launched, capsys):
    tmp_path.chmod(0o500)
    monkeypatch.chdir(workplace)
    assert run(["render", *GOOD, *MODEL, "-o", str(tmp_path / "out.mp4")]) == 6
    assert "no permission" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc here")
def test_a_file_system_that_takes_no_files(workplace, monkeypatch, never_launched, capsys):
    monkeypatch.chdir(workplace)
    assert run(["render", *GOOD, *MODEL, "-o", "/proc/out.mp4"]) == 6
    assert capsys.readouterr().err.count("error: ") == 1


# Names that look bad and are good

GOOD_NAMES = {
    "dash after --": ["--", "-p.png", "-s.wav"],
    "dash after ./": ["./-p.png", "./-s.wav"],
    "unicode": ["Ärger 日本 🙂.png", "naïve \u202eبها.wav"],
    "spaces, quotes and colons": ["a b'c\"d.png", "file:x %d.wav"],
    "newline": ["a\nb.png", "c\td.wav"],
    "no suffix": ["picture", "sound"],
    "wrong suffix": ["p.wav", "s.png"],
}


@pytest.mark.parametrize("what", GOOD_NAMES)
def test_odd_names_work(what, workplace, tmp_path, monkeypatch, capsys):
    seen = []

    def fake(job, on_event, **options):
        seen.append(type(job).model_validate_json(job.model_dump_json()))
        return 0

    monkeypatch.setattr(launch, "run", fake)
    *dashes, picture, speech = GOOD_NAMES[what]
    (tmp_path / picture).write_bytes((workplace / "p.png").read_bytes())
    (tmp_path / speech).write_bytes((workplace / "s.wav").read_bytes())
    monkeypatch.chdir(tmp_path)
    assert run(["render", "--model", str(workplace / "model"), *dashes, picture, speech]) == 0, (
        capsys.readouterr().err
    )
    assert (seen[0].picture, seen[0].audio) == (tmp_path / picture, tmp_path / speech)
    assert seen[0].output.parent == tmp_path


def test_a_name_that_is_no_text_is_refused_in_one_line(
    workplace, tmp_path, monkeypatch, never_launched, capsys
):
    picture = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.png"))
    picture.write_bytes((workplace / "p.png").read_bytes())
    monkeypatch.chdir(workplace)
    assert run(["render", str(picture), "s.wav", *MODEL]) == 6  # the output would be named after it
    assert run(["render", str(picture), "s.wav", *MODEL, "-o", str(tmp_path / "out.mp4")]) == 4
    first, second = capsys.readouterr().err.splitlines()
    assert "not valid UTF-8" in first
    assert "not valid UTF-8" in second


# Faults that only the worker meets, for real, on a model of a few hundred kilobytes

SMALL = [
    "--size",
    "64x64",
    "--steps",
    "1",
    "--set",
    "sampling.chunk_frames=5",
    "--set",
    "sampling.motion_frames=1",
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    import tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    tiny_model.write(folder)
    return folder


@pytest.fixture
def at_work(workplace, tmp_path, monkeypatch) -> Path:
    """An empty current folder, from which workers find the package whether it is installed or not."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(workplace: Path, model: Path, *options: str) -> list[str]:
    return [
        "render",
        str(workplace / "p.png"),
        str(workplace / "s.wav"),
        "--model",
        str(model),
        *SMALL,
        *options,
    ]


def test_weights_that_lack_a_tensor(workplace, tiny, at_work, capsys):
    import safetensors.torch

    model = at_work / "model"
    shutil.copytree(tiny, model)
    path = model / "diffusion_pytorch_model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors.pop("head.head.weight")
    safetensors.torch.save_file(tensors, path)
    assert run(command(workplace, model)) == 5
    line = cli_parts.error_line(capsys)
    assert "head.head.weight" in line
    assert list(at_work.iterdir()) == [model]


def test_weights_that_are_cut_short(workplace, tiny, at_work, capsys):
    model = at_work / "model"
    shutil.copytree(tiny, model)
    path = model / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    assert run(command(workplace, model)) == 5
    assert path.name in cli_parts.error_line(capsys)
    assert list(at_work.iterdir()) == [model]


@pytest.mark.skipif(Path("/dev/nvidiactl").exists(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(workplace, tiny, at_work, capsys):
    assert run(command(workplace, tiny, "--device", "cuda")) == 7
    assert "--device cpu" in cli_parts.error_line(capsys)
    assert list(at_work.iterdir()) == []


def test_interrupted_in_the_middle_keeps_what_was_rendered(workplace, tiny, at_work):
    """Ctrl-C after the first chunk: 130, a part file that plays, no final file, no process left."""
    arguments = [sys.executable, "-m", "flashtalk_cli", *command(workplace, tiny, "-o", "out.mp4", "--json")]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if json.loads(line)["event"] == "chunk":
            process.send_signal(signal.SIGINT)
            break
    out, err = process.communicate(timeout=120)
    last = json.loads(out.splitlines()[-1])
    assert (process.returncode, last["event"], err) == (130, "interrupted", "")
    part = at_work / "out.mp4.part"
    assert list(at_work.iterdir()) == [part]
    assert last["path"] == str(part)
    assert media_probe.probe(part).video.n_frames == last["frames"] > 0
