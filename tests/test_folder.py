"""Model folders: where they are looked for, what is said to be missing, fetching, checking without loading."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file

from flashtalk_cli.errors import ModelError
from flashtalk_cli.models import folder as folders
from flashtalk_cli.models.export import write_config
from flashtalk_cli.models.folder import (
    COMPONENTS,
    ModelFolder,
    find,
    home,
    list_models,
    pull,
    resolve,
)
from flashtalk_cli.models.verify import verify_folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_model.write(path, shards=2)
    return path


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home folder for models."""
    monkeypatch.setenv("FLASHTALK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def copy(tiny: Path, target: Path) -> Path:
    return shutil.copytree(tiny, target)


def test_no_torch_until_tensors_are_looked_at() -> None:
    """Commands that only name, list or look for models start at once."""
    code = "import sys; from flashtalk_cli.models import folder; folder.list_models(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLASHTALK_HOME, then the platform's folder for caches."""
    monkeypatch.setenv("FLASHTALK_HOME", "/models")
    assert home() == Path("/models")
    monkeypatch.delenv("FLASHTALK_HOME")
    monkeypatch.setattr(folders, "sys", SimpleNamespace(platform="linux"))
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert home() == Path("/caches/flashtalk")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/ada")
    assert home() == Path("/home/ada/.cache/flashtalk")
    monkeypatch.setattr(folders, "sys", SimpleNamespace(platform="darwin"))
    assert home() == Path("/home/ada/Library/Caches/flashtalk")


def test_models_are_found_by_path_and_by_name(
    tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert resolve(tiny).path == tiny
    assert resolve(str(tiny)).name == tiny.name
    monkeypatch.chdir(tiny.parent)
    assert resolve(tiny.name).path == tiny
    copy(tiny, place / "mine")
    assert resolve("mine").path == place / "mine"
    copy(tiny, place / "soulx-14b")
    assert resolve("soulx-14b") == ModelFolder(
        "soulx-14b", place / "soulx-14b", place / "soulx-14b" / "chinese-wav2vec2-base"
    )


def test_a_name_of_the_program_is_not_a_folder_here(
    tiny: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder `soulx-14b` in the working directory does not change what the name means."""
    copy(tiny, tmp_path / "soulx-14b")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="flashtalk models pull soulx-14b"):
        resolve("soulx-14b")
    assert resolve("./soulx-14b").path == tmp_path / "soulx-14b"


def test_an_absent_model_is_told_with_the_places(place: Path) -> None:
    with pytest.raises(ModelError) as caught:
        resolve("nobody")
    line = str(caught.value)
    assert str(Path("nobody").absolute()) in line
    assert str(place / "nobody") in line
    assert "mini, soulx-14b" in line
    assert "\n" not in line


def test_a_file_is_told_not_to_be_a_folder(place: Path, tmp_path: Path) -> None:
    (tmp_path / "tall.png").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"tall\.png is a file, and a model is a folder; flashtalk models"):
        find(tmp_path / "tall.png")


def test_the_speech_encoder_is_looked_for_in_order(tiny: Path, place: Path, tmp_path: Path) -> None:
    """Given, inside the model's folder, beside it, in the home folder."""
    model = copy(tiny, tmp_path / "models" / "a")
    inside = model / "chinese-wav2vec2-base"
    beside = Path(shutil.copytree(inside, model.parent / "chinese-wav2vec2-base"))
    at_home = Path(shutil.copytree(inside, place / "chinese-wav2vec2-base"))
    other = Path(shutil.copytree(inside, tmp_path / "other"))
    assert resolve(model, other).speech_path == other
    assert resolve(model, "chinese-wav2vec2-base").speech_path == at_home
    for expected in (inside, beside, at_home):
        assert resolve(model).speech_path == expected
        shutil.rmtree(expected)
    with pytest.raises(ModelError, match=r"2 missing: chinese-wav2vec2-base/pytorch_model\.bin"):
        resolve(model)
    with pytest.raises(ModelError, match="no speech encoder 'nobody'"):
        resolve(model, "nobody")


@pytest.mark.parametrize(
    ("removed", "named"),
    [
        ("config.json", "config.json"),
        ("google", "google/umt5-xxl"),
        ("diffusion_pytorch_model-00001-of-00002.safetensors", "diffusion_pytorch_model-00001-of-00002"),
        ("Wan2.1_VAE.safetensors", "Wan2.1_VAE.pth"),
        ("chinese-wav2vec2-base/config.json", "chinese-wav2vec2-base/config.json"),
    ],
)
def test_a_missing_file_is_named(removed: str, named: str, tiny: Path, place: Path, tmp_path: Path) -> None:
    model = copy(tiny, tmp_path / "a")
    path = model / removed
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ModelError, match=f"1 missing: {named}"):
        resolve(model)


def test_safetensors_come_before_pickles(tiny: Path, tmp_path: Path) -> None:
    model = copy(tiny, tmp_path / "a")
    (model / "Wan2.1_VAE.pth").touch()
    assert [path.suffix for path in find(model).files("vae")] == [".safetensors"]
    (model / "Wan2.1_VAE.safetensors").unlink()
    assert [path.suffix for path in find(model).files("vae")] == [".pth"]


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "is not JSON"),
        ('{"weight_map": 3}', "no weight_map"),
        ('{"weight_map": {"a": "../../etc/passwd"}}', "outside its folder"),
    ],
)
def test_a_broken_index_is_told(index: str, message: str, tiny: Path, tmp_path: Path) -> None:
    model = copy(tiny, tmp_path / "a")
    (model / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    with pytest.raises(ModelError, match=message):
        resolve(model)
    assert message in verify_folder(find(model))[0].problem


def test_the_list_of_models(tiny: Path, place: Path) -> None:
    """Known ones first, whether present or not; then what else is in the home folder."""
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries)[:2] == ["mini", "soulx-14b"]
    assert entries["soulx-14b"].state == "absent"
    assert entries["mini"].source == "packaged"
    copy(tiny, place / "mine")
    copy(tiny, place / "soulx-14b")
    (place / "soulx-14b" / "Wan2.1_VAE.safetensors").unlink()
    (place / "notes").mkdir()
    entries = {entry.name: entry for entry in list_models()}
    assert list(entries) == ["mini", "soulx-14b", "mine"]
    assert (entries["mine"].state, entries["mine"].source) == ("ready", "local")
    assert entries["mine"].size_bytes > 1e6
    assert entries["soulx-14b"].state == "incomplete"
    assert entries["soulx-14b"].missing == ["Wan2.1_VAE.pth"]


def test_verify_a_good_folder(tiny: Path) -> None:
    reports = verify_folder(find(tiny))
    assert [report.component for report in reports] == list(COMPONENTS)
    assert not any(report.problem for report in reports)
    assert all(report.n_tensors > 10 for report in reports)
    assert len(reports[0].files) == 2


def test_verify_says_what_is_wrong_of_every_component(tiny: Path, tmp_path: Path) -> None:
    """One broken file does not hide what is wrong with another."""
    model = copy(tiny, tmp_path / "a")
    vae, text = model / "Wan2.1_VAE.safetensors", model / "models_t5_umt5-xxl-enc-bf16.safetensors"
    image = next(model.glob("models_clip*"))
    tensors = load_file(vae)
    del tensors["conv2.bias"]
    save_file({**tensors, "conv1.bias": torch.zeros(7), "extra": torch.zeros(1)}, vae)
    text.write_bytes(text.read_bytes()[:-1])
    image.unlink()
    dit, vae_report, text_report, image_report, speech = verify_folder(find(model))
    assert not dit.problem
    assert not speech.problem
    assert vae_report.missing == ["conv2.bias"]
    assert vae_report.unexpected == ["extra"]
    assert vae_report.misshapen == ["conv1.bias [7] instead of [32]"]
    assert "1 missing: conv2.bias; 1 unexpected: extra; 1 misshapen: conv1.bias" in vae_report.problem
    assert "is cut off" in text_report.problem
    assert "no file of the image component" in image_report.problem


def test_verify_reads_no_tensor(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flashtalk_cli.models import tensors

    def read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(tensors.SafetensorsSource, "read", read)
    assert not any(report.problem for report in verify_folder(find(tiny)))


def hub(monkeypatch: pytest.MonkeyPatch, snapshot_download: Any) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**12))


def test_pull_fetches_model_and_speech_encoder(
    tiny: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both repositories, only the files that are used, and what comes out resolves."""
    asked: dict[str, list[str]] = {}

    def download(repository: str, *, local_dir: Path, allow_patterns: list[str], tqdm_class: Any) -> None:
        asked[repository] = allow_patterns
        speech = tiny / "chinese-wav2vec2-base"
        shutil.copytree(speech if "wav2vec2" in repository else tiny, local_dir, dirs_exist_ok=True)

    hub(monkeypatch, download)
    folder = pull("soulx-14b")
    assert folder == resolve("soulx-14b")
    assert list(asked) == ["Soul-AILab/SoulX-FlashTalk-14B", "TencentGameMate/chinese-wav2vec2-base"]
    assert "Wan2.1_VAE.*" in asked["Soul-AILab/SoulX-FlashTalk-14B"]
    assert not any(
        "fairseq" in pattern or pattern == "*" for patterns in asked.values() for pattern in patterns
    )


def test_pull_that_fails_is_one_line(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network's own reason, how to go on, and nothing left that looks like a model."""

    def download(*_: Any, **__: Any) -> None:
        try:
            raise ConnectionError("name not known\nat all")
        except ConnectionError as error:
            raise RuntimeError("an explanation\nof many lines") from error

    hub(monkeypatch, download)
    with pytest.raises(ModelError, match="name not known at all; the same command") as caught:
        pull("soulx-14b")
    assert "\n" not in str(caught.value)
    assert list_models()[1].state == "absent"


@pytest.mark.parametrize(
    ("name", "message"), [("mini", "part of the package"), ("nobody", "not a known name")]
)
def test_pull_of_what_cannot_be_pulled(name: str, message: str, place: Path) -> None:
    with pytest.raises(ModelError, match=message):
        pull(name)


def test_pull_onto_a_full_disk_is_told_beforehand(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    hub(monkeypatch, download)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9))
    with pytest.raises(ModelError, match=r"needs 55 GB more in .*, 1 GB are free; set FLASHTALK_HOME"):
        pull("soulx-14b")


def test_random_weights_need_no_folder(place: Path, tmp_path: Path) -> None:
    """A known model need not be there; one named by path must, with its config.json."""
    assert resolve("soulx-14b", random=True).path == place / "soulx-14b"
    with pytest.raises(ModelError):
        resolve("nobody", random=True)
    write_config(tmp_path / "bare", tiny_model.CONFIG)
    assert resolve(tmp_path / "bare", random=True).path == tmp_path / "bare"
