"""The processes of a run that torchrun started, or the one process of a run that it did not.

Joining and leaving the process group happens here and nowhere else; a worker does it once.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

PEER_TIMEOUT_S = 600  # a rank that waits longer for the others gives up


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run, and its device."""

    device: torch.device
    size: int = 1
    rank: int = 0

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reports and writes what is written once."""
        return self.rank == 0

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank: the same answer on all."""
        if self.size == 1:
            return here
        flag = torch.tensor([float(here)], device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def join(device: torch.device) -> Ranks:
    """Join the run's process group, when torchrun started this process; each rank takes a GPU of its own."""
    if not dist.is_torchelastic_launched():
        return Ranks(device)
    timeout = timedelta(seconds=PEER_TIMEOUT_S)
    if device.type == "cuda":
        device = torch.device("cuda", dist.get_node_local_rank())
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    return Ranks(device, dist.get_world_size(), dist.get_rank())
