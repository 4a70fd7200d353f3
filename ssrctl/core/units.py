"""Update units: the reasoning steps of one question, neighbours fused where they want the same (SSR section 2.3.4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

AdvantageColumn = tuple[float | None, ...]


@dataclass(frozen=True)
class Unit:
    """Steps that are updated as one.

    Attributes:
        steps: ascending indices of neighbouring steps, from 0.
        budget: the sum of their budgets, a fraction of the unprotected coordinates.
        advantages: per step in ``steps``, one advantage per response; None where the response has no such
            step or its score is missing.
    """

    steps: tuple[int, ...]
    budget: float
    advantages: tuple[AdvantageColumn, ...]

    @property
    def has_signal(self) -> bool:
        """Whether any advantage differs from 0; a unit without signal claims nothing."""
        return any(a for column in self.advantages for a in column if a is not None)


def plan_units(
    advantages: Sequence[Sequence[float | None]], budgets: Sequence[float], *, fuse_tol: float = 0.0
) -> list[Unit]:
    """Turn a group's advantages into update units, in step order.

    Args:
        advantages: one list per response, one value per step of that response.
        budgets: fraction of the unprotected coordinates per step index, at least as many as the longest
            response has steps.
        fuse_tol: neighbouring steps whose advantages differ by less than this in every response become one
            unit; a response without the step, or without a score for it, counts as 0, which is the gradient
            that it contributes. 0 fuses nothing.
    """
    num_steps = max((len(row) for row in advantages), default=0)
    columns = [tuple(row[i] if i < len(row) else None for row in advantages) for i in range(num_steps)]
    units: list[Unit] = []
    for index, column in enumerate(columns):
        if units and _distance(units[-1].advantages[-1], column) < fuse_tol:
            last = units[-1]
            units[-1] = Unit((*last.steps, index), last.budget + budgets[index], (*last.advantages, column))
        else:
            units.append(Unit((index,), budgets[index], (column,)))
    return units


def _distance(a: AdvantageColumn, b: AdvantageColumn) -> float:
    return max((abs((x or 0.0) - (y or 0.0)) for x, y in zip(a, b, strict=True)), default=0.0)
