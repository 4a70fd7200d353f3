"""The number of coordinates that each step may claim (SSR section 2.3.3)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from fractions import Fraction

EPSILON = 1e-8
RULES = ("share", "paper")
SHOWN_STEPS = (5, 8, 20)  # numbers of steps for which plans show what is granted


def profile_at(curve: Sequence[float], num_steps: int) -> list[float]:
    """Return the profile v_1..v_T for ``num_steps`` steps; past its end the last value holds.

    Args:
        curve: the gradient left for each step, relative to that of step 1 (v_1 = 1); at least 0.
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
    curve: Sequence[float],
    num_steps: int,
    *,
    budget: float = 0.05,
    max_step_budget: float = 0.01,
    rule: str = "share",
    silent: Collection[int] = (),
) -> list[float]:
    """Return k_1..k_T, fractions of the unprotected coordinates whose sum is at most B, up to float rounding.

    Args:
        curve: v_1.., as measured for the rule.
        num_steps: T.
        budget: B.
        max_step_budget: the cap k_max.
        rule: ``share`` deals out again what the cap cuts off (``shared_budget``), so that all of B is granted when
            T k_max >= B; ``paper`` is k_i = min(k_max, B w_i), and what the cap cuts off is lost.
        silent: indices (from 0) of steps without a signal, which claim nothing. Under ``share`` they get 0, and the
            others share all of B; ``paper`` gives them their k_i, which stays unused.

    Raises:
        ValueError: an unknown rule or an impossible curve.
    """
    if rule not in RULES:
        raise ValueError(f"the budget rule must be one of {', '.join(RULES)}, got {rule!r}")
    weights = step_weights(curve, num_steps)
    if rule == "paper":
        return [min(max_step_budget, budget * weight) for weight in weights]
    heard = [0.0 if i in silent else weight for i, weight in enumerate(weights)]
    return shared_budget(heard, budget=budget, max_step_budget=max_step_budget) if any(heard) else heard


@dataclass(frozen=True)
class Grant:
    """The budgets of a question in short.

    Attributes:
        num_steps: T.
        granted_frac: the sum of the steps' budgets over B, in [0, 1].
        smallest: coordinates of the step with the smallest budget.
        equal: coordinates of each step if all had the same budget.
    """

    num_steps: int
    granted_frac: float
    smallest: int
    equal: int

    @property
    def starves(self) -> bool:
        """True if a step gets less than a tenth of an equal budget."""
        return 10 * self.smallest < self.equal


def grant(
    curve: Sequence[float],
    num_steps: int,
    num_unprotected: int,
    *,
    budget: float = 0.05,
    max_step_budget: float = 0.01,
    rule: str = "share",
) -> Grant:
    """Sum up the budgets of a question of ``num_steps`` steps, at least 1; arguments as in ``step_budgets``."""
    budgets = step_budgets(curve, num_steps, budget=budget, max_step_budget=max_step_budget, rule=rule)
    return Grant(
        num_steps=num_steps,
        granted_frac=sum(budgets) / budget,
        smallest=coordinates(min(budgets), num_unprotected),
        equal=coordinates(min(max_step_budget, budget / num_steps), num_unprotected),
    )


def shared_budget(weights: Sequence[float], *, budget: float = 0.05, max_step_budget: float = 0.01) -> list[float]:
    """Deal out B by weight, at most k_max each; what the cap cuts off goes to the others by weight.

    Returns k_i = min(k_max, c w_i), with the one c for which they sum to B; where even k_max for every weight above 0
    sums to less, k_max for each of these. A weight of 0 gets 0. The arithmetic is exact and rounds once, at the end:
    equal weights get equal shares, whatever their order.

    Raises:
        ValueError: a weight that is negative or not finite, or weights that sum to 0.
    """
    if any(not 0.0 <= weight < float("inf") for weight in weights):
        raise ValueError(f"weights must be finite and at least 0, got {list(weights)}")
    exact = [Fraction(weight) for weight in weights]
    rest, left, cap = sum(exact, Fraction(0)), Fraction(budget), Fraction(max_step_budget)
    if weights and rest == 0:
        raise ValueError(f"all {len(weights)} weights are 0: there is nothing to share out by")
    for weight in sorted(exact, reverse=True):
        if left * weight < cap * rest or weight == 0:  # neither this one nor any smaller one reaches the cap
            break
        rest, left = rest - weight, left - cap
    if rest == 0:  # every weight above 0 is at the cap
        return [max_step_budget if weight else 0.0 for weight in exact]
    # c = left / rest has only grown since a weight was taken out, so c times that weight is still above the cap.
    return [float(min(cap, left * weight / rest)) for weight in exact]


def coordinates(fraction: float, num_unprotected: int) -> int:
    """Return a budget in coordinates, rounded down so that the sum over steps stays within B."""
    return int(fraction * num_unprotected)


def _check_curve(curve: Sequence[float]) -> None:
    if not curve:
        raise ValueError("a budget profile needs at least one value")
    for position, value in enumerate(curve, start=1):
        if not 0.0 <= value < float("inf"):
            raise ValueError(f"v_{position} of a budget profile must be finite and at least 0, got {value}")
