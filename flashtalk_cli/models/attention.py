"""Attention, and the choice of the kernel that computes it.

A kernel takes q [B, N, heads, head_dim] and k, v [B, M, heads, head_dim] of one dtype and
returns [B, N, heads, head_dim]: softmax(q k^T / sqrt(head_dim)) v, no mask. It is chosen
once, when a model is loaded; no call asks again what machine it runs on.

    fa3      package fa3-fwd: FlashAttention 3, Hopper GPUs, bfloat16, forward only
    fa3-fp8  the same with self-attention's q, k and v in e4m3: never taken but when asked for by name
    flash    package flash-attn: FlashAttention 2, Ampere GPUs and later, half precision
    cudnn    torch's scaled_dot_product_attention, by cuDNN wherever it takes the sizes, half precision
    sdpa     torch's scaled_dot_product_attention, any device and dtype; for many keys in bfloat16 on a
             CPU, without gradients, two matrix products and a softmax in its place

On one H200, self-attention over 12,096 tokens of 40 x 128 in bfloat16 ran at 677 (fa3), 567
(cudnn) and 357 (the FlashAttention 2 inside torch) TFLOP/s.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models import attention_fp8

log = logging.getLogger(__name__)

KERNEL_NAMES = ("fa3", "cudnn", "flash", "sdpa")  # in the order in which `auto` looks, from Hopper on
ROUNDING = ("fa3-fp8",)  # and those that it never takes
BEFORE_HOPPER = ("flash", "cudnn", "sdpa")  # and on GPUs that FlashAttention 2 was written for
MANY_KEYS = 128  # from here on two products are faster than a fused kernel on a CPU
MAX_SCORES = 1 << 22  # numbers: 8 MB of bfloat16
HALF_PRECISION = (torch.float16, torch.bfloat16)
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)  # CUDA compute capabilities


class KeyValue(NamedTuple):
    """Keys and values of one cross-attention, each [..., tokens, heads, head_dim]."""

    k: Tensor
    v: Tensor


class PromptKeys(NamedTuple):
    """Keys and values of a prompt's rows, each [B, rows, heads, head_dim].

    The model attends to empty rows behind the prompt like to any other, and those are all alike: the last
    row here stands for `times` of them.
    """

    k: Tensor
    v: Tensor
    times: int

    def each(self) -> KeyValue:
        """Every row by itself."""
        k, v = (torch.cat([x, x[:, -1:].expand(-1, self.times - 1, -1, -1)], dim=1) for x in (self.k, self.v))
        return KeyValue(k, v)


class CrossKeys(NamedTuple):
    """What tokens attend to that stays the same in a session: the prompt, and apart from it the picture.

    Keys have the weight of the queries' norm multiplied in. scale: float32 [B], what the sum of both results is
    divided by in eight bits: either is a mean of values, so the sum is no larger than that of their largest.
    """

    text: PromptKeys
    image: KeyValue
    scale: Tensor


@dataclass(frozen=True)
class AttentionKernel:
    """A named way to compute attention; call it with q, k, v."""

    name: str
    run: Callable[..., Tensor]

    @property
    def eight_bits(self) -> bool:
        """Whether self-attention's q, k and v are to come in e4m3, with scales."""
        return self.name in ROUNDING

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """Attention of q to k and v, each [B, tokens, heads, head_dim]; in e4m3 with scales [3, B, heads]."""
        return self.run(q, k, v) if scales is None else self.run(q, k, v, scales)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    products = (
        q.device.type == "cpu"
        and q.dtype == torch.bfloat16
        and k.shape[2] >= MANY_KEYS
        and not torch.is_grad_enabled()
    )
    return (_in_products(q, k, v) if products else F.scaled_dot_product_attention(q, k, v)).transpose(1, 2)


def _in_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of q [B, heads, N, head_dim] and k, v [B, heads, M, head_dim], as it is defined.

    The fused kernel multiplies at a third of the rate that oneDNN's products reach on a CPU with bfloat16
    instructions: for 729 tokens of 4 x 64 this takes 0.54 of its time, for 900 0.63. Keys are padded so
    that rows of scores fill whole registers, and queries are cut so that scores stay in the cache.
    """
    n_keys = k.shape[2]
    padding = -n_keys % 16
    k, v = (F.pad(x, (0, 0, 0, padding)) if padding else x for x in (k, v))
    rows = max(1, MAX_SCORES // (k.shape[0] * k.shape[1] * k.shape[2]))
    outs = []
    for queries in (q * q.shape[-1] ** -0.5).split(rows, dim=2):
        scores = queries @ k.mT
        scores[..., n_keys:] = -torch.inf
        outs.append(torch.softmax(scores, dim=-1, out=scores) @ v)
    return torch.cat(outs, dim=2)


# What cuDNN does not take, such as some widths of a head, must not end a run: the others are there for that.
_CUDNN_FIRST = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(_CUDNN_FIRST, set_priority=True):
        return _sdpa(q, k, v)


SDPA = AttentionKernel("sdpa", _sdpa)
CUDNN = AttentionKernel("cudnn", _cudnn)


def _from_package(name: str, module: str) -> AttentionKernel:
    flash_attn_func = importlib.import_module(module).flash_attn_func
    if name in ROUNDING:
        return AttentionKernel(name, attention_fp8.attention_by(flash_attn_func))
    return AttentionKernel(name, lambda q, k, v: flash_attn_func(q, k, v, causal=False))


_PACKAGES = {
    "fa3": ("fa3-fwd", "fa3_fwd_interface"),
    "fa3-fp8": ("fa3-fwd", "fa3_fwd_interface"),
    "flash": ("flash-attn", "flash_attn"),
}


def why_absent(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernel cannot serve this device and dtype, with the mend; None when it can."""
    if name == "sdpa":
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, this is {device.type!r}: take 'sdpa' or 'auto'"
    if dtype not in HALF_PRECISION or (name.startswith("fa3") and dtype != torch.bfloat16):
        return f"it does not compute in {dtype}: set precision.dit to bfloat16, or take 'sdpa'"
    capability = torch.cuda.get_device_capability(device)
    needed = HOPPER if name.startswith("fa3") else AMPERE
    if capability < needed or (name.startswith("fa3") and capability >= BLACKWELL):
        have = ".".join(map(str, capability))
        return f"the GPU has compute capability {have}, {name!r} is built for {needed[0]}.x: take 'auto'"
    if name == "cudnn":
        return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN: take 'sdpa'"
    package, module = _PACKAGES[name]
    if importlib.util.find_spec(module) is None:
        return f"package {package} is not installed: pip install {package}, or take 'auto'"
    return None


def in_order(device: torch.device) -> tuple[str, ...]:
    """The kernels that `auto` tries on this device, fastest first."""
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < HOPPER
    return BEFORE_HOPPER if old else KERNEL_NAMES


def choose_kernel(
    name: str, device: torch.device, dtype: torch.dtype, among: Collection[str] | None = None
) -> AttentionKernel:
    """The kernel called `name`, or for 'auto' the fastest that is there, `among` those (None: all).

    Raises DeviceError when a kernel asked for by name cannot run here.
    """
    found = [one for one in in_order(device) if among is None or one in among]
    names = found if name == "auto" else [name]
    for candidate in names:
        reason = why_absent(candidate, device, dtype)
        if reason is None:
            try:
                return _load(candidate)
            except (ImportError, OSError) as error:  # a wheel built for another torch or CUDA
                reason = f"its package does not load ({error}): reinstall it, or take 'auto'"
        if name != "auto":
            raise DeviceError(f"attention kernel {name!r} cannot run here: {reason}")
        log.debug("attention kernel %s passed over: %s", candidate, reason)
    raise AssertionError("sdpa runs everywhere")


def _load(name: str) -> AttentionKernel:
    return {"sdpa": SDPA, "cudnn": CUDNN}.get(name) or _from_package(name, _PACKAGES[name][1])
