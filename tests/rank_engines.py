"""What one rank of tests/test_engine.py does on two GPUs: self-attention of the 14B model by both engines."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from types import SimpleNamespace

import torch
import torch.distributed as dist
from attending import attend
from torch import Tensor

from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.parallel.mesh import ring_of
from flashtalk_cli.parallel.ranks import Ranks
from flashtalk_cli.parallel.xfuser import xfuser_ring

TOKENS, HEADS, DIM = 12_096, 40, 128
REPEATS = 10
# Root mean square of the difference, to that of the result. Round a ring xfuser merges halves by their logarithms
# of sums, which are 9 here and which it rounds to bfloat16, so to 1/32: halves weigh wrong by up to 1/64, and their
# sum is off by 0.013 (its code on a CPU).
NOISE = 0.03


def timed_ms(work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    out = work()
    torch.cuda.synchronize()
    begin_s = time.perf_counter()
    for _ in range(REPEATS):
        work()
    torch.cuda.synchronize()
    return out, (time.perf_counter() - begin_s) / REPEATS * 1000


def compare(rank: int, options: SimpleNamespace) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    limit = timedelta(seconds=60)
    dist.init_process_group("cpu:gloo,cuda:nccl", options.store, limit, 2, rank, device_id=device)
    ours = ring_of(Ranks(device, 2, rank), options.ulysses)
    theirs = xfuser_ring(ours, device, "sdpa")
    draw = torch.Generator(device).manual_seed(0)
    shape = (3, 1, TOKENS, HEADS, DIM)
    whole = torch.randn(shape, generator=draw, device=device, dtype=torch.bfloat16)
    q, k, v = (ours.shard(x, 1) for x in whole)
    with torch.no_grad():
        one, one_ms = timed_ms(lambda: attend(ours, SDPA, q, k, v, TOKENS))
        other, other_ms = timed_ms(lambda: attend(theirs, SDPA, q, k, v, TOKENS))
    error = ((one - other).float().square().mean() / one.float().square().mean()).sqrt().item()
    if rank == 0:
        print(
            f"ulysses {options.ulysses}: torch {one_ms:.2f} ms, xfuser {other_ms:.2f} ms, difference {error:.4f}"
        )
    assert error < NOISE, f"{error:.4f} apart; allowed {NOISE}"
    dist.destroy_process_group()
