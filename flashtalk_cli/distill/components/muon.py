"""Muon: momentum whose every direction is given the same length.

A matrix's update is the nearest orthogonal matrix to its momentum, found by a few products (Newton and
Schulz). What is rarely or faintly asked of a layer is so learned as fast as what is loud: with
AdamW the video VAE had brightness and one colour axis within minutes and never came to the other.
After K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), from which
the polynomial's coefficients are.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """The orthogonal factors of matrices [N, R, C], nearly: all singular values between about 0.7 and 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(ROUNDS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """For weights of two dims or more: all but the first are one. Equal shapes are worked on together."""

    def __init__(self, weights: Iterable[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight against its gradient's momentum."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                alike.setdefault(weight.shape, []).append(weight)
            for shape, weights in alike.items():
                self._step(weights, shape, group["lr"], group["momentum"])

    def _step(self, weights: list[nn.Parameter], shape: torch.Size, lr: float, momentum: float) -> None:
        gradients = torch.stack([_gradient(weight) for weight in weights])
        state = self.state[weights[0]]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(gradients)
        state["momentum"].lerp_(gradients, 1 - momentum)
        updates = orthogonalise(gradients.lerp(state["momentum"], momentum).flatten(2))
        rows, columns = updates.shape[-2:]
        updates = updates.unflatten(2, shape[1:]) * (-lr * max(1, rows / columns) ** 0.5)
        torch._foreach_add_([*weights], [*updates.unbind()])


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad
