"""The same interface by xfuser's groups and attention: `compute.engine: xfuser`, of the extra `gpu`.

xfuser swaps heads as `UlyssesRing` does, and passes keys and values round the ring neighbour by
neighbour, while it computes, merging partial softmaxes. Three things it cannot do, so they are refused
and never done otherwise in silence: leave padding out (the tokens must divide by the ranks), merge
partial softmaxes of cuDNN's attention, which tells it no logarithms of sums (then the ring must be 1),
and call fa3, of which it knows an older package with other arguments than ours.

xfuser keeps its groups in globals of its own, so a process can have one such ring.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

from flashtalk_cli.errors import ConfigError, DeviceError
from flashtalk_cli.parallel.sequence import Attend, Exchange, Size, UlyssesRing

KERNELS = {"cudnn": "TORCH_CUDNN", "flash": "FA", "sdpa": "TORCH_FLASH"}  # ours: theirs
WITHOUT_SUMS = ("cudnn",)


def kernels_in(ring: int) -> list[str]:
    """Our names of the kernels that xfuser runs in a ring of so many: `auto` chooses among them."""
    return [name for name in KERNELS if ring == 1 or name not in WITHOUT_SUMS]


@dataclass(frozen=True)
class XfuserRing(UlyssesRing):
    """Shards and gathers as its parent does; xfuser attends."""

    run: Callable[[Tensor, Tensor, Tensor], Tensor] = field(kw_only=True)

    def exchange(self, size: Size) -> Exchange:
        """The next self-attention. xfuser packs for itself, so parts may be written anywhere.

        Raises ConfigError when the tokens do not divide by the ranks, and for float32, which no kernel takes.
        """
        if size.dtype == torch.float32:
            raise ConfigError(
                f"compute.engine xfuser attends in half precision, not in {size.dtype}: take torch"
            )
        if size.tokens * self.everyone.size != size.length:
            raise ConfigError(
                f"compute.engine xfuser attends to padding, and {size.length} tokens do not divide by "
                f"{self.everyone.size} GPUs: take compute.engine torch, or another --size or --gpus"
            )
        return XfuserExchange(size, self)


class XfuserExchange(Exchange):
    """All of it by xfuser's layer, whatever kernel is named: that was chosen before."""

    def __init__(self, size: Size, ring: XfuserRing) -> None:
        super().__init__(size)
        self._ring = ring

    def attend(self, kernel: Attend, q: Tensor, k: Tensor, v: Tensor, scales: Tensor | None = None) -> Tensor:
        """Attention of this rank's queries to the keys of all tokens: [B, n, dim]."""
        with self._ring.everyone.traffic:
            return self._ring.run(*(self._heads(x).contiguous() for x in (q, k, v))).flatten(2)


def xfuser_ring(ring: UlyssesRing, device: torch.device, attention: str) -> XfuserRing:
    """The ring with xfuser's attention; `attention` is our name of the kernel. Every rank must call this.

    Raises DeviceError when xfuser, or this kernel of it, cannot run here.
    """
    if device.type != "cuda":
        raise DeviceError("compute.engine xfuser needs GPUs, and this run uses the CPU: take torch")
    kernels = kernels_in(ring.ring.size)
    if attention not in kernels:
        raise DeviceError(
            f"xfuser cannot run compute.attention {attention} in a ring of {ring.ring.size}: take auto, "
            f"{', '.join(kernels)}, or compute.engine torch"
        )
    try:
        _complete(importlib.import_module("yunchang.ring.utils"))
        start = importlib.import_module("xfuser.core.distributed")
        importlib.import_module("xfuser.core.long_ctx_attention.ring")  # else the layer does, when it is made
        layer = importlib.import_module("xfuser.core.long_ctx_attention").xFuserLongContextAttention
        kind = importlib.import_module("yunchang.kernels").AttnType[KERNELS[attention]]
    # A RuntimeError: diffusers beside another transformers; a KeyError: an older yunchang, which lacks a kernel.
    except (ImportError, OSError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"xfuser does not load ({reason}): pip install --upgrade 'flashtalk[gpu]' diffusers, "
            "or take compute.engine torch"
        ) from None
    _start_groups(start, ring, device)
    attend = layer(use_pack_qkv=True, attn_type=kind)
    return XfuserRing(
        ring.everyone, ring.ulysses, ring.ring, run=lambda q, k, v: attend(None, query=q, key=k, value=v)
    )


def _complete(utilities: ModuleType) -> None:
    """Let xfuser 0.5 to 0.7 load beside yunchang 0.6.4, the newest that there is to install.

    Next to its ring for GPUs xfuser loads one for NPUs, for which yunchang lacks a function; it is never called here.
    """
    if not hasattr(utilities, "update_npu_out"):
        vars(utilities)["update_npu_out"] = None


def _start_groups(start: ModuleType, ring: UlyssesRing, device: torch.device) -> None:
    """Have xfuser make its groups, in the order of ranks that ours have."""
    with _unbound(ring.everyone.handle):
        start.init_distributed_environment(
            world_size=ring.everyone.size, rank=ring.everyone.rank, local_rank=device.index
        )
        start.initialize_model_parallel(
            sequence_parallel_degree=ring.everyone.size,
            ulysses_degree=ring.ulysses.size,
            ring_degree=ring.ring.size,
        )


@contextmanager
def _unbound(everyone: dist.ProcessGroup | None) -> Iterator[None]:
    """Groups made inside are made when they are first used, and most of xfuser's never are.

    Where the group of all ranks is bound to a device, others are split off it at once, of which xfuser warns.
    """
    if everyone is None:
        yield
        return
    bound, everyone.bound_device_id = everyone.bound_device_id, None
    try:
        yield
    finally:
        everyone.bound_device_id = bound
