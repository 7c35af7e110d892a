"""The processes of a run that torchrun started, or the one process of a run that it did not.

Process groups are made and ended here and nowhere else; a worker joins once and leaves once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.parallel.group import ALONE, Group

# A rank that waits longer for the others gives up. A peer that dies is noticed at once, by its closed
# connection or by torchrun; this bounds what hangs, and must outlast a first compilation on one rank.
PEER_TIMEOUT_S = 600

T = TypeVar("T")


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

    @property
    def everyone(self) -> Group:
        """All ranks, as a group."""
        return ALONE if self.size == 1 else Group(self.size, self.rank, dist.group.WORLD)

    def split(self, parts: Sequence[Sequence[int]]) -> Group:
        """The group of this rank, where `parts` says which ranks are together: each rank in exactly one.

        All ranks must call this with the same parts. The order within a part numbers its group.
        """
        assert sorted(rank for part in parts for rank in part) == list(range(self.size))
        own = next(part for part in parts if self.rank in part)
        if len(own) == self.size:
            assert list(own) == sorted(own)
            return self.everyone
        handles = {tuple(part): self._new_group(part) for part in parts if len(part) > 1}
        return Group(len(own), list(own).index(self.rank), handles[tuple(own)]) if len(own) > 1 else ALONE

    @staticmethod
    def _new_group(part: Sequence[int]) -> dist.ProcessGroup:
        return dist.new_group(list(part), timeout=timedelta(seconds=PEER_TIMEOUT_S))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank: the same answer on all."""
        if self.size == 1:
            return here
        flag = torch.tensor([float(here)])  # on the CPU: no rank waits for its GPU
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def from_leader(self, value: T | None) -> T:
        """What rank 0 gives, on every rank; the others give None. Tensors in it must be on the CPU."""
        if self.size == 1:
            assert value is not None
            return value
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def leave(self) -> None:
        """Leave the process group."""
        if self.size > 1:
            dist.destroy_process_group()


def join(device: torch.device) -> Ranks:
    """Join the run's process group, when torchrun started this process; each rank takes a GPU of its own.

    Tensors on a GPU travel by NCCL, and tensors on the CPU, which coordinate, by gloo.
    Raises DeviceError when there are fewer GPUs than ranks.
    """
    if not dist.is_torchelastic_launched():
        return Ranks(device)
    timeout = timedelta(seconds=PEER_TIMEOUT_S)
    if device.type == "cuda":
        local_rank, have = dist.get_node_local_rank(), torch.cuda.device_count()
        if local_rank >= have:
            raise DeviceError(f"more ranks than GPUs: this machine has {have}; lower --gpus, or take all")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    return Ranks(device, dist.get_world_size(), dist.get_rank())


def lost_peers(error: Exception) -> str | None:
    """One line when an error says that other ranks went away in a collective; None for any other error.

    Such an error is an effect: its cause is what the rank that went away reports, if it can.
    """
    text = str(error)
    lost = isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return f"a rank lost its peers: {text.splitlines()[0]}" if lost else None
