"""Linear layers that share an input, as one product; and whether a layer is one in eight bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.models import fp8
from flashtalk_cli.models.fp8 import Fp8Linear, Rows


def in_eight_bits(layer: nn.Module) -> bool:
    """Whether the layer wants its input as `Rows`."""
    return isinstance(layer, Fp8Linear)


@torch.no_grad()
def lay_together(layers: Sequence[nn.Module]) -> None:
    """Let each parameter and buffer of equal layers lie one behind another in memory. Names and values stay."""
    for name, first in (*layers[0].named_parameters(), *layers[0].named_buffers()):
        own = [getattr(layer, name) for layer in layers]
        together = torch.empty(len(own), *first.shape, dtype=first.dtype, device=first.device)
        for place, tensor in zip(together, own, strict=True):
            place.copy_(tensor)
            tensor.data = place


def linear_together(x: Tensor | Rows, *layers: nn.Module) -> tuple[Tensor, ...]:
    """What each layer makes of x; in one product where `lay_together` was there and no gradients are kept.

    One product of three times the rows fills a GPU better than three (see docs/speed-log.md). What comes
    out then are slices of one tensor.
    """
    if not torch.is_grad_enabled() and (weight := _one(layers, "weight")) is not None:
        bias = _one(layers, "bias")
        assert bias is not None
        if isinstance(x, Rows):
            scale, layer = _one(layers, "scale"), layers[0]
            assert scale is not None
            assert isinstance(layer, Fp8Linear)
            return fp8.linear(x, weight, scale, bias, layer.dtype).chunk(len(layers), dim=-1)
        return F.linear(x, weight, bias).chunk(len(layers), dim=-1)
    return tuple(layer(x) for layer in layers)


def _one(layers: Sequence[nn.Module], name: str) -> Tensor | None:
    """A tensor of that name of every layer as one [sum of rows, ...], if they lie one behind another."""
    parts: list[Tensor] = [getattr(layer, name) for layer in layers]
    first = parts[0]
    for index, part in enumerate(parts):
        if part.data_ptr() != first.data_ptr() + index * first.nbytes or not part.is_contiguous():
            return None
    if first.untyped_storage().nbytes() < first.storage_offset() * first.itemsize + len(parts) * first.nbytes:
        return None  # neighbours by chance
    return first.as_strided((len(parts) * len(first), *first.shape[1:]), first.stride())
