"""AdamW: one step on tensors, and the common part of optimizers whose state has dtypes of its own."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.sparse_update import Survival


class CountedAdamW(torch.optim.Optimizer, abc.ABC):
    """An optimizer whose state keeps its dtypes, and which counts the updates that reach the stored weights.

    Attributes:
        survival: counts of the last step.
    """

    survival = Survival()  # of copies and unpickled optimizers, which skip the constructor

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient; returns what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.survival = Survival()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.survival += self._update(parameter, parameter.grad, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As in torch, but every tensor keeps its dtype: torch casts int16 bits to bfloat16 values with their parameter's."""
        super().load_state_dict(state_dict)
        ids = [key for group in state_dict["param_groups"] for key in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for key, parameter in zip(ids, parameters, strict=True):
            for field, value in state_dict["state"].get(key, {}).items():
                # A step count on the CPU is read without waiting for the GPU.
                device = "cpu" if field == "step" else parameter.device
                self.state[parameter][field] = value.to(device, copy=True)

    @abc.abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, group: Mapping[str, Any]) -> Survival:
        """Update a parameter and its state; return the counts."""


def next_step(state: Mapping[str, Tensor], group: Mapping[str, Any]) -> dict[str, Any]:
    """Count a step of a parameter in its state, and return the settings with which ``adamw`` takes it."""
    state["step"].add_(1)  # in place: a tensor, as torch has it
    return {
        "step": int(state["step"]),
        "lr": float(group["lr"]),
        "betas": group["betas"],
        "eps": group["eps"],
        "weight_decay": group["weight_decay"],
    }


def adamw(
    weights: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """One step of AdamW (Loshchilov & Hutter 2019, algorithm 2), in place, in torch's order of operations.

    Args:
        weights: float32 (or float64) ``[k]``.
        gradient: as ``weights``; left as it was.
        exp_avg: first moment, as ``weights``.
        exp_avg_sq: second moment, as ``weights``.
        step: number of this step, from 1.
        lr: step size.
        betas: decay of the first and the second moment.
        eps: added to the denominator.
        weight_decay: decoupled: the weights shrink by ``lr * weight_decay`` of themselves first.
    """
    b1, b2 = betas
    weights.mul_(1 - lr * weight_decay)
    exp_avg.lerp_(gradient, 1 - b1)
    exp_avg_sq.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    denominator = (exp_avg_sq.sqrt() / (1 - b2**step) ** 0.5).add_(eps)
    weights.addcdiv_(exp_avg, denominator, value=-(lr / (1 - b1**step)))
