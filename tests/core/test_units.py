"""Update units and the fusion of neighbours."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.units import Unit, plan_units

advantage = st.one_of(st.none(), st.sampled_from([0.0, 0.05, 0.1, 0.5, -1.0, 2.0]))
groups = st.lists(st.lists(advantage, max_size=8), max_size=5)


@given(groups, st.sampled_from([0.0, 0.06, 0.3, 100.0]))
def test_units_partition_the_steps_in_order(advantages: list[list[float | None]], tol: float) -> None:
    longest = max((len(row) for row in advantages), default=0)
    budgets = [2.0**-i for i in range(longest + 2)]
    units = plan_units(advantages, budgets, fuse_tol=tol)
    assert [step for unit in units for step in unit.steps] == list(range(longest))
    for unit in units:
        assert unit.budget == sum(budgets[i] for i in unit.steps)
        assert [list(c) for c in unit.advantages] == [
            [row[i] if i < len(row) else None for row in advantages] for i in unit.steps
        ]
        assert unit.has_signal == any(a not in (None, 0.0) for column in unit.advantages for a in column)

    def filled(step: int) -> list[float]:
        return [row[step] or 0.0 if step < len(row) else 0.0 for row in advantages]

    starts = {unit.steps[0] for unit in units}
    for step in range(1, longest):
        gap = max(abs(x - y) for x, y in zip(filled(step - 1), filled(step), strict=True))
        assert (step in starts) == (gap >= tol)


def test_zero_tolerance_fuses_nothing() -> None:
    assert [unit.steps for unit in plan_units([[1.0, 1.0, 1.0]], [0.1] * 3)] == [(0,), (1,), (2,)]


def test_every_response_must_agree() -> None:
    close_but_one = [[0.5, 0.5], [0.5, 0.51], [0.5, -0.5]]
    assert len(plan_units(close_but_one, [0.1] * 2, fuse_tol=0.1)) == 2
    assert len(plan_units(close_but_one[:2], [0.1] * 2, fuse_tol=0.1)) == 1


def test_a_step_that_a_response_lacks_counts_as_no_advantage() -> None:
    assert len(plan_units([[0.5, 0.5], [0.5]], [0.1] * 2, fuse_tol=0.1)) == 2
    assert len(plan_units([[0.5, 0.5], [0.0]], [0.1] * 2, fuse_tol=0.1)) == 1
    assert len(plan_units([[None, 0.5]], [0.1] * 2, fuse_tol=0.1)) == 2


def test_budgets_add_up() -> None:
    (unit,) = plan_units([[1.0, 1.0, 1.0]], [0.01, 0.02, 0.03], fuse_tol=0.5)
    assert unit == Unit((0, 1, 2), pytest.approx(0.06), ((1.0,), (1.0,), (1.0,)))


def test_no_responses() -> None:
    assert plan_units([], []) == [] and plan_units([[], []], []) == []
