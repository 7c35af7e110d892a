"""The operations of models/token_ops.py by fused kernels; see there for what each means."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models.attention import AttentionKernel, CrossKeys
from flashtalk_cli.models.fp8 import Rows
from flashtalk_cli.models.kernels import cross, heads, rows, speech, vectors
from flashtalk_cli.models.token_ops import TokenOps


class FusedOps(TokenOps):
    """A kernel or two each, for CUDA devices and without gradients."""

    def linear_float32(self, layer: nn.Module, x: Tensor) -> Tensor:  # noqa: D102
        assert isinstance(layer, nn.Linear)
        return vectors.linear(x, layer.weight, layer.bias)

    def modulate(  # noqa: D102
        self, own: Tensor, time: Tensor, *, reach: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        return vectors.modulate(own, time, reach)

    def norm(  # noqa: D102
        self, x: Tensor, weight: Tensor, bias: Tensor, eps: float, *, quantise: bool = False
    ) -> Tensor | Rows:
        _, out = rows.sum_norm(x, None, None, weight, bias, eps, quantise)
        assert out is not None
        return out

    def add(self, x: Tensor, y: Tensor, gate: Tensor | None = None) -> Tensor:  # noqa: D102
        return rows.sum_norm(x, y, gate)[0]

    def add_norm(  # noqa: D102
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
        total, out = rows.sum_norm(x, y, gate, weight, bias, eps, quantise)
        assert out is not None
        return total, out

    def rms_rotate(  # noqa: D102
        self,
        x: Tensor,
        weight: Tensor,
        rotation: Tensor,
        head_dim: int,
        eps: float,
        out: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> Tensor:
        if scales is None:
            return rows.rms_rotate(x, weight, rotation, head_dim, eps, out)
        assert x.shape[-1] == scales.shape[-1] * head_dim, (x.shape, scales.shape, head_dim)
        return heads.rms_rotate(x, weight, rotation, scales, eps, out)

    def place(  # noqa: D102
        self, x: Tensor, out: Tensor | None = None, scales: Tensor | None = None
    ) -> Tensor:
        if scales is not None:
            return heads.place(x, scales, out)
        assert out is not None
        return rows.rms_rotate(x, None, None, out.shape[-1], out=out)

    def rows(self, x: Tensor) -> Rows:  # noqa: D102
        return rows.quantise_rows(x)

    def cross_attention(  # noqa: D102
        self, q: Tensor, eps: float, keys: CrossKeys, kernel: AttentionKernel, *, quantise: bool = False
    ) -> Tensor | Rows:
        return cross.attention(q, eps, keys, quantise)

    def fold(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: D102
        return speech.fold(x, weight, bias)

    def fold_keys(self, x: Tensor, weight: Tensor, scales: Tensor) -> Rows:  # noqa: D102
        return speech.fold_keys(x, weight, scales)

    def fold_values(self, x: Tensor, weight: Tensor, bias: Tensor, scales: Tensor) -> Rows:  # noqa: D102
        return speech.fold_values(x, weight, bias, scales)

    def softmax(self, scores: Tensor, bias: Tensor, scale: float) -> Tensor:  # noqa: D102
        return speech.softmax(scores, bias, scale)

    def softmax_rows(  # noqa: D102
        self, scores: Tensor, bias: Tensor, scale: float, frame_tokens: int, skipped: int
    ) -> Rows:
        return speech.softmax_rows(scores, bias, scale, frame_tokens, skipped)

    def gelu(self, layer: nn.Module, x: Tensor | Rows, *, quantise: bool = False) -> Tensor | Rows:  # noqa: D102
        if quantise:
            return rows.quantise_rows(layer(x), gelu=True)
        if isinstance(layer, nn.Linear) and isinstance(x, Tensor) and x.dtype != torch.float32:
            flat = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
            return flat.view(*x.shape[:-1], -1)  # within the product, before anything is rounded
        return F.gelu(layer(x), approximate="tanh")


FUSED = FusedOps()
