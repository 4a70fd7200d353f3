"""Two-level advantages, compared with SSR eq. 4-9 in numpy."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from reference import advantages as reference

from ssrctl.core.advantages import of_sign, response_advantages, two_level_advantages

scores = st.integers(-100, 100).map(lambda score: score / 100)
rewards = st.lists(st.lists(st.none() | scores, max_size=6), min_size=1, max_size=8)
known = st.lists(st.lists(scores, min_size=1, max_size=6), min_size=2, max_size=6)


def as_arrays(values):
    return [np.array([np.nan if a is None else a for a in row], dtype=np.float64) for row in values]


def agree(found, expected, tolerance=1e-12):
    # float64 on both sides: sums of at most 48 numbers of order 1, divided by deviations of at least 0.002
    for ours, theirs in zip(as_arrays(found), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)


@given(rewards)
def test_group_is_eq_6(given_rewards):
    agree(two_level_advantages(given_rewards, "group").values, reference.group(given_rewards))


@given(rewards)
def test_paper_is_eq_9(given_rewards):
    agree(two_level_advantages(given_rewards).values, reference.paper(given_rewards), 1e-9)


def test_a_worked_example():
    """Rewards 1, 0 and 0, missing: mean 1/3, std sqrt(2)/3."""
    made = two_level_advantages([[1.0, 0.0], [0.0, None]], "group")
    expected = [[math.sqrt(2), -1 / math.sqrt(2)], [-1 / math.sqrt(2), None]]
    agree(made.values, as_arrays(expected), 1e-7)  # eps of 1e-8 over a deviation of 0.47
    assert made.num_without_signal == 0
    paper = two_level_advantages([[1.0, 0.0], [0.0, None]], "paper")
    agree(paper.values, as_arrays([[1.0, -1.0], [0.0, None]]), 1e-7)
    assert paper.num_without_signal == 1


@given(rewards)
def test_paper_sums_to_zero_within_every_response(given_rewards):
    for row in two_level_advantages(given_rewards, "paper").values:
        # at most 6 z-scores of at most 2.3, each off by a few units in the last place of a mean over 0.002
        assert abs(math.fsum(a for a in row if a is not None)) < 1e-9


@given(known)
def test_group_sums_to_zero_over_the_group_and_has_unit_variance(given_rewards):
    values = [a for row in two_level_advantages(given_rewards, "group").values for a in row]
    assert abs(math.fsum(values)) < 1e-9
    if any(values):
        # (std / (std + 1e-8))**2 with std of at least 0.001
        assert np.mean(np.square(values)) == pytest.approx(1.0, abs=1e-4)


@given(rewards)
def test_hybrid_has_the_second_moment_of_eq_6(given_rewards):
    hybrid = np.concatenate(as_arrays(two_level_advantages(given_rewards, "hybrid").values))
    group = np.concatenate(as_arrays(two_level_advantages(given_rewards, "group").values))
    # eq. 9 divides by sigma + 1e-8, with sigma of at least 1e-3
    assert np.nansum(hybrid**2) == pytest.approx(np.nansum(group**2), rel=1e-4, abs=1e-12)


@given(rewards)
def test_hybrid_is_the_response_mean_plus_scaled_eq_9(given_rewards):
    hybrid = as_arrays(two_level_advantages(given_rewards, "hybrid").values)
    group = as_arrays(two_level_advantages(given_rewards, "group").values)
    paper = as_arrays(two_level_advantages(given_rewards, "paper").values)
    scales = []
    for mixed, standing, inner in zip(hybrid, group, paper, strict=True):
        if not np.isfinite(standing).any():
            continue
        mean = np.nanmean(standing)
        assert np.nanmean(mixed) == pytest.approx(mean, abs=1e-9)
        scales += [d / w for d, w in zip(mixed - mean, inner, strict=True) if np.isfinite(w) and abs(w) > 1e-3]
    if scales:
        assert max(scales) - min(scales) < 1e-6  # one scale for the whole group
        assert min(scales) > 0


@given(known, st.floats(0.1, 10), st.floats(-5, 5))
def test_affine_maps_of_the_rewards_change_nothing(given_rewards, factor, shift):
    flat = [r for row in given_rewards for r in row]
    assume(np.std(flat) > 0.01)
    mapped = [[factor * r + shift for r in row] for row in given_rewards]
    for rule in ("paper", "group", "hybrid"):
        before, after = (two_level_advantages(r, rule).values for r in (given_rewards, mapped))
        # eps of 1e-8 over deviations from 1e-3 on
        agree(after, as_arrays(before), 1e-3)


@pytest.mark.parametrize("rule", ["paper", "group", "hybrid"])
@pytest.mark.parametrize("value", [0.1, 0.85, -1.0, 1 / 3])
def test_equal_scores_give_exactly_zero(rule, value):
    made = two_level_advantages([[value] * 7, [value] * 3, [value, None], []], rule)
    assert made.values == [[0.0] * 7, [0.0] * 3, [0.0, None], []]
    assert made.num_without_signal == 4


@pytest.mark.parametrize("rule", ["paper", "hybrid"])
def test_a_response_of_equal_scores_has_no_signal_within(rule):
    values = two_level_advantages([[0.3, 0.3, 0.3], [0.3], [1.0, -1.0, 0.1]], rule).values
    assert len(set(values[0])) == 1
    assert values[0][0] == pytest.approx(values[1][0]), "one scored step has no signal within either"
    assert (values[0][0] == 0.0) == (rule == "paper")


def test_round_off_is_no_signal():
    """0.1 + 0.2 is not 0.3 in floating point; their difference over eps must not become an advantage."""
    made = two_level_advantages([[0.1 + 0.2, 0.3], [0.3, 0.3]], "group")
    assert made.values == [[0.0, 0.0], [0.0, 0.0]]


def test_a_missing_score_leaves_the_others_as_they_are():
    without = two_level_advantages([[1.0, 0.5], [0.0]], "group").values
    with_missing = two_level_advantages([[1.0, None, 0.5], [None, 0.0], [None]], "group").values
    assert with_missing == [[without[0][0], None, without[0][1]], [None, without[1][0]], [None]]


@pytest.mark.parametrize("rule", ["paper", "group", "hybrid"])
def test_nothing_to_judge(rule):
    assert two_level_advantages([], rule).values == []
    made = two_level_advantages([[], [None, None]], rule)
    assert made.values == [[], [None, None]]
    assert made.num_without_signal == 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rewards_must_be_finite(bad):
    with pytest.raises(ValueError, match="finite or missing"):
        two_level_advantages([[0.0, bad]])


def test_rules_are_known_by_name():
    with pytest.raises(ValueError, match="'mean'; known: paper, group, hybrid"):
        two_level_advantages([[0.0]], "mean")


def test_one_reward_per_response():
    values = response_advantages([1.0, None, -1.0, 1.0])
    deviation = math.sqrt(8 / 9)  # mean 1/3
    assert values[1] is None
    assert values[0] == values[3] == pytest.approx((2 / 3) / deviation, abs=1e-7)
    assert values[2] == pytest.approx((-4 / 3) / deviation, abs=1e-7)
    assert response_advantages([0.4, 0.4]) == [0.0, 0.0]
    assert response_advantages([]) == []


def test_the_advantages_of_a_sign():
    values = [[0.5, None, -1.0], [0.0, 2.0]]
    assert of_sign(values, "both") == values
    assert of_sign(values, "positive") == [[0.5, None, 0.0], [0.0, 2.0]]
    assert of_sign(values, "negative") == [[0.0, None, -1.0], [0.0, 0.0]]
    assert of_sign(values, "positive", other=None) == [[0.5, None, None], [None, 2.0]]
    with pytest.raises(ValueError, match="unknown sign of advantages 'up'"):
        of_sign(values, "up")
