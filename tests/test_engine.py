"""xfuser as the engine of self-attention: what it is asked for and what is refused (contract, with a stand-in for
the package), and that it computes what torch's collectives do (parity, on GPUs)."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import rank_engines
import torch
import torch.multiprocessing as multiprocessing
from attending import attend
from thread_ranks import groups
from torch import Tensor

from flashtalk_cli.errors import ConfigError, DeviceError
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.parallel.sequence import UlyssesRing
from flashtalk_cli.parallel.xfuser import KERNELS, xfuser_ring

GPU = torch.device("cuda", 0)
WORLD: Any = SimpleNamespace(bound_device_id=GPU)  # a process group


def ring_of(ulysses: int, ring: int) -> UlyssesRing:
    everyone = replace(groups(ulysses * ring)[0], handle=WORLD)
    return UlyssesRing(everyone, groups(ulysses)[0], groups(ring)[0])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A stand-in for xfuser that notes what it is asked for, and gives its queries back."""
    found: dict[str, Any] = {}

    class Layer:
        def __init__(self, **options: Any) -> None:
            found["layer"] = options

        def __call__(self, module: None, *, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            assert query.is_contiguous()
            return query

    def module(name: str, **members: Any) -> None:
        made = ModuleType(name)
        made.__dict__.update(members)
        monkeypatch.setitem(sys.modules, name, made)

    module("xfuser")
    module("xfuser.core")
    module(
        "xfuser.core.distributed",
        init_distributed_environment=lambda **given: found.update(world=given),
        initialize_model_parallel=lambda **given: found.update(degrees=given, bound=WORLD.bound_device_id),
    )
    module("xfuser.core.long_ctx_attention", xFuserLongContextAttention=Layer)
    module("xfuser.core.long_ctx_attention.ring")
    module("yunchang")
    module("yunchang.ring")
    module("yunchang.ring.utils")
    module("yunchang.kernels", AttnType={name: f"their {name}" for name in KERNELS.values()})
    return found


def test_xfuser_is_asked_for_our_degrees_and_kernel(asked: dict[str, Any]) -> None:
    """Contract: packed queries, keys and values; tokens that divide go in as they are held."""
    made = xfuser_ring(ring_of(2, 2), GPU, "sdpa")
    assert asked["world"] == {"world_size": 4, "rank": 0, "local_rank": 0}
    assert asked["degrees"] == {"sequence_parallel_degree": 4, "ulysses_degree": 2, "ring_degree": 2}
    assert asked["layer"] == {"use_pack_qkv": True, "attn_type": "their TORCH_FLASH"}
    assert asked["bound"] is None  # its groups are made when they are used
    assert WORLD.bound_device_id == GPU
    q = torch.randn(1, 3, 4, 8).bfloat16()
    assert torch.equal(attend(made, SDPA, q, q, q, 12), q)
    assert made.everyone.traffic.begun == 1


def test_padding_is_refused(asked: dict[str, Any]) -> None:
    """Contract: it would be attended to."""
    made = xfuser_ring(ring_of(2, 2), GPU, "flash")
    q = torch.randn(1, 3, 4, 8).bfloat16()
    with pytest.raises(ConfigError, match="11 tokens do not divide by 4 GPUs"):
        attend(made, SDPA, q, q, q, 11)


def test_float32_is_refused(asked: dict[str, Any]) -> None:
    """Contract: in one line, and not by a kernel's own error in the first step."""
    made = xfuser_ring(ring_of(2, 2), GPU, "sdpa")
    q = torch.randn(1, 3, 4, 8)
    with pytest.raises(ConfigError, match=r"half precision, not in torch.float32: take torch"):
        attend(made, SDPA, q, q, q, 12)


def test_what_yunchang_lacks_for_npus_is_filled_in(asked: dict[str, Any]) -> None:
    """Contract: before xfuser loads what would look for it; what is there is left alone."""
    utilities = sys.modules["yunchang.ring.utils"].__dict__
    xfuser_ring(ring_of(2, 2), GPU, "sdpa")
    assert utilities["update_npu_out"] is None
    utilities["update_npu_out"] = "theirs"
    xfuser_ring(ring_of(2, 2), GPU, "sdpa")
    assert utilities["update_npu_out"] == "theirs"


def test_an_older_yunchang_is_named(asked: dict[str, Any]) -> None:
    """Contract: which lacks a kernel that we ask for."""
    sys.modules["yunchang.kernels"].__dict__["AttnType"] = {"TORCH": "theirs"}
    with pytest.raises(DeviceError, match=r"xfuser does not load \('TORCH_FLASH'\): pip install --upgrade"):
        xfuser_ring(ring_of(2, 2), GPU, "sdpa")


def test_what_xfuser_cannot_do_is_refused(asked: dict[str, Any]) -> None:
    """Contract: in one line with the mend, before any group is made."""
    with pytest.raises(DeviceError, match="cudnn in a ring of 2: take auto, flash, sdpa, or"):
        xfuser_ring(ring_of(1, 2), GPU, "cudnn")
    for name in ("fa3", "fa3-fp8"):
        with pytest.raises(
            DeviceError, match=f"attention {name} in a ring of 1: take auto, cudnn, flash, sdpa, or"
        ):
            xfuser_ring(ring_of(2, 1), GPU, name)
    with pytest.raises(DeviceError, match="needs GPUs"):
        xfuser_ring(ring_of(2, 1), torch.device("cpu"), "sdpa")
    assert "world" not in asked


def test_a_missing_xfuser_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Contract: with what installs it."""
    monkeypatch.setitem(sys.modules, "yunchang", None)
    monkeypatch.setitem(sys.modules, "xfuser", None)
    with pytest.raises(DeviceError, match=r"pip install --upgrade 'flashtalk\[gpu\]'"):
        xfuser_ring(ring_of(2, 1), GPU, "sdpa")


def test_an_xfuser_that_does_not_load_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: what diffusers raises, in lines, when it does not fit the transformers that is there."""
    (tmp_path / "xfuser").mkdir()
    (tmp_path / "yunchang" / "ring").mkdir(parents=True)
    (tmp_path / "yunchang" / "ring" / "utils.py").touch()
    (tmp_path / "xfuser" / "__init__.py").write_text(
        'raise RuntimeError("Failed to import it:\\nno MT5Tokenizer")'
    )
    for name in ("xfuser", "yunchang", "yunchang.ring", "yunchang.ring.utils"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DeviceError, match=r"does not load \(Failed to import it: no MT5Tokenizer\)"):
        xfuser_ring(ring_of(2, 1), GPU, "sdpa")


@pytest.mark.gpu
@pytest.mark.parametrize("ulysses", [2, 1])
def test_both_engines_compute_the_same(ulysses: int, tmp_path: Path) -> None:
    """Parity: to bfloat16's noise, for heads swapped and for a ring; prints the time of each."""
    if find_spec("xfuser") is None:  # one that is there and does not load fails
        pytest.skip("needs the package xfuser")
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    options = SimpleNamespace(store=f"file://{tmp_path / 'store'}", ulysses=ulysses)
    multiprocessing.spawn(rank_engines.compare, (options,), nprocs=2)
