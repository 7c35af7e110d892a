"""Self-attention in eight bits: q, k and v in e4m3, each head of each under a scale of its own.

A product of q and k is off by a part of its largest terms, and few channels of a head are much louder than the
others. So channels are mixed before, queries' and keys' alike, by a Hadamard matrix, whose columns are
orthogonal: every product is what it was, of terms about as large as one another. That halves what eight bits
cost (measured, see bench/README.md).

fa3-fwd multiplies e4m3 at 1.4 times the rate of bfloat16 and gives bfloat16. A scale cannot go by token, for
it has to leave the sums over keys; e4m3 is a floating format, so what a head's loudest number costs its quiet
ones is range that they have to spare. Few keys, as a prompt's or a picture's, stay as they are: to quantise
the queries would take longer than it saves. Elsewhere than on a GPU the same numbers are multiplied in
float32, which exists to measure the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK

FEW_KEYS = 512
LEAST_MIXED = 16  # channels of a head
# fa3 holds a softmax's numbers in e4m3, too, from 0 to this.
LARGEST_WEIGHT = 256.0


class Heads(NamedTuple):
    """e4m3 numbers [B, n, heads, head_dim] and what each head was divided by, float32 [B, heads]."""

    values: Tensor
    scales: Tensor

    def in_float32(self) -> Tensor:
        """The numbers that these stand for."""
        return self.values.float() * self.scales[:, None, :, None]


@lru_cache(maxsize=8)
def hadamard(width: int, device: torch.device, dtype: torch.dtype) -> Tensor | None:
    """Signs [width, width] with orthogonal columns, after Sylvester; None where width is no power of two."""
    if width < LEAST_MIXED or width & (width - 1):
        return None
    with torch.inference_mode(False):
        signs = torch.ones(1, 1)
        while len(signs) < width:
            signs = torch.cat([torch.cat([signs, signs], 1), torch.cat([signs, -signs], 1)])
        return signs.to(device, dtype)


def quantise_heads(x: Tensor, mix: bool = False) -> Heads:
    """The nearest e4m3 numbers of each head of x [B, n, heads, head_dim] under the head's own scale.

    mix: each head's channels mixed before.
    """
    signs = hadamard(x.shape[-1], x.device, x.dtype) if mix else None
    if x.is_cuda:
        from flashtalk_cli.models.kernels import heads

        return heads.quantise(x, signs)
    x = x.float() if signs is None else x.float() @ signs.float() * x.shape[-1] ** -0.5
    scales = x.abs().amax(dim=(1, 3)).clamp_min(SMALLEST_PEAK) / LARGEST
    return Heads((x / scales[:, None, :, None]).to(torch.float8_e4m3fn), scales)


def attention_by(flash: Callable[..., Any]) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Attention by a package's `flash_attn_func`: in eight bits where there are many keys."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if k.shape[1] <= FEW_KEYS:
            return flash(q, k, v, causal=False)
        heads = [quantise_heads(q, mix=True), quantise_heads(k, mix=True), quantise_heads(v)]
        scales = {f"{name}_descale": x.scales for name, x in zip("qkv", heads, strict=True)}
        return flash(*(x.values for x in heads), causal=False, **scales)

    return run


def emulated(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same numbers, on any device; the weights of a softmax rounded as fa3 rounds them."""
    if k.shape[1] <= FEW_KEYS:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    dtype = q.dtype
    heads = quantise_heads(q, mix=True), quantise_heads(k, mix=True), quantise_heads(v)
    q, k, v = (x.in_float32().transpose(1, 2) for x in heads)
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * LARGEST_WEIGHT
    out = weights.to(torch.float8_e4m3fn).float() @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(dtype)
