"""What a critic is, and how its scores become rewards."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Protocol

from ssrctl.configs import CriticOptions
from ssrctl.io.records import Rollout, StepScore

STEP_RANGE = (-100.0, 100.0)
FINAL_RANGE = (0.0, 100.0)


class Critic(Protocol):
    """Scores reasoning steps."""

    def score(self, rollouts: Sequence[Rollout], on_done: Callable[[int], None] | None = None) -> list[list[StepScore]]:
        """One list per rollout, one score per step, in order.

        What a response says never raises; a step that cannot be judged is missing.

        Args:
            rollouts: with question, response and steps.
            on_done: called with the number of rollouts that were just finished.
        """


def scored(score: float, kind: str, rationale: str | None = None) -> StepScore:
    """A verdict with its reward: r / 100 for a step (SSR eq. 2), (r - 50) / 50 for a final answer (eq. 3).

    Args:
        score: in [-100, 100] for a step, in [0, 100] for a final answer; anything else makes it missing.
        kind: ``step`` or ``final``.
        rationale: a short reason.
    """
    low, high = FINAL_RANGE if kind == "final" else STEP_RANGE
    if not math.isfinite(score) or not low <= score <= high:
        return missing("out_of_range", rationale)
    return StepScore(score=score, reward=(score - 50) / 50 if kind == "final" else score / 100, rationale=rationale)


def missing(error: str, rationale: str | None = None) -> StepScore:
    """A score that could not be given, with its error class; never 0."""
    return StepScore(score=None, reward=None, rationale=rationale, error=error)


def make_critic(options: CriticOptions) -> Critic:
    """The critic that ``options.critic`` names."""
    return CRITICS[options.critic](options)


def _rule(options: CriticOptions) -> Critic:
    from ssrctl.critics.rule import RuleCritic

    return RuleCritic()


def _llm(options: CriticOptions) -> Critic:
    from ssrctl.critics.llm import LLMCritic

    return LLMCritic(options)


CRITICS: dict[str, Callable[[CriticOptions], Critic]] = {"rule": _rule, "llm": _llm}
