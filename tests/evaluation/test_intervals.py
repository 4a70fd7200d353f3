"""Intervals, tests and power over problems: against formulas, and against the coverage they claim."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm, t

from ssrctl.evaluation import intervals
from ssrctl.evaluation.intervals import Estimate, accuracy_interval, holm, least_detectable, paired_difference

shares = st.lists(st.integers(0, 8).map(lambda right: right / 8), min_size=1, max_size=12)


@settings(max_examples=50)
@given(shares)
def test_an_interval_holds_its_mean_stays_in_range_and_has_a_width(values: list[float]) -> None:
    found = accuracy_interval(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    assert found.num_problems == len(values) and found.confidence == 0.95
    assert 0 <= found.low <= found.value <= found.high <= 1
    assert found.high - found.low > 0.01


@settings(max_examples=50)
@given(shares, st.randoms(use_true_random=False))
def test_a_difference_has_a_width_and_turns_its_sign_with_its_sides(before: list[float], chance: object) -> None:
    after = sorted(before, key=lambda _: chance.random())  # type: ignore[attr-defined]
    there, back = (paired_difference(*pair, num_samples=8) for pair in ((before, after), (after, before)))
    assert there.high - there.low > 0.01
    assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low), abs=1e-12)
    assert there.p_value == pytest.approx(back.p_value, abs=0.02)


def wilson(p: float, count: float, quantile: float) -> tuple[float, float]:
    """Wilson 1927: centre and half-width of the score interval."""
    centre = (p + quantile**2 / (2 * count)) / (1 + quantile**2 / count)
    half = quantile / (1 + quantile**2 / count) * math.sqrt(p * (1 - p) / count + quantile**2 / (4 * count * count))
    return centre - half, centre + half


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize("value", [1.0, 0.0, 0.5])
def test_where_problems_do_not_differ_it_is_wilsons(value: float, confidence: float) -> None:
    found = accuracy_interval([value] * 10, confidence)
    expected = wilson(value, 10, norm.ppf((1 + confidence) / 2))
    assert (found.low, found.high) == pytest.approx(expected, abs=1e-9)


def test_several_samples_count_as_many_problems_as_their_spread_says() -> None:
    values = [0.25, 0.5, 0.75, 0.5]
    # p (1 - p) / (s^2 / 4) with s^2 = 0.125 / 3
    found = accuracy_interval(values)
    assert (found.low, found.high) == pytest.approx(wilson(0.5, 0.25 / (0.125 / 12), t.ppf(0.975, 3)), abs=1e-9)
    single = accuracy_interval([0.0, 1.0, 0.0, 1.0])
    assert found.high - found.low < single.high - single.low


def test_the_difference_is_students() -> None:
    before, after = [0.125, 0.5, 0.25, 0.0], [0.375, 0.75, 0.25, 0.5]
    found = paired_difference(before, after, 0.9)
    # differences 1/4, 1/4, 0, 1/2: mean 1/4, s^2 = 1/24
    error = math.sqrt(1 / 24 / 4)
    assert (found.low, found.high) == pytest.approx((0.25 - t.ppf(0.95, 3) * error, 0.25 + t.ppf(0.95, 3) * error))
    assert found.detectable == pytest.approx((t.ppf(0.95, 3) + t.ppf(0.8, 3)) * error)


def test_three_gained_of_thirty_are_not_significant() -> None:
    found = paired_difference([0.0] * 30, [1.0] * 3 + [0.0] * 27)
    assert (found.test, found.p_value) == ("mcnemar", pytest.approx(0.25))
    assert found.low < 0 < found.high


def test_an_evaluation_compared_with_itself() -> None:
    found = paired_difference([0.5, 0.25], [0.5, 0.25], num_samples=4)
    assert (found.value, found.p_value, found.test) == (0.0, 1.0, "permutation")
    assert found.low < 0 < found.high


def test_the_permutation_test_is_exact_for_few_problems() -> None:
    before, after = [0.25, 0.5, 0.0, 1.0, 0.5], [0.5, 1.0, 0.25, 0.75, 0.5]
    differences = [b - a for a, b in zip(before, after, strict=True) if a != b]
    sums = [
        abs(sum(sign * value for sign, value in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    expected = sum(total >= abs(sum(differences)) - 1e-12 for total in sums) / len(sums)
    assert paired_difference(before, after).p_value == pytest.approx(expected)


def test_a_single_problem_that_moved_is_no_evidence() -> None:
    assert paired_difference([0.5, 0.25, 0.0], [1.0, 0.25, 0.0]).p_value == 1.0


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_no_problems_and_unequal_lists_are_refused() -> None:
    with pytest.raises(ValueError, match="no problems"):
        accuracy_interval([])
    with pytest.raises(ValueError, match="no problems"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="argument 2"):
        paired_difference([0.5], [0.5, 0.5])


# --------------------------------------------------------------------------------------------------
# simulations

DRAWS = 2000
DIFFICULTIES = {"even": (1.0, 1.0), "extreme": (0.5, 0.5), "easy": (4.0, 1.0)}  # beta distributions of p


@pytest.fixture
def few_permutations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulations need no third digit of each p-value."""
    monkeypatch.setattr(intervals, "NUM_PERMUTATIONS", 400)


def covered(truth: float, draws: np.ndarray, interval: Callable[[list[float]], Estimate]) -> float:
    found = [interval(row.tolist()) for row in draws]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


# A count of right problems is discrete, and so is the coverage of any interval of it: 0.93 to 0.98 at 20 to 50 problems.
@pytest.mark.slow
@pytest.mark.parametrize(("num_samples", "tolerance"), [(1, 0.027), (4, 0.018), (8, 0.015)])
@pytest.mark.parametrize("count", [20, 50, 200])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_coverage_of_accuracy(difficulty: str, count: int, num_samples: int, tolerance: float) -> None:
    a, b = DIFFICULTIES[difficulty]
    rng = np.random.default_rng(0)
    draws = rng.binomial(num_samples, rng.beta(a, b, (DRAWS, count))) / num_samples
    assert covered(a / (a + b), draws, accuracy_interval) == pytest.approx(0.95, abs=tolerance)


@pytest.mark.slow
@pytest.mark.usefixtures("few_permutations")
@pytest.mark.parametrize("num_samples", [1, 4, 8])
@pytest.mark.parametrize("count", [20, 50, 200])
@pytest.mark.parametrize("difficulty", DIFFICULTIES)
def test_coverage_and_type_1_error_of_a_difference(difficulty: str, count: int, num_samples: int) -> None:
    rng = np.random.default_rng(1)
    p = rng.beta(*DIFFICULTIES[difficulty], (DRAWS, count))
    before, after = (rng.binomial(num_samples, p) / num_samples for _ in range(2))
    found = [
        paired_difference(*pair, num_samples=num_samples) for pair in zip(before.tolist(), after.tolist(), strict=True)
    ]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(0.95, abs=0.015)
    assert np.mean([one.p_value <= 0.05 for one in found]) <= 0.065


@pytest.mark.slow
@pytest.mark.usefixtures("few_permutations")
@pytest.mark.parametrize(("count", "num_samples"), [(100, 8), (300, 4), (800, 1)])
def test_a_planted_difference_is_found_at_the_stated_power(count: int, num_samples: int) -> None:
    """Half of the problems gain as much as makes the mean difference equal to the detectable one."""
    rng = np.random.default_rng(2)
    p = rng.uniform(0.2, 0.6, count)
    sample = rng.binomial(num_samples, p) / num_samples
    effect = least_detectable(sample.tolist(), num_samples)
    draws = [
        paired_difference(
            (rng.binomial(num_samples, p) / num_samples).tolist(),
            (rng.binomial(num_samples, p + effect) / num_samples).tolist(),
            num_samples=num_samples,
        )
        for _ in range(400)
    ]
    power = np.mean([one.low > 0 for one in draws])
    # with one sample the problems' difficulty counts as noise, which errs on the side of more problems
    assert 0.74 <= power <= (0.86 if num_samples > 1 else 0.97)
