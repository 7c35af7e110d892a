"""One trained network with its optimiser, its moving average, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flashtalk_cli.distill.config import Optimiser
from flashtalk_cli.distill.muon import Muon, as_adam
from flashtalk_cli.distill.networks import local, whole
from flashtalk_cli.models.dit import DiT

MUON_MOMENTUM = 0.95


def learning_rate(step: int, steps: int, optimiser: Optimiser) -> float:
    """The rate of update `step` (from 0) of `steps`: a linear rise, a plateau, a linear fall to zero."""
    rise = min(1.0, (step + 1) / max(1, optimiser.warmup_steps))
    fall_steps = optimiser.cooldown_share * steps
    fall = min(1.0, (steps - step) / fall_steps) if fall_steps >= 1 else 1.0
    return optimiser.learning_rate * rise * max(0.0, fall)


class Trained:
    """A network that learns.

    `average` is the moving average of its float32 parameters (None where there is to be none): it
    follows quickly at first, so that a short run does not keep its random beginning. `mean` averages
    a tensor over the ranks that have copies of the network, where there are several.
    """

    def __init__(
        self,
        dit: DiT,
        optimiser: Optimiser,
        steps: int,
        ema_decay: float | None,
        mean: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.dit, self.optimiser, self.steps, self.ema_decay = dit, optimiser, steps, ema_decay
        self.mean = mean
        self.names = [name for name, _ in dit.named_parameters()]
        self.working: list[Tensor] = [parameter for _, parameter in dit.named_parameters()]
        self.parameters: list[Tensor]
        if all(p.dtype == torch.float32 for p in self.working):
            self.parameters = self.working
        else:
            self.parameters = [nn.Parameter(p.detach().float()) for p in self.working]
            self.gradients = [torch.zeros_like(p) for p in self.parameters]
            for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
                parameter.grad = gradient
        self.average = None if ema_decay is None else [p.detach().clone() for p in self.parameters]
        self.optimisers = _optimisers(dict(zip(self.names, self.parameters, strict=True)), optimiser)
        self.step_count = 0

    def update(self) -> Tensor:
        """Move the parameters by the gradients that are there; the gradients' norm before clipping."""
        if self.parameters is not self.working:
            found = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.working]
            torch._foreach_copy_(self.gradients, found)
            for worked in self.working:
                worked.grad = None
        if self.mean is not None:
            self._average([p.grad for p in self.parameters if p.grad is not None])
        norm = nn.utils.clip_grad_norm_(self.parameters, self.optimiser.clip_norm)
        rate = learning_rate(self.step_count, self.steps, self.optimiser)
        for each in self.optimisers:
            for group in each.param_groups:
                group["lr"] = rate
            each.step()
            if self.parameters is self.working:
                each.zero_grad(set_to_none=True)
        self.step_count += 1
        with torch.no_grad():
            if self.parameters is not self.working:
                torch._foreach_copy_(self.working, self.parameters)
            if self.average is not None and self.ema_decay is not None:
                decay = min(self.ema_decay, self.step_count / (10 + self.step_count))
                torch._foreach_lerp_(
                    [local(a) for a in self.average], [local(p) for p in self.parameters], 1 - decay
                )
        return whole(norm)

    def _average(self, gradients: list[Tensor]) -> None:
        """Over the ranks, in one exchange."""
        assert self.mean is not None
        flat = self.mean(torch.cat([gradient.flatten() for gradient in gradients]))
        parts = flat.split([gradient.numel() for gradient in gradients])
        torch._foreach_copy_(gradients, [part.view_as(g) for part, g in zip(parts, gradients, strict=True)])

    @torch.no_grad()
    def adopt(self) -> None:
        """Take the network's present weights as the beginning: masters and average follow them."""
        if self.parameters is not self.working:
            torch._foreach_copy_(self.parameters, self.working)
        if self.average is not None:
            torch._foreach_copy_([local(a) for a in self.average], [local(p) for p in self.parameters])

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: this rank's part of it."""
        moments = {
            name: {key: local(value) for key, value in each.state[parameter].items()}
            for each, name, parameter in self._moved()
        }
        return {
            "step": self.step_count,
            "parameters": [local(p.detach()) for p in self.parameters],
            "average": None if self.average is None else [local(a) for a in self.average],
            "moments": moments,
        }

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Go on from what `state` gave."""
        self.step_count = state["step"]
        for mine, theirs in zip(self.parameters, state["parameters"], strict=True):
            local(mine).copy_(theirs)
        if self.parameters is not self.working:
            torch._foreach_copy_(self.working, self.parameters)
        if self.average is not None:
            for mine, theirs in zip(self.average, state["average"], strict=True):
                local(mine).copy_(theirs)
        for each, name, parameter in self._moved():
            each.state[parameter] = _moments_like(state["moments"][name], parameter)

    def _moved(self) -> Iterator[tuple[torch.optim.Optimizer, str, Tensor]]:
        """Each parameter with the optimiser that moves it."""
        names = {id(parameter): name for name, parameter in zip(self.names, self.parameters, strict=True)}
        for each in self.optimisers:
            for group in each.param_groups:
                for parameter in group["params"]:
                    yield each, names[id(parameter)], parameter


def _moments_like(kept: dict[str, Tensor], parameter: Tensor) -> dict[str, Tensor]:
    """A checkpoint's moments as the optimiser wants them: spread as the parameter is; counts by themselves."""
    found: dict[str, Tensor] = {}
    for key, value in kept.items():
        if key == "step":  # a fused AdamW counts on the device
            found[key] = value.to(parameter.device if _fused(parameter) else "cpu", copy=True)
            continue
        found[key] = torch.zeros_like(parameter, requires_grad=False)
        local(found[key]).copy_(value)
    return found


def _fused(parameter: Tensor) -> bool:
    return parameter.device.type == "cuda"


def _optimisers(parameters: dict[str, Tensor], optimiser: Optimiser) -> list[torch.optim.Optimizer]:
    """What moves each parameter. Matrices decay; norms, biases and modulations do not."""
    matrices = {name for name, p in parameters.items() if p.ndim > 1 and p.shape[0] > 1}
    hidden = {name for name in matrices if optimiser.muon and name.startswith("blocks.")}
    groups = [
        {
            "params": [parameters[name] for name in sorted(matrices - hidden)],
            "weight_decay": optimiser.weight_decay,
        },
        {"params": [p for name, p in parameters.items() if name not in matrices], "weight_decay": 0.0},
    ]
    fused = _fused(next(iter(parameters.values())))
    adam = torch.optim.AdamW(
        groups,
        lr=optimiser.learning_rate,
        betas=(optimiser.beta1, optimiser.beta2),
        fused=fused,
        foreach=None if fused else True,
    )
    if not hidden:
        return [adam]
    weights: Any = [p for name, p in parameters.items() if name in hidden]
    decay = optimiser.weight_decay
    return [adam, Muon(weights, optimiser.learning_rate, MUON_MOMENTUM, decay, as_adam)]
