"""Update units and their fusion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.units import Unit, plan_units

columns = st.lists(st.lists(st.none() | st.sampled_from([0.0, 0.1, -1.0, 1.0]), max_size=5), min_size=1, max_size=4)


@given(columns)
def test_without_fusion_every_step_is_a_unit(advantages):
    longest = max(len(row) for row in advantages)
    budgets = [0.001 * (i + 1) for i in range(longest)]
    units = plan_units(advantages, budgets)
    assert [unit.steps for unit in units] == [(i,) for i in range(longest)]
    assert [unit.budget for unit in units] == budgets
    for i, unit in enumerate(units):
        column = tuple(row[i] if i < len(row) else None for row in advantages)
        assert unit.advantages == (column,)
        assert unit.has_signal == any(a not in (None, 0.0) for a in column)


@given(columns, st.sampled_from([0.05, 0.1, 0.15, 1.05, 5.0]))
def test_fusion_joins_neighbours_that_differ_by_less(advantages, tolerance):
    longest = max(len(row) for row in advantages)
    budgets = [0.001 * (i + 1) for i in range(longest)]
    units = plan_units(advantages, budgets, fuse_tol=tolerance)
    assert [step for unit in units for step in unit.steps] == list(range(longest))
    assert sum(unit.budget for unit in units) == pytest.approx(sum(budgets))

    def value(row, i):
        return (row[i] if i < len(row) else None) or 0.0

    starts = {unit.steps[0] for unit in units}
    for i in range(1, longest):
        apart = max(abs(value(row, i) - value(row, i - 1)) for row in advantages)
        assert (i in starts) == (apart >= tolerance)
    for unit in units:
        assert unit.advantages == tuple(tuple(r[i] if i < len(r) else None for r in advantages) for i in unit.steps)


def test_a_tolerance_that_is_met_exactly_does_not_fuse():
    assert len(plan_units([[0.0, 0.5]], [0.01, 0.01], fuse_tol=0.5)) == 2
    assert len(plan_units([[0.0, 0.5]], [0.01, 0.01], fuse_tol=0.500001)) == 1


def test_equal_steps_stay_apart_when_fusion_is_off():
    assert len(plan_units([[1.0, 1.0]], [0.01, 0.01], fuse_tol=0.0)) == 2


def test_no_responses_no_units():
    assert plan_units([], []) == []
    assert plan_units([[], []], []) == []


def test_missing_and_zero_advantages_are_no_signal():
    assert not Unit((0,), 0.1, ((None, 0.0, -0.0),)).has_signal
    assert Unit((0, 1), 0.1, ((None, 0.0), (None, -1e-9))).has_signal
