"""Products in eight bits: e4m3 numbers, a scale for each row of what is multiplied, and each row of what by.

A row's scale maps its largest magnitude to the largest e4m3 number, so no row can overflow and a loud
token does not cost the others their digits. Products are accumulated in float32 and come out in the
compute dtype. On a GPU that multiplies e4m3 that is `torch._scaled_mm`; elsewhere the same numbers are
multiplied in float32, which is slow and exists to measure the error (it differs by the order of sums).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashtalk_cli.errors import DeviceError

LARGEST = 448.0  # e4m3, finite kind; https://arxiv.org/abs/2209.05433
SMALLEST_PEAK = 1e-12  # a row of zeros has this scale and stays zero
HOPPER = 9  # major compute capability, the only one for which products of many groups are one kernel
ADA = (8, 9)  # CUDA compute capability from which on e4m3 is multiplied


class Rows(NamedTuple):
    """Numbers in e4m3 [..., n, dim] and what each row was divided by, float32 [..., n, 1]."""

    values: Tensor
    scales: Tensor

    def in_float32(self) -> Tensor:
        """The numbers that these stand for."""
        return self.values.float() * self.scales


def quantise_rows(x: Tensor) -> Rows:
    """The nearest e4m3 numbers of each row of x [..., dim] under the row's own scale."""
    x = x.float()
    scales = x.abs().amax(dim=-1, keepdim=True).clamp_min(SMALLEST_PEAK) / LARGEST
    return Rows((x / scales).to(torch.float8_e4m3fn), scales)


def rows_under(x: Tensor, scales: Tensor) -> Rows:
    """The nearest e4m3 numbers of each row of x [..., n, dim] under scales that are given, float32 [..., n, 1].

    What is too large becomes the largest number.
    """
    values = (x.float() / scales.clamp_min(SMALLEST_PEAK)).clamp(-LARGEST, LARGEST)
    return Rows(values.to(torch.float8_e4m3fn).contiguous(), scales.contiguous())


class Fp8Linear(nn.Module):
    """A linear layer's weight in e4m3 [out, in] with a scale a row, float32 [out, 1]; no gradients.

    Takes rows that are quantised already, and gives `dtype`.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        values, scale = quantise_rows(weight)
        self.dtype = dtype
        self.register_buffer("weight", values)
        self.register_buffer("scale", scale)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Rows) -> Tensor:
        """[..., n, in] -> [..., n, out]."""
        return linear(x, self.weight, self.scale, self.bias, self.dtype)


def linear(x: Rows, weight: Tensor, scale: Tensor, bias: Tensor, dtype: torch.dtype) -> Tensor:
    """x times weight [out, in] with scale [out, 1], plus bias [out]: [..., n, out]."""
    if not x.values.is_cuda:
        return F.linear(x.in_float32(), weight.float() * scale, bias.float()).to(dtype)
    out = torch._scaled_mm(
        x.values.flatten(0, -2),
        weight.t(),
        scale_a=x.scales.reshape(-1, 1),
        scale_b=scale.t(),
        bias=bias,
        out_dtype=dtype,
        use_fast_accum=True,
    )
    return out.view(*x.values.shape[:-1], -1)


class Runs(NamedTuple):
    """How many rows belong to each group."""

    lengths: tuple[int, ...]
    ends: Tensor  # one past each group's last row, int32 on the device

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> Runs:
        """Not to be called while a graph is recorded."""
        with torch.inference_mode(False):
            ends = torch.tensor(list(accumulate(lengths)), dtype=torch.int32, device=device)
        return cls(tuple(lengths), ends)


def grouped(x: Rows, weight: Rows, runs: Runs, dtype: torch.dtype) -> Tensor:
    """Runs of rows of x [n, in], each times a weight of its own, of weight [groups, out, in]: [n, out] in `dtype`."""
    if x.values.is_cuda and torch.cuda.get_device_capability(x.values.device)[0] == HOPPER:
        scales = x.scales.flatten(), weight.scales.flatten(1)
        return torch._scaled_grouped_mm(
            x.values, weight.values.mT, *scales, offs=runs.ends, out_dtype=dtype, use_fast_accum=True
        )
    none = x.scales.new_zeros(weight.values.shape[1], dtype=dtype)
    parts = zip(x.values.split(runs.lengths), x.scales.split(runs.lengths), strict=True)
    return torch.cat(
        [
            linear(Rows(*part), one, scale, none, dtype)
            for part, one, scale in zip(parts, weight.values, weight.scales, strict=True)
        ]
    )


def check_device(device: torch.device) -> None:
    """Raises DeviceError where e4m3 is not multiplied; a CPU emulates it, which is of no use but to measure."""
    have = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if have is None:
        reason = f"it needs a GPU that multiplies e4m3 and this run uses {device.type!r}: take 'auto'"
    elif have < ADA:
        reason = f"the GPU has compute capability {have[0]}.{have[1]}, 8.9 is needed: take 'bfloat16'"
    else:
        return
    raise DeviceError(f"precision.dit fp8 cannot run here: {reason}")


def to_eight_bits(block: nn.Module, names: Iterable[str]) -> None:
    """Replace the linear layers of those names, one after another: no two whole copies are held."""
    for name in names:
        layer = block.get_submodule(name)
        assert isinstance(layer, nn.Linear), name
        small = Fp8Linear(layer.weight.data, layer.bias.data, layer.weight.dtype)
        parent, _, leaf = name.rpartition(".")
        setattr(block.get_submodule(parent), leaf, small)
