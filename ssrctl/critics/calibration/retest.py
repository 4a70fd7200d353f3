"""Statistics of scores: separation of right from wrong, and test-retest noise of repeated judgements."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations


def auc(positive: Sequence[float], negative: Sequence[float]) -> float | None:
    """Return the chance that a value of ``positive`` exceeds one of ``negative``, ties counted half.

    This is Mann-Whitney's U / nm, in [0, 1]; 0.5 means no separation. None when either is empty.
    """
    from scipy.stats import rankdata

    if not positive or not negative:
        return None
    ranks = rankdata([*positive, *negative])
    smallest = len(positive) * (len(positive) + 1) / 2
    return float((ranks[: len(positive)].sum() - smallest) / (len(positive) * len(negative)))


def kappa(called: Sequence[bool], labels: Sequence[bool], weights: Sequence[float]) -> float | None:
    """Return Cohen's kappa (1960), the agreement beyond chance: (p_o - p_e) / (1 - p_e), in [-1, 1].

    Args:
        called, labels: one yes-or-no verdict each per item.
        weights: of each item, positive.

    Returns:
        None without items, or when both give every item the same verdict, so that chance agrees always.
    """
    total = math.fsum(weights)
    if not total:
        return None
    agree = math.fsum(w for a, b, w in zip(called, labels, weights, strict=True) if a == b) / total
    yes = [math.fsum(w for a, w in zip(side, weights, strict=True) if a) / total for side in (called, labels)]
    chance = yes[0] * yes[1] + (1 - yes[0]) * (1 - yes[1])
    return None if chance >= 1 - 1e-12 else (agree - chance) / (1 - chance)


def point_biserial(values: Sequence[float], outcomes: Sequence[bool]) -> float | None:
    """Return Pearson's correlation of ``values`` with a yes-or-no outcome, in [-1, 1]; None if either is constant."""
    from scipy.stats import pointbiserialr

    if len(set(outcomes)) < 2 or max(values) - min(values) <= 1e-9 * max(map(abs, values)):
        return None
    return float(pointbiserialr(outcomes, values).statistic)


@dataclass(frozen=True)
class Noise:
    """Differences between the scores of the same step in several judgements.

    Attributes:
        num_steps: number of steps with at least two scores; the other statistics are over these.
        score_std: standard deviation of one score about its step's mean (root of the mean square within steps,
            n - 1 in the denominator), in points of score.
        mean_abs_difference: mean over steps of the mean |difference| of two scores, in points of score.
        icc: intraclass correlation ICC(1), one-way random effects (Shrout & Fleiss 1979; for unequal numbers of
            scores with the usual effective number): the share of the scores' variance that is between steps. At most
            1; None with a single step or without any variance.
    """

    num_steps: int
    score_std: float
    mean_abs_difference: float
    icc: float | None

    def to_dict(self) -> dict[str, float | None]:
        return asdict(self)


def score_noise(steps: Sequence[Sequence[float]]) -> Noise | None:
    """Return the noise of repeated scores.

    Args:
        steps: the known scores of each step, one per judgement, in points of score; steps with fewer than two are
            left out.

    Returns:
        None when no step has two scores.
    """
    steps = [scores for scores in steps if len(scores) >= 2]
    if not steps:
        return None
    total = sum(len(scores) for scores in steps)
    means = [math.fsum(scores) / len(scores) for scores in steps]
    within = math.fsum((x - mean) ** 2 for scores, mean in zip(steps, means, strict=True) for x in scores)
    within /= total - len(steps)
    differences = [
        math.fsum(abs(a - b) for a, b in combinations(scores, 2)) / math.comb(len(scores), 2) for scores in steps
    ]
    return Noise(
        num_steps=len(steps),
        score_std=math.sqrt(within),
        mean_abs_difference=math.fsum(differences) / len(steps),
        icc=_icc([len(scores) for scores in steps], means, within),
    )


def _icc(counts: Sequence[int], means: Sequence[float], within: float) -> float | None:
    """Return ICC(1) from the steps' numbers of scores, their means and the mean square within steps."""
    if len(means) < 2:
        return None
    total = sum(counts)
    grand = math.fsum(count * mean for count, mean in zip(counts, means, strict=True)) / total
    between = math.fsum(count * (mean - grand) ** 2 for count, mean in zip(counts, means, strict=True))
    between /= len(means) - 1
    effective = (total - sum(count**2 for count in counts) / total) / (len(means) - 1)
    spread = between + (effective - 1) * within
    return (between - within) / spread if spread > 0 else None


def changed_frac(predictions: Sequence[Sequence[int | None]]) -> float | None:
    """Return the chance that two judgements of a trace name different first errors.

    Args:
        predictions: per trace, one per judgement; undecided ones (None) are left out.

    Returns:
        Mean over the traces with two or more decided judgements of the share of pairs that differ; None without any.
    """
    shares = []
    for mine in predictions:
        decided = [prediction for prediction in mine if prediction is not None]
        if len(decided) >= 2:
            pairs = math.comb(len(decided), 2)
            shares.append(sum(a != b for a, b in combinations(decided, 2)) / pairs)
    return sum(shares) / len(shares) if shares else None
