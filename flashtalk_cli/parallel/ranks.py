"""The processes of a run that torchrun started, or the one process of a run that it did not.

Process groups are made and ended here and nowhere else; a worker joins once and leaves once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from flashtalk_cli.errors import DeviceError
from flashtalk_cli.parallel.group import ALONE, Group
from flashtalk_cli.parallel.mail import Mail, mail_of
from flashtalk_cli.parallel.peers import can_reach, may_reach
from flashtalk_cli.parallel.pulse import FIRST_S, SILENT_S, Pulse
from flashtalk_cli.parallel.traffic import Traffic

# The libraries' own limit on an exchange. Where nobody keeps a watch on the pulse it must outlast a first
# compilation on one rank; where somebody does, it must not end a run that rests.
UNWATCHED_S = FIRST_S
WATCHED_S = 30 * 24 * 3600.0

LEAVE_S = 10.0

PR_SET_PDEATHSIG = 1  # of Linux's prctl

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run, and its device."""

    device: torch.device
    size: int = 1
    rank: int = 0
    one_host: bool = True  # whether all of them are on this one
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    pulse: Pulse = field(default_factory=Pulse, compare=False)
    before_leaving: list[Callable[[], None]] = field(default_factory=list, compare=False)
    patience_s: float = UNWATCHED_S

    @property
    def leads(self) -> bool:
        """Whether this is the rank that reports and writes what is written once."""
        return self.rank == 0

    @property
    def everyone(self) -> Group:
        """All ranks, as a group."""
        return ALONE if self.size == 1 else Group(self.size, self.rank, dist.group.WORLD, self.traffic)

    @cached_property
    def mail(self) -> Mail:
        """What carries messages from rank to rank."""
        return mail_of(self.everyone, self.device, reached=self.reached)

    @cached_property
    def reached(self) -> bool:
        """Whether every rank's GPU writes to every other's memory: found out by all together, when first asked."""
        if self.any(not may_reach(self.everyone, self.device, self.one_host)):
            return False
        return not self.any(not can_reach(self.everyone, self.device))

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
        if len(own) == 1:
            return ALONE
        return Group(len(own), list(own).index(self.rank), handles[tuple(own)], self.traffic)

    def _new_group(self, part: Sequence[int]) -> Any:
        """A group; torch's word for none, where this rank is not in it."""
        return dist.new_group(list(part), timeout=timedelta(seconds=self.patience_s))

    def wait(self) -> None:
        """Until all ranks are here."""
        if self.size > 1:
            with self.traffic:
                dist.barrier()

    def any(self, here: bool) -> bool:
        """Whether it is so on any rank: the same answer on all."""
        if self.size == 1:
            return here
        flag = torch.tensor([float(here)])  # on the CPU: no rank waits for its GPU
        with self.traffic:
            dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag.item())

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """The mean over ranks of a tensor."""
        if self.size > 1:
            with self.traffic:
                dist.all_reduce(values)
            values /= self.size
        return values

    def from_leader(self, value: T | None) -> T:
        """What rank 0 gives, on every rank; the others give None. Tensors in it must be on the CPU."""
        if self.size == 1:
            assert value is not None
            return value
        box: list[Any] = [value]
        with self.traffic:
            dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
        return box[0]

    def to_leader(self, value: T) -> list[T]:
        """What each rank gives, in order, on rank 0; nothing on the others. Tensors in it must be on the CPU."""
        if self.size == 1:
            return [value]
        box: list[Any] | None = [None] * self.size if self.leads else None
        with self.traffic:
            dist.gather_object(value, box, dst=0)
        return box or []

    def leave(self) -> None:
        """Leave the process group, in order; a library that does not let go in LEAVE_S ends the process, code 0."""
        self.pulse.end()
        if self.size == 1:
            return
        for end in self.before_leaving:
            end()
        watch = threading.Timer(LEAVE_S, os._exit, [0])  # nobody minds the pulse any more
        watch.daemon = True
        watch.start()
        dist.destroy_process_group()
        watch.cancel()


def join(device: torch.device, log: Path | None = None, patience_s: float = UNWATCHED_S) -> Ranks:
    """Join the run's process group, when torchrun started this process; each rank takes a GPU of its own.

    Tensors on a GPU travel by NCCL, and tensors on the CPU, which coordinate, by gloo. From here on this
    process dies with the torchrun that started it. `log` is where this rank's log lies, for the others' errors;
    `patience_s` is how long an exchange may take once all have met. Raises DeviceError when there are fewer
    GPUs than ranks.
    """
    if not dist.is_torchelastic_launched():
        return Ranks(device)
    _die_with_parent()
    timeout = timedelta(seconds=FIRST_S)
    store, rank, size = next(dist.rendezvous("env://", timeout=timeout))
    store.set_timeout(timedelta(seconds=SILENT_S))
    if device.type == "cuda":
        local_rank, have = dist.get_node_local_rank(), torch.cuda.device_count()
        if local_rank >= have:
            raise DeviceError(f"more ranks than GPUs: this machine has {have}; lower --gpus, or take all")
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    traffic = Traffic(device)
    pulse = Pulse(size, rank, store, traffic, host=socket.gethostname(), log=str(log or "its stderr"))
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
    distributed_c10d._set_pg_timeout(timedelta(seconds=patience_s))
    one_host = os.environ.get("LOCAL_WORLD_SIZE") == str(size)  # set by torchrun
    return Ranks(device, size, rank, one_host, traffic, pulse, patience_s=patience_s)


def _die_with_parent() -> None:
    """Have Linux kill this process when its parent dies, even while it is stopped or stuck in a driver."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def lost_peers(error: Exception) -> str | None:
    """One line when an error says that other ranks went away in a collective; None for any other error.

    Such an error is an effect: its cause is what the rank that went away reports, if it can.
    """
    text = str(error)
    lost = isinstance(error, dist.DistBackendError) or (isinstance(error, RuntimeError) and "gloo" in text)
    return f"a rank lost its peers: {text.splitlines()[0]}" if lost else None
