"""What turns a question's per-unit gradients into an update: KronosOpt, or dense AdamW in the same loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ssrctl.configs import TrainConfig
from ssrctl.core.bits import bits_from_mask, bits_to_indices
from ssrctl.core.budget import coordinates
from ssrctl.core.kronos import KronosOpt
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import Unit
from ssrctl.io.delta import changed_indices
from ssrctl.models.gradients import UnitGradient

Changes = dict[str, tuple[Tensor, Tensor]]


@dataclass
class QuestionUpdate:
    """What one question contributed.

    Attributes:
        gradients: loss and clip counts of each unit, in order.
        selected: per unit, ascending flat indices per parameter name; empty for dense updates.
        granted: per unit, the budget in coordinates.
        cosine: ``[units][units]`` cosines between dense gradients before masking, float64, when asked for.
    """

    gradients: list[UnitGradient] = field(default_factory=list)
    selected: list[dict[str, Tensor]] = field(default_factory=list)
    granted: list[int] = field(default_factory=list)
    cosine: list[list[float]] | None = None


class Updater(Protocol):
    """Gradients in, updated weights out."""

    num_protected: int
    #: memory beside the weights
    bytes_per_parameter: float

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For learning-rate schedules."""

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """The units as this updater wants them."""

    def add_question(self, gradients: Iterator[UnitGradient], *, with_cosine: bool = False) -> QuestionUpdate:
        """Take in one question; on an exception nothing of it is kept."""

    def step(self) -> dict[str, float]:
        """Apply what was taken in since the last step; returns metrics."""

    def changes(self) -> Changes:
        """Coordinates that may differ from the base model, ascending, and their values."""

    def state(self) -> dict[str, Tensor]:
        """State to store in a checkpoint."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""


class KronosUpdater:
    """SSR algorithm 2: sequential, disjoint, exactly selected claims."""

    optimizer: KronosOpt
    # one dense fp32 gradient, the claimed and touched bits, and kept (index, value) pairs
    bytes_per_parameter: float = 4 + 3 / 8 + 12 * 0.05

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, protected: BlockMask | None
    ) -> None:
        self.optimizer = KronosOpt(
            parameters, lr=config.resolved_learning_rate, protected=protected, max_grad_norm=config.max_grad_norm
        )
        self.num_protected = self.optimizer.num_protected

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """Units without signal claim nothing and are left out."""
        return [unit for unit in units if unit.has_signal]

    def add_question(self, gradients: Iterator[UnitGradient], *, with_cosine: bool = False) -> QuestionUpdate:
        update = QuestionUpdate()
        dense: list[dict[str, Tensor]] = []
        self.optimizer.begin_question()
        try:
            for made in gradients:
                if with_cosine:
                    dense.append({n: p.grad.clone() for n, p in self.optimizer.named.items() if p.grad is not None})
                granted = coordinates(made.unit.budget, self.optimizer.num_unprotected)
                update.selected.append(self.optimizer.claim(granted))
                update.granted.append(granted)
                update.gradients.append(made)
        except BaseException:
            self.optimizer.abandon_question()
            raise
        if with_cosine:
            update.cosine = cosine_matrix(dense)
        return update

    def step(self) -> dict[str, float]:
        stats = self.optimizer.step()
        return {
            "grad_norm": stats.grad_norm,
            "clip_scale": stats.clip_scale,
            "updated_frac": stats.num_updated / self.optimizer.num_coordinates,
        }

    def changes(self) -> Changes:
        found: Changes = {}
        for name, parameter in self.optimizer.named.items():
            indices = bits_to_indices(self.optimizer.touched[name], parameter.numel())
            if indices.numel():
                found[name] = (indices.cpu(), parameter.detach().view(-1)[indices].cpu())
        return found

    def state(self) -> dict[str, Tensor]:
        return {f"{name}.touched": bits for name, bits in self.optimizer.touched.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, bits in self.optimizer.touched.items():
            bits.copy_(tensors[f"{name}.touched"])


class AdamWUpdater:
    """Dense AdamW on the sum of all units' gradients (SSR eq. 14); protected coordinates are put back."""

    # one dense gradient, two moments, and a copy of the base weights to find what changed
    bytes_per_parameter: float = 16.0

    def __init__(
        self, parameters: Sequence[tuple[str, torch.nn.Parameter]], config: TrainConfig, protected: BlockMask | None
    ) -> None:
        self.named = dict(parameters)
        self.optimizer = torch.optim.AdamW(
            self.named.values(), lr=config.resolved_learning_rate, weight_decay=config.weight_decay
        )
        self.max_grad_norm = config.max_grad_norm
        self.base = {name: parameter.detach().to("cpu", copy=True) for name, parameter in self.named.items()}
        self.num_protected = protected.count() if protected is not None else 0
        bits = bits_from_mask(protected) if protected is not None else {}
        self._frozen = {name: bits_to_indices(b, self.named[name].numel()) for name, b in bits.items()}
        self._sum: dict[str, Tensor] = {}

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """All steps in one backward pass: the gradient of the sum is the sum of the gradients."""
        if not any(unit.has_signal for unit in units):
            return []
        steps = tuple(step for unit in units for step in unit.steps)
        columns = tuple(column for unit in units for column in unit.advantages)
        return [Unit(steps, sum(unit.budget for unit in units), columns)]

    def add_question(self, gradients: Iterator[UnitGradient], *, with_cosine: bool = False) -> QuestionUpdate:
        update = QuestionUpdate()
        found: dict[str, Tensor] = {}
        try:
            for made in gradients:
                update.gradients.append(made)
            for name, parameter in self.named.items():
                if parameter.grad is not None:
                    if bad := int((~parameter.grad.isfinite()).sum()):
                        raise NonFiniteGradient(name, bad)
                    found[name] = parameter.grad
        finally:
            self.optimizer.zero_grad(set_to_none=True)
        for name, gradient in found.items():
            self._sum[name] = self._sum[name].add_(gradient) if name in self._sum else gradient
        return update

    @torch.no_grad()
    def step(self) -> dict[str, float]:
        if not self._sum:
            self.optimizer.step()  # moves nothing without gradients; schedules count it
            return {"grad_norm": 0.0, "clip_scale": 1.0, "updated_frac": 0.0}
        for name, parameter in self.named.items():
            parameter.grad = self._sum.pop(name, None)
            if parameter.grad is not None and name in self._frozen:
                parameter.grad.view(-1)[self._frozen[name]] = 0.0
        limit = self.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(self.named.values(), limit))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for name, indices in self._frozen.items():
            # Weight decay moves what has no gradient, so the originals are written back.
            self.named[name].view(-1)[indices] = self.base[name].view(-1)[indices].to(self.named[name].device)
        total = sum(parameter.numel() for parameter in self.named.values())
        return {
            "grad_norm": norm,
            "clip_scale": min(1.0, limit / norm) if norm > 0 else 1.0,
            "updated_frac": (total - self.num_protected) / total,
        }

    def changes(self) -> Changes:
        found: Changes = {}
        for name, parameter in self.named.items():
            now = parameter.detach().cpu()
            indices = changed_indices(self.base[name], now)
            if indices.numel():
                found[name] = (indices, now.view(-1)[indices])
        return found

    def state(self) -> dict[str, Tensor]:
        tensors = {}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"{name}.{key}"] = value
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, parameter in self.named.items():
            for key in ("step", "exp_avg", "exp_avg_sq"):
                if f"{name}.{key}" in tensors:
                    value = tensors[f"{name}.{key}"]
                    self.optimizer.state[parameter][key] = value if key == "step" else value.to(parameter.device)


UPDATERS: dict[str, type[KronosUpdater] | type[AdamWUpdater]] = {"kronos": KronosUpdater, "adamw": AdamWUpdater}


def cosine_matrix(gradients: Sequence[dict[str, Tensor]]) -> list[list[float]]:
    """Cosines between gradients over all tensors, products accumulated in float64; 0 where one is zero.

    Args:
        gradients: one mapping of parameter name to gradient per unit; an absent name counts as zero.
    """
    size = len(gradients)
    products = torch.zeros(size, size, dtype=torch.float64)
    # in order, not as a set: the order of additions decides the last bit
    for name in dict.fromkeys(name for gradient in gradients for name in gradient):
        # one tensor at a time, so that the float64 copies stay small
        rows = [gradient[name].flatten().double() if name in gradient else None for gradient in gradients]
        for i, a in enumerate(rows):
            for j, b in enumerate(rows[: i + 1]):
                if a is not None and b is not None:
                    products[i, j] += torch.dot(a, b).cpu()
    products = products + products.tril(-1).T
    norms = products.diagonal().sqrt()
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0).tolist()
