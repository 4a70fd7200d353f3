"""Update units and their fusion."""

import itertools

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


@given(columns, st.integers(1, 4), st.sampled_from([0.0, 0.15]))
def test_max_units_joins_the_most_similar_neighbours(advantages, limit, tolerance):
    longest = max(len(row) for row in advantages)
    budgets = [0.001 * (i + 1) for i in range(longest)]
    before = plan_units(advantages, budgets, fuse_tol=tolerance)
    units = plan_units(advantages, budgets, fuse_tol=tolerance, max_units=limit)
    heard = [set(unit.steps) for unit in before if unit.has_signal]
    while len(heard) > limit:  # the slow way: every pair's distance from the raw advantages

        def mean(row, steps):
            return sum((row[i] if i < len(row) else None) or 0.0 for i in sorted(steps)) / len(steps)

        gaps = [max(abs(mean(r, a) - mean(r, b)) for r in advantages) for a, b in itertools.pairwise(heard)]
        place = min(range(len(gaps)), key=lambda i: (round(gaps[i], 9), i))
        heard[place] |= heard.pop(place + 1)
    assert [set(unit.steps) for unit in units if unit.has_signal] == heard
    assert sorted(step for unit in units for step in unit.steps) == list(range(longest))
    assert [unit.steps[0] for unit in units] == sorted(unit.steps[0] for unit in units)
    assert sum(unit.budget for unit in units) == pytest.approx(sum(budgets))
    for unit in units:
        assert unit.advantages == tuple(tuple(r[i] if i < len(r) else None for r in advantages) for i in unit.steps)


def test_steps_without_signal_do_not_count_as_units():
    units = plan_units([[1.0, 0.0, 0.9, -1.0]], [0.01] * 4, max_units=2)
    assert [unit.steps for unit in units] == [(0, 2), (1,), (3,)]


def test_max_units_is_at_least_one():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        plan_units([[1.0]], [0.01], max_units=0)
