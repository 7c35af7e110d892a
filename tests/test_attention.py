"""Attention kernels: what they compute, and that the choice of one is right and is made once.

Packages and GPUs that this machine lacks are played by stand-ins: modules written to a folder,
and a CUDA capability that is only said.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models.attention import KERNEL_NAMES, SDPA, attention, choose_kernel, why_absent
from flashtalk_cli.models.attention_fp8 import FEW_KEYS, emulated
from flashtalk_cli.parallel.mesh import kernels_of
from flashtalk_cli.parallel.split import Grid, Split

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, BLACKWELL, ADA, TURING = (9, 0), (12, 0), (8, 9), (7, 5)


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@settings(max_examples=20)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 3), st.sampled_from([2, 6, 32])
)
def test_sdpa_is_attention_by_definition(b: int, n: int, m: int, heads: int, width: int) -> None:
    """Property: any batch, any numbers of queries and keys, no mask, scale 1 / sqrt(head_dim)."""
    random = torch.Generator().manual_seed(n * 41 + m)
    q, k, v = (torch.randn(b, tokens, heads, width, generator=random) for tokens in (n, m, m))
    torch.testing.assert_close(attention(q, k, v, kernel=SDPA), by_definition(q, k, v))


@torch.inference_mode()
@pytest.mark.parametrize(("n", "m"), [(130, 128), (7, 200), (300, 131)])
def test_many_keys_in_bfloat16_on_a_cpu(monkeypatch: pytest.MonkeyPatch, n: int, m: int) -> None:
    """Parity: padded keys count for nothing, and queries in several pieces are the same queries.

    A row's weights, rounded to bfloat16, bring an error of half a per cent; a wrong key or scale far more.
    """
    monkeypatch.setattr("flashtalk_cli.models.attention.MAX_SCORES", 2 * 3 * 64 * 208)
    fused = mock.Mock(side_effect=AssertionError("the fused kernel is the slower one"))
    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", fused)
    random = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(2, tokens, 3, 32, generator=random).bfloat16() for tokens in (n, m, m))
    out = attention(q, k, v, kernel=SDPA)
    assert out.dtype == torch.bfloat16
    wanted = by_definition(q.float(), k.float(), v.float())
    assert torch.linalg.vector_norm(out.float() - wanted) < 0.01 * torch.linalg.vector_norm(wanted)


def test_sdpa_passes_gradients() -> None:
    """Parity: gradients of q, k and v equal those of the definition."""
    given_ = [torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)]
    weight = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    ours = torch.autograd.grad((attention(*given_, kernel=SDPA) * weight).sum(), given_)
    theirs = torch.autograd.grad((by_definition(*given_) * weight).sum(), given_)
    torch.testing.assert_close(ours, theirs)


class Machine:
    """A pretended CUDA machine on which stand-ins of the attention packages can be installed."""

    modules = ("fa3_fwd_interface", "flash_attn")

    def __init__(self, site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.site, self.monkeypatch = site, monkeypatch
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: True)
        self.capability = HOPPER
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: self.capability)

    def install(self, module: str, text: str | None = None) -> None:
        """A package whose attention returns twice v, to be told apart from any other."""
        stand_in = "def flash_attn_func(q, k, v, softmax_scale=None, causal=False):\n    return 2 * v\n"
        (self.site / f"{module}.py").write_text(text or stand_in)
        importlib.invalidate_caches()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    before = {name: sys.modules.pop(name, None) for name in Machine.modules}
    yield Machine(tmp_path, monkeypatch)
    for name, module in before.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def test_auto_takes_the_fastest_present(machine: Machine) -> None:
    """Contract: on Hopper fa3, then cuDNN, then flash, then SDPA, by what is there; before it flash, then cuDNN."""
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "cudnn"
    machine.install("flash_attn")
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "cudnn"
    machine.install("fa3_fwd_interface")
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "fa3"
    assert choose_kernel("auto", CUDA, torch.float16).name == "cudnn"
    machine.monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    assert choose_kernel("auto", CUDA, torch.float16).name == "flash"
    machine.capability = ADA
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "flash"
    assert choose_kernel("auto", CUDA, torch.float32).name == "sdpa"
    assert choose_kernel("auto", CPU, torch.bfloat16) is SDPA


def test_auto_looks_among_those_that_an_engine_runs(machine: Machine) -> None:
    """Contract: fa3 is there and fastest, and passed over where xfuser attends, which does not know it."""
    machine.install("fa3_fwd_interface")
    machine.install("flash_attn")
    whole = Grid((1,), (1,))
    for ulysses, ring, expected in ((2, 1, "cudnn"), (1, 2, "flash")):
        among = kernels_of(Split(ulysses, ring, whole), "xfuser")
        assert choose_kernel("auto", CUDA, torch.bfloat16, among).name == expected
    for split, engine in ((Split(1, 1, whole), "xfuser"), (Split(1, 2, whole), "torch")):
        assert choose_kernel("auto", CUDA, torch.bfloat16, kernels_of(split, engine)).name == "fa3"


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(HOPPER, "fa3"), (BLACKWELL, "cudnn"), (ADA, "flash"), (TURING, "sdpa")],
)
def test_auto_asks_what_the_gpu_can_do(machine: Machine, capability: tuple[int, int], expected: str) -> None:
    """Contract: an installed package is no use on a GPU that it is not built for."""
    for module in Machine.modules:
        machine.install(module)
    machine.capability = capability
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == expected


@pytest.mark.parametrize(("name", "module"), [("fa3", "fa3_fwd_interface"), ("flash", "flash_attn")])
def test_a_package_is_called_with_q_k_v(machine: Machine, name: str, module: str) -> None:
    """Contract: the kernel of a package is that package's flash_attn_func, looked up once."""
    machine.install(module)
    kernel = choose_kernel(name, CUDA, torch.bfloat16)
    (machine.site / f"{module}.py").unlink()
    q = torch.randn(1, 4, 2, 8)
    torch.testing.assert_close(attention(q, q, q + 1, kernel=kernel), 2 * (q + 1))


def test_eight_bits_are_for_many_keys(machine: Machine) -> None:
    """Contract: never by auto; fa3 is given e4m3 and each head's scale, of few keys bfloat16 as it came."""
    machine.install(
        "fa3_fwd_interface",
        """def flash_attn_func(q, k, v, causal=False, q_descale=None, k_descale=None, v_descale=None):
    if v_descale is None:
        return v
    assert q_descale.shape == k_descale.shape == (2, 3)
    return v.float() * v_descale[:, None, :, None]
""",
    )
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "fa3"
    kernel = choose_kernel("fa3-fp8", CUDA, torch.bfloat16)
    assert kernel.name == "fa3-fp8"
    v = torch.randn(2, FEW_KEYS + 1, 3, 8) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    few = v[:, 1:]
    assert attention(few, few, few, kernel=kernel) is few
    given = attention(v, v, v, kernel=kernel)
    assert not torch.equal(given, v)
    for head in range(3):
        error = (given - v)[:, :, head].abs().max() / v[:, :, head].abs().max()
        assert error <= 2**-4  # half a step of three bits of mantissa


def test_eight_bits_emulated() -> None:
    """Parity: attention by definition, to what e4m3 leaves of q, k, v and weights; of few keys exactly.

    Of channels that are much louder than others too: they are mixed.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, FEW_KEYS + 40, 2, 32) for _ in range(3))
    loud = torch.ones(32)
    loud[3] = 8
    for size in (torch.ones(32), loud / loud.norm() * 32**0.5):
        exact = by_definition(q * size, k * size, v)
        error = (emulated(q * size, k * size, v) - exact).norm() / exact.norm()
        assert 0.01 < error < 0.07
    few = k[:, :100], v[:, :100]
    torch.testing.assert_close(emulated(q, *few), by_definition(q, *few))


def test_a_package_that_does_not_load(machine: Machine) -> None:
    """Fault: a wheel of another torch is passed over by auto, and is an error when asked for."""
    machine.install("fa3_fwd_interface", "raise ImportError('undefined symbol: c10')\n")
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "cudnn"
    with pytest.raises(DeviceError, match=r"undefined symbol.*reinstall"):
        choose_kernel("fa3", CUDA, torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "says"),
    [
        ("fa3", CPU, torch.bfloat16, "needs a CUDA device"),
        ("cudnn", CPU, torch.bfloat16, "needs a CUDA device"),
        ("fa3", CUDA, torch.bfloat16, "pip install fa3-fwd"),
        ("flash", CUDA, torch.bfloat16, "pip install flash-attn"),
        ("flash", CUDA, torch.float32, "set precision.dit to bfloat16"),
        ("fa3", CUDA, torch.float16, "set precision.dit to bfloat16"),
    ],
)
def test_a_kernel_that_cannot_run_is_an_error_with_the_mend(
    machine: Machine, name: str, device: torch.device, dtype: torch.dtype, says: str
) -> None:
    """Fault: one line that names the kernel, the reason and what to do."""
    with pytest.raises(DeviceError, match=says) as caught:
        choose_kernel(name, device, dtype)
    assert "\n" not in str(caught.value)
    assert name in str(caught.value)
    reason = why_absent(name, device, dtype)
    assert reason
    assert reason in str(caught.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_eight_bits_on_a_gpu() -> None:
    """Parity: fa3 in e4m3 is nearer to its emulation than that is to the exact; heads of very different size."""
    device = torch.device("cuda")
    if reason := why_absent("fa3-fp8", device, torch.bfloat16):
        pytest.skip(reason)
    sizes = torch.tensor([0.1, 1.0, 10.0, 100.0], device=device)[:, None]
    q, k, v = (torch.randn(2, 1500, 4, 128, device=device).bfloat16() for _ in range(3))
    v = (v * sizes).bfloat16()
    out = attention(q, k, v, kernel=choose_kernel("fa3-fp8", device, torch.bfloat16))
    assert out.dtype == torch.bfloat16
    alike, exact = (f(*(x.float() for x in (q, k, v))) / sizes for f in (emulated, by_definition))
    ours = out.float() / sizes
    lost = (alike - exact).norm()
    assert (ours - exact).norm() < 1.5 * lost
    assert (ours - alike).norm() < 0.5 * lost


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize(("n", "m"), [(1000, 1000), (130, 32), (130, 257)])
def test_kernels_agree_on_a_gpu(name: str, n: int, m: int) -> None:
    """Parity: every kernel present computes attention by definition, to bfloat16, laid out as it came."""
    device = torch.device("cuda")
    if reason := why_absent(name, device, torch.bfloat16):
        pytest.skip(reason)
    q, k, v = (torch.randn(2, tokens, 4, 128, device=device).bfloat16() for tokens in (n, m, m))
    out = attention(q, k, v, kernel=choose_kernel(name, device, torch.bfloat16))
    expected = by_definition(q.float(), k.float(), v.float())
    assert out.shape == expected.shape
    assert (out.float() - expected).norm() / expected.norm() < 0.01
