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
from torch.nn import functional as F

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models.attention import KERNEL_NAMES, SDPA, choose_kernel, why_absent
from flashtalk_cli.models.attention_fp8 import emulated, hadamard, normed_scales, to_e4m3
from flashtalk_cli.models.fp8 import LARGEST
from flashtalk_cli.models.rope import rotation_table
from flashtalk_cli.models.token_ops import PLAIN
from flashtalk_cli.parallel.mesh import kernels_of
from flashtalk_cli.parallel.split import Grid, Split

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HOPPER, BLACKWELL, ADA, TURING = (9, 0), (12, 0), (8, 9), (7, 5)
DTYPES = (torch.float32, torch.bfloat16)


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
    torch.testing.assert_close(SDPA(q, k, v), by_definition(q, k, v))


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
    out = SDPA(q, k, v)
    assert out.dtype == torch.bfloat16
    wanted = by_definition(q.float(), k.float(), v.float())
    assert torch.linalg.vector_norm(out.float() - wanted) < 0.01 * torch.linalg.vector_norm(wanted)


def test_sdpa_passes_gradients() -> None:
    """Parity: gradients of q, k and v equal those of the definition."""
    given_ = [torch.randn(2, n, 2, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7)]
    weight = torch.randn(2, 5, 2, 8, dtype=torch.float64)
    ours = torch.autograd.grad((SDPA(*given_) * weight).sum(), given_)
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
    torch.testing.assert_close(kernel(q, q, q + 1), 2 * (q + 1))


def test_eight_bits_come_with_scales(machine: Machine) -> None:
    """Contract: never by auto; fa3 is given e4m3 and each head's scale, or without scales what came."""
    machine.install(
        "fa3_fwd_interface",
        """def flash_attn_func(q, k, v, causal=False, q_descale=None, k_descale=None, v_descale=None):
    if v_descale is None:
        return v
    for scale in (q_descale, k_descale, v_descale):
        assert scale.shape == (2, 3) and scale.is_contiguous()
    return v.float() * (v_descale + 10 * k_descale + 100 * q_descale)[:, None, :, None]
""",
    )
    assert choose_kernel("auto", CUDA, torch.bfloat16).name == "fa3"
    kernel = choose_kernel("fa3-fp8", CUDA, torch.bfloat16)
    assert kernel.name == "fa3-fp8"
    v, scales = torch.randn(2, 9, 3, 8), torch.rand(3, 2, 6)[..., ::2] + 1
    assert kernel.run(v, v, v) is v
    small = to_e4m3(v, scales[2])
    found = kernel.run(small, small, small, scales)
    factor = scales[2] + 10 * scales[1] + 100 * scales[0]
    torch.testing.assert_close(found, small.float() * factor[:, None, :, None])


class Projected:
    """Queries, keys and values as a block of the 14B model makes them of tokens, of two of its heads of 128 channels.

    loud: what some of the norms' weights, and of the rows of weights for values, are larger by.
    """

    dim, heads, width, taken = 5120, 40, 128, 2

    def __init__(self, n: int, loud: float = 1.0) -> None:
        def sizes(n: int) -> Tensor:
            return torch.where(torch.rand(n) < 0.03, loud, 1.0)

        self.table = rotation_table((1, n, 1), self.width, CPU)
        self.inputs = [torch.randn(1, n, self.dim) for _ in "qk"]
        self.weights = [(1 + 0.2 * torch.randn(self.dim)) * sizes(self.dim) for _ in "qk"]
        channels = self.taken * self.width
        weight = torch.randn(channels, self.dim) * self.dim**-0.5 * sizes(channels)[:, None]
        bias = 0.1 * torch.randn(channels)
        stretch, shift = 1 + 0.1 * torch.randn(self.dim), 0.1 * torch.randn(self.dim)
        tokens = F.layer_norm(torch.randn(1, n, self.dim), (self.dim,)) * stretch + shift
        self.v = self._heads(F.linear(tokens, weight, bias))
        self.reach = self.dim**0.5 * stretch.abs().max() + shift.norm()
        self.bound = self.reach * weight.norm(dim=1) + bias.abs()

    def exact(self) -> list[Tensor]:
        """q, k, v in float32."""
        q, k = (
            PLAIN.rms_rotate(x, weight, self.table, self.width, 1e-6)
            for x, weight in zip(self.inputs, self.weights, strict=True)
        )
        return [self._heads(q), self._heads(k), self.v]

    def scales(self) -> Tensor:
        """Known before: [3, 1, heads]."""
        v = 1.07 * self.bound.unflatten(0, (self.taken, -1)).amax(1) / LARGEST
        q, k = (normed_scales(weight, self.heads)[: self.taken] for weight in self.weights)
        return torch.stack([q, k, v])[:, None]

    def peaks(self) -> Tensor:
        """Of the same form, from the largest number of each head."""
        q, k, v = self.exact()
        signs = hadamard(self.width, CPU, torch.float32)
        assert signs is not None
        mixed = [x @ signs * self.width**-0.5 for x in (q, k)]
        return torch.stack([x.abs().amax((1, 3)) for x in (*mixed, v)]) / LARGEST

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.width))[:, :, : self.taken]


def in_e4m3(q: Tensor, k: Tensor, v: Tensor, scales: Tensor) -> list[Tensor]:
    return [to_e4m3(q, scales[0], mix=True), to_e4m3(k, scales[1], mix=True), to_e4m3(v, scales[2])]


@torch.no_grad()
@pytest.mark.parametrize("loud", [1.0, 8.0])
def test_scales_known_before_cost_nothing(loud: float) -> None:
    """Accuracy: attention is as near to the exact as with scales from each head's largest number.

    With channels that are much louder than others, too.
    """
    torch.manual_seed(0)
    given = Projected(300, loud)
    exact = given.exact()
    wanted = by_definition(*exact)
    errors = []
    for scales in (given.scales(), given.peaks()):
        found = emulated(*in_e4m3(*exact, scales), scales, dtype=torch.float32)
        errors.append(float((found - wanted).norm() / wanted.norm()))
    known, measured = errors
    assert 0.01 < measured < 0.2
    assert known < 1.15 * measured
    assert (given.peaks() < given.scales()).all()


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 6),
    st.sampled_from([2, 6, 16, 64]),
    st.sampled_from(["normal", "one channel", "one head", "equal", "as the signs", "huge", "zero"]),
    st.sampled_from(DTYPES),
    st.integers(0, 2**31),
)
@torch.no_grad()
def test_no_number_is_beyond_its_scale(
    heads: int, width: int, kind: str, dtype: torch.dtype, seed: int
) -> None:
    """Property: whatever row is normed, turned and mixed, its numbers are no larger than e4m3's largest."""
    random = torch.Generator().manual_seed(seed)
    n, dim = 5, heads * width
    x = torch.randn(2, n, dim, generator=random)
    one = int(torch.randint(dim, (), generator=random))
    signs = hadamard(width, CPU, torch.float32)
    if kind == "one channel":
        x = torch.zeros_like(x)
        x[..., one] = -3
    elif kind == "one head":
        x[..., [i for i in range(dim) if i // width != one // width]] = 0
    elif kind == "equal":
        x = torch.full_like(x, 0.3)
    elif kind == "as the signs" and signs is not None:  # a head that mixing sums up in one channel
        x = signs[one % width].repeat(heads).expand_as(x)
    elif kind == "huge":
        x = x * 1e15
    elif kind == "zero":
        x = torch.zeros_like(x)
    weight = torch.randn(dim, generator=random)
    if kind == "equal" or kind == "as the signs":
        weight = torch.ones(dim)
    table = rotation_table((1, n, 1), width, CPU)
    turned = PLAIN.rms_rotate(x.to(dtype), weight.to(dtype), table, width, 1e-6).unflatten(-1, (-1, width))
    mixed = turned.float() if signs is None else turned.float() @ signs * width**-0.5
    scales = normed_scales(weight.to(dtype), heads)
    assert (mixed.abs().amax((1, 3)) <= LARGEST * scales * (1 + 2**-8)).all()
    small = PLAIN.rms_rotate(x.to(dtype), weight.to(dtype), table, width, 1e-6, scales=scales[None])
    assert small.dtype == torch.float8_e4m3fn
    assert not small.float().isnan().any()
    again = small.float().unflatten(-1, (-1, width)) * scales[:, None]
    assert ((again - mixed).abs() <= mixed.abs() * 2**-4 * 1.02 + 2**-10 * scales[:, None]).all()


@torch.no_grad()
def test_eight_bits_emulated() -> None:
    """Parity: attention by definition of the numbers that e4m3 stands for, and bfloat16 unless asked otherwise.

    Without scales it is attention to what comes.
    """
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 90, 3, 32) for _ in range(3))
    scales = 0.5 + torch.rand(3, 2, 3)
    small = [to_e4m3(x / 8, scale) for x, scale in zip((8 * q, 8 * k, 8 * v), scales, strict=True)]
    whole = [x.float() * scale[:, None, :, None] for x, scale in zip(small, scales, strict=True)]
    exact, found = by_definition(*whole), emulated(*small, scales, dtype=torch.float32)
    assert 0.001 < (found - exact).norm() / exact.norm() < 0.03  # a softmax's weights are rounded
    assert torch.equal(emulated(*small, scales), found.bfloat16())
    torch.testing.assert_close(emulated(q, k, v), by_definition(q, k, v))


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
@torch.no_grad()
def test_eight_bits_on_a_gpu() -> None:
    """Parity: fa3 in e4m3 is nearer to its emulation than that is to the exact; heads of very different size."""
    device = torch.device("cuda")
    if reason := why_absent("fa3-fp8", device, torch.bfloat16):
        pytest.skip(reason)
    sizes = torch.tensor([0.1, 1.0, 10.0, 100.0], device=device)
    q, k, v = (torch.randn(2, 1500, 4, 128, device=device) for _ in range(3))
    scales = torch.full((3, 2, 4), 70 / LARGEST, device=device)  # typical numbers are near 6
    scales[2] *= sizes
    v = v * sizes[:, None]
    small = in_e4m3(q, k, v, scales)
    out = choose_kernel("fa3-fp8", device, torch.bfloat16).run(*small, scales)
    assert out.dtype == torch.bfloat16
    alike = emulated(*small, scales, dtype=torch.float32) / sizes[:, None]
    exact, ours = by_definition(q, k, v) / sizes[:, None], out.float() / sizes[:, None]
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
    out = choose_kernel(name, device, torch.bfloat16)(q, k, v)
    expected = by_definition(q.float(), k.float(), v.float())
    assert out.shape == expected.shape
    assert (out.float() - expected).norm() / expected.norm() < 0.01
