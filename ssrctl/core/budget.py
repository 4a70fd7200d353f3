"""The number of coordinates that each step may claim (SSR section 2.3.3)."""

from __future__ import annotations

import math
from collections.abc import Sequence

EPSILON = 1e-8


def profile_at(curve: Sequence[float], num_steps: int) -> list[float]:
    """Return the profile v_1..v_T for ``num_steps`` steps; past its end the last value holds.

    Args:
        curve: mean magnitude mass available at each step, normalised to v_1 = 1; positive.
        num_steps: T, at least 1.
    """
    _check_curve(curve)
    return [curve[min(i, len(curve) - 1)] for i in range(num_steps)]


def step_weights(curve: Sequence[float], num_steps: int) -> list[float]:
    """w_i = (v_i + eps)^-1 / sum_t (v_t + eps)^-1, which sum to 1: the less mass is left, the larger the share."""
    if num_steps == 0:
        return []
    inverse = [1.0 / (v + EPSILON) for v in profile_at(curve, num_steps)]
    total = sum(inverse)
    return [value / total for value in inverse]


def step_budgets(
    curve: Sequence[float], num_steps: int, *, budget: float = 0.05, max_step_budget: float = 0.01
) -> list[float]:
    """k_i = min(k_max, B w_i), fractions of the unprotected coordinates; their sum is at most B."""
    return [min(max_step_budget, budget * weight) for weight in step_weights(curve, num_steps)]


def shared_budget(weights: Sequence[float], *, budget: float = 0.05, max_step_budget: float = 0.01) -> list[float]:
    """Deal out B by weight, at most k_max each: ``min(k_max, B w_i / sum(w))``.

    Raises:
        ValueError: a weight that is negative or not finite, or weights that sum to 0.
    """
    if any(not 0.0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be finite and at least 0, got {list(weights)}")
    total = math.fsum(weights)
    if weights and total == 0:
        raise ValueError(f"all {len(weights)} weights are 0: there is nothing to share out by")
    return [min(max_step_budget, budget * weight / total) for weight in weights]


def coordinates(fraction: float, num_unprotected: int) -> int:
    """Return a budget in coordinates, rounded down so that the sum over steps stays within B."""
    return int(fraction * num_unprotected)


def _check_curve(curve: Sequence[float]) -> None:
    if not curve:
        raise ValueError("a budget profile needs at least one value")
    for position, value in enumerate(curve, start=1):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"v_{position} of a budget profile must be finite and at least 0, got {value}")
