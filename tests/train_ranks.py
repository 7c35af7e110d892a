"""Run by torchrun from test_train_cli.py: prints the worst relative error of sharded gradients, and of an
update by gradients that are averaged over whole copies."""

from __future__ import annotations

import sys

import tiny_model
import torch
from torch import Tensor

from flashtalk_cli.distill import networks
from flashtalk_cli.distill.adapt import ALONE, velocity_of
from flashtalk_cli.distill.config import Network, Optimiser
from flashtalk_cli.distill.optimise import Trained
from flashtalk_cli.models.attention import SDPA
from flashtalk_cli.models.dit import DiT, DitParams
from flashtalk_cli.parallel.ranks import Ranks, join

CPU = torch.device("cpu")


def build(shards: int, recompute: bool) -> DiT:
    network = Network(init="random", dtype="float32", recompute=recompute)
    dit = networks.build(DitParams.from_config(tiny_model.CONFIG), network, SDPA)
    networks.place(dit, network, CPU, shards, trained=True)
    networks.draw_weights(dit, 0)
    head = dit.head.head.weight
    networks.set_value(head.data, torch.randn(head.shape, generator=torch.Generator().manual_seed(5)))
    return dit


def gradients(dit: DiT, kind: str) -> list[Tensor]:
    """Of a loss twice accumulated, or of the last step of a rollout whose first steps have none."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    dit.zero_grad()
    for _ in range(2):
        x, y, text, tokens = (
            normal(2, 16, 3, 8, 8),
            normal(2, 20, 3, 8, 8),
            normal(2, 5, 32),
            normal(2, 5, 32),
        )
        windows, t = normal(2, 9, 5, 3, 32), torch.tensor([0.3, 0.8])
        if kind == "loss":
            velocity_of(dit, x, t, y, text, tokens, windows).square().mean().backward()
            continue
        context, heard = dit.condition(text, tokens), dit.hear(windows)
        with torch.no_grad():
            for _ in range(2):
                x = x - 0.1 * dit(x, 1000 * t, y, context, heard, ALONE)
        dit(x, 1000 * t, y, context, heard, ALONE).square().mean().backward()
    return [networks.whole(parameter.grad) for parameter in dit.parameters() if parameter.grad is not None]


def moved_by_copies(ranks: Ranks) -> float:
    """How far an update by the mean of the ranks' gradients is from one by the mean itself."""
    one, copy = (Trained(build(1, False), Optimiser(muon=True), 10, None) for _ in range(2))
    copy.mean = ranks.mean
    for trained, seeds in ((one, range(ranks.size)), (copy, [ranks.rank])):
        for i, parameter in enumerate(trained.parameters):
            drawn = [torch.Generator().manual_seed(1000 * seed + i) for seed in seeds]
            mean = sum(torch.randn(parameter.shape, generator=g) for g in drawn) / len(drawn)
            parameter.grad = torch.as_tensor(mean)
        trained.update()
    pairs = zip(one.parameters, copy.parameters, strict=True)
    return max(((a - b).abs().max() / (a.abs().max() + 1e-8)).item() for a, b in pairs)


def main() -> None:
    torch.set_num_threads(1)
    ranks = join(CPU)
    worst = moved_by_copies(ranks)
    for kind, recompute in (("loss", False), ("rollout", False), ("rollout", True)):
        one, many = (build(shards, recompute) for shards in (1, ranks.size))
        wanted, found = gradients(one, kind), gradients(many, kind)
        assert len(wanted) == len(found) == len(list(one.parameters()))
        for a, b in zip(wanted, found, strict=True):
            worst = max(worst, ((a - b).abs().max() / (a.abs().max() + 1e-8)).item())
    if ranks.leads:
        sys.stdout.write(f"{worst}\n")
    ranks.leave()


if __name__ == "__main__":
    main()
