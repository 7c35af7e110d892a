"""What one rank of tests/test_peers.py does; in a file of its own, which its processes import."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from flashtalk_cli.parallel.beside import Beside
from flashtalk_cli.parallel.group import Group
from flashtalk_cli.parallel.mail import PeerMail
from flashtalk_cli.parallel.shelf import PeerShelf

SIZE, ROUNDS, REPLAYS = 2, 40, 6
LATE_CYCLES = 200_000  # of a GPU's clock that a rank is late by, now and then


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(seed)).float()


def late(seed: int) -> None:
    """Let this rank be late at random: whoever reads too early or writes too soon is found out."""
    torch.cuda._sleep(int(torch.randint(1, LATE_CYCLES, (), generator=torch.Generator().manual_seed(seed))))


def work(rank: int, store: str, device_of: list[int]) -> None:
    device = torch.device("cuda", device_of[rank])
    torch.cuda.set_device(device)
    dist.init_process_group("gloo", store, timedelta(seconds=60), SIZE, rank)
    group = Group(SIZE, rank, dist.group.WORLD)
    mailed(group, device)
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        shelved(group, device, dtype)
    recorded(group, device)
    torch.cuda.synchronize()
    dist.barrier()
    dist.destroy_process_group()


def mailed(group: Group, device: torch.device) -> None:
    """Strips of larger tensors, of other sizes each time, one of them empty."""
    mail, other, found = PeerMail(group, device), 1 - group.rank, []

    def sent(index: int, rank: int) -> Tensor:
        return drawn(1000 * index + rank, 2, 5, 7 + index % 3, 6)[:, 1 : 1 + index % 4, 2:].bfloat16()

    for index in range(ROUNDS):
        whole = drawn(1000 * index + group.rank, 2, 5, 7 + index % 3, 6).bfloat16().to(device)
        late(7 * index + group.rank)
        got = mail.exchange(
            {other: whole[:, 1 : 1 + index % 4, 2:]}, {other: sent(index, other).shape}, 1 << 12
        )
        found.append(got[other].clone())
    for index, got in enumerate(found):
        assert torch.equal(got.cpu(), sent(index, other)), f"message {index}"


def shelved(group: Group, device: torch.device, dtype: torch.dtype) -> None:
    """Rounds beside the main stream, each read late."""
    shelf, beside, found = PeerShelf(group), Beside(device), []
    parts = [torch.stack([drawn(100 * i + rank, 3, 8) for rank in range(SIZE)]) for i in range(ROUNDS)]
    for index, part in enumerate(parts):
        room = shelf.room((3, 8), dtype, device)
        room[group.rank].copy_(part[group.rank].to(device).to(dtype))
        with beside.run():
            shelf.share(room)
        beside.join()
        late(3 * index + group.rank)
        found.append(room.float())
    for index, (part, got) in enumerate(zip(parts, found, strict=True)):
        assert torch.equal(got.cpu(), part), f"round {index}"


def recorded(group: Group, device: torch.device) -> None:
    """An even count of rounds and messages, replayed with other numbers."""
    shelf, mail, given = PeerShelf(group), PeerMail(group, device), torch.zeros(3, 8, device=device)
    other = 1 - group.rank

    def rounds() -> Tensor:
        outs = []
        for step in range(2):
            room = shelf.room((3, 8), torch.float32, device)
            room[group.rank].copy_(given + step)
            shelf.share(room)
            outs.append(room[other] + mail.exchange({other: given}, {other: given.shape}, 1 << 12)[other])
        return torch.stack(outs)

    rounds()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = rounds()
    found = []
    for index in range(REPLAYS):
        given.fill_(10 * index + group.rank)
        late(index + 11 * group.rank)
        graph.replay()
        found.append(out.clone())
    for index, got in enumerate(found):
        expected = 2.0 * (10 * index + other)
        assert got.cpu().flatten(1).unique(dim=1).flatten().tolist() == [expected, expected + 1], (
            f"replay {index}"
        )
