"""What a block does between its large matrix products: norms, gates, rotation, GELU, few keys; and the time's vectors.

`TokenOps` is plain code: it runs on any device, with gradients, and says what is meant. On a CUDA device
and without gradients `token_ops` gives the same interface by fused kernels. It is asked once a step, by
`DiT.forward`, and once a chunk, by `DiT.fold`; no block asks again.

Everything computes in float32 and gives the dtype of its input; where `quantise` is asked for it gives
`Rows`, for a layer in eight bits. Shapes: x, y [B, n, dim]; vectors over channels [dim] or [B, 1, dim].
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models.attention import AttentionKernel, CrossKeys, KeyValue, PromptKeys
from flashtalk_cli.models.attention_fp8 import to_e4m3
from flashtalk_cli.models.fp8 import LARGEST, Rows, quantise_rows, rows_under
from flashtalk_cli.models.rope import rotate

HAS_TRITON = importlib.util.find_spec("triton") is not None


class TokenOps:
    """Plain code."""

    def linear_float32(self, layer: nn.Module, x: Tensor) -> Tensor:
        """What a linear layer makes of x, float32 [B, in], multiplied in float32 whatever its weights are: [B, out]."""
        assert isinstance(layer, nn.Linear)
        return F.linear(x, layer.weight.float(), layer.bias.float())

    def modulate(self, own: Tensor, time: Tensor, *, reach: bool = False) -> tuple[Tensor, Tensor | None]:
        """A block's own vectors [1, 6, dim] and the time's, float32 [B, 6, dim], summed: float32 [B, 6, dim].

        They are shift, scale and gate of one norm and then of another; what comes of a scale is one more, since
        it multiplies by that. With `reach` also how long a row of LayerNorm(x) * scale + shift, of the first norm, can
        be: float32 [B].
        """
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (own.float() + time).chunk(6, 1)
        scale_1, scale_2 = 1 + scale_1, 1 + scale_2
        out = torch.cat([shift_1, scale_1, gate_1, shift_2, scale_2, gate_2], 1)
        return out, longest_token(scale_1, shift_1) if reach else None

    def norm(
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, quantise: bool = False
    ) -> Tensor | Rows:
        """LayerNorm(x) * weight + bias."""
        if x.device.type == "cpu" and weight.numel() == x.shape[-1]:  # one pass over memory, not several
            out = F.layer_norm(x, x.shape[-1:], weight.flatten(), bias.flatten(), eps)
        else:
            normal = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
            out = torch.addcmul(bias.float(), normal, weight.float()).to(x.dtype)
        return quantise_rows(out) if quantise else out

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:
        """x + y * gate."""
        return x + y if gate is None else torch.addcmul(x, y, gate).to(x.dtype)

    def add_norm(
        self,
        x: Tensor,
        y: Tensor,
        gate: Tensor | None,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        *,
        quantise: bool = False,
    ) -> tuple[Tensor, Tensor | Rows]:
        """Both in turn: x + y * gate, and the norm of that."""
        x = self.add(x, y, gate)
        return x, self.norm(x, weight, bias, eps, quantise=quantise)

    def rms_rotate(
        self,
        x: Tensor,
        weight: Tensor,
        rotation: Tensor,
        head_dim: int,
        eps: float,
        out: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        """x over the root of its mean square, times weight, and then each head turned: rotation [n, head_dim / 2, 2].

        Into `out`, groups of heads [B, n, groups, channels of a group], where that is given. With scales,
        float32 [B or 1, heads], each head mixed and over its scale, in e4m3 (see attention_fp8.py).
        """
        heads = _rms_norm(x, weight, eps).unflatten(-1, (-1, head_dim))
        turned = rotate(heads, rotation).to(x.dtype)
        turned = (turned if scales is None else to_e4m3(turned, scales, mix=True)).flatten(-2)
        return turned if out is None else self.place(turned, out)

    def place(self, x: Tensor, out: Tensor | None = None, scales: Tensor | None = None) -> Tensor:
        """x into groups of heads, or such groups into one: [B, n, dim] and [B, n, groups, channels of a group].

        With scales, float32 [B or 1, heads], x [B, n, dim] comes in e4m3, each head over its scale; without
        `out` then as [B, n, dim].
        """
        if scales is not None:
            x = to_e4m3(x.unflatten(-1, (scales.shape[-1], -1)), scales).flatten(-2)
            if out is None:
                return x
        assert out is not None
        return out.copy_(x.unflatten(-1, out.shape[2:]) if out.ndim > x.ndim else x.flatten(2))

    def rows(self, x: Tensor) -> Rows:
        """x in eight bits; groups of heads [B, n, groups, channels of a group] as one row."""
        return quantise_rows(x.flatten(2))

    def cross_attention(
        self, q: Tensor, eps: float, keys: CrossKeys, kernel: AttentionKernel, *, quantise: bool = False
    ) -> Tensor | Rows:
        """To the prompt, and apart from that to the picture, summed: [B, n, heads, head_dim] to [B, n, dim].

        Queries come as they are, and count as over the root of their mean square over all heads. With `quantise` in
        eight bits under the keys' scale.
        """
        q = rms_norm(q.flatten(2), None, eps).view(q.shape)
        if q.device.type == "cpu" and q.dtype == torch.bfloat16 and not torch.is_grad_enabled():
            out = _cross_products(q, keys.text, keys.image)
        else:
            out = (kernel(q, *keys.text.each()) + kernel(q, *keys.image)).flatten(2)
        return rows_under(out, keys.scale[:, None, None].expand(*out.shape[:2], 1)) if quantise else out

    def fold(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Each head of x [f, n, heads, head_dim] times its weight [heads, head_dim, dim]: [f, heads n, dim].

        The bias [dim] is dealt out to the heads.
        """
        heads = torch.bmm(rearrange(x, "f n h d -> h (f n) d"), weight)
        folded = rearrange(heads, "h (f n) c -> f (h n) c", f=len(x))
        return folded if bias is None else folded + bias / len(weight)

    def fold_keys(self, x: Tensor, weight: Tensor, scales: Tensor) -> Rows:
        """`fold` in eight bits, each row under a scale that is given: float32 [f, heads n, 1]."""
        return rows_under(self.fold(x, weight), scales)

    def fold_values(self, x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Rows:
        """`fold` in eight bits, [f, dim, heads n], each channel under a scale that is given: float32 [dim]."""
        return rows_under(self.fold(x, weight, bias).mT, scales[:, None].expand(len(x), -1, 1))

    def softmax(self, scores: Tensor, bias: Tensor, scale: float) -> Tensor:
        """softmax((scores + bias) * scale) over each head's keys: scores [f, s, heads n], bias [f, heads, n].

        Scores are used up.
        """
        each = scores.unflatten(-1, bias.shape[1:]).float() + bias[:, None].float()
        return each.mul(scale).softmax(-1).flatten(-2).to(scores.dtype)

    def softmax_rows(
        self, scores: Tensor, bias: Tensor, scale: float, frame_tokens: int, skipped: int
    ) -> Rows:
        """The same in eight bits, of the tokens of a run of frames, whose first so many are not there: [s, heads n]."""
        frame = (torch.arange(len(scores), device=scores.device) + skipped) // frame_tokens
        weights = self.softmax(scores[:, None], bias[frame], scale)[:, 0]
        values = (weights.float() * LARGEST).to(torch.float8_e4m3fn)
        return Rows(values, torch.full_like(scores[:, :1], 1 / LARGEST, dtype=torch.float32))

    def gelu(self, layer: nn.Module, x: Tensor | Rows, *, quantise: bool = False) -> Tensor | Rows:
        """GELU, in its tanh form, of what a linear layer makes of x."""
        if isinstance(x, Tensor) and x.device.type == "cpu" and _linear_gelu_fits(layer, x):
            out = torch.ops.mkldnn._linear_pointwise(x, layer.weight, layer.bias, "gelu", [], "tanh")
        else:
            out = F.gelu(layer(x), approximate="tanh")
        return quantise_rows(out) if quantise else out


def _cross_products(q: Tensor, text: PromptKeys, image: KeyValue) -> Tensor:
    """Cross-attention as one product with all keys and one with all values: few, for which a CPU's kernels are slow."""
    n_text = text.k.shape[1]
    k, v = (torch.cat(pair, dim=1).transpose(1, 2) for pair in ((text.k, image.k), (text.v, image.v)))
    scores = (q.transpose(1, 2) * q.shape[-1] ** -0.5 @ k.mT).float()
    scores[..., n_text - 1] += math.log(text.times)
    weights = torch.cat([scores[..., :n_text].softmax(-1), scores[..., n_text:].softmax(-1)], dim=-1)
    return (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)


def longest_token(weight: Tensor, bias: Tensor) -> Tensor:
    """What no row of LayerNorm(x) * weight + bias is longer than: weight and bias [B, 1, dim], result [B]."""
    stretched = weight.shape[-1] ** 0.5 * weight.abs().amax((1, 2))
    return stretched + torch.linalg.vector_norm(bias, dim=(1, 2))


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., dim] over the root of its mean square over all channels, times weight [dim] where there is one."""
    return _rms_norm(x, weight, eps).to(x.dtype)


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if x.device.type != "cpu" or torch.is_grad_enabled():
        return F.rms_norm(x.float(), x.shape[-1:], None if weight is None else weight.float(), eps)
    # What F.rms_norm is made of on a CPU, in fewer passes over memory.
    x = x.to(torch.float32, copy=True)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.shape[-1])
    x.mul_(mean_square.add_(eps).rsqrt_())
    return x if weight is None else x.mul_(weight.float())


def _linear_gelu_fits(layer: nn.Module, x: Tensor) -> bool:
    """Whether oneDNN gives GELU(layer(x)) in one pass: bfloat16, no gradients, and a CPU and a torch that have it.

    A third less time than the two after each other, whose GELU is slow in bfloat16, and one rounding less.
    """
    return (
        isinstance(layer, nn.Linear)
        and x.dtype == layer.weight.dtype == torch.bfloat16
        and not torch.is_grad_enabled()
        and _has_linear_gelu()
    )


@cache
def _has_linear_gelu() -> bool:
    probe = torch.ones(2, 2, dtype=torch.bfloat16)
    try:
        torch.ops.mkldnn._linear_pointwise(probe, probe, probe[0], "gelu", [], "tanh")
    except (AttributeError, RuntimeError, NotImplementedError):  # a private operator: it may go or change
        return False
    return True


PLAIN = TokenOps()


def token_ops(x: Tensor) -> TokenOps:
    """What is fastest for tokens like x, as things are: device, and whether gradients are kept."""
    if not (x.is_cuda and HAS_TRITON) or torch.is_grad_enabled():
        return PLAIN
    from flashtalk_cli.models.kernels.ops import FUSED

    return FUSED
