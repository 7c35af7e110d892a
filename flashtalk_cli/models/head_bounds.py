"""What heads of q, k and v are divided by in eight bits: known from weights and time, before any token is seen.

So what is written can be quantised as it is written, and every rank of any count divides by the same.

A row that was normed to a root mean square of 1 is sqrt(dim) long; rotating it, and mixing channels of a head by
orthonormal columns, keep that. So no number of a head of q or k exceeds sqrt(dim) times the head's largest norm
weight. A value is a product of a token with a row of weights, and so no larger than the product of their lengths;
a token comes from a LayerNorm, whose rows are sqrt(dim) long before they are stretched and shifted. Real numbers
are some 70 times smaller than such a bound (at 5,120 channels), and of the 2^17 that e4m3 spans that leaves enough
to both sides: it is a floating format, whose error is its three bits of mantissa wherever a number lies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flashtalk_cli.models.attention_fp8 import normed_scales
from flashtalk_cli.models.fp8 import LARGEST, SMALLEST_PEAK, Fp8Linear

ROUNDED = 1.07  # a token in e4m3 may be longer than it was, by half a step of three bits


@dataclass(frozen=True)
class HeadBounds:
    """Scales as they are, and what they grow by with the longest token, of q, k and v: float32 [3, 1, heads] each."""

    fixed: Tensor
    growing: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, weight_q: Tensor, weight_k: Tensor, values: nn.Module, heads: int) -> HeadBounds:
        """From the norms' weights [dim] of q and k, and the layer that makes values."""
        assert isinstance(values, (nn.Linear, Fp8Linear))
        lengths = torch.linalg.vector_norm(values.weight.float(), dim=1)
        if isinstance(values, Fp8Linear):
            lengths = lengths * values.scale.flatten()
        biased = _largest(values.bias, heads).clamp_min(SMALLEST_PEAK) / LARGEST
        fixed = torch.stack([normed_scales(weight_q, heads), normed_scales(weight_k, heads), biased])
        growing = torch.zeros_like(fixed)
        growing[2] = ROUNDED * _largest(lengths, heads) / LARGEST
        return cls(fixed[:, None], growing[:, None])

    def scales(self, reach: Tensor) -> Tensor:
        """float32 [3, B, heads]; no token that values are made of is longer than `reach` [B]."""
        return torch.addcmul(self.fixed, self.growing, reach[None, :, None])


def _largest(x: Tensor, heads: int) -> Tensor:
    return x.float().abs().unflatten(0, (heads, -1)).amax(1)
