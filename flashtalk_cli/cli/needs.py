"""How much memory each model takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Needs:
    """Memory that a model takes, at its preset's size, in bytes."""

    gpu: float = 0  # weights, and what a chunk takes beside them
    gpu_offloaded: float | None = None  # None: cannot be offloaded
    host_offloaded: float = 0


# By model, and whether in eight bits. The peak on one H200 was 44.0 GiB in bfloat16 and 37.1 in fp8 (`flashtalk bench`);
# the driver's own share is added. With --offload it was 12.1 GB (`scripts/gpu-check offload`), and the allocator
# held up to 22.5 where there was room; the host's share is counted.
NEEDS = {
    ("soulx-14b", False): Needs(gpu=49e9, gpu_offloaded=20e9, host_offloaded=44e9),
    ("soulx-14b", True): Needs(gpu=42e9),
}
