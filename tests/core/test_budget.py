"""Step budgets (SSR section 2.3.3)."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.budget import coordinates, profile_at, shared_budget, step_budgets, step_weights

curves = st.lists(st.floats(0, 1e3), min_size=1, max_size=12)
counts = st.integers(1, 40)


@given(curves, counts)
def test_weights_are_inverse_masses_that_sum_to_one(curve, num_steps):
    weights = step_weights(curve, num_steps)
    assert len(weights) == num_steps
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    masses = [*curve, *[curve[-1]] * num_steps][:num_steps]
    for weight, mass in zip(weights, masses, strict=True):
        # w_i (v_i + eps) is the same for all i
        assert weight * (mass + 1e-8) == pytest.approx(weights[0] * (masses[0] + 1e-8), rel=1e-9)


@given(curves, counts, st.floats(1e-4, 1), st.floats(1e-4, 1), st.integers(1, 10**9))
def test_budgets_keep_within_both_limits(curve, num_steps, budget, cap, size):
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap)
    assert all(0 <= k <= cap for k in budgets)
    assert sum(budgets) <= budget * (1 + 1e-12)
    uncapped = [budget * weight for weight in step_weights(curve, num_steps)]
    assert budgets == pytest.approx([min(cap, share) for share in uncapped], rel=1e-12)
    # rounding down keeps the sum over steps within B, to the rounding of B * size itself
    assert sum(coordinates(k, size) for k in budgets) <= budget * size * (1 + 1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=10, unique=True))
def test_later_steps_get_more_of_a_decaying_curve(values):
    curve = sorted(values, reverse=True)
    budgets = step_budgets(curve, len(curve), budget=0.05, max_step_budget=1.0)
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1]


def test_worked_example_with_the_defaults():
    # inverse masses 1, 2, 4, 4: weights 1/11, 2/11, 4/11, 4/11 of 5%; the last two are capped at 1%
    budgets = step_budgets([1.0, 0.5, 0.25], 4)
    assert budgets == pytest.approx([0.05 / 11, 0.1 / 11, 0.01, 0.01], rel=1e-6)


def test_the_last_value_holds_beyond_the_profile():
    assert profile_at([1.0, 0.5], 4) == [1.0, 0.5, 0.5, 0.5]
    assert profile_at([1.0, 0.5, 0.2], 2) == [1.0, 0.5]


def test_no_steps_no_budgets():
    assert step_budgets([1.0], 0) == []


def test_coordinates_round_down():
    assert coordinates(0.01, 199) == 1
    assert coordinates(0.01, 200) == 2
    assert coordinates(0.01, 99) == 0
    assert coordinates(0.05, 0) == 0


@pytest.mark.parametrize("bad", [-0.1, float("nan"), float("inf")])
def test_impossible_profiles_are_refused(bad):
    with pytest.raises(ValueError, match="v_2 of a budget profile"):
        step_weights([1.0, bad], 3)


def test_an_empty_profile_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        step_weights([], 3)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=20).filter(any), st.floats(1e-4, 1), st.floats(1e-4, 1))
def test_what_is_dealt_out_is_in_proportion_to_the_weights_up_to_the_cap(weights, budget, cap):
    shares = shared_budget(weights, budget=budget, max_step_budget=cap)
    total = sum(Fraction(weight) for weight in weights)
    for share, weight in zip(shares, weights, strict=True):
        assert share == pytest.approx(float(min(Fraction(cap), Fraction(budget) * Fraction(weight) / total)), rel=1e-12)


def test_shared_budgets_by_hand():
    assert shared_budget([1.0, 3.0], budget=0.04, max_step_budget=0.02) == [0.01, 0.02]
    assert shared_budget([1.0] * 5) == pytest.approx([0.01] * 5)
    assert shared_budget([1.0] * 10) == pytest.approx([0.005] * 10)
    assert shared_budget([0.0, 2.0], max_step_budget=1.0) == [0.0, 0.05]
    assert shared_budget([]) == []


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_impossible_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        shared_budget([1.0, bad])


def test_weights_without_a_sum_are_refused():
    with pytest.raises(ValueError, match="all 3 weights are 0: there is nothing to share out by"):
        shared_budget([0.0, 0.0, 0.0])
