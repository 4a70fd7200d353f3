"""Advantages from step rewards, at two levels: within the group and within the response (SSR eq. 4-9).

Everything is float64 with population standard deviations. A missing reward (None) is left out of every mean
and its advantage is None. Where the standard deviation is below ``MIN_STD`` there is no signal, and
advantages are exactly 0: dividing round-off by eps = 1e-8 would make noise look like credit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

EPSILON = 1e-8
MIN_STD = 1e-6

Rewards = Sequence[Sequence[float | None]]
Values = list[list[float | None]]


@dataclass(frozen=True)
class Advantages:
    """Advantages of one group.

    Attributes:
        values: one list per response, one value per step; None where the reward is missing.
        num_without_signal: responses whose advantages are all 0 or missing.
    """

    values: Values
    num_without_signal: int


def two_level_advantages(rewards: Rewards, rule: str = "paper") -> Advantages:
    """Advantages of one group of responses to the same question.

    Args:
        rewards: one list per response j, one reward r_ij in [-1, 1] per step i, None where missing.
        rule: ``paper`` is eq. 9; ``group`` is eq. 6 alone; ``hybrid`` is the response's mean of eq. 6 plus
            eq. 9 scaled to the group's typical within-response spread.

    The ``paper`` rule cancels what eq. 6 measured: eq. 9 is the z-score of an affine map of the rewards, so
    it is the z-score of the rewards themselves, and every response's advantages sum to zero, good or bad.

    Raises:
        ValueError: an unknown rule, or a reward that is NaN or infinite.
    """
    if rule not in RULES:
        raise ValueError(f"unknown advantage rule {rule!r}; known: {', '.join(RULES)}")
    for reward in (r for row in rewards for r in row):
        if reward is not None and not math.isfinite(reward):
            raise ValueError(f"a reward must be finite or missing, got {reward}")
    values = RULES[rule](rewards)
    silent = sum(1 for row in values if not any(row))
    return Advantages(values, silent)


def group_normalised(rewards: Rewards) -> Values:
    """Eq. 6: every reward against the mean and std of all step rewards of the group (eq. 4-5)."""
    mean, std = _mean_std([r for row in rewards for r in row if r is not None])
    return [_standardise(row, mean, std) for row in rewards]


def within_response(rewards: Rewards) -> Values:
    """Eq. 9: eq. 6, then against the mean and std of the response itself (eq. 7-8)."""
    out = []
    for row in group_normalised(rewards):
        mean, std = _mean_std([a for a in row if a is not None])
        out.append(_standardise(row, mean, std))
    return out


def hybrid(rewards: Rewards) -> Values:
    """A_ij = mu_j + s * A_ij(eq. 9), with mu_j of eq. 7.

    mu_j says whether the response beat its group, eq. 9 which of its steps did. The scale s makes the
    within-response part as large over the group as it is under eq. 6: s^2 is the mean of sigma_j^2 (eq. 8)
    over the judged steps of responses that have a within-response signal. So a group's hybrid advantages
    have the same second moment as eq. 6's, and each response's steps are spread equally far.
    """
    grouped, within = group_normalised(rewards), within_response(rewards)
    spread = weight = 0.0
    means = []
    for row, inner in zip(grouped, within, strict=True):
        judged = [a for a in row if a is not None]
        mean, std = _mean_std(judged)
        means.append(mean)
        if any(inner):
            spread += std**2 * len(judged)
            weight += len(judged)
    scale = math.sqrt(spread / weight) if weight else 0.0
    return [[None if a is None else mean + scale * a for a in inner] for inner, mean in zip(within, means, strict=True)]


def response_advantages(rewards: Sequence[float | None]) -> list[float | None]:
    """One reward per response, normalised over the group: what GSPO gives to every token of a response."""
    mean, std = _mean_std([r for r in rewards if r is not None])
    return _standardise(rewards, mean, std)


def of_sign(values: Rewards, sign: str, other: float | None = 0.0) -> Values:
    """Replace the advantages that are not of a sign; missing ones stay missing.

    Args:
        values: advantages, one list per response or per step, None where missing.
        sign: a key of ``SIGNS``.
        other: what the advantages of the other sign become; of ``positive`` and ``negative`` also those that are 0.

    Raises:
        ValueError: an unknown sign.
    """
    if sign not in SIGNS:
        raise ValueError(f"unknown sign of advantages {sign!r}; known: {', '.join(SIGNS)}")
    return [[a if a is None or SIGNS[sign](a) else other for a in row] for row in values]


SIGNS: dict[str, Callable[[float], bool]] = {
    "both": lambda advantage: True,
    "positive": lambda advantage: advantage > 0,
    "negative": lambda advantage: advantage < 0,
}

RULES: dict[str, Callable[[Rewards], Values]] = {"paper": within_response, "group": group_normalised, "hybrid": hybrid}


def _mean_std(values: Sequence[float]) -> tuple[float, float]:
    """(mean, population std) with exact summation; (0, 0) of nothing."""
    if not values:
        return 0.0, 0.0
    mean = math.fsum(values) / len(values)
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / len(values))


def _standardise(row: Sequence[float | None], mean: float, std: float) -> list[float | None]:
    if std < MIN_STD:
        return [None if value is None else 0.0 for value in row]
    return [None if value is None else (value - mean) / (std + EPSILON) for value in row]
