"""Separation and noise: against pairs counted one by one, other formulas for the same, and planted noise."""

from __future__ import annotations

import itertools
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.critics.calibration.retest import auc, changed_frac, kappa, point_biserial, score_noise

values = st.lists(st.integers(-5, 5).map(float), max_size=8)


@given(values, values)
def test_auc_counts_pairs(positive: list[float], negative: list[float]) -> None:
    pairs = [(a > b) + 0.5 * (a == b) for a in positive for b in negative]
    assert auc(positive, negative) == (pytest.approx(np.mean(pairs)) if pairs else None)


@given(st.lists(st.tuples(st.integers(-5, 5), st.booleans()), max_size=12))
def test_point_biserial_is_pearson(pairs: list[tuple[int, bool]]) -> None:
    column, outcomes = [float(value) for value, _ in pairs], [right for _, right in pairs]
    found = point_biserial(column, outcomes)
    if len(set(column)) < 2 or len(set(outcomes)) < 2:
        assert found is None
    else:
        assert found == pytest.approx(np.corrcoef(column, outcomes)[0, 1], abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(1, 3)), max_size=12))
def test_kappa_is_that_of_the_confusion_table(items: list[tuple[bool, bool, int]]) -> None:
    """A weight of 2 is an item that comes twice; the reference is the product form of the table's cells."""
    pairs = [(a, b) for a, b, weight in items for _ in range(weight)]
    tp, fp, fn, tn = (pairs.count(cell) for cell in ((True, True), (True, False), (False, True), (False, False)))
    below = (tp + fp) * (fp + tn) + (tp + fn) * (fn + tn)
    expected = 2 * (tp * tn - fn * fp) / below if below else None
    assert kappa(*map(list, zip(*items, strict=True)) if items else ([], [], [])) == pytest.approx(expected)


def test_values_equal_but_for_rounding_have_no_correlation() -> None:
    assert point_biserial([0.1 + 0.2, 0.3, 0.3], [True, False, True]) is None


def test_noise_of_equal_numbers_of_scores() -> None:
    """Against the textbook's table of squares, made with numpy."""
    scores = np.random.default_rng(3).normal(size=(12, 4)) * 9 + np.arange(12)[:, None]
    found = score_noise(scores.tolist())
    assert found is not None and found.num_steps == 12
    between = 4 * scores.mean(axis=1).var(ddof=1)
    within = scores.var(axis=1, ddof=1).mean()
    assert found.score_std == pytest.approx(within**0.5)
    assert found.icc == pytest.approx((between - within) / (between + 3 * within))
    pairs = [abs(row[a] - row[b]) for row in scores for a, b in itertools.combinations(range(4), 2)]
    assert found.mean_abs_difference == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(("of_steps", "of_scores"), [(40.0, 10.0), (10.0, 30.0), (0.0, 20.0)])
def test_planted_noise_is_found_whatever_is_missing(of_steps: float, of_scores: float) -> None:
    draw = random.Random(1)
    steps = []
    for _ in range(6000):
        centre = draw.gauss(0, of_steps)
        steps.append([draw.gauss(centre, of_scores) for _ in range(draw.choice([0, 1, 2, 3, 5]))])
    found = score_noise(steps)
    assert found is not None and found.num_steps == sum(len(scores) > 1 for scores in steps)
    assert found.score_std == pytest.approx(of_scores, rel=0.03)
    assert found.mean_abs_difference == pytest.approx(2 * of_scores / np.pi**0.5, rel=0.03)
    assert found.icc == pytest.approx(of_steps**2 / (of_steps**2 + of_scores**2), abs=0.03)


def test_noise_of_little() -> None:
    assert score_noise([]) is None
    assert score_noise([[1.0], []]) is None
    same = score_noise([[5.0, 5.0], [-5.0, -5.0]])
    assert same is not None and (same.score_std, same.mean_abs_difference, same.icc) == (0.0, 0.0, 1.0)
    flat = score_noise([[5.0, 5.0], [5.0, 5.0]])
    assert flat is not None and flat.icc is None
    one = score_noise([[1.0, 4.0]])
    assert one is not None and one.icc is None
    assert one.score_std == pytest.approx(statistics.stdev([1.0, 4.0]))


def test_changed_first_errors() -> None:
    assert changed_frac([[1, 1], [1, 2]]) == 0.5
    assert changed_frac([[1, 1, 2]]) == pytest.approx(2 / 3)
    assert changed_frac([[1, None], [None, None], [3]]) is None
    assert changed_frac([[1, None, -1], [2, 2, 2]]) == 0.5
    assert changed_frac([]) is None
