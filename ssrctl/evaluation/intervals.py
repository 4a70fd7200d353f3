"""Confidence intervals, tests and power for accuracies that come from several samples per problem.

Samples of one problem are not independent of each other, so the problem is the unit everywhere: an evaluation is N
numbers, the fractions of correct samples of its problems, and a comparison the N differences of them. Coverage and error
rates of what is here were simulated from 20 problems up (the slow tests of ``tests/evaluation``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

NUM_PERMUTATIONS = 20_000
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A mean over problems with its interval.

    Attributes:
        value: the mean over problems.
        low, high: ends of the interval.
        confidence: its level.
        num_problems: number of problems.
    """

    value: float
    low: float
    high: float
    confidence: float
    num_problems: int


@dataclass(frozen=True)
class Difference(Estimate):
    """A mean paired difference with its interval and test.

    Attributes:
        p_value: two-sided, of the hypothesis that swapping the two evaluations of a problem changes nothing.
        test: ``mcnemar`` (exact) or ``permutation``.
        detectable: the smallest true difference that a test at this level would find with 80% power.
    """

    p_value: float
    test: str
    detectable: float


def accuracy_interval(per_problem: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return mean accuracy over problems with Wilson's interval for the effective number of problems.

    The effective number is that of independent yes-or-no trials whose mean would have the variance seen between problems,
    p (1 - p) / (s^2 / N); with one sample per problem it is about N. The quantile is that of Student's t with N - 1 degrees
    of freedom where problems differ, since s is estimated. When all have the same accuracy, each counts as one trial.
    (Wilson 1927; effective sample sizes in proportions: Korn and Graubard 1998.)

    Args:
        per_problem: fraction of correct samples of each problem, in [0, 1].
        confidence: level, such as 0.95.

    Raises:
        ValueError: no problems.
    """
    from scipy.stats import norm, t

    mean, count = _mean(per_problem), len(per_problem)
    spread = _variance(per_problem)
    tail = (1 + confidence) / 2
    if spread < 1e-12:
        trials, quantile = float(count), float(norm.ppf(tail))
    else:
        trials, quantile = mean * (1 - mean) / (spread / count), float(t.ppf(tail, count - 1))
    return Estimate(mean, *wilson(mean, trials, quantile), confidence, count)


def mean_interval(per_problem: Sequence[float], confidence: float = 0.95, *, least: float = -math.inf) -> Estimate:
    """Return a mean over problems with Student's t interval, cut off at ``least``, the smallest value that there is.

    Raises:
        ValueError: fewer than two problems.
    """
    from scipy.stats import t

    if len(per_problem) < 2:
        raise ValueError(f"an interval needs two problems or more, got {len(per_problem)}")
    mean, count = _mean(per_problem), len(per_problem)
    half = float(t.ppf((1 + confidence) / 2, count - 1)) * math.sqrt(_variance(per_problem) / count)
    return Estimate(mean, max(least, mean - half), mean + half, confidence, count)


def wilson(share: float, trials: float, quantile: float) -> tuple[float, float]:
    """Return the ends of Wilson's interval for a share in [0, 1] of ``trials`` (> 0), at a quantile of the normal law."""
    square = quantile**2
    middle = (share + square / (2 * trials)) / (1 + square / trials)
    half = quantile / (1 + square / trials) * math.sqrt(share * (1 - share) / trials + square / (4 * trials**2))
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


def paired_difference(
    before: Sequence[float], after: Sequence[float], confidence: float = 0.95, *, num_samples: int = 1
) -> Difference:
    """Return the mean of (after - before) over the same problems, with a t interval and an exact or permutation test.

    Where all problems differ by the same amount, the t interval has no width. Then two problems more are assumed, one that
    gained and one that lost a sample, as Bonett and Price (2012) do it for one sample per problem.

    The test is McNemar's exact one when every problem is simply right or wrong, else a permutation of signs: all of them
    where at most 14 problems differ, otherwise 20,000 with a fixed seed.

    Args:
        before, after: fraction of correct samples of each problem, in the same order.
        confidence: level, such as 0.95.
        num_samples: samples per problem, at least 1; the smallest difference of a problem is 1 / num_samples.

    Raises:
        ValueError: no problems, or lists of different lengths.
    """
    from scipy.stats import t

    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean, count = _mean(differences), len(differences)
    middle, error = mean, math.sqrt(_variance(differences) / count)
    if error < 1e-9:
        more = [*differences, 1 / num_samples, -1 / num_samples]
        middle = _mean(more)
        error = math.sqrt(sum((value - middle) ** 2 for value in more) / len(more) ** 2)
    degrees = max(1, count - 1)
    quantile = float(t.ppf((1 + confidence) / 2, degrees))
    test, p_value = _test(before, after, differences)
    return Difference(
        mean,
        max(-1.0, min(mean, middle - quantile * error)),
        min(1.0, max(mean, middle + quantile * error)),
        confidence,
        count,
        p_value,
        test,
        (quantile + float(t.ppf(POWER, degrees))) * error,
    )


def least_detectable(per_problem: Sequence[float], num_samples: int, confidence: float = 0.95) -> float:
    """Return the smallest difference that two evaluations like this one could show, at 80% power.

    Two evaluations of the same problems with the same number of samples, paired; only the sampling is counted, so the
    truth is at least as large: where one model is better on some problems and worse on others, more is needed. With one
    sample per problem sampling cannot be told from the problems' difficulty, and all variance counts.

    Args:
        per_problem: fraction of correct samples of each problem, in [0, 1].
        num_samples: samples per problem, at least 1.
        confidence: level of the test.
    """
    from scipy.stats import t

    count, mean = len(per_problem), _mean(per_problem)
    if num_samples > 1:
        within = _mean([share * (1 - share) for share in per_problem]) / (num_samples - 1)
    else:
        within = mean * (1 - mean)
    # no sample in which the problems of an evaluation disagree is no proof that none would
    within = max(within, 1 / (4 * num_samples * (count + 1)))
    degrees = max(1, count - 1)
    return float(t.ppf((1 + confidence) / 2, degrees) + t.ppf(POWER, degrees)) * math.sqrt(2 * within / count)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values adjusted for their number (Holm 1979), in the same order: reject those at most the level."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda place: p_values[place])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def _test(before: Sequence[float], after: Sequence[float], differences: Sequence[float]) -> tuple[str, float]:
    """Return (name, p-value) of the paired test."""
    import numpy as np
    from scipy.stats import binomtest, permutation_test

    moved = [value for value in differences if abs(value) > 1e-12]  # the others keep their sign whatever is swapped
    is_binary = {*before, *after} <= {0.0, 1.0}
    name = "mcnemar" if is_binary else "permutation"
    if len(moved) < 2:  # one difference is as large with either sign; scipy's test refuses a single observation
        return name, 1.0
    if is_binary:
        return name, float(binomtest(sum(value > 0 for value in moved), len(moved)).pvalue)
    found = permutation_test(
        (np.asarray(moved, dtype=np.float64),),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        n_resamples=NUM_PERMUTATIONS,
        batch=1000,
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return name, float(found.pvalue)


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("an interval over no problems")
    return math.fsum(values) / len(values)


def _variance(values: Sequence[float]) -> float:
    """Return the unbiased variance; 0 for one value."""
    mean = _mean(values)
    return math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
