"""The interface between the training step and an updater, and what updaters share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ssrctl.core.claims import KeptUnit, Tally
from ssrctl.core.mask import BlockMask
from ssrctl.core.units import Unit
from ssrctl.distributed.world import World
from ssrctl.errors import UserError
from ssrctl.sampling.engines.base import Changes as Changes
from ssrctl.training.sign_shares import SignSums
from ssrctl.training.unit_gradients import UnitGradient


@dataclass
class QuestionUpdate:
    """One question's contribution to a batch.

    Attributes:
        gradients: loss and clip counts of each unit, in order.
        kept: per unit, the selected part of its gradient; empty for dense updates.
        granted: per unit, the budget in coordinates; empty for dense updates.
        tally: counts of the selections, where the question waits for those of other processes.
        signs: per unit, the parts of positive and of negative advantages; empty unless measured.
    """

    gradients: list[UnitGradient] = field(default_factory=list)
    kept: list[KeptUnit] = field(default_factory=list)
    granted: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    signs: list[SignSums] = field(default_factory=list)


class Updater(Protocol):
    """An algorithm that takes gradients and updates the weights."""

    num_protected: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, for learning-rate schedules."""

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """Return the units to backpropagate: joined, filtered or as they are."""

    def before_unit(self, unit: Unit) -> None:
        """Prepare for the backward pass of a unit."""

    def add_question(self, gradients: Iterator[UnitGradient]) -> QuestionUpdate:
        """Add one question's gradients to the batch; on an exception nothing of the question is kept."""

    def combine(self, team: World, *, whole: bool) -> None:
        """Combine the gradients of a unit over the processes that share its question, before ``add_question`` takes it.

        Args:
            team: these processes; all call this. Each has the gradient of its own responses in ``parameter.grad``.
            whole: leave the whole gradient there in the first of them, which is observed.

        Raises:
            NonFiniteGradient: in all of them or in none.
        """

    def exchange(self, mine: Mapping[int, QuestionUpdate]) -> None:
        """With several processes, add the questions of all to the batch; ``mine`` are this one's, by number."""

    def pending(self) -> Mapping[str, Tensor] | None:
        """Return the flat indices (int64) that ``step`` may write, by parameter name; None if that is any."""

    def step(self) -> dict[str, float | None]:
        """Apply the questions added since the last step; return metrics."""

    def changes(self) -> Changes:
        """Return the coordinates that may differ from the base model, with their values."""

    def state(self) -> dict[str, Tensor]:
        """Return the state to store in a checkpoint."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Restore what ``state`` returned."""


def sum_gradients(named: Mapping[str, torch.nn.Parameter], team: World) -> None:
    """Replace each parameter's gradient by its sum over the team, the same bits in each process."""
    for name in names_with_gradient(named, team):
        gradient = named[name].grad
        named[name].grad = team.add_up((torch.zeros_like(named[name]) if gradient is None else gradient).contiguous())


def names_with_gradient(named: Mapping[str, torch.nn.Parameter], team: World) -> list[str]:
    """Return the parameters, in order, that have a gradient in any process of the team."""
    found = {name for names in team.gather([n for n, p in named.items() if p.grad is not None]) for name in names}
    return [name for name in named if name in found]


def frozen_coordinates(protected: BlockMask | None, mask: BlockMask | None) -> BlockMask | None:
    """Return the coordinates that never change: the protected ones, and those outside the mask if there is one."""
    if mask is None:
        return protected
    return ~mask if protected is None else ~mask | protected


def values_at(named: Mapping[str, Tensor], indices: Mapping[str, Tensor]) -> Changes:
    """Read the parameters at flat indices; tensors without an index are left out."""
    return {
        name: (places.cpu(), named[name].detach().view(-1)[places].cpu())
        for name, places in indices.items()
        if places.numel()
    }


def joined(units: Sequence[Unit]) -> list[Unit]:
    """Join all units into one, for one backward pass: the gradient of the sum is the sum of the gradients.

    Returns an empty list when no unit has a signal.
    """
    if not any(unit.has_signal for unit in units):
        return []
    whole = units[0]
    for unit in units[1:]:
        whole = whole.joined(unit)
    return [whole]


def state_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """Return the optimizer's state as ``NAME.key`` tensors; ``names`` are those of its parameters, in order."""
    packed: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[place]}.{key}": value for place, kept in packed.items() for key, value in kept.items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """Restore what ``state_tensors`` returned; the groups' settings, such as the learning rate, stay as they are.

    Raises:
        UserError: the tensors belong to other parameters.
    """
    places = {name: place for place, name in enumerate(names)}
    state: dict[int, dict[str, Tensor]] = {}
    for full, value in tensors.items():
        name, _, key = full.rpartition(".")
        if name not in places:
            raise UserError(f"the optimizer's state is for another model: it holds {full}", "use another checkpoint")
        state.setdefault(places[name], {})[key] = value
    try:
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    except (ValueError, KeyError) as error:
        raise UserError(f"the optimizer's state does not fit: {error}", "use another checkpoint") from error
