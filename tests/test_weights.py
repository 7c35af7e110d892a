"""Loading: tensors arrive as they were written, whatever is wrong is told in one line, memory is held once."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_model
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flashtalk_cli.errors import DeviceError, ModelError
from flashtalk_cli.models import weights
from flashtalk_cli.models.export import released_tensors, save_tensors, write_component, write_json
from flashtalk_cli.models.folder import COMPONENTS, STEMS, Component, ModelFolder, find, resolve
from flashtalk_cli.models.tensors import MemorySource, SafetensorsSource, fill

CPU = torch.device("cpu")
FILES: dict[str, str] = {
    "dit": "diffusion_pytorch_model.safetensors",
    **{component: f"{stem}.safetensors" for component, stem in STEMS.items()},
    "speech": "chinese-wav2vec2-base/model.safetensors",
}
VICTIMS: dict[str, str] = {  # a tensor of each component that tells no size
    "dit": "blocks.1.ffn.2.bias",
    "vae": "decoder.middle.1.to_qkv.weight",
    "text": "blocks.1.norm2.weight",
    "image": "visual.transformer.2.mlp.2.bias",  # of the block that is not run: held to all the same
    "speech": "encoder.layers.2.feed_forward.output_dense.bias",
}
LOADERS: dict[str, Callable[..., Any]] = {
    "dit": weights.load_dit,
    "vae": weights.load_vae,
    "text": weights.load_text_encoder,
    "image": weights.load_image_encoder,
    "speech": weights.load_speech_encoder,
}
each_component = pytest.mark.parametrize("component", COMPONENTS)


@pytest.fixture(scope="session")
def written_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, Tensor]]]:
    path = tmp_path_factory.mktemp("tiny")
    return path, tiny_model.write(path)


@pytest.fixture
def written(written_folder: tuple[Path, dict]) -> dict[str, dict[str, Tensor]]:
    return written_folder[1]


@pytest.fixture
def folder(written_folder: tuple[Path, dict], tmp_path: Path) -> ModelFolder:
    return resolve(shutil.copytree(written_folder[0], tmp_path / "model"))


def load(component: str, folder: ModelFolder, dtype: torch.dtype = torch.float32, **how: Any) -> Any:
    loaded = LOADERS[component](folder, CPU, dtype, **how)
    return getattr(loaded, "module", loaded)


def released(component: Component, folder: ModelFolder, module: Any) -> dict[str, Tensor]:
    """The module's tensors under their released names; of the folded position convolution, the product."""
    if component == "speech":
        return dict(module.state_dict())
    return released_tensors(module, weights.plan_of(folder, component).layout)


def expected(component: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What `released` should give for tensors as written."""
    unused = ("head", "post_norm", "transformer.2.")
    if component == "image":
        return {k: torch.zeros_like(v) if k.startswith(unused) else v for k, v in tensors.items()}
    if component != "speech":
        return tensors
    convolution = "encoder.pos_conv_embed.conv"
    g, v = (tensors[f"{convolution}.parametrizations.weight.original{i}"] for i in (0, 1))
    rest = {key: value for key, value in tensors.items() if "parametrizations" not in key}
    return rest | {f"{convolution}.weight": torch._weight_norm(v.double(), g.double(), 2).float()}


def same(component: Component, folder: ModelFolder, tensors: dict[str, Tensor]) -> None:
    ours, theirs = released(component, folder, load(component, folder)), expected(component, tensors)
    assert ours.keys() == theirs.keys()
    for key in ours:
        assert torch.equal(ours[key], theirs[key]), key


@each_component
def test_tensors_arrive_as_written(component: Component, folder: ModelFolder, written: dict) -> None:
    same(component, folder, written[component])


@each_component
def test_tensors_arrive_from_pickles(component: Component, folder: ModelFolder, written: dict) -> None:
    """The released .pth and .bin files; CLIP's with a text half, wav2vec's as its pre-training left it."""
    if component == "dit":
        pytest.skip("the DiT is released as safetensors only")
    path = folder.path / FILES[component]
    tensors = load_file(path)
    if component == "image":
        tensors |= {"log_scale": torch.ones(()), "textual.head": torch.ones(3)}
    if component == "speech":
        old = {
            "parametrizations.weight.original0": "weight_g",
            "parametrizations.weight.original1": "weight_v",
        }
        for new, name in old.items():
            stem = "encoder.pos_conv_embed.conv."
            tensors[stem + name] = tensors.pop(stem + new)
        tensors = {f"wav2vec2.{key}": value for key, value in tensors.items()}
        tensors |= {"quantizer.codevectors": torch.ones(2), "wav2vec2.masked_spec_embed": torch.ones(32)}
        torch.save(tensors, path.with_name("pytorch_model.bin"))
    else:
        torch.save(tensors, path.with_suffix(".pth"))
    path.unlink()
    same(component, folder, written[component])


def test_shards_with_an_index(tmp_path: Path, written: dict) -> None:
    tiny_model.write(tmp_path, shards=3)
    folder = resolve(tmp_path)
    assert len(folder.files("dit")) == 3
    same("dit", folder, written["dit"])
    (tmp_path / "diffusion_pytorch_model-00002-of-00003.safetensors").unlink()
    with pytest.raises(ModelError, match=r"1 missing: diffusion_pytorch_model-00002-of-00003"):
        resolve(tmp_path)
    with pytest.raises(ModelError, match=r"cannot read .*00002-of-00003"):
        load("dit", find(tmp_path))


def test_a_file_forgotten_beside_the_dit_is_told(folder: ModelFolder) -> None:
    """Fault: without an index every file of the DiT's name is read, and one tensor in two of them is one too many."""
    kept = folder.path / "diffusion_pytorch_model_old.safetensors"
    shutil.copy(folder.path / "diffusion_pytorch_model.safetensors", kept)
    with pytest.raises(ModelError, match=r"model_old\.safetensors in .* both have .*: move the one"):
        load("dit", folder)


def test_a_tensor_under_two_of_its_names_is_told(folder: ModelFolder) -> None:
    """Fault: the speech encoder's position convolution in the old words beside the new."""
    path = folder.path / FILES["speech"]
    tensors = load_file(path)
    stem = "encoder.pos_conv_embed.conv."
    tensors[f"{stem}weight_g"] = tensors[f"{stem}parametrizations.weight.original0"].clone()
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"the same tensor twice, as .* and as "):
        load("speech", folder)


@pytest.mark.parametrize("shards", [(1, 3), (3, 1), (3, 2)])
def test_a_dit_that_is_written_takes_the_place_of_all_of_the_one_before(
    shards: tuple[int, int], folder: ModelFolder, written: dict
) -> None:
    """Contract: an index or shards that were there do not hide it."""
    other = {key: value + 1 for key, value in written["dit"].items()}
    write_component(folder.path, "dit", other, shards=shards[0])
    files = write_component(folder.path, "dit", written["dit"], shards=shards[1])
    assert sorted(folder.files("dit")) == sorted(files)
    assert len(list(folder.path.glob("diffusion_pytorch_model*.safetensors"))) == shards[1]
    same("dit", folder, written["dit"])


def test_whole_numbers_are_no_weights(folder: ModelFolder) -> None:
    """Fault: a quantised file of the right names and shapes is told when it is loaded, not in mid-render."""
    path = folder.path / FILES["dit"]
    tensors = load_file(path)
    key = "blocks.0.ffn.0.weight"
    save_file({**tensors, key: tensors[key].to(torch.int8)}, path)
    with pytest.raises(ModelError, match=f"{key} is of int8"):
        load("dit", folder)


@each_component
def test_numbers_are_converted_on_the_way(component: Component, folder: ModelFolder, written: dict) -> None:
    module = load(component, folder, torch.bfloat16)
    assert {tensor.dtype for tensor in module.state_dict().values()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in module.parameters())
    assert not module.training
    name, ours = next(iter(released(component, folder, module).items()))
    assert torch.equal(ours, expected(component, written[component])[name].bfloat16())


def test_vae_keeps_its_memory_order(folder: ModelFolder) -> None:
    """Convolutions lie in memory as they are built (channels last), whatever order the file has."""
    built = weights.plan_of(folder, "vae").module.state_dict()
    for how in ({}, {"random": True}):
        loaded = load("vae", folder, torch.bfloat16, **how).state_dict()
        assert {k: v.stride() for k, v in loaded.items()} == {k: v.stride() for k, v in built.items()}
    assert not built["encoder.conv1.weight"].is_contiguous()


@each_component
def test_what_does_not_fit_is_listed(component: Component, folder: ModelFolder) -> None:
    """A missing, an unexpected and a misshapen tensor are all named in one line, with their number."""
    path, victim = folder.path / FILES[component], VICTIMS[component]
    tensors = load_file(path)
    other = next(key for key in tensors if key.endswith("bias" if component != "text" else "norm1.weight"))
    misshapen = torch.zeros(tensors[other].shape[0] + 1)
    surprise = "visual.surprise" if component == "image" else "surprise"
    del tensors[victim]
    save_file({**tensors, other: misshapen, surprise: torch.zeros(2)}, path)
    with pytest.raises(ModelError) as caught:
        load(component, folder)
    line = str(caught.value)
    strip = "visual."
    assert f"1 missing: {victim.removeprefix(strip)}" in line
    assert "1 unexpected: surprise" in line
    assert (
        f"1 misshapen: {other.removeprefix(strip)} [{len(misshapen)}] instead of [{len(misshapen) - 1}]"
        in line
    )
    assert path.name in line
    assert "\n" not in line


def test_a_long_list_is_cut_and_counted() -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(2, 2, device="meta") for _ in range(4)))
    layout = weights.Layout.same_names(module)
    with pytest.raises(ModelError, match=r"8 missing: 0\.weight, 0\.bias, 1\.weight and 5 more"):
        fill(module, layout, MemorySource({}), CPU, torch.float32)


@pytest.mark.parametrize(
    ("component", "key"),
    [("text", "token_embedding.weight"), ("image", "visual.head"), ("text", "blocks.0.attn.q.weight")],
)
def test_a_missing_tensor_that_tells_the_size_is_named(component: str, key: str, folder: ModelFolder) -> None:
    path = folder.path / FILES[component]
    tensors = load_file(path)
    del tensors[key]
    save_file(tensors, path)
    with pytest.raises(ModelError, match=key.removeprefix("visual.")):
        load(component, folder)


@each_component
@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_file_cut_off_is_told(component: str, kept: float, folder: ModelFolder) -> None:
    path = folder.path / FILES[component]
    whole = path.read_bytes()
    path.write_bytes(whole[: kept if kept > 1 else int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"cut off|broken header"):
        load(component, folder)


@pytest.mark.parametrize("kept", [0, 4, 0.5, 0.999])
def test_a_pickle_cut_off_is_told(kept: float, folder: ModelFolder) -> None:
    path = folder.path / FILES["vae"]
    torch.save(load_file(path), path.with_suffix(".pth"))
    path.unlink()
    whole = path.with_suffix(".pth").read_bytes()
    path.with_suffix(".pth").write_bytes(whole[: kept if kept > 1 else int(len(whole) * kept)])
    with pytest.raises(ModelError, match=r"Wan2\.1_VAE\.pth is broken, cut off"):
        load("vae", folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "an object"),
        ('{"dim": -1}', "dim is -1"),
        ('{"dim": "wide"}', "dim is 'wide'"),
        ('{"dim": 48.5, "num_heads": 4}', "48.5"),
    ],
)
def test_a_bad_config_is_told(config: str, message: str, folder: ModelFolder) -> None:
    (folder.path / "config.json").write_text(config)
    with pytest.raises(ModelError, match=message) as caught:
        load("dit", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("component", "key", "value", "message"),
    [
        ("text", "text_dim", 64, "text encoder has 32 where config.json's text_dim is 64"),
        ("image", "image_dim", 64, "image encoder has 32"),
        ("image", "clip_heads", 0, "clip_heads is 0"),
        ("image", "clip_heads", 5, "width 32 in 5 heads"),
        ("speech", "audio_dim", 768, "speech encoder has 32"),
        ("speech", "audio_layers", 12, "speech encoder has 3"),
        ("image", "clip_heads", True, "clip_heads is True"),
        ("vae", "vae_dim", "wide", "config.json"),
        ("vae", "vae_dim_mult", 4, "config.json has a size that makes no vae"),
    ],
)
def test_components_of_two_models_are_told(
    component: str, key: str, value: Any, message: str, folder: ModelFolder
) -> None:
    write_json(folder.path / "config.json", {**tiny_model.CONFIG, key: value})
    with pytest.raises(ModelError, match=message):
        load(component, folder)


@each_component
def test_random_weights(component: Component, folder: ModelFolder, caplog: pytest.LogCaptureFixture) -> None:
    """Loud, finite, the same for the same seed, other ones for another seed."""
    with caplog.at_level(logging.WARNING):
        first = load(component, folder, random=True).state_dict()
    assert "random weights" in caplog.text
    again, other = (load(component, folder, random=True, seed=seed).state_dict() for seed in (0, 1))
    assert all(value.isfinite().all() for value in first.values())
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not any(torch.equal(first[key], other[key]) for key in first if first[key].numel() > 4)


@torch.no_grad()
def test_random_encoders_are_of_ordinary_scale(folder: ModelFolder) -> None:
    """What a timing runs on: no output vanishes, overflows, or is the same in every place."""
    text = weights.load_text_encoder(folder, CPU, torch.float32, random=True).encode("Hello, world.")
    image = weights.load_image_encoder(folder, CPU, torch.float32, random=True).encode(torch.rand(3, 64, 48))
    sound = torch.randn(8000, generator=torch.Generator().manual_seed(0))
    speech = weights.load_speech_encoder(folder, CPU, torch.float32, random=True).encode(sound, 12)
    for rows in (text, image[0], speech[:, -1]):
        assert 0.1 < rows.std() < 10
        assert rows.std(dim=0).min() > 1e-3


def test_random_weights_need_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The released model's sizes are known without its folder, for every component."""
    monkeypatch.setenv("FLASHTALK_HOME", str(tmp_path))
    folder = resolve("soulx-14b", random=True)
    plans = {component: weights.plan_of(folder, component, random=True) for component in COMPONENTS}
    n_parameters = {
        component: sum(p.numel() for p in plan.module.parameters()) / 1e9 for component, plan in plans.items()
    }
    assert all(plan.source is None for plan in plans.values())
    assert n_parameters["dit"] == pytest.approx(18.88, abs=0.01)
    assert n_parameters["text"] == pytest.approx(5.68, abs=0.01)
    assert n_parameters["image"] == pytest.approx(0.61, abs=0.01)
    assert n_parameters["speech"] == pytest.approx(0.094, abs=0.001)
    assert weights.byte_ids("a" * 600)[-1] == 1
    assert len(weights.byte_ids("a" * 600)) == 512


def test_a_device_without_room_is_told_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what is free and what is needed; what this process holds in reserve counts as free."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30, 8 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 2 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2**30)
    device = torch.device("cuda", 0)
    weights._check_memory("dit", 4 * 2**30, device)
    with pytest.raises(DeviceError, match=r"cuda:0 has 4\.0 GiB free, the dit component needs 5\.0 GiB"):
        weights._check_memory("dit", 5 * 2**30, device)


MEASURE = """
import json, sys, threading, time
import torch
from pathlib import Path
from flashtalk_cli.models import weights
from flashtalk_cli.models.folder import find

def status(field):
    line = next(l for l in open("/proc/self/status") if l.startswith(field))
    return int(line.split()[1]) * 1024

folder, component, field = find(sys.argv[1]), sys.argv[2], sys.argv[3]
load = {"dit": weights.load_dit, "text": weights.load_text_encoder}[component]
weights.plan_of(folder, component)  # imports and the first use of everything, but no tensor
torch.ones(1000, 1000).bfloat16()
before, peak, done = status(field), 0, False

def watch():
    global peak
    while not done:
        peak = max(peak, status(field))
        time.sleep(0.002)

thread = threading.Thread(target=watch)
thread.start()
kept = load(folder, torch.device("cpu"), getattr(torch, sys.argv[4]))
done = True
thread.join()
module = getattr(kept, "module", kept)
print(json.dumps([peak - before, sum(p.nbytes for p in module.parameters())]))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
@pytest.mark.parametrize(
    ("component", "field", "dtype"),
    [("dit", "VmRSS", "float32"), ("dit", "VmRSS", "bfloat16"), ("text", "RssAnon", "float32")],
)
def test_memory_holds_a_model_once(component: str, field: str, dtype: str, folder: ModelFolder) -> None:
    """Loading some 200 MB takes less than 1.5 times what the loaded model weighs.

    Of a memory-mapped .pth only what the system cannot take back counts: its pages are the file's.
    """
    path = folder.path
    config = {**tiny_model.CONFIG, "text_dim": 256}
    if component == "dit":
        config |= {"dim": 512, "ffn_dim": 2048, "num_layers": 10}
        write_json(path / "config.json", config)
        plan = weights.plan_of(find(path), "dit", random=True)
        state = {k: torch.zeros(v.shape) for k, v in plan.module.state_dict().items()}
        write_component(path, "dit", state)
    else:
        write_json(path / "config.json", config)
        (path / FILES["text"]).unlink()
        params = tiny_model.TextParams(264, dim=256, attention_dim=1024, ffn_dim=4096, heads=4, layers=8)
        plan_module = tiny_model.build_text(params)
        state = {k: torch.zeros(v) for k, v in tiny_model.text_layout(params).shapes(plan_module).items()}
        torch.save(state, path / f"{STEMS['text']}.pth")
    del state
    arguments = [sys.executable, "-c", MEASURE, str(path), component, field, dtype]
    # glibc hands large blocks back when they are freed; here blocks of this small model count as large
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "262144"}
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    peak_bytes, model_bytes = json.loads(result.stdout)
    assert model_bytes > 90e6
    assert peak_bytes < 1.5 * model_bytes, f"{peak_bytes / 1e6:.0f} MB for {model_bytes / 1e6:.0f} MB"


def test_a_written_file_is_for_whoever_may_read_the_others(tmp_path: Path) -> None:
    """As the umask says, also over a private file; a disk that takes no more leaves what was there."""
    other, path = tmp_path / "other", tmp_path / "a" / "weights.safetensors"
    other.touch()
    for value in (1.0, 2.0):
        assert save_tensors(path, {"x": torch.full((3,), value)}, {"step": "1"}) == path
        assert path.stat().st_mode == other.stat().st_mode
        path.chmod(0o600)
    path.with_name(f"{path.name}.part").mkdir()
    with pytest.raises(OSError, match="part"):
        save_tensors(path, {"x": torch.zeros(3)})
    assert SafetensorsSource([path]).read("x").tolist() == [2.0] * 3
