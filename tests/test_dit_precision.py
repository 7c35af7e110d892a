"""The DiT in other number formats, and its gradients: near float32, and right."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dit_parts import CPU, SMALL, Inputs, gradients_of, random_dit, relative_error
from torch import Tensor, nn

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models.attention import choose_kernel
from flashtalk_cli.models.dit import EIGHT_BITS, EXACT_BLOCKS, SPEECH
from flashtalk_cli.models.fp8 import check_device
from flashtalk_cli.models.layers import lay_together
from flashtalk_cli.models.token_ops import PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_queries_keys_and_values_in_one_product(dtype: torch.dtype) -> None:
    """Parity: laid together, layers keep names and values, compute the same, and lay down no second copy."""
    dit, given_ = random_dit().to(dtype), Inputs.draw(SMALL)
    before = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    with torch.no_grad():
        expected = given_.through(dit)
        for block in dit.blocks:
            lay_together([block.self_attn.q, block.self_attn.k, block.self_attn.v])
        products: list[Tensor] = []
        hook = nn.modules.module.register_module_forward_hook(lambda m, *_: products.append(m))
        together = given_.through(dit)
        hook.remove()
    assert relative_error(together, expected) < (1e-5 if dtype == torch.float32 else 0.02)
    assert not any(block.self_attn.q in products for block in dit.blocks), "each on its own"
    assert {name: tensor.shape for name, tensor in dit.state_dict().items()} == {
        name: tensor.shape for name, tensor in before.items()
    }
    assert all(torch.equal(tensor, before[name]) for name, tensor in dit.state_dict().items())
    assert gradients_of(dit.float(), given_).keys() == before.keys()


def test_blocks_in_eight_bits() -> None:
    """Parity within what e4m3 leaves, in half the memory; what is small or precise stays as it was."""
    dit = random_dit(replace(SMALL, dim=64, ffn_dim=128)).bfloat16()
    given_ = Inputs.draw(dit.params)
    held = sum(a.nbytes for a in dit.blocks[0].state_dict().values())
    with torch.no_grad():
        expected = given_.through(dit)
        dit.arrange(eight_bits=True)
        small = given_.through(dit)
    error = float((small - expected).norm() / expected.norm())
    assert 1e-4 < error < 0.08
    quantised = {n for n, a in dit.state_dict().items() if a.dtype == torch.float8_e4m3fn}
    first, layers = range(len(dit.blocks) - EXACT_BLOCKS), [name for name in EIGHT_BITS if name != SPEECH]
    assert quantised == {f"blocks.{index}.{layer}.weight" for index in first for layer in layers}
    assert sum(a.nbytes for a in dit.blocks[0].state_dict().values()) < 0.9 * held


@pytest.mark.parametrize(
    "layers",
    [
        *("self_attn.o", "cross_attn.q", "cross_attn.o", "ffn.0", "ffn.2", "audio_cross_attn"),
        "self_attn.q self_attn.k self_attn.v",
    ],
)
@torch.no_grad()
def test_any_one_layer_in_eight_bits(layers: str) -> None:
    """Contract: which layers are quantised is data: each of them alone gets its rows, the others their tensors."""
    dit = random_dit(replace(SMALL, dim=64, ffn_dim=128))
    given_ = Inputs.draw(dit.params)
    expected = given_.through(dit)
    for block in dit.blocks:
        block.arrange(layers.split())
    assert 1e-5 < relative_error(given_.through(dit), expected) < 0.08


def test_eight_bits_want_a_gpu_that_has_them() -> None:
    """Fault: one line with the mend."""
    with pytest.raises(DeviceError, match="this run uses 'cpu': take 'auto'"):
        check_device(CPU)


def test_bfloat16_stays_near_float32() -> None:
    """Parity: rounding everywhere but in norms, rotation, gates and time costs little."""
    given_, dit = Inputs.draw(SMALL, b=2), random_dit()
    with torch.no_grad():
        exact = given_.through(dit)
        rounded = given_.through(dit.bfloat16())
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).norm() / exact.norm()) < 0.02


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.bfloat16, 0.02)])
def test_a_gpu_computes_what_a_cpu_does(dtype: torch.dtype, bound: float) -> None:
    """Parity: CPU and GPU take other ways through rotation and modulation; the result is one."""
    params = replace(SMALL, dim=256)  # heads of 64, which every kernel takes
    given_, dit = Inputs.draw(params), random_dit(params)
    cuda = torch.device("cuda")
    on_gpu = Inputs(*(getattr(given_, name).to(cuda) for name in Inputs.__dataclass_fields__))
    with torch.no_grad():
        expected = given_.through(dit)
        dit.to(cuda, dtype).kernel = choose_kernel("auto", cuda, dtype)
        result = on_gpu.through(dit).cpu()
    assert ((result - expected).norm() / expected.norm()) < bound, dit.kernel.name


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cpu", "aot_eager"), pytest.param("cuda", "inductor", marks=pytest.mark.gpu)],
)
def test_blocks_compile_with_gradients_and_without(device: str, backend: str) -> None:
    """Contract: both ways a distillation runs its networks can be traced, and give what plain code does."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    params = replace(SMALL, dim=256)
    drawn, dit = Inputs.draw(params), random_dit(params).to(device)
    given_ = Inputs(*(getattr(drawn, name).to(device) for name in Inputs.__dataclass_fields__))
    expected = given_.through(dit).detach()
    dit.compile_blocks(backend)
    learning = given_.through(dit)
    learning.square().mean().backward()
    with torch.no_grad():
        rolled = given_.through(dit)
    for result in (learning.detach(), rolled):
        assert ((result - expected).norm() / expected.norm()) < 1e-3


def test_time_is_embedded_in_float32_whatever_the_weights() -> None:
    """Contract: neighbouring times stay apart in bfloat16, where 999 and 1000 are one number."""
    dit = random_dit().bfloat16()
    rounded_weights, _ = dit._embed_time(torch.tensor([999.0, 1000.0]), PLAIN)
    exact, _ = dit.float()._embed_time(torch.tensor([999.0, 1000.0]), PLAIN)
    torch.testing.assert_close(rounded_weights, exact)
    assert (exact[0] - exact[1]).abs().max() > 1e-2


def test_gradients_reach_every_weight_and_are_right() -> None:
    """Parity: along a random direction in weights, the gradient predicts the change of the loss."""
    dit, given_ = random_dit(), Inputs.draw(SMALL)
    gradients = gradients_of(dit, given_)
    assert gradients.keys() == dict(dit.named_parameters()).keys()
    assert all(g.isfinite().all() and g.abs().max() > 0 for g in gradients.values())

    random = torch.Generator().manual_seed(2)
    for weight in dit.parameters():
        weight.requires_grad_(False)
    for part in ("self_attn", "cross_attn", "audio", "ffn", "modulation", "embedding"):
        named = {n: w for n, w in dit.named_parameters() if part in n}
        step = {n: g / g.norm() + torch.randn(g.shape, generator=random) * 0.01 for n, g in gradients.items()}
        predicted = sum(float((gradients[n] * step[n]).sum()) for n in named)
        losses = []
        for sign in (1, -1):
            for n, w in named.items():
                w += sign * 1e-3 * step[n]
            losses.append(float(given_.through(dit).double().square().mean()))
            for n, w in named.items():
                w -= sign * 1e-3 * step[n]
        assert (losses[0] - losses[1]) / 2e-3 == pytest.approx(predicted, rel=0.02), part


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputing_blocks_changes_no_gradient(dtype: torch.dtype) -> None:
    """Parity: activation checkpointing gives the same gradients from fewer kept activations."""
    dit, given_ = random_dit().to(dtype), Inputs.draw(SMALL, latents=2, h=8, w=8)
    kept: list[int] = []

    def measured() -> dict[str, Tensor]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda a: sizes.append(a.numel()) or a, lambda a: a):
            out = given_.through(dit)
        kept.append(sum(sizes))
        dit.zero_grad()
        out.square().mean().backward()
        return {name: w.grad.clone() for name, w in dit.named_parameters() if w.grad is not None}

    plain = measured()
    dit.recompute = True
    torch.testing.assert_close(measured(), plain)
    assert kept[1] < kept[0]
