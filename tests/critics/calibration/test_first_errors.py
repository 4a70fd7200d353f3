"""First-error measures: against slow references written from their definitions, and against planted values."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from ssrctl.critics.calibration.first_errors import (
    ALL_RIGHT,
    accuracies,
    best_random_f1,
    best_threshold,
    f1,
    f1_estimate,
    first_error,
    random_f1,
    verdict,
)

score = st.one_of(st.none(), st.integers(-3, 3).map(lambda tens: 10.0 * tens), st.sampled_from([-100.0, 100.0]))


@st.composite
def traces(draw: st.DrawFn) -> tuple[list[list[float | None]], list[int]]:
    scores = draw(st.lists(st.lists(score, min_size=1, max_size=4), min_size=2, max_size=8))
    labels = [draw(st.integers(-1, len(mine) - 1)) for mine in scores]
    return scores, labels


@pytest.mark.parametrize(
    ("scores", "strict", "lenient"),
    [
        ([50, 10, 90], ALL_RIGHT, ALL_RIGHT),
        ([50, -10, -90], 1, 1),
        ([0, 50], ALL_RIGHT, ALL_RIGHT),  # 0 is not below 0
        ([-0.001, 50], 0, 0),
        ([None, -10], None, 1),  # the missing one may have been the first
        ([-10, None], 0, 0),  # no matter what the missing one is
        ([50, None], None, ALL_RIGHT),
        ([None], None, ALL_RIGHT),
        ([], ALL_RIGHT, ALL_RIGHT),
    ],
)
def test_the_first_error(scores: list[float | None], strict: int | None, lenient: int) -> None:
    assert first_error(scores, 0.0) == strict
    assert first_error(scores, 0.0, missing_is_right=True) == lenient


@pytest.mark.parametrize(
    ("label", "prediction", "expected"),
    [
        (2, 2, "right"),
        (-1, -1, "right"),
        (2, 1, "early"),
        (2, 0, "early"),
        (2, 3, "late"),
        (0, -1, "missed"),
        (-1, 0, "false_alarm"),
        (0, None, "undecided"),
        (-1, None, "undecided"),
    ],
)
def test_verdicts(label: int, prediction: int | None, expected: str) -> None:
    assert verdict(label, prediction) == expected


def test_f1_is_the_harmonic_mean() -> None:
    assert f1(0.5, 1.0) == pytest.approx(1 / ((1 / 0.5 + 1 / 1.0) / 2))
    assert f1(0.0, 1.0) == f1(1.0, 0.0) == f1(0.0, 0.0) == 0.0
    assert f1(1.0, 1.0) == 1.0


def test_accuracies_are_per_class() -> None:
    assert accuracies([0, 2, -1, -1, -1], [1, 0, 1, 1, 0.5]) == (0.5, pytest.approx(2.5 / 3))
    assert accuracies([0], [1]) == (1.0, None)
    assert accuracies([-1], [0]) == (None, 0.0)


# --------------------------------------------------------------------------------------------------
# thresholds


def slow_f1(scores: list[list[float | None]], labels: list[int], wrong_below: float) -> float:
    hits: dict[bool, list[bool]] = {True: [], False: []}
    for mine, label in zip(scores, labels, strict=True):
        hits[label == -1].append(first_error(mine, wrong_below) == label)
    a, b = np.mean(hits[True]), np.mean(hits[False])
    return float(2 / (1 / a + 1 / b)) if a and b else 0.0


@given(traces(), st.sampled_from([0.0, 5.0, -30.0, -80.0, 100.0]))
def test_no_threshold_beats_the_best(data: tuple[list[list[float | None]], list[int]], near: float) -> None:
    scores, labels = data
    best = best_threshold(scores, labels, near)
    if {label == -1 for label in labels} != {True, False}:
        assert best is None
        return
    assert best is not None and -100 < best.wrong_below <= 100
    grid = [-99.0, *np.arange(-95, 101, 5.0)]  # scores are whole tens
    found = {wrong_below: slow_f1(scores, labels, wrong_below) for wrong_below in grid}
    assert best.f1 == pytest.approx(max(found.values()), abs=1e-12)
    assert slow_f1(scores, labels, best.wrong_below) == pytest.approx(best.f1, abs=1e-12)
    if slow_f1(scores, labels, near) == pytest.approx(best.f1, abs=1e-12):
        assert best.wrong_below == near


def test_a_planted_threshold_is_found() -> None:
    scores = [[60, 37], [90, 80, 41], [70, 42.5], [95]]
    best = best_threshold(scores, [1, 2, -1, -1], near=0.0)
    assert best is not None and best.f1 == 1.0
    assert best.wrong_below == 42.0  # the middle, 41.75, with the decimals that the gap needs
    low = best_threshold([[-90.0], [-70.0]], [0, -1], near=0.0)
    assert low is not None and (low.wrong_below, low.f1) == (-80.0, 1.0)


def test_weights_count_a_trace_so_many_times() -> None:
    scores, labels = [[10.0], [-10.0], [5.0], [30.0]], [0, 0, -1, -1]
    for weights in ([1, 1, 1, 1], [3, 1, 2, 1], [1, 3, 1, 2]):
        repeated = [index for index, weight in enumerate(weights) for _ in range(weight)]
        slow = best_threshold([scores[k] for k in repeated], [labels[k] for k in repeated], 0.0)
        assert best_threshold(scores, labels, 0.0, weights) == slow


# --------------------------------------------------------------------------------------------------
# chance


@pytest.mark.parametrize("rate", [0.0, 0.13, 0.5, 1.0])
def test_random_f1_is_that_of_all_ways_to_flag_steps(rate: float) -> None:
    labels, lengths = [0, 2, 1, -1, -1], [3, 4, 2, 1, 3]
    expected = []
    for label, length in zip(labels, lengths, strict=True):
        chance = 0.0
        for flags in itertools.product([0, 1], repeat=length):
            found = flags.index(1) if 1 in flags else -1
            chance += (found == label) * np.prod([rate if flag else 1 - rate for flag in flags])
        expected.append(chance)
    a, b = np.mean(expected[:3]), np.mean(expected[3:])
    assert random_f1(labels, lengths, rate) == pytest.approx(2 * a * b / (a + b) if a + b else 0.0, abs=1e-12)


def test_no_random_critic_beats_chance() -> None:
    draw = random.Random(5)
    lengths = [draw.randrange(2, 7) for _ in range(12_000)]
    labels = [draw.randrange(-1, length) if draw.random() < 0.6 else -1 for length in lengths]
    best = best_random_f1(labels, lengths)
    assert best is not None and 0.1 < best < 0.5
    reached = []
    for rate in (0.1, 0.25, 0.5, 0.9):
        scores = [[draw.random() for _ in range(length)] for length in lengths]
        hits = [float(first_error(mine, rate) == label) for mine, label in zip(scores, labels, strict=True)]
        found, expected = f1(*accuracies(labels, hits)), random_f1(labels, lengths, rate)  # type: ignore[arg-type]
        assert found == pytest.approx(expected, abs=0.015)
        reached.append(found)
    assert max(reached) < best + 0.015


def test_chance_needs_both_classes() -> None:
    assert best_random_f1([0, 1], [2, 2]) is None
    assert random_f1([-1], [2], 0.5) is None


# --------------------------------------------------------------------------------------------------
# intervals


def planted(num_problems: int, seed: int, per_problem: int = 1) -> tuple[list[int], list[float], list[int]]:
    """Labels, hits and problems; solutions of a problem share its difficulty."""
    draw = random.Random(seed)
    labels, hits, problems = [], [], []
    for problem in range(num_problems):
        ease = draw.choice([0.4, 0.9])
        for _ in range(per_problem):
            labels.append(draw.choice([-1, 0]))
            hits.append(float(draw.random() < ease))
            problems.append(problem)
    return labels, hits, problems


def test_the_interval_is_that_of_resampled_problems() -> None:
    labels, hits, problems = planted(60, seed=1, per_problem=4)
    found = f1_estimate(labels, hits, problems)
    assert found is not None and found.num_problems == 60
    assert found.value == f1(*accuracies(labels, hits))  # type: ignore[arg-type]
    draw, values = np.random.default_rng(7), []
    members = [[k for k, mine in enumerate(problems) if mine == problem] for problem in range(60)]
    for _ in range(2000):
        rows = [k for problem in draw.integers(0, 60, 60) for k in members[problem]]
        values.append(f1(*accuracies([labels[k] for k in rows], [hits[k] for k in rows])))  # type: ignore[arg-type]
    low, high = np.quantile(values, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.015)  # percentile ends, not bias-corrected
    alone = f1_estimate(labels, hits, range(len(labels)))
    assert alone is not None and found.high - found.low > 1.2 * (alone.high - alone.low)


def test_the_interval_does_not_collapse_where_all_agree() -> None:
    labels = [0] * 30 + [-1] * 30
    found = f1_estimate(labels, [1.0] * 60, range(60))
    assert found is not None and found.value == found.high == 1.0
    assert found.low == pytest.approx(1 / (1 + 1.959964**2 / 30))  # Wilson's lower end at 30 of 30
    half = f1_estimate(labels, [1.0] * 30 + [1.0, 0.0] * 15, range(60))
    assert half is not None and 0.4 < half.low < half.value < half.high < 1
    none = f1_estimate(labels, [0.0] * 60, range(60))
    assert none is not None and none.value == none.low == 0.0 and 0.05 < none.high < 0.2


def test_few_problems_give_a_wide_interval() -> None:
    found = f1_estimate([0, 0, -1, -1], [1.0, 0.0, 1.0, 1.0], "abcd")
    assert found is not None and found.low < 0.3 and found.high > 0.9
    half = f1_estimate([0, 0, -1, -1], [1.0, 0.0, 1.0, 0.0], "abcd")
    low, high = binomtest(1, 2).proportion_ci(0.95, method="wilson")
    assert half is not None and (half.low, half.value, half.high) == pytest.approx((low, 0.5, high))
    assert f1_estimate([0, 0], [1.0, 0.0], "ab") is None
    assert f1_estimate([], [], []) is None


@pytest.mark.slow
def test_the_interval_covers_as_often_as_it_says() -> None:
    labels, hits, _ = planted(20_000, seed=99)
    true = f1(*accuracies(labels, hits))  # type: ignore[arg-type]
    covered = 0
    for seed in range(200):
        found = f1_estimate(*planted(80, seed=seed, per_problem=3))
        assert found is not None
        covered += found.low <= true <= found.high
    assert 0.90 <= covered / 200 <= 0.99  # 0.95, give or take three standard errors
