"""Self-attention in eight bits: q, k and v in e4m3, each head of each under a scale of its own.

A product of q and k is off by a part of its largest terms, and few channels of a head are much louder than the
others. So channels are mixed before, queries' and keys' alike, by a Hadamard matrix, whose columns are
orthogonal: every product is what it was, of terms about as large as one another. That halves what eight bits
cost (measured, see bench/README.md).

fa3-fwd multiplies e4m3 at 1.4 times the rate of bfloat16 and gives bfloat16. A scale cannot go by token, for
it has to leave the sums over keys. It is known before any token is seen, from a bound that no number exceeds:
so what writes q, k and v writes them in e4m3, at once and on every GPU alike, and they are exchanged in half the
bytes. A typical number then lies near 6, which costs nothing: e4m3 is a floating format, its three bits of
mantissa are as many from 2^-6 on as they are below 448. Few keys, as a prompt's or a picture's, stay as
they are: to quantise the queries would take longer than it saves. Elsewhere than on a GPU the same numbers
are multiplied in float32, which exists to measure the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK

LEAST_MIXED = 16  # channels of a head
# fa3 holds a softmax's numbers in e4m3, too, from 0 to this.
LARGEST_WEIGHT = 256.0


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


def normed_scales(weight: Tensor, heads: int) -> Tensor:
    """For heads of what is RMS-normed over its full width, times weight [dim], turned and mixed: float32 [heads].

    A normed row is sqrt(dim) long at most, and what follows keeps each head's length, but for the weight.
    """
    largest = weight.float().abs().unflatten(0, (heads, -1)).amax(1)
    return (len(weight) ** 0.5 * largest).clamp_min(SMALLEST_PEAK) / LARGEST


def to_e4m3(x: Tensor, scales: Tensor, mix: bool = False) -> Tensor:
    """The nearest e4m3 numbers of each head of x [B, n, heads, head_dim] over its scale, float32 [B or 1, heads].

    mix: each head's channels mixed before, where there is a matrix for so many. What is too large becomes
    the largest number.
    """
    signs = hadamard(x.shape[-1], x.device, x.dtype) if mix else None
    x = x.float() if signs is None else x.float() @ signs.float() * x.shape[-1] ** -0.5
    return (x / scales[:, None, :, None]).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def attention_by(flash: Callable[..., Any]) -> Callable[..., Tensor]:
    """Attention by a package's `flash_attn_func`: in eight bits where scales are given, else as q, k and v come."""

    def run(q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """q, k, v: [B, n, heads, head_dim], with scales in e4m3; scales: of each, float32 [3, B, heads]."""
        if scales is None:
            return flash(q, k, v, causal=False)
        names = ("q_descale", "k_descale", "v_descale")
        return flash(q, k, v, causal=False, **dict(zip(names, scales.contiguous(), strict=True)))

    return run


def emulated(
    q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """The same numbers on any device, in float32; the weights of a softmax rounded as fa3 rounds them.

    dtype: of the result, where scales are given.
    """
    if scales is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
    q, k, v = (
        (x.float() * scale[:, None, :, None]).transpose(1, 2)
        for x, scale in zip((q, k, v), scales, strict=True)
    )
    scores = q @ k.mT * q.shape[-1] ** -0.5
    weights = (scores - scores.amax(-1, keepdim=True)).exp() * LARGEST_WEIGHT
    out = weights.to(torch.float8_e4m3fn).float() @ v / weights.sum(-1, keepdim=True)
    return out.transpose(1, 2).to(dtype)
