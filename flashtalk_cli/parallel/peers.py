"""Memory of one GPU that others of its host write to themselves, as over NVLink."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from flashtalk_cli.parallel.group import Group

LEAST = 512  # bytes, of a trial

_log = logging.getLogger(__name__)


class Signals(Protocol):
    """What torch gives with memory that ranks share."""

    def barrier(self, channel: int = 0) -> None:
        """Wait in the current stream for all ranks to come here; what they wrote before is there then."""

    def get_buffer(self, rank: int, sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A rank's memory, as a tensor of this device."""


class Reached(NamedTuple):
    """Equal memory on all ranks of a group."""

    own: Tensor
    theirs: tuple[Tensor, ...]  # by rank, the own one included
    signals: Signals


def reach(sizes: Sequence[int], dtype: torch.dtype, device: torch.device, group: Group) -> Reached:
    """Make memory of these sizes on every rank; all must call this, and none may be recording a graph."""
    from torch.distributed import _symmetric_memory as symmetric

    assert group.handle is not None
    own = symmetric.empty(*sizes, dtype=dtype, device=device)
    signals: Signals = symmetric.rendezvous(own, group.handle)
    theirs = tuple(signals.get_buffer(rank, tuple(sizes), dtype) for rank in range(group.size))
    return Reached(own, theirs, signals)


def may_reach(group: Group, device: torch.device, one_host: bool) -> bool:
    """Whether the group's ranks, on the first GPUs of one host, can reach each other's memory."""
    if group.size == 1 or device.type != "cuda" or not one_host:
        return False
    others = (index for index in range(group.size) if index != device.index)
    return all(torch.cuda.can_device_access_peer(device, other) for other in others)


def can_reach(group: Group, device: torch.device) -> bool:
    """Whether this rank can set such memory up: a container may forbid what the GPUs could. All ranks try together.

    One that fails alone leaves the others waiting, until their pulse ends the run.
    """
    try:
        reach((group.size, LEAST), torch.uint8, device, group)
    except RuntimeError as error:
        reason = str(error).split("\n")[0]
        _log.warning(
            "GPUs exchange by collectives, which is slower: their memory cannot be shared: %s", reason
        )
        return False
    return True
