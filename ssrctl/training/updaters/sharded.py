"""An updater of a sharded model: it sees the rows of this process as parameters, files hold whole tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ssrctl.core.units import Unit
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.world import World
from ssrctl.training.unit_gradients import UnitGradient
from ssrctl.training.updaters.base import Changes, QuestionUpdate, Updater


class ShardedUpdater:
    """Another updater over the rows of this process.

    Args:
        inner: the updater of ``sharded.parameters``, whose sums of counts and squares are over all processes.
        sharded: the model.
    """

    def __init__(self, inner: Updater, sharded: ShardedModel) -> None:
        self.inner, self.sharded = inner, sharded
        self.num_protected = inner.num_protected

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        return self.inner.optimizer

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        return self.inner.plan(units)

    def before_unit(self, unit: Unit) -> None:
        self.inner.before_unit(unit)

    def add_question(self, gradients: Iterator[UnitGradient]) -> QuestionUpdate:
        try:
            return self.inner.add_question(self._of_rows(gradients))
        finally:
            self.sharded.drop_gradients()

    def _of_rows(self, gradients: Iterator[UnitGradient]) -> Iterator[UnitGradient]:
        for made in gradients:
            self.sharded.take_gradients()
            yield made

    def combine(self, team: World, *, whole: bool) -> None:
        """Combine nothing: the gradients of the rows are sums over all processes already."""

    def exchange(self, mine: Mapping[int, QuestionUpdate]) -> None:
        """Exchange nothing: every process has its rows of every question."""

    def pending(self) -> Mapping[str, Tensor] | None:
        """As of this process's rows."""
        return self.inner.pending()

    def step(self) -> dict[str, float | None]:
        self.sharded.settle()
        return self.inner.step()

    def changes(self) -> Changes:
        """As of the whole model, in the main process; empty in the others. All processes call it."""
        return self.sharded.whole_changes(self.inner.changes())

    def state(self) -> dict[str, Tensor]:
        """As of the whole model, in the main process; empty in the others. All processes call it."""
        return self.sharded.whole_state(self.inner.state())

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.inner.load_state(self.sharded.state_of_rows(tensors))
