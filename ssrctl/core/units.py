"""Update units: the reasoning steps of one question, neighbours fused where they want the same (SSR section 2.3.4)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

AdvantageColumn = tuple[float | None, ...]


@dataclass(frozen=True)
class Unit:
    """Steps that are updated as one.

    Attributes:
        steps: ascending indices of steps, from 0; neighbours, but for steps without a signal between them.
        budget: the sum of their budgets, a fraction of the unprotected coordinates.
        advantages: per step in ``steps``, one advantage per response; None where the response has no such
            step or its score is missing.
    """

    steps: tuple[int, ...]
    budget: float
    advantages: tuple[AdvantageColumn, ...]

    @property
    def has_signal(self) -> bool:
        """True if any advantage differs from 0; a unit without signal claims nothing."""
        return any(a for column in self.advantages for a in column if a is not None)

    @property
    def mean_advantages(self) -> tuple[float, ...]:
        """Per response, the mean over the unit's steps; a step without an advantage counts as 0."""
        return tuple(math.fsum(a or 0.0 for a in row) / len(row) for row in zip(*self.advantages, strict=True))

    def of_responses(self, rows: Sequence[int]) -> Unit:
        """Return the unit with the advantages of some of the responses."""
        columns = tuple(tuple(column[row] for row in rows) for column in self.advantages)
        return Unit(self.steps, self.budget, columns)

    def joined(self, after: Unit) -> Unit:
        """Join this unit with the next into one with the sum of their budgets."""
        return Unit(self.steps + after.steps, self.budget + after.budget, self.advantages + after.advantages)


def plan_units(
    advantages: Sequence[Sequence[float | None]],
    budgets: Sequence[float],
    *,
    fuse_tol: float = 0.0,
    max_units: int | None = None,
) -> list[Unit]:
    """Turn a group's advantages into update units, in step order.

    Args:
        advantages: one list per response, one value per step of that response.
        budgets: fraction of the unprotected coordinates per step index, at least as many as the longest
            response has steps.
        fuse_tol: neighbouring steps whose advantages differ by less than this in every response become one
            unit; a response without the step, or without a score for it, counts as 0, which is the gradient
            that it contributes. 0 fuses nothing.
        max_units: most units with a signal that remain: of these, the neighbours whose mean advantages
            are closest (largest difference over the responses; the first of equals) are joined until it is so.
            Units without a signal cost nothing and do not count.

    Raises:
        ValueError: ``max_units`` below 1.
    """
    if max_units is not None and max_units < 1:
        raise ValueError(f"max_units must be at least 1, got {max_units}")
    num_steps = max((len(row) for row in advantages), default=0)
    columns = [tuple(row[i] if i < len(row) else None for row in advantages) for i in range(num_steps)]
    units: list[Unit] = []
    for index, column in enumerate(columns):
        step = Unit((index,), budgets[index], (column,))
        if units and _distance(_values(units[-1].advantages[-1]), _values(column)) < fuse_tol:
            units[-1] = units[-1].joined(step)
        else:
            units.append(step)
    return units if max_units is None else _at_most(units, max_units)


def steps_with_signal(advantages: Sequence[Sequence[float | None]]) -> set[int]:
    """Return the indices of the steps in which any response has an advantage other than 0.

    Args:
        advantages: as in ``plan_units``.
    """
    return {i for row in advantages for i, advantage in enumerate(row) if advantage}


def _at_most(units: list[Unit], max_units: int) -> list[Unit]:
    """Join the most similar neighbours with a signal until ``max_units`` of them remain; the others stay apart."""
    silent = [unit for unit in units if not unit.has_signal]
    heard = [unit for unit in units if unit.has_signal]
    while len(heard) > max_units:
        means = [unit.mean_advantages for unit in heard]
        apart = [_distance(a, b) for a, b in itertools.pairwise(means)]
        place = apart.index(min(apart))
        heard[place : place + 2] = [heard[place].joined(heard[place + 1])]
    return sorted(silent + heard, key=lambda unit: unit.steps)


def _values(column: AdvantageColumn) -> tuple[float, ...]:
    return tuple(a or 0.0 for a in column)


def _distance(a: Sequence[float], b: Sequence[float]) -> float:
    return max((abs(x - y) for x, y in zip(a, b, strict=True)), default=0.0)
