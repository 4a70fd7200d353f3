"""Detection of the first wrong step by its score (ProcessBench, Zheng et al. 2024, arXiv:2412.06559).

A trace has a label, the index of its first wrong step or ``ALL_RIGHT``, and one score per step in [-100, 100],
None where it is missing. The first step whose score is below a threshold is the critic's prediction. Accuracy is
the mean over the traces with an error and over those without one; F1 is the harmonic mean of the two, so that a critic
that calls everything right, or everything wrong, gets 0.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from ssrctl.evaluation.intervals import Estimate, wilson
from ssrctl.io.labelled import ALL_RIGHT

LOWEST, HIGHEST = -100.0, 100.0
NUM_RESAMPLES = 10_000
CONFIDENCE = 0.95  # of the interval of F1
MIN_PROBLEMS = 10  # per class; with fewer, resamples without any trace of a class are no longer negligible

Scores = Sequence[float | None]


def first_error(scores: Scores, wrong_below: float, *, missing_is_right: bool = False) -> int | None:
    """Return the first step whose score is below ``wrong_below``.

    Args:
        scores: one per step; None is a missing score.
        wrong_below: threshold; a score equal to it is not below it.
        missing_is_right: skip missing scores. Otherwise one before the first step called wrong leaves the trace
            undecided, since that step might have been the first.

    Returns:
        The step's index, ``ALL_RIGHT`` when no score is below the threshold, or None when undecided.
    """
    for index, score in enumerate(scores):
        if score is None:
            if not missing_is_right:
                return None
        elif score < wrong_below:
            return index
    return ALL_RIGHT


def verdict(label: int, prediction: int | None) -> str:
    """Classify a prediction by the label.

    Returns:
        ``right`` (it is the label), ``undecided``, ``false_alarm`` (a step of a trace without error), ``missed``
        (no step of one with an error), ``early`` or ``late`` (another step of one with an error).
    """
    if prediction == label:
        return "right"
    if prediction is None:
        return "undecided"
    if label == ALL_RIGHT:
        return "false_alarm"
    if prediction == ALL_RIGHT:
        return "missed"
    return "early" if prediction < label else "late"


def f1(erroneous: float, correct: float) -> float:
    """Return the harmonic mean of the accuracies with and without an error, each in [0, 1]; 0 if both are 0."""
    return 2 * erroneous * correct / (erroneous + correct) if erroneous + correct > 0 else 0.0


def accuracies(labels: Sequence[int], hits: Sequence[float]) -> tuple[float | None, float | None]:
    """Return the mean of ``hits`` over traces with an error and over those without; None for a class without traces.

    Args:
        labels: one per trace.
        hits: whether each prediction is the label; over several judgements, the share of them, in [0, 1].
    """
    erroneous = [hit for label, hit in zip(labels, hits, strict=True) if label != ALL_RIGHT]
    correct = [hit for label, hit in zip(labels, hits, strict=True) if label == ALL_RIGHT]
    return _mean(erroneous), _mean(correct)


def f1_of(labels: Sequence[int], hits: Sequence[float]) -> float | None:
    """Return the F1 of ``accuracies(labels, hits)``; None when a class has no traces."""
    erroneous, correct = accuracies(labels, hits)
    return None if erroneous is None or correct is None else f1(erroneous, correct)


def f1_estimate(
    labels: Sequence[int],
    hits: Sequence[float],
    problems: Sequence[Hashable],
    *,
    seed: int = 0,
) -> Estimate | None:
    """Return F1 with a BCa bootstrap interval over problems, since solutions of one problem are not independent.

    Where resampling is uninformative, because a class has fewer than ``MIN_PROBLEMS`` problems or all its traces agree,
    the interval is from the F1 of the two lower to the F1 of the two upper ends of the accuracies' Wilson intervals,
    each problem counted as one trial; F1 grows with both, so this errs on the wide side.

    Args:
        labels, hits: as in ``accuracies``.
        problems: the problem of each trace.
        seed: seed of the resamples.

    Returns:
        None when there are only traces with, or only traces without an error: F1 is not defined then.
    """
    from scipy.stats import norm

    erroneous, correct = accuracies(labels, hits)
    if erroneous is None or correct is None:
        return None
    table = _problem_table(labels, hits, problems)
    counts = (table[:, [1, 3]] > 0).sum(axis=0)
    value = f1(erroneous, correct)
    if min(counts) < MIN_PROBLEMS or any(_all_agree(table[:, [k, k + 1]]) for k in (0, 2)):
        quantile = float(norm.ppf((1 + CONFIDENCE) / 2))
        shares = zip((erroneous, correct), counts.tolist(), strict=True)
        ends = [wilson(round(share * count) / count, count, quantile) for share, count in shares]
        low, high = f1(ends[0][0], ends[1][0]), f1(ends[0][1], ends[1][1])
    else:
        low, high = _bootstrap_f1(table, seed)
    return Estimate(value, low, high, CONFIDENCE, len(table))


def _problem_table(labels: Sequence[int], hits: Sequence[float], problems: Sequence[Hashable]) -> np.ndarray:
    """Return float64 [problems, 4]: hits and traces with an error, hits and traces without."""
    rows: dict[Hashable, list[float]] = {}
    for label, hit, problem in zip(labels, hits, problems, strict=True):
        row = rows.setdefault(problem, [0.0] * 4)
        first = 2 if label == ALL_RIGHT else 0
        row[first] += hit
        row[first + 1] += 1
    return np.array(list(rows.values()), dtype=np.float64)


def _all_agree(hits_and_traces: np.ndarray) -> bool:
    """Return whether every problem of a class has the same accuracy."""
    known = hits_and_traces[hits_and_traces[:, 1] > 0]
    return bool(np.ptp(known[:, 0] / known[:, 1]) < 1e-12)


def _bootstrap_f1(table: np.ndarray, seed: int) -> tuple[float, float]:
    from scipy.stats import bootstrap

    def statistic(*columns: np.ndarray, axis: int = -1) -> np.ndarray:
        hits_e, num_e, hits_c, num_c = (column.sum(axis=axis) for column in columns)
        # Very rarely a resample has no trace of a class; its accuracy is then 0.
        share_e, share_c = hits_e / np.maximum(num_e, 1), hits_c / np.maximum(num_c, 1)
        found: np.ndarray = 2 * share_e * share_c / np.maximum(share_e + share_c, np.finfo(np.float64).tiny)
        return found

    found = bootstrap(
        tuple(table.T),
        statistic,
        paired=True,
        n_resamples=NUM_RESAMPLES,
        confidence_level=CONFIDENCE,
        method="BCa",
        batch=250,
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


# --------------------------------------------------------------------------------------------------
# baselines


def random_f1(labels: Sequence[int], lengths: Sequence[int], rate: float) -> float | None:
    """Return F1 of the expected accuracies of a critic that calls each step wrong with probability ``rate``.

    A trace with label k is hit with probability (1 - rate)^k rate, one without error and with T steps with
    (1 - rate)^T.

    Args:
        labels: one per trace.
        lengths: steps per trace.
        rate: in [0, 1].

    Returns:
        None when a class has no traces.
    """
    expected = [
        (1 - rate) ** length if label == ALL_RIGHT else (1 - rate) ** label * rate
        for label, length in zip(labels, lengths, strict=True)
    ]
    return f1_of(labels, expected)


def best_random_f1(labels: Sequence[int], lengths: Sequence[int]) -> float | None:
    """Return the maximum of ``random_f1`` over rates on a grid of 0.005.

    It depends only on the traces, so it is the same baseline for every critic. Constant critics get 0.
    """
    found = [random_f1(labels, lengths, rate / 200) for rate in range(201)]
    known = [value for value in found if value is not None]
    return max(known) if known else None


@dataclass(frozen=True)
class Threshold:
    """A threshold with its F1 on the traces that it was chosen on."""

    wrong_below: float
    f1: float


def best_threshold(
    scores: Sequence[Scores], labels: Sequence[int], near: float, weights: Sequence[float] | None = None
) -> Threshold | None:
    """Return the threshold in (-100, 100] with the highest F1 on these traces.

    Each trace is hit by the thresholds of one interval, so all thresholds are tried at the cost of one sort. Among
    equally good thresholds the nearest to ``near`` wins: ``near`` itself, or about the middle of a gap between scores,
    with as few decimals as the gap allows.

    Args:
        scores: one list per trace.
        labels: one per trace.
        near: the threshold in use.
        weights: of each trace in the accuracies, positive; all 1 by default.

    Returns:
        None when a class has no traces.
    """
    classes = np.array([int(label == ALL_RIGHT) for label in labels])
    shares = np.ones(len(labels)) if weights is None else np.asarray(weights, dtype=np.float64)
    totals = np.bincount(classes, weights=shares, minlength=2)
    if not totals.all():
        return None
    ranges = [_right_between(mine, label) for mine, label in zip(scores, labels, strict=True)]
    inside = [None if ends is None else np.clip(ends, LOWEST, HIGHEST) for ends in ranges]
    edges = np.unique([LOWEST, HIGHEST, *(end for ends in inside if ends is not None for end in ends)])
    # changes[c, k]: weight of the traces of class c whose interval begins, less those whose ends, at edges[k]
    changes = np.zeros((2, len(edges)))
    for ends, kind, weight in zip(inside, classes, shares, strict=True):
        if ends is not None:
            changes[kind, np.searchsorted(edges, ends[0])] += weight
            changes[kind, np.searchsorted(edges, ends[1])] -= weight
    erroneous, correct = np.cumsum(changes, axis=1) / totals[:, None]  # for thresholds in (edges[k], edges[k + 1]]
    found = []
    for place, (low, high) in enumerate(pairwise(edges.tolist())):
        chosen = near if low < near <= high else _between(low, high)
        found.append(Threshold(chosen, f1(max(0.0, float(erroneous[place])), max(0.0, float(correct[place])))))
    # Rounding errors in sums of weights must not decide between equals.
    return max(found, key=lambda threshold: (round(threshold.f1, 9), -abs(threshold.wrong_below - near)))


def _between(low: float, high: float) -> float:
    """Return about the middle of (low, high], with few decimals where there is room."""
    middle = (low + high) / 2
    rounded = (round(middle, decimals) for decimals in range(4))
    return next((value for value in rounded if low < value <= high), middle)


def _right_between(scores: Scores, label: int) -> tuple[float, float] | None:
    """Return the interval (low, high] of thresholds for which ``first_error`` gives ``label``; None if empty."""
    before = scores if label == ALL_RIGHT else scores[: label + 1]
    known = [score for score in before if score is not None]
    if len(known) < len(before):
        return None
    low = -math.inf if label == ALL_RIGHT else known.pop()
    high = min(known, default=math.inf)
    return (low, high) if low < high else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
