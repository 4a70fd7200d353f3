"""Budgets against SSR section 2.3.3 in exact fractions."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.budget import coordinates, profile_at, step_budgets, step_weights

curves = st.lists(st.one_of(st.floats(0, 2), st.just(0.0), st.just(1.0)), min_size=1, max_size=30)
shares = st.floats(1e-4, 1.0)


@given(curves, st.integers(1, 60), shares, shares)
def test_equal_the_formula(curve: list[float], num_steps: int, budget: float, cap: float) -> None:
    held = [Fraction(curve[i] if i < len(curve) else curve[-1]) for i in range(num_steps)]
    inverse = [1 / (v + Fraction(1, 10**8)) for v in held]
    weights = [w / sum(inverse) for w in inverse]
    assert step_weights(curve, num_steps) == pytest.approx([float(w) for w in weights], rel=1e-12)
    expected = [float(min(Fraction(cap), Fraction(budget) * w)) for w in weights]
    found = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap)
    assert found == pytest.approx(expected, rel=1e-12)


@given(curves, st.integers(1, 60), shares, shares, st.integers(1, 10**9))
def test_bounds(curve: list[float], num_steps: int, budget: float, cap: float, n: int) -> None:
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap)
    assert sum(step_weights(curve, num_steps)) == pytest.approx(1, rel=1e-12)
    assert max(budgets) <= cap
    # Up to the rounding of 60 additions; in coordinates, up to the rounding of one product.
    assert sum(budgets) <= budget * (1 + 1e-14)
    assert sum(coordinates(k, n) for k in budgets) <= budget * n * (1 + 1e-14)
    assert all(0 <= coordinates(k, n) <= cap * n for k in budgets)


def test_worked_example() -> None:
    # v = 1, 1/2, 1/4: inverses 1, 2, 4, so the last step gets 4/7 of B, unless the cap takes it
    assert step_budgets([1.0, 0.5, 0.25], 3, budget=0.07, max_step_budget=1.0) == pytest.approx([0.01, 0.02, 0.04])
    assert step_budgets([1.0, 0.5, 0.25], 3, budget=0.07, max_step_budget=0.015) == pytest.approx([0.01, 0.015, 0.015])
    assert step_budgets([1.0], 2) == [0.01, 0.01]
    assert step_budgets([1.0], 10) == pytest.approx([0.005] * 10)


def test_less_mass_means_a_larger_share() -> None:
    weights = step_weights([1.0, 0.8, 0.5], 5)
    assert weights[0] < weights[1] < weights[2] == weights[3] == weights[4]


def test_the_last_value_holds() -> None:
    assert profile_at([1.0, 0.5], 4) == [1.0, 0.5, 0.5, 0.5]
    assert profile_at([1.0, 0.5, 0.2], 2) == [1.0, 0.5]


def test_coordinates_round_down() -> None:
    assert coordinates(0.0199, 100) == 1 and coordinates(0.25, 4) == 1 and coordinates(0.0, 100) == 0


def test_no_steps() -> None:
    assert step_weights([1.0], 0) == [] and step_budgets([1.0], 0) == []


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_impossible_curves_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match="v_2 of a budget profile"):
        step_weights([1.0, bad], 2)
    with pytest.raises(ValueError, match="at least one value"):
        step_budgets([], 3)
