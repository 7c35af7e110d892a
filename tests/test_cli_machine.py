"""`flashtalk presets`, `models` and `doctor`, held to: what is listed is there, what is shown loads again, and what
a machine lacks is said, with the figures."""

from __future__ import annotations

import json

import numpy as np
import pytest
from cli_parts import error_line, model_folder

from flashtalk_cli import presets
from flashtalk_cli.cli import machine
from flashtalk_cli.cli.app import run
from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models.device import choose_device


def test_presets_are_listed_also_without_a_subcommand(capsys):
    assert run(["presets"]) == 0
    assert run(["presets", "list"]) == 0
    first, second = np.array_split(capsys.readouterr().out.splitlines(), 2)
    assert list(first) == list(second)
    assert [line.split()[0] for line in first] == presets.names()
    assert all(len(line) < 100 for line in first)


def test_a_shown_preset_loads_again(tmp_path, capsys):
    assert run(["presets", "show", "mini", "--set", "sampling.steps=2"]) == 0
    path = tmp_path / "mine.yaml"
    path.write_text(capsys.readouterr().out, encoding="utf-8")
    expected = presets.load("mini", [presets.parse_set("sampling.steps=2")])
    assert presets.load(str(path)) == expected


def test_models_are_listed_with_their_state(tmp_path, monkeypatch, capsys):
    model_folder(tmp_path / "other")
    monkeypatch.setenv("FLASHTALK_HOME", str(tmp_path))
    assert run(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("soulx-14b")).split()[1] == "absent"
    assert next(line for line in lines if line.startswith("other")).split()[1] == "ready"


def test_pulling_what_is_not_on_the_hub_is_a_model_error(capsys):
    assert run(["models", "pull", "none"]) == 5
    assert "soulx-14b" in error_line(capsys)


def test_verifying_an_incomplete_model_says_what_is_wrong(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert run(["models", "verify", str(tmp_path)]) == 5
    assert "missing files: " in error_line(capsys)


def test_doctor_reports_what_a_render_needs(capsys):
    assert run(["doctor", "--quick", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    topics = {finding["topic"] for finding in report["findings"]}
    assert topics >= {
        "flashtalk",
        "ffmpeg",
        "encoders",
        "torch",
        "libraries",
        "attention",
        "disk",
        "model",
        "preset",
    }
    assert {finding["state"] for finding in report["findings"]} <= {"good", "note"}
    assert report["probe"]["attention"]["sdpa"] is None


GPU = {"name": "GPU", "capability": "9.0", "free_bytes": 1, "total_bytes": 140e9}
SEEN = {"torch": "2", "cuda": "13", "threads": 2, "gpus": [], "attention": {"sdpa": None}}


@pytest.mark.parametrize(
    ("gpus", "fits"),
    [
        ([], ["mini"]),
        ([GPU], ["h200x1-fp8", "mini", "soulx-14b"]),
        ([GPU, GPU], ["h200x1-fp8", "h200x2-bf16", "h200x2-realtime", "mini", "soulx-14b"]),
        ([{**GPU, "total_bytes": 45e9}], ["h200x1-fp8", "mini", "soulx-14b"]),  # the last with --offload
        ([{**GPU, "total_bytes": 8e9}], ["mini"]),
    ],
)
def test_doctor_says_which_preset_fits(monkeypatch, gpus, fits):
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: 128e9)
    found = [f for f in machine.examine({**SEEN, "gpus": gpus}) if f.topic == "preset"]
    assert [f.text.split(":")[0] for f in found if f.state == "good"] == fits


@pytest.mark.parametrize(
    ("total_bytes", "host_bytes", "said"),
    [
        (140e9, 1e9, "soulx-14b: fits this machine"),
        (24e9, 128e9, "soulx-14b: fits with --offload"),
        (24e9, 128e9, "h200x1-fp8: needs a GPU with 42 GB; the largest here has 24 GB"),
        (24e9, 16e9, "needs 44 GB of host memory with --offload; there are 16 GB"),
        (8e9, 128e9, "needs a GPU with 49 GB, or 20 GB with --offload; the largest here has 8 GB"),
        (140e9, 1e9, "h200x2-realtime: needs 2 GPUs; there is 1"),
    ],
)
def test_doctor_says_what_a_preset_takes(monkeypatch, total_bytes, host_bytes, said):
    monkeypatch.setattr(machine, "host_memory_bytes", lambda: host_bytes)
    found = machine.examine({**SEEN, "gpus": [{**GPU, "total_bytes": total_bytes}]})
    assert any(said in f.text for f in found if f.topic == "preset")


def test_doctor_says_once_how_a_model_is_shared():
    """A line a count of GPUs, however many presets are made for that model."""
    found = [f.text for f in machine.examine({**SEEN, "gpus": [GPU] * 4}) if f.topic == "sharing"]
    assert [text.split(":")[0] for text in found] == ["soulx-14b --gpus 2", "soulx-14b --gpus 4"]
    assert "heads over 4" in found[1]


def test_doctor_survives_a_torch_that_does_not_load(monkeypatch, capsys):
    monkeypatch.setattr(machine, "probe", lambda: {"error": "libcudart.so.13: cannot open shared object"})
    assert run(["doctor"]) == 1
    captured = capsys.readouterr()
    assert "does not load: libcudart" in captured.out
    assert "see torch" in captured.err


@pytest.mark.parametrize(
    ("files", "most"),
    [
        ([], 0),
        (["dev/null", "dev/nvidiactl", "dev/nvidia-uvm"], 0),
        (["dev/nvidia0", "dev/nvidia1", "dev/nvidiactl"], 2),
        (["dev/nvidia3", "proc/driver/nvidia/gpus/0000:01:00.0", "proc/driver/nvidia/gpus/0000:02:00.0"], 2),
        (["sys/bus/pci/devices/0/vendor=0x10de", "sys/bus/pci/devices/0/class=0x030200"], 1),  # no files yet
        (["sys/bus/pci/devices/0/vendor=0x10de", "sys/bus/pci/devices/0/class=0x040300"], 0),  # its sound
        (["sys/bus/pci/devices/0/vendor=0x8086", "sys/bus/pci/devices/0/class=0x030000"], 0),
        (["sys/bus/pci/devices/0/vendor=0x10de"], 0),
        (["dev/nvidia0", "dev/kfd"], None),
        (["dev/dxg"], None),
        (["dev/nvhost-gpu"], None),
    ],
)
def test_gpus_are_counted_without_torch(tmp_path, files, most):
    """Contract: never fewer than torch may find; None where these files do not tell."""
    for file in files:
        name, _, content = file.partition("=")
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert machine.most_gpus(tmp_path) == most


def test_the_machines_gpus_are_not_more_than_counted():
    most = machine.most_gpus()
    assert most is None or len(machine.probe()["gpus"]) <= most


def test_a_gpu_that_torch_does_not_see_is_told_with_a_mend_for_every_command(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        DeviceError, match=r"--device cpu, or --set compute\.device=cpu where a command has no"
    ):
        choose_device("cuda")
