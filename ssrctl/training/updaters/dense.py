"""The sum of dense gradients over the questions of a batch, shared by the AdamW updaters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ssrctl.core.counting import ALONE as ONE_PROCESS
from ssrctl.core.counting import Group
from ssrctl.core.topk import NonFiniteGradient
from ssrctl.core.units import Unit
from ssrctl.distributed.world import ALONE, World
from ssrctl.training.unit_gradients import UnitGradient
from ssrctl.training.updaters.base import (
    QuestionUpdate,
    joined,
    load_state_tensors,
    state_tensors,
    sum_gradients,
)


class DenseGradients:
    """Base of the updaters that sum whole gradients; a question with a NaN is left out of the sum.

    Attributes:
        named: the parameters by name.
        max_grad_norm: clip on the norm of the summed gradient; 0 is off.
        world: the processes that share a batch.
        group: the processes that share each parameter.
        sum: the gradients of the questions since the last step, by name.
        num_coordinates: of all parameters, over all processes of the group.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        named: dict[str, torch.nn.Parameter],
        max_grad_norm: float,
        world: World = ALONE,
        group: Group = ONE_PROCESS,
    ) -> None:
        self.named, self.max_grad_norm, self.world, self.group = named, max_grad_norm, world, group
        self.sum: dict[str, Tensor] = {}
        self.num_coordinates = self._over_all(sum(parameter.numel() for parameter in named.values()))

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """Join all steps for one backward pass."""
        return joined(units)

    def before_unit(self, unit: Unit) -> None:
        """Prepare nothing."""

    def add_question(self, gradients: Iterator[UnitGradient]) -> QuestionUpdate:
        update = QuestionUpdate()
        try:
            for made in gradients:
                update.gradients.append(made)
            found = {name: p.grad for name, p in self.named.items() if p.grad is not None}
            if (broken := self._first_non_finite(found)) is not None:
                raise NonFiniteGradient(*broken)
        finally:
            self._drop_gradients()
        for name, gradient in found.items():
            self.sum[name] = self.sum[name].add_(gradient) if name in self.sum else gradient
        return update

    def combine(self, team: World, *, whole: bool) -> None:
        """Let each process add the gradient of its own responses to its sum; ``exchange`` adds up all.

        A gradient that is observed is summed now, and added by the first process.
        """
        broken = self._first_non_finite({name: p.grad for name, p in self.named.items() if p.grad is not None})
        if somewhere := next(filter(None, team.gather(broken)), None):
            raise NonFiniteGradient(*somewhere)
        if whole:
            sum_gradients(self.named, team)
            if not team.is_main:
                self._drop_gradients()

    def _drop_gradients(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def exchange(self, mine: Mapping[int, QuestionUpdate]) -> None:
        """Sum the gradients over the processes, tensor by tensor, in the gradients' dtype.

        Every process gets the same bits; one process, which adds the questions in another order, may get others.
        """
        if self.world.size == 1:
            return
        found = {name for names in self.world.gather(list(self.sum)) for name in names}
        for name, parameter in self.named.items():
            if name in found:
                self.sum[name] = self.world.add_up(self.sum.get(name, torch.zeros_like(parameter)).contiguous())

    def state(self) -> dict[str, Tensor]:
        return state_tensors(self.optimizer, list(self.named))

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        load_state_tensors(self.optimizer, list(self.named), tensors)

    def check_finite(self, norm: float) -> None:
        """Raise if the questions' gradients, each finite, have a sum (in ``grad``) that is not, and drop the sum.

        Raises:
            NonFiniteGradient: a value of the sum overflowed.
        """
        if math.isfinite(norm):
            return
        broken = self._first_non_finite({name: p.grad for name, p in self.named.items() if p.grad is not None})
        if broken is not None:
            self.optimizer.zero_grad(set_to_none=True)
            raise NonFiniteGradient(*broken)

    def clip_scale(self, norm: float) -> float:
        """Return the factor, in (0, 1], by which the clip scales a gradient of this norm."""
        return min(1.0, self.max_grad_norm / norm) if self.max_grad_norm and norm > 0 else 1.0

    def _first_non_finite(self, gradients: Mapping[str, Tensor]) -> tuple[str, int] | None:
        """Return the first gradient with a NaN or infinity in any process, and the number of these; None without one."""
        counts = ((name, int((~gradient.isfinite()).sum())) for name, gradient in gradients.items())
        return self.group.first(next((found for found in counts if found[1]), None))

    def _over_all(self, count: int) -> int:
        """Return the sum of a count over the processes that share each parameter."""
        return int(self.group.total(torch.tensor(count)))
