"""Memory that ranks write to themselves: nothing is read too early or overwritten too soon, by whichever rank is late.

Two GPUs where there are two. One GPU holds both ranks where there is one: its memory is reached as another's is,
and what is not shown then is only that links between GPUs carry it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import rank_peers
import torch
import torch.multiprocessing as multiprocessing

from flashtalk_cli.parallel.group import Group
from flashtalk_cli.parallel.peers import may_reach


@pytest.mark.parametrize(("size", "reached"), [(2, True), (4, True), (8, False)])
def test_only_the_gpus_of_a_run_need_to_reach_each_other(
    size: int, reached: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contract: of a host with two islands of four GPUs, the first is enough for runs of up to four."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a.index // 4 == b // 4)
    group, device = Group(size, 0), torch.device("cuda:0")
    assert may_reach(group, device, one_host=True) is reached
    assert not may_reach(group, device, one_host=False)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_ranks_read_what_the_others_wrote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parity: messages and shelves, eager and recorded, hold what was written to them, in every round."""
    device_of = [0, 1] if torch.cuda.device_count() > 1 else [0, 0]
    if device_of[1] == 0:
        monkeypatch.setenv("TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES", "1")
    store = f"file://{tmp_path / 'store'}"
    multiprocessing.spawn(rank_peers.work, (store, device_of), nprocs=rank_peers.SIZE)
