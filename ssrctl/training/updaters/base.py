"""What every updater offers to the training step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ssrctl.core.claims import KeptUnit
from ssrctl.core.units import Unit
from ssrctl.errors import UserError
from ssrctl.training.unit_gradients import UnitGradient

Changes = dict[str, tuple[Tensor, Tensor]]


@dataclass
class QuestionUpdate:
    """What one question contributed.

    Attributes:
        gradients: loss and clip counts of each unit, in order.
        kept: per unit, what it keeps of its gradient; empty for dense updates.
        granted: per unit, the budget in coordinates.
    """

    gradients: list[UnitGradient] = field(default_factory=list)
    kept: list[KeptUnit] = field(default_factory=list)
    granted: list[int] = field(default_factory=list)


class Updater(Protocol):
    """Gradients in, updated weights out."""

    num_protected: int

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """For learning-rate schedules."""

    def plan(self, units: Sequence[Unit]) -> list[Unit]:
        """The units as this updater wants them."""

    def before_unit(self, unit: Unit) -> None:
        """Told of each unit before its backward pass."""

    def add_question(self, gradients: Iterator[UnitGradient]) -> QuestionUpdate:
        """Take in one question; on an exception nothing of it is kept."""

    def step(self) -> dict[str, float | None]:
        """Apply what was taken in since the last step; returns metrics."""

    def changes(self) -> Changes:
        """Coordinates that may differ from the base model, ascending, and their values."""

    def state(self) -> dict[str, Tensor]:
        """State to store in a checkpoint."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``state``."""


def joined(units: Sequence[Unit]) -> list[Unit]:
    """All units as one, for one backward pass: the gradient of the sum is the sum of the gradients.

    Nothing when none has a signal.
    """
    if not any(unit.has_signal for unit in units):
        return []
    whole = units[0]
    for unit in units[1:]:
        whole = whole.joined(unit)
    return [whole]


def state_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> dict[str, Tensor]:
    """The optimizer's state as ``NAME.key`` tensors; ``names`` are its parameters' in order."""
    packed: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return {f"{names[place]}.{key}": value for place, kept in packed.items() for key, value in kept.items()}


def load_state_tensors(optimizer: torch.optim.Optimizer, names: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``state_tensors``; what the groups hold, such as the learning rate, stays as it is.

    Raises:
        UserError: tensors of other parameters.
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
