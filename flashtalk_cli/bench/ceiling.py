"""How fast this machine is at the kinds of arithmetic that a chunk consists of: measured, in this run.

Single operations of the libraries, with random data, at the sizes that one rank meets. What a stage could
at most be is its work at these rates; norms, copies and exchanges keep it below.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from flashtalk_cli.bench.work import dit_tokens
from flashtalk_cli.config import Canvas
from flashtalk_cli.models import fp8
from flashtalk_cli.models.attention_fp8 import to_e4m3
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.models.vae import STRIDE_PX, VaeParams

PROBE_S = 0.4  # of repetitions of one operation
MAX_REPEATS, WARM_UP = 200, 3


@dataclass(frozen=True)
class Probe:
    """A kind of operation, at its measured rate."""

    kind: str
    what: str  # the operation, its sizes and number format
    tflops: float

    def as_dict(self) -> dict[str, Any]:
        """For a report."""
        return {"kind": self.kind, "what": self.what, "tflops": self.tflops}


@torch.no_grad()
def probe_dit(dit: DiT, tokens: int, ranks: int, device: torch.device, *, eight_bits: bool) -> list[Probe]:
    """Matrix product and self-attention of a rank that has its share of the tokens, and of the heads."""
    p, kernel, dtype = dit.params, dit.kernel, dit.dtype
    rows, heads = -(-tokens // ranks), max(1, p.num_heads // ranks)
    parts = torch.randn(3, 1, tokens, heads, p.head_dim, device=device, dtype=dtype)
    scales = None
    if kernel.eight_bits:
        scales = parts.float().abs().amax((2, 4)) / fp8.LARGEST
        parts = torch.stack([to_e4m3(part, scale) for part, scale in zip(parts, scales, strict=True)])
    q, k, v = parts
    product_s = _seconds(_product(rows, p.dim, p.ffn_dim, dtype, device, eight_bits=eight_bits), device)
    attention_s = _seconds(lambda: kernel(q, k, v, scales), device)
    form = "e4m3, scales by row" if eight_bits else _short(dtype)
    return [
        Probe(
            "gemm",
            f"{rows} x {p.dim} x {p.ffn_dim}, {form}",
            2e-12 * rows * p.dim * p.ffn_dim / product_s,
        ),
        Probe(
            "attention",
            f"{kernel.name}, {tokens} tokens, {heads} heads of {p.head_dim}, {_short(parts.dtype)}",
            4e-12 * tokens**2 * heads * p.head_dim / attention_s,
        ),
    ]


def _product(
    rows: int, width: int, out: int, dtype: torch.dtype, device: torch.device, *, eight_bits: bool
) -> Callable[[], Tensor]:
    """A linear layer [rows, width] -> [rows, out]; in eight bits of operands that are quantised already."""
    x = torch.randn(rows, width, device=device, dtype=dtype)
    weight = torch.randn(out, width, device=device, dtype=dtype)
    if not eight_bits:
        return lambda: F.linear(x, weight)
    small, (values, scale) = fp8.quantise_rows(x), fp8.quantise_rows(weight)
    bias = torch.zeros(out, device=device, dtype=dtype)
    return lambda: fp8.linear(small, values, scale, bias, dtype)


@torch.no_grad()
def probe_vae(
    params: VaeParams, canvas: Canvas, ranks: int, dtype: torch.dtype, device: torch.device
) -> Probe:
    """The 3 x 3 x 3 convolutions of the upper levels in their mix, over a latent's frames, a share of the rows."""
    flops = seconds = 0.0
    sizes = []
    for level, (mult, frames) in enumerate(zip(params.dim_mult, (4, 4, 2), strict=False)):
        channels, stride = params.dim * mult, 2**level
        height = max(STRIDE_PX, canvas.height_px // ranks) // stride
        width = canvas.width_px // stride
        x = torch.randn(frames, 3 * channels, height, width, device=device, dtype=dtype)
        weight = torch.randn(channels, 3 * channels, 3, 3, device=device, dtype=dtype)
        seconds += _seconds(_convolution(x, weight), device)
        flops += 2.0 * weight.numel() * frames * height * width
        sizes.append(f"{channels} of {width} x {height}")
    what = f"3 x 3 over three stacked frames, channels {', '.join(sizes)}, {_short(dtype)}"
    return Probe("convolution", what, 1e-12 * flops / seconds)


def tokens_of(params: DitParams, latents: int, canvas: Canvas) -> int:
    """Tokens of a chunk on that canvas."""
    return dit_tokens(params, latents, canvas.height_px // STRIDE_PX, canvas.width_px // STRIDE_PX)


def _convolution(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """A channels-last convolution, which is the fastest layout on CPUs and GPUs alike."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    return lambda: F.conv2d(x, weight, padding=1)


def _seconds(run: Callable[[], Tensor], device: torch.device) -> float:
    """Median duration of an operation after a warm-up."""
    for _ in range(WARM_UP):
        run()
    took_s: list[float] = []
    give_up_s = time.perf_counter() + PROBE_S
    while len(took_s) < MAX_REPEATS and (not took_s or time.perf_counter() < give_up_s):
        if device.type == "cuda":
            begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun.record()
            run()
            ended.record()
            ended.synchronize()
            took_s.append(begun.elapsed_time(ended) / 1000)
        else:
            begun_s = time.perf_counter()
            run()
            took_s.append(time.perf_counter() - begun_s)
    return float(np.median(took_s))


def _short(dtype: torch.dtype) -> str:
    return "e4m3" if dtype == torch.float8_e4m3fn else str(dtype).removeprefix("torch.")
