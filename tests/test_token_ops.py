"""A block's passes between its matrix products: the faster forms of a CPU without gradients.

Kernels for CUDA devices are held to the same plain code in test_kernels.py.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models import token_ops
from flashtalk_cli.models.attention import SDPA, CrossKeys, KeyValue, PromptKeys
from flashtalk_cli.models.token_ops import PLAIN


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_without_gradients_is_that_with_them(dtype: torch.dtype) -> None:
    """Parity: the form of few passes leaves its input as it was, and rows of zeros stay zero."""
    random = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 9, 24, generator=random) * 3).to(dtype)
    x[0, 4] = 0
    before = x.clone()
    weight = torch.randn(24, generator=random).to(dtype)
    with torch.no_grad():
        ours = token_ops.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(ours, token_ops.rms_norm(x, weight, 1e-6))
    assert ours.dtype == dtype
    assert torch.equal(x, before)


def test_gelu_within_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: where oneDNN has it, it is nearer to float32 than two passes are; where not, those serve."""
    torch.manual_seed(0)
    layer, x = nn.Linear(32, 48).bfloat16(), torch.randn(1, 50, 32).bfloat16()
    with torch.no_grad():
        product = F.linear(x.float(), layer.weight.float(), layer.bias.float())
        exact = F.gelu(product, approximate="tanh")
        once = PLAIN.gelu(layer, x)
        monkeypatch.setattr(token_ops, "_has_linear_gelu", lambda: False)
        twice = PLAIN.gelu(layer, x)
    assert isinstance(once, torch.Tensor)
    assert isinstance(twice, torch.Tensor)
    assert once.dtype == twice.dtype == torch.bfloat16
    error, plain_error = (torch.linalg.vector_norm(y.float() - exact) for y in (once, twice))
    assert error <= plain_error < 0.004 * torch.linalg.vector_norm(exact)


def test_few_keys_in_two_products() -> None:
    """bfloat16 on a CPU against float32 by the kernel: prompt and picture apart, an empty row counted as often as said."""
    torch.manual_seed(0)
    q, text, image = (torch.randn(2, n, 3, 64) for n in (50, 7, 17))
    said, seen = PromptKeys(text, -text, 26), KeyValue(image, image.flip(1))
    scale = torch.ones(2)

    def attend(q: Tensor, prompt: PromptKeys, picture: KeyValue) -> Tensor:
        return PLAIN.cross_attention(q, 1e-6, CrossKeys(prompt, picture, scale), SDPA)

    with torch.no_grad():
        expected = attend(q, said, seen)
        half = [x.bfloat16() for x in (q, text, -text, image, image.flip(1))]
        found = attend(half[0], PromptKeys(*half[1:3], 26), KeyValue(*half[3:]))
        once = attend(q, PromptKeys(text, -text, 1), seen)
    assert found.dtype == torch.bfloat16
    off = (found.float() - expected).square().mean() / expected.square().mean()
    assert off.sqrt() < 0.01
    assert (once - expected).square().mean() / expected.square().mean() > 0.01


def test_a_torch_without_the_fused_gelu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A private operator that is gone, or takes other arguments, is not an error."""
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not token_ops._has_linear_gelu.__wrapped__()


def test_gelu_keeps_gradients() -> None:
    """With gradients the two passes are taken, and the layer learns."""
    layer, x = nn.Linear(8, 8).bfloat16(), torch.randn(1, 3, 8).bfloat16()
    y = PLAIN.gelu(layer, x)
    assert isinstance(y, torch.Tensor)
    y.float().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight.grad.abs().sum() > 0
