"""KronosOpt: each reasoning step updates its own, disjoint set of coordinates (SSR algorithm 2).

For every question the claimed set starts as the protected set; each unit, in order, backpropagates its loss
and claims the coordinates with the largest gradients that nobody has claimed yet. The kept (index, value)
pairs of all units of all questions in the batch are applied at once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.bits import bits_from_indices, set_bits
from ssrctl.core.mask import BlockMask
from ssrctl.core.topk import select_topk

Indices = dict[str, Tensor]


@dataclass(frozen=True)
class StepStats:
    """What one ``KronosOpt.step`` did.

    Attributes:
        grad_norm: L2 norm of the kept gradient, summed over units and questions, before the clip.
        clip_scale: what the clip multiplied it by, in (0, 1].
        num_updated: distinct coordinates that were updated.
    """

    grad_norm: float
    clip_scale: float
    num_updated: int


class KronosOpt(torch.optim.Optimizer):
    """Masked gradient descent with sequential claims.

    Use::

        optimizer = KronosOpt(model.named_parameters(), lr=3e-2, protected=mask)
        for question in batch:
            optimizer.begin_question()
            for loss, k in units:              # in step order
                loss.backward(retain_graph=True)
                optimizer.claim(k)             # selects, keeps, and drops the dense gradient
        optimizer.step()

    Selection is global: one threshold over all parameters, exact, ties to the lowest (parameter, index).

    Args:
        params: (name, parameter) pairs, as from ``model.named_parameters()``; a tied parameter once.
        lr: step size.
        protected: coordinates that are never claimed and so never change; names and shapes must be those of
            ``params``.
        max_grad_norm: clip on the L2 norm of the kept (sparse) gradient of the whole batch; 0 is off.

    Raises:
        ValueError: parameters without names or with equal ones, or a protected mask over other tensors.
    """

    def __init__(
        self,
        params: Iterable[tuple[str, Tensor]],
        lr: float,
        *,
        protected: BlockMask | None = None,
        max_grad_norm: float = 1.0,
    ) -> None:
        if lr < 0:
            raise ValueError(f"the learning rate must be at least 0, got {lr}")
        super().__init__(params, {"lr": lr})
        self.named = {
            name: parameter
            for group in self.param_groups
            for name, parameter in zip(group.get("param_names", ()), group["params"], strict=True)
        }
        if len(self.named) != sum(len(group["params"]) for group in self.param_groups):
            raise ValueError("two parameters have the same name")
        self.max_grad_norm = max_grad_norm
        self._protected = self._protected_bits(protected)
        self.num_coordinates = sum(parameter.numel() for parameter in self.named.values())
        self.num_protected = protected.count() if protected is not None else 0
        self._taken: dict[str, Tensor] | None = None
        self._kept: list[dict[str, tuple[Tensor, Tensor]]] = []
        self._question_start = 0
        #: bits of every coordinate that was ever updated, per parameter name
        self.touched = {
            name: torch.zeros(-(-p.numel() // 8), dtype=torch.uint8, device=p.device) for name, p in self.named.items()
        }

    @property
    def num_unprotected(self) -> int:
        """Coordinates that steps may claim; budgets are fractions of this."""
        return self.num_coordinates - self.num_protected

    def begin_question(self) -> None:
        """Forget the claims of the question before; what it kept stays for ``step``."""
        self._taken = {name: bits.clone() for name, bits in self._protected.items()}
        self._question_start = len(self._kept)

    def abandon_question(self) -> None:
        """Drop what the question at hand has claimed, as when one of its gradients is NaN."""
        del self._kept[self._question_start :]
        self._taken = None
        self.zero_grad(set_to_none=True)

    @torch.no_grad()
    def claim(self, k: int) -> Indices:
        """Claim the ``k`` largest |gradient| coordinates that are free, keep their values, drop the gradients.

        Args:
            k: how many; when fewer are free, all of these are claimed.

        Returns:
            Ascending flat indices per parameter name, int64.

        Raises:
            RuntimeError: no question was begun, or no parameter has a gradient.
            NonFiniteGradient: NaN or infinity in a gradient; nothing is claimed then.
        """
        if self._taken is None:
            raise RuntimeError("claim() before begin_question()")
        gradients = {name: p.grad for name, p in self.named.items() if p.grad is not None}
        if not gradients:
            raise RuntimeError("claim() found no gradient: call backward() first")
        selected = select_topk(gradients, k, self._taken)
        kept = {}
        for name, indices in selected.items():
            if indices.numel():
                kept[name] = (indices, gradients[name].reshape(-1)[indices].clone())
                set_bits(self._taken[name], indices)
        self._kept.append(kept)
        self.zero_grad(set_to_none=True)
        return selected

    @torch.no_grad()
    def step(self, closure: None = None) -> StepStats:  # type: ignore[override]
        """Apply everything that was claimed since the last step: theta -= lr * clip * sum of kept gradients."""
        if closure is not None:
            raise ValueError("KronosOpt takes no closure: gradients are claimed unit by unit")
        summed = {name: merged for name in self.named if (merged := self._summed(name)) is not None}
        square = sum(float(values.double().square().sum()) for _, values in summed.values())
        norm = square**0.5
        scale = min(1.0, self.max_grad_norm / norm) if self.max_grad_norm and norm > 0 else 1.0
        rate = {name: group["lr"] for group in self.param_groups for name in group["param_names"]}
        for name, (indices, values) in summed.items():
            flat = self.named[name].view(-1)
            flat[indices] = flat[indices] - (rate[name] * scale) * values.to(flat.dtype)
            set_bits(self.touched[name], indices)
        updated = sum(indices.numel() for indices, _ in summed.values())
        self._kept.clear()
        self._taken = None
        return StepStats(norm, scale, updated)

    def _summed(self, name: str) -> tuple[Tensor, Tensor] | None:
        """(distinct ascending indices, sum of kept values) of one parameter over all units of the batch."""
        parts = [kept[name] for kept in self._kept if name in kept]
        if not parts:
            return None
        indices, inverse = torch.unique(torch.cat([i for i, _ in parts]), sorted=True, return_inverse=True)
        values = torch.cat([v for _, v in parts]).float()
        return indices, torch.zeros(indices.numel(), device=values.device).index_add_(0, inverse, values)

    def _protected_bits(self, protected: BlockMask | None) -> dict[str, Tensor]:
        if protected is None:
            return {
                n: torch.zeros(-(-p.numel() // 8), dtype=torch.uint8, device=p.device) for n, p in self.named.items()
            }
        shapes = {name: tuple(p.shape) for name, p in self.named.items()}
        if protected.shapes != shapes:
            odd = sorted(n for n in shapes.keys() | protected.shapes.keys() if shapes.get(n) != protected.shapes.get(n))
            raise ValueError(f"the protected mask is over other tensors; first difference: {odd[0]}")
        return {
            name: bits_from_indices(tiles.to_indices().to(self.named[name].device), tiles.numel)
            for name, tiles in protected.tensors.items()
        }

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch, but parameters need names (claims, masks and deltas are by name) and none can come later."""
        if hasattr(self, "named"):
            raise ValueError("KronosOpt takes all its parameters at the start: its masks and budgets are over these")
        super().add_param_group(param_group)
        if "param_names" not in self.param_groups[-1]:
            raise ValueError("KronosOpt needs (name, parameter) pairs, as from model.named_parameters()")
