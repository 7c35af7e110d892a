"""What a training run needs, in bytes, told before it starts: a machine too small is refused with numbers."""

from __future__ import annotations

from dataclasses import dataclass

import psutil
import torch

from flashtalk_cli.config import PATCH_PX, Canvas, Sampling
from flashtalk_cli.distill.config import Network
from flashtalk_cli.errors import DeviceError
from flashtalk_cli.models.dit import DitParams

GIB = 2**30
FLOAT32_BYTES = 4
BLOCK_ACTIVATIONS = 34  # widths of the residual stream that one block keeps for its backward pass
RESERVE = 0.06  # of the device: the allocator's gaps, the libraries' own


@dataclass(frozen=True)
class Need:
    """Bytes that each rank needs, by what for."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts.values())

    def __str__(self) -> str:
        return " + ".join(f"{n_bytes / GIB:.1f} {name}" for name, n_bytes in self.parts.items())


def count_parameters(params: DitParams) -> int:
    """Parameters of the diffusion transformer, counted on the meta device."""
    from flashtalk_cli.models.dit import DiT

    with torch.device("meta"):
        return sum(parameter.numel() for parameter in DiT(params).parameters())


def need_of(
    params: DitParams,
    network: Network,
    canvas: Canvas,
    sampling: Sampling,
    micro_batch: int,
    shards: int,
    *,
    trained: int,
    frozen: int,
    averaged: int,
) -> Need:
    """Bytes for so many trained and frozen networks, cut into so many shards.

    A trained one has float32 weights, gradients and two moments; in one piece also the weights it computes
    with. `averaged` of them keep a moving average. Activations are those of one pass of the
    largest canvas: with recompute every block's input and the inside of one block, else the inside of all.
    """
    n = count_parameters(params)
    width = 2 if network.dtype == "bfloat16" else 4
    masters = FLOAT32_BYTES if width == 2 or shards > 1 else 0
    computing = width if shards == 1 else 0
    tokens = sampling.chunk_latents * canvas.area_px // PATCH_PX**2
    stream = micro_batch * tokens * params.dim * width
    inside = stream * (BLOCK_ACTIVATIONS + 4 * params.ffn_dim // params.dim)
    activations = params.num_layers * stream + inside if network.recompute else params.num_layers * inside
    parts = {
        "weights": trained * n * (masters + computing) // shards,
        "gradients": trained * n * FLOAT32_BYTES // shards,
        "moments": trained * n * 2 * FLOAT32_BYTES // shards,
        "average": averaged * n * FLOAT32_BYTES // shards,
        "frozen weights": frozen * n * width // shards,
        "activations": activations,
    }
    if shards > 1:
        parts["gathered blocks"] = 3 * width * n // max(1, params.num_layers)
    return Need({name: n_bytes for name, n_bytes in parts.items() if n_bytes})


def available_bytes(device: torch.device) -> int:
    """Memory that this process can still have on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)


def check(need: Need, device: torch.device, shards: int, what: str) -> None:
    """Raise DeviceError, with the numbers and what would do, when a run of so many shards does not fit."""
    have = int(available_bytes(device) * (1 - RESERVE))
    if need.total <= have:
        return
    activations = need.parts.get("activations", 0) + need.parts.get("gathered blocks", 0)
    spread = (need.total - activations) * shards
    room = have - activations
    if room <= 0:
        mend = "lower micro_batch or the canvas, or set network.recompute=true"
    else:
        mend = f"{-(-spread // room)} such devices would do (--gpus, with network.shard=true)"
    raise DeviceError(
        f"{what} needs {need.total / GIB:.1f} GiB a device ({need}), {device} has {have / GIB:.1f} GiB "
        f"for it: {mend}"
    )
