"""Intervals over problems: against formulas, and against the coverage they claim."""

from __future__ import annotations

import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

from ssrctl.evaluation.intervals import accuracy_interval, paired_difference

shares = st.lists(st.integers(0, 8).map(lambda right: right / 8), min_size=1, max_size=12)


@settings(max_examples=25)
@given(shares)
def test_an_interval_holds_its_mean_and_stays_in_range(values: list[float]) -> None:
    found = accuracy_interval(values)
    assert found.value == pytest.approx(np.mean(values), abs=1e-12)
    assert found.num_problems == len(values) and found.confidence == 0.95
    assert 0 <= found.low <= found.value <= found.high <= 1


def wilson(right: int, count: int, confidence: float) -> tuple[float, float]:
    """Wilson 1927: centre and half-width of the score interval."""
    z, p = norm.ppf((1 + confidence) / 2), right / count
    centre = (p + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return centre - half, centre + half


@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.99])
@pytest.mark.parametrize(("value", "right"), [(1.0, 10), (0.0, 0), (0.5, 5)])
def test_where_problems_do_not_differ_it_is_wilsons(value: float, right: int, confidence: float) -> None:
    found = accuracy_interval([value] * 10, confidence)
    assert (found.low, found.high) == pytest.approx(wilson(right, 10, confidence), abs=1e-9)
    assert found.low < found.high, "ten problems alike do not prove certainty"


def test_one_problem_says_little() -> None:
    found = accuracy_interval([0.25])
    assert found.low <= 0.25 <= found.high and found.high - found.low > 0.5


def bca(values: np.ndarray, confidence: float, resamples: int) -> tuple[float, float]:
    """Efron 1987 by hand: bias correction, jackknife acceleration, then shifted percentiles."""
    rng = np.random.default_rng(7)
    means = np.array([values[rng.integers(0, len(values), len(values))].mean() for _ in range(resamples)])
    below = (np.sum(means < values.mean()) + 0.5 * np.sum(means == values.mean())) / resamples
    z0 = norm.ppf(below)
    left_out = np.array([np.delete(values, i).mean() for i in range(len(values))])
    gap = left_out.mean() - left_out
    acceleration = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    ends = []
    for tail in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = z0 + norm.ppf(tail)
        ends.append(np.quantile(means, norm.cdf(z0 + z / (1 - acceleration * z))))
    return ends[0], ends[1]


def test_it_is_the_bca_bootstrap_over_problems() -> None:
    values = np.random.default_rng(1).beta(0.6, 2.0, size=40)
    found = accuracy_interval(values.tolist(), 0.9)
    # Two sets of 10,000 resamples: the ends wander by about 1% of the standard error over sqrt(tail).
    tolerance = 0.1 * values.std() / math.sqrt(len(values))
    assert (found.low, found.high) == pytest.approx(bca(values, 0.9, 10_000), abs=tolerance)
    assert found.high - found.value > found.value - found.low, "the skew moves both ends up"


def test_equal_calls_give_equal_intervals() -> None:
    values = [0.0, 0.125, 0.5, 1.0, 0.875]
    assert accuracy_interval(values) == accuracy_interval(values)


def test_more_confidence_is_wider_and_more_problems_are_narrower() -> None:
    values = [0.0, 0.25, 0.5, 1.0] * 5

    def width(estimate: object) -> float:
        return estimate.high - estimate.low  # type: ignore[attr-defined]

    assert width(accuracy_interval(values, 0.9)) < width(accuracy_interval(values, 0.99))
    assert width(accuracy_interval(values * 4)) == pytest.approx(width(accuracy_interval(values)) / 2, rel=0.1)


def test_a_difference_is_after_minus_before_per_problem() -> None:
    before, after = [0.0, 0.5, 0.25, 0.75], [0.25, 1.0, 0.25, 1.0]
    found = paired_difference(before, after)
    assert found.value == pytest.approx(0.25) and found.num_problems == 4
    assert found.low < found.value < found.high
    back = paired_difference(after, before)
    assert back.value == pytest.approx(-0.25)
    # resamples are the same, so the mirror image is exact up to the interpolation of percentiles
    assert (-back.high, -back.low) == pytest.approx((found.low, found.high), abs=1e-2)


def test_pairing_takes_out_what_problems_share() -> None:
    rng = np.random.default_rng(3)
    before = rng.uniform(0, 0.9, 50)
    after = before + 0.05 + 0.01 * rng.standard_normal(50)
    paired = paired_difference(before.tolist(), after.tolist())
    alone = accuracy_interval(before.tolist())
    assert paired.low > 0.04
    assert paired.high - paired.low < 0.1 * (alone.high - alone.low)


def test_the_same_difference_everywhere_is_a_point() -> None:
    found = paired_difference([0.125, 0.5, 0.25], [0.375, 0.75, 0.5], 0.9)
    assert (found.value, found.low, found.high, found.confidence) == (0.25, 0.25, 0.25, 0.9)


def test_record() -> None:
    assert asdict(accuracy_interval([0.5, 0.5])).keys() == {"value", "low", "high", "confidence", "num_problems"}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="no problems"):
        accuracy_interval([])
    with pytest.raises(ValueError, match="no problems"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="zip"):
        paired_difference([0.5], [0.5, 0.5])
