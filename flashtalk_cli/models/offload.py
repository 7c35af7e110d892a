"""A network's blocks on a GPU that cannot hold them: weights rest in host memory, each visits in its turn.

    offload = Offload(blocks, parts, lane)
    for block in offload.each("forward"): ...   # the block's weights of that part are on the device

Weights are copied a block or two ahead, beside the computation, into a few slots of device memory that
all blocks share; there is one copy of everything in host memory and no other. Results are those of
the same blocks on the device, to the bit: the same numbers meet the same kernels. Of a model without
offload they are the same up to rounding, for there q, k and v become one product (`DiT.arrange`).

Source of the scheme: prefetching over a ring of buffers, as in any double-buffered pipeline.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from flashtalk_cli.errors import DeviceError

AHEAD = 2  # blocks under way while one computes: one hides the copy, the second its jitter
REST = "forward"  # the part of whatever no other part names
ALIGNMENT_BYTES = 256  # of each weight in its slot, as a fresh allocation has it


class Lane(Protocol):
    """Slots of device memory, and copies into them beside the computation."""

    def pin(self, host: Tensor) -> None:
        """Make a tensor in host memory fit for copies that do not wait."""

    def allocate(self, slots: int, n_bytes: int) -> None:
        """Make the slots, of so many bytes each."""

    def fetch(self, slot: int, host: Tensor) -> None:
        """Begin to copy into a slot, after all that was computed before its `leave`."""

    def arrive(self, slot: int) -> Tensor:
        """The slot's memory; what is computed from here on waits for its copy."""

    def leave(self, slot: int) -> None:
        """What was computed up to here is the last that reads the slot."""


class CudaLane:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device)
        self._slots: list[Tensor] = []
        self._arrived: list[torch.cuda.Event] = []
        self._left: list[torch.cuda.Event] = []

    def pin(self, host: Tensor) -> None:
        """See `Lane`. The memory is pinned where it is: torch's own pinned memory comes in powers of two."""
        runtime = torch.cuda.cudart()
        status = runtime.cudaHostRegister(host.data_ptr(), host.nbytes, 0)
        if int(status) != 0:
            raise DeviceError(
                f"{host.nbytes / 2**30:.2f} GiB of host memory cannot be pinned (CUDA error {int(status)}): "
                "leave out --offload, or raise the limit on locked memory (ulimit -l)"
            )
        # Memory that is freed while it is pinned could not be pinned again. (A process that ends need not care.)
        weakref.finalize(host, runtime.cudaHostUnregister, host.data_ptr()).atexit = False

    def allocate(self, slots: int, n_bytes: int) -> None:
        """See `Lane`."""
        self._slots = [torch.empty(n_bytes, dtype=torch.uint8, device=self._device) for _ in range(slots)]
        self._arrived = [torch.cuda.Event() for _ in range(slots)]
        self._left = [torch.cuda.Event() for _ in range(slots)]
        for slot in range(slots):  # whoever had this memory before may still be computing
            self.leave(slot)

    def fetch(self, slot: int, host: Tensor) -> None:
        """See `Lane`."""
        with torch.cuda.stream(self._copies):
            self._copies.wait_event(self._left[slot])
            self._slots[slot][: len(host)].copy_(host, non_blocking=True)
            self._arrived[slot].record(self._copies)

    def arrive(self, slot: int) -> Tensor:
        """See `Lane`."""
        torch.cuda.current_stream(self._device).wait_event(self._arrived[slot])
        return self._slots[slot]

    def leave(self, slot: int) -> None:
        """See `Lane`."""
        self._left[slot].record(torch.cuda.current_stream(self._device))


@dataclass(frozen=True)
class Packed:
    """Weights side by side in host memory, so that one copy moves them all."""

    host: Tensor  # uint8 [bytes]
    places: tuple[tuple[Tensor, int], ...]  # each weight, and the byte where it begins

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> Packed:
        """Move weights, of whatever number formats, which must be in host memory, into a tensor of their own."""
        places, n_bytes = [], 0
        for weight in weights:
            assert weight.device.type == "cpu", weight.device
            places.append((weight, n_bytes))
            n_bytes += -(-weight.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        packed = cls(torch.zeros(n_bytes, dtype=torch.uint8), tuple(places))
        for weight, start in places:
            there = _view(packed.host, start, weight)
            there.copy_(weight.detach())
            weight.data = there
        return packed

    def point_to(self, memory: Tensor) -> None:
        """Let the weights be views of `memory`, which is laid out like `host`."""
        for weight, start in self.places:
            weight.data = _view(memory, start, weight)


def _view(memory: Tensor, start: int, weight: Tensor) -> Tensor:
    """The bytes from `start` as a tensor like `weight`."""
    return memory[start : start + weight.nbytes].view(weight.dtype).view(weight.shape)


class Offload:
    """Blocks, and the order in which their weights (parameters and buffers) visit the device.

    parts: for each name of a part, how the names of the weights that it reads begin; `REST` is all others. A
    part's pass moves only its own weights.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        parts: Mapping[str, tuple[str, ...]],
        lane: Lane,
        ahead: int = AHEAD,
    ) -> None:
        assert ahead >= 1, ahead
        self._blocks, self._lane, self._ahead = blocks, lane, ahead
        self._parts: dict[str, list[Packed]] = {part: [] for part in (*parts, REST)}
        for block in blocks:
            for part, packed in self._parts.items():
                weights = (*block.named_parameters(), *block.named_buffers())
                packed.append(Packed.of([w for name, w in weights if _part_of(name, parts) == part]))
                lane.pin(packed[-1].host)
            _return_freed()
        largest = max(len(weights.host) for packed in self._parts.values() for weights in packed)
        lane.allocate(ahead + 1, largest)

    def each(self, part: str) -> Iterator[nn.Module]:
        """The blocks in order, each with its weights of that part on the device until the next is asked for.

        One pass at a time.
        """
        lane, packed, n_slots = self._lane, self._parts[part], self._ahead + 1
        for index in range(min(self._ahead, len(packed))):
            lane.fetch(index, packed[index].host)
        for index, (block, weights) in enumerate(zip(self._blocks, packed, strict=True)):
            if (coming := index + self._ahead) < len(packed):
                lane.fetch(coming % n_slots, packed[coming].host)
            weights.point_to(lane.arrive(index % n_slots))
            try:
                yield block
            finally:
                weights.point_to(weights.host)
                lane.leave(index % n_slots)


def _return_freed() -> None:
    """Have the C library give back the memory of weights that were moved, where it is one that can be asked to.

    It keeps what is freed between pieces that live on, and launch.py has it count pieces of up to 256 MB among
    those: all blocks' weights would be there twice.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _part_of(name: str, parts: Mapping[str, tuple[str, ...]]) -> str:
    return next((part for part, prefixes in parts.items() if name.startswith(prefixes)), REST)
