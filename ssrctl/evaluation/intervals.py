"""Confidence intervals for accuracies that come from several samples per problem.

Problems are resampled: samples of one problem are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NUM_RESAMPLES = 10_000


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


def accuracy_interval(per_problem: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return mean accuracy over problems with a BCa bootstrap interval over problems.

    When every problem has the same accuracy, resampling is pointless and the interval is Wilson's, which treats each
    problem as one trial and so errs on the wide side.

    Args:
        per_problem: fraction of correct samples of each problem, in [0, 1].
        confidence: level, such as 0.95.

    Raises:
        ValueError: no problems.
    """
    from scipy.stats import binomtest

    mean = _mean(per_problem)
    if max(per_problem) - min(per_problem) < 1e-12:
        # Wilson's formula holds for fractional counts, scipy's takes whole ones: use the nearest.
        count = len(per_problem)
        wilson = binomtest(round(mean * count), count).proportion_ci(confidence, method="wilson")
        return Estimate(mean, min(mean, wilson.low), max(mean, wilson.high), confidence, count)
    return _bootstrap(per_problem, confidence)


def paired_difference(before: Sequence[float], after: Sequence[float], confidence: float = 0.95) -> Estimate:
    """Return the mean of (after - before) over the same problems, with a BCa bootstrap interval over problems.

    When every problem differs by the same amount, the interval is that single value.

    Args:
        before, after: fraction of correct samples of each problem, in the same order.
        confidence: level, such as 0.95.

    Raises:
        ValueError: no problems, or lists of different lengths.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean = _mean(differences)
    if max(differences) - min(differences) < 1e-12:
        return Estimate(mean, mean, mean, confidence, len(differences))
    return _bootstrap(differences, confidence)


def _bootstrap(values: Sequence[float], confidence: float) -> Estimate:
    import numpy as np
    from scipy.stats import bootstrap

    found = bootstrap(
        (np.asarray(values, dtype=np.float64),),
        np.mean,
        n_resamples=NUM_RESAMPLES,
        confidence_level=confidence,
        method="BCa",
        batch=500,
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(_mean(values), float(found.low), float(found.high), confidence, len(values))


def _mean(values: Sequence[float]) -> float:
    if not values:
        raise ValueError("an interval over no problems")
    return sum(values) / len(values)
