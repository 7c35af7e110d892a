"""Muon: momentum whose every direction is given the same length.

A matrix's update is the nearest orthogonal matrix to its momentum, found by a few products (Newton and
Schulz). What is rarely or faintly asked of a layer is so learned as fast as what is loud: with
AdamW the video VAE had brightness and one colour axis within minutes and never came to the other.
After K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks" (2024), from which
the polynomial's coefficients are; the update's length as Adam's is from J. Liu et al., "Muon is
scalable for LLM training" (2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from flashtalk_cli.distill.networks import like, local, whole

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ROUNDS = 5


def by_shape(rows: int, columns: int) -> float:
    """The length at which a layer's output changes alike for any shape."""
    return max(1, rows / columns) ** 0.5


def as_adam(rows: int, columns: int) -> float:
    """The length that gives entries the size of Adam's, 0.2: learning rates and decay are then Adam's too."""
    return 0.2 * max(rows, columns) ** 0.5


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
    """For weights of two dims or more: all but the first are one. Equal shapes are worked on together.

    length: the update's spectral norm for a matrix of so many rows and columns, before the learning
    rate. A weight that is spread over ranks keeps its momentum spread; the update is worked out whole.
    """

    def __init__(
        self,
        weights: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        length: Callable[[int, int], float] = by_shape,
    ) -> None:
        super().__init__(weights, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.length = length

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every weight against its gradient's momentum."""
        assert closure is None
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for weight in group["params"]:
                alike.setdefault(weight.shape, []).append(weight)
            for weights in alike.values():
                self._step(weights, group["lr"], group["momentum"], group["weight_decay"])

    def _step(self, weights: list[nn.Parameter], lr: float, momentum: float, decay: float) -> None:
        gradients = [_gradient(weight) for weight in weights]
        moments = [self._moment(weight) for weight in weights]
        torch._foreach_lerp_(moments, gradients, 1 - momentum)
        ahead = torch._foreach_lerp(gradients, moments, momentum)
        updates = orthogonalise(torch.stack([whole(matrix) for matrix in ahead]).flatten(2))
        updates = (updates * self.length(*updates.shape[-2:])).unflatten(2, weights[0].shape[1:])
        held = [local(weight) for weight in weights]
        if decay:
            torch._foreach_mul_(held, 1 - lr * decay)
        mine = [like(update, weight) for update, weight in zip(updates.unbind(), weights, strict=True)]
        torch._foreach_add_(held, mine, alpha=-lr)

    def _moment(self, weight: nn.Parameter) -> Tensor:
        state = self.state[weight]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight, requires_grad=False)
        moment: Tensor = state["momentum"]
        return moment


def _gradient(weight: nn.Parameter) -> Tensor:
    assert weight.grad is not None
    return weight.grad
