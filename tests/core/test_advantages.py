"""Two-level advantages against SSR eq. 4-9 in numpy."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference import advantages as reference

from ssrctl.core.advantages import MIN_STD, response_advantages, two_level_advantages

# Scores are whole numbers, so standard deviations are 0 or far above the threshold.
scores = st.one_of(st.none(), st.integers(-100, 100).map(lambda r: r / 100))
groups = st.lists(st.lists(scores, max_size=7), min_size=1, max_size=6)
full_groups = st.lists(
    st.lists(st.integers(-100, 100).map(lambda r: r / 100), min_size=2, max_size=7).filter(lambda r: len(set(r)) > 1),
    min_size=1,
    max_size=6,
)
RULES = ["paper", "group", "hybrid"]


def compare(values: list[list[float | None]], expected: np.ndarray) -> None:
    # numpy sums in another order, and eq. 9 divides by a std of about 0.01 at least: 1e-9 is a thousand ulps.
    np.testing.assert_allclose(reference.padded(values), expected, rtol=1e-9, atol=1e-9)


@given(groups)
def test_paper_and_group_equal_the_equations(rewards: list[list[float | None]]) -> None:
    dense = reference.padded(rewards)
    compare(two_level_advantages(rewards, "group").values, reference.group(dense))
    compare(two_level_advantages(rewards, "paper").values, reference.final(dense))


@pytest.mark.parametrize("rule", RULES)
@given(groups)
def test_missing_stays_missing(rule: str, rewards: list[list[float | None]]) -> None:
    found = two_level_advantages(rewards, rule)
    assert [[a is None for a in row] for row in found.values] == [[r is None for r in row] for row in rewards]
    assert all(math.isfinite(a) for row in found.values for a in row if a is not None)
    silent = sum(all(a is None or a == 0 for a in row) for row in found.values)
    assert found.num_without_signal == silent


@given(groups)
def test_paper_rule_sums_to_zero_in_every_response(rewards: list[list[float | None]]) -> None:
    for row in two_level_advantages(rewards, "paper").values:
        assert sum(a for a in row if a is not None) == pytest.approx(0, abs=1e-9)


@given(full_groups, st.floats(0.1, 10), st.floats(-5, 5))
def test_paper_rule_forgets_the_group(rewards: list[list[float]], scale: float, shift: float) -> None:
    """A z-score of an affine map is the same z-score: each response alone gives the same advantages."""
    together = two_level_advantages(rewards, "paper").values
    for row, found in zip(rewards, together, strict=True):
        alone = two_level_advantages([[scale * r + shift for r in row]], "paper").values[0]
        # eps = 1e-8 over stds of 0.005 and up, in two places
        assert found == pytest.approx(alone, abs=2e-5)


def test_group_rule_rewards_the_better_response() -> None:
    good, bad = two_level_advantages([[0.9, 0.8], [-0.5, -0.6]], "group").values
    assert min(x for x in good if x is not None) > 0 > max(x for x in bad if x is not None)
    assert good[0] > good[1] and bad[0] > bad[1]  # type: ignore[operator]


@given(full_groups)
def test_hybrid_is_the_mean_plus_a_common_scale_times_eq_9(rewards: list[list[float]]) -> None:
    dense = reference.padded(rewards)
    eq6, eq9 = reference.group(dense), reference.final(dense)
    sigma_squared = np.nanvar(eq6, axis=1)
    lengths = np.array([len(row) for row in rewards])
    scale = math.sqrt((sigma_squared * lengths).sum() / lengths.sum())
    found = two_level_advantages(rewards, "hybrid").values
    compare(found, np.nanmean(eq6, axis=1, keepdims=True) + scale * eq9)
    # The second moment over the group is that of eq. 6; eps = 1e-8 over stds of 0.005 and up keeps them apart.
    assert np.nanmean(reference.padded(found) ** 2) == pytest.approx(np.nanmean(eq6**2), rel=1e-5)


def test_hybrid_where_some_responses_have_no_signal_within() -> None:
    rewards = [[0.5, 0.5, 0.5], [1.0, None, 0.0], [0.3], [None, None], []]
    found = two_level_advantages(rewards, "hybrid")
    eq6 = reference.group(reference.padded(rewards))
    mean, within = eq6[1, [0, 2]].mean(), eq6[1, [0, 2]].std()
    assert found.values[0] == pytest.approx([eq6[0, 0]] * 3)
    assert found.values[1] == [pytest.approx(mean + within, rel=1e-6), None, pytest.approx(mean - within, rel=1e-6)]
    assert found.values[2] == [pytest.approx(eq6[2, 0])]
    assert found.values[3:] == [[None, None], []]
    assert found.num_without_signal == 2


@pytest.mark.parametrize("rule", RULES)
@given(st.floats(-1, 1), st.lists(st.integers(0, 9), min_size=1, max_size=8))
def test_equal_scores_give_exactly_zero(rule: str, score: float, lengths: list[int]) -> None:
    found = two_level_advantages([[score] * n for n in lengths], rule)
    assert found.values == [[0.0] * n for n in lengths]
    assert found.num_without_signal == len(lengths)


def test_equal_scores_within_a_response_give_exactly_zero_among_others() -> None:
    draw = random.Random(0)
    for _ in range(200):
        score, others = draw.uniform(-1, 1), [draw.uniform(-1, 1) for _ in range(5)]
        assert two_level_advantages([[score] * draw.randint(1, 9), others], "paper").values[0][0] == 0.0


def test_the_threshold_of_no_signal() -> None:
    # two values at +-d around 0.5 have the population std d
    assert two_level_advantages([[0.5 - 0.9 * MIN_STD, 0.5 + 0.9 * MIN_STD]], "group").values == [[0.0, 0.0]]
    low, high = two_level_advantages([[0.5 - 1.1 * MIN_STD, 0.5 + 1.1 * MIN_STD]], "group").values[0]
    # 1.1e-6 / (1.1e-6 + 1e-8)
    assert (low, high) == (pytest.approx(-110 / 111, rel=1e-6), pytest.approx(110 / 111, rel=1e-6))


def test_response_advantages_are_a_z_score_with_population_std() -> None:
    assert response_advantages([1.0, None, -1.0, 1.0, -1.0]) == [
        None if r is None else pytest.approx(r / (1 + 1e-8), rel=1e-12) for r in (1.0, None, -1.0, 1.0, -1.0)
    ]
    assert response_advantages([0.3, 0.3, None]) == [0.0, 0.0, None]
    assert response_advantages([]) == [] and response_advantages([None]) == [None]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="unknown advantage rule 'both'"):
        two_level_advantages([[1.0]], "both")
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite or missing"):
            two_level_advantages([[1.0, bad]], "group")


def test_no_responses() -> None:
    assert two_level_advantages([], "paper").values == []
