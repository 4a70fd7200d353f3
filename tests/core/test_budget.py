"""Step budgets (SSR section 2.3.3)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.budgets import poured

from ssrctl.core.budget import (
    RULES,
    coordinates,
    grant,
    profile_at,
    shared_budget,
    step_budgets,
    step_weights,
)

curves = st.lists(st.floats(0, 1e3), min_size=1, max_size=12)
counts = st.integers(1, 40)
positive_weights = st.lists(st.floats(0, exclude_min=True, allow_infinity=False), min_size=1, max_size=20)
limits = st.floats(1e-4, 1)


@given(curves, counts)
def test_weights_are_inverse_masses_that_sum_to_one(curve, num_steps):
    weights = step_weights(curve, num_steps)
    assert len(weights) == num_steps
    assert sum(weights) == pytest.approx(1.0, abs=1e-12)
    masses = [*curve, *[curve[-1]] * num_steps][:num_steps]
    for weight, mass in zip(weights, masses, strict=True):
        # w_i (v_i + eps) is the same for all i
        assert weight * (mass + 1e-8) == pytest.approx(weights[0] * (masses[0] + 1e-8), rel=1e-9)


@pytest.mark.parametrize("rule", RULES)
@given(curves, counts, limits, limits, st.integers(1, 10**9))
def test_budgets_keep_within_both_limits(rule, curve, num_steps, budget, cap, size):
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap, rule=rule)
    assert all(0 <= k <= cap for k in budgets)
    assert sum(budgets) <= budget * (1 + 1e-12)
    # rounding down keeps the sum over steps within B, to the rounding of B * size itself
    assert sum(coordinates(k, size) for k in budgets) <= budget * size * (1 + 1e-12)


@given(curves, counts, limits, limits)
def test_the_rule_of_the_paper_loses_what_the_cap_cuts_off(curve, num_steps, budget, cap):
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap, rule="paper")
    values = [curve[min(i, len(curve) - 1)] for i in range(num_steps)]
    inverse = [1.0 / (v + 1e-8) for v in values]
    assert budgets == [min(cap, budget * (one / sum(inverse))) for one in inverse]  # to the bit


@given(curves, counts, limits, limits)
def test_rule_share_grants_all_of_b_where_the_caps_allow_it(curve, num_steps, budget, cap):
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=cap)
    assert sum(budgets) == pytest.approx(min(budget, num_steps * cap), rel=1e-12)


@given(curves, counts, limits, limits, st.sets(st.integers(0, 39)))
def test_steps_without_a_signal_leave_their_share_to_the_others(curve, num_steps, budget, cap, silent):
    given = {"budget": budget, "max_step_budget": cap}
    budgets = step_budgets(curve, num_steps, **given, silent=silent)
    heard = [i for i in range(num_steps) if i not in silent]
    assert all(budgets[i] == 0 for i in range(num_steps) if i in silent)
    assert sum(budgets) == pytest.approx(min(budget, len(heard) * cap), rel=1e-12)
    by_paper = step_budgets(curve, num_steps, **given, rule="paper")
    assert step_budgets(curve, num_steps, **given, rule="paper", silent=silent) == by_paper


@given(counts, limits, limits)
def test_a_flat_profile_gives_equal_budgets_under_both_rules(num_steps, budget, cap):
    for rule in RULES:
        budgets = step_budgets([1.0], num_steps, budget=budget, max_step_budget=cap, rule=rule)
        assert budgets == pytest.approx([min(cap, budget / num_steps)] * num_steps, rel=1e-12)


@given(st.lists(st.floats(0.01, 1), min_size=2, max_size=10, unique=True))
def test_later_steps_get_more_of_a_decaying_curve(values):
    curve = sorted(values, reverse=True)
    budgets = step_budgets(curve, len(curve), budget=0.05, max_step_budget=1.0)
    assert budgets == sorted(budgets)
    assert budgets[0] < budgets[-1]


def test_worked_example_with_the_defaults():
    # inverse values 1, 2, 4, 4: weights 1/11, 2/11, 4/11, 4/11 of 5%; the last two are capped at 1%
    budgets = step_budgets([1.0, 0.5, 0.25], 4, rule="paper")
    assert budgets == pytest.approx([0.05 / 11, 0.1 / 11, 0.01, 0.01], rel=1e-6)
    # rule share: four caps are less than B; of 3% the caps leave 1%, which goes to the first two as 1 to 2
    assert step_budgets([1.0, 0.5, 0.25], 4) == [0.01] * 4
    budgets = step_budgets([1.0, 0.5, 0.25], 4, budget=0.03)
    assert budgets == pytest.approx([0.01 / 3, 0.02 / 3, 0.01, 0.01], rel=1e-6)


def test_an_unknown_rule_is_refused():
    with pytest.raises(ValueError, match="must be one of share, paper, got 'other'"):
        step_budgets([1.0], 2, rule="other")


def test_grants_by_hand():
    # weights 1, 1, 1, 1, 1, 100 of 105: the last is cut off at 1%, the others get 5% / 105 each
    curve = [1.0, 1.0, 1.0, 1.0, 1.0, 0.01]
    found = grant(curve, 6, 100_000, rule="paper")
    assert found.granted_frac == pytest.approx((0.01 + 0.25 / 105) / 0.05, rel=1e-5)
    assert (found.smallest, found.equal, found.starves) == (47, 833, True)
    found = grant(curve, 6, 100_000)
    assert found.granted_frac == pytest.approx(1.0)
    assert (found.smallest, found.equal, found.starves) == (800, 833, False)
    even = grant([1.0], 8, 100_000)
    assert (even.num_steps, even.granted_frac, even.smallest, even.equal) == (8, pytest.approx(1.0), 625, 625)
    assert not even.starves and not grant([1.0], 3, 5).starves  # 0 of 0 coordinates


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


weight_lists = st.lists(st.one_of(st.sampled_from([0.0, 1.0, 2.0]), st.floats(0, 1e6)), min_size=1, max_size=20)


@given(weight_lists.filter(any), limits, limits)
def test_what_the_cap_cuts_off_is_poured_out_again(weights, budget, cap):
    shares = shared_budget(weights, budget=budget, max_step_budget=cap)
    assert shares == [float(k) for k in poured(weights, budget, cap)]


@given(positive_weights, limits, limits)
def test_all_of_b_is_dealt_out_whatever_the_weights(weights, budget, cap):
    shares = shared_budget(weights, budget=budget, max_step_budget=cap)
    assert all(0 <= k <= cap for k in shares)
    assert sum(shares) == pytest.approx(min(budget, len(weights) * cap), rel=1e-12)


@given(positive_weights, limits, limits, st.randoms())
def test_shares_follow_the_weights_and_not_their_order(weights, budget, cap, random):
    places = list(range(len(weights)))
    random.shuffle(places)
    shares = shared_budget(weights, budget=budget, max_step_budget=cap)
    moved = shared_budget([weights[place] for place in places], budget=budget, max_step_budget=cap)
    assert moved == [shares[place] for place in places]
    ranked = [share for _, share in sorted(zip(weights, shares, strict=True))]
    assert ranked == sorted(ranked)
    by_weight = dict(zip(weights, shares, strict=True))
    assert shares == [by_weight[weight] for weight in weights]  # equal weights, equal shares


@given(positive_weights, st.integers(0), st.floats(1, 100), limits, limits)
def test_a_larger_weight_gets_no_less(weights, place, factor, budget, cap):
    place %= len(weights)
    raised = [w * factor if i == place else w for i, w in enumerate(weights)]
    if raised[place] == float("inf"):
        return
    before = shared_budget(weights, budget=budget, max_step_budget=cap)
    after = shared_budget(raised, budget=budget, max_step_budget=cap)
    assert after[place] >= before[place]
    assert all(b <= a for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != place)


def test_shared_budgets_by_hand():
    assert shared_budget([1.0, 3.0], budget=0.04, max_step_budget=0.02) == [0.02, 0.02]
    assert shared_budget([1.0, 1.0, 3.0], budget=0.04, max_step_budget=0.02) == [0.01, 0.01, 0.02]
    assert shared_budget([1.0] * 5) == pytest.approx([0.01] * 5)
    assert shared_budget([1.0] * 10) == pytest.approx([0.005] * 10)
    assert shared_budget([0.0, 2.0], max_step_budget=1.0) == [0.0, 0.05]
    assert shared_budget([0.0, 2.0]) == [0.0, 0.01]
    assert shared_budget([]) == []


@pytest.mark.parametrize("bad", [-1e-9, float("nan"), float("inf")])
def test_impossible_weights_are_refused(bad):
    with pytest.raises(ValueError, match="weights must be finite and at least 0"):
        shared_budget([1.0, bad])


def test_weights_without_a_sum_are_refused():
    with pytest.raises(ValueError, match="all 3 weights are 0: there is nothing to share out by"):
        shared_budget([0.0, 0.0, 0.0])
