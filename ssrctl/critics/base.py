"""The protocol of critics, and the reward of a score."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from ssrctl.io.records import Rollout, StepScore

STEP_RANGE = (-100.0, 100.0)
FINAL_RANGE = (0.0, 100.0)

# Error classes that a retry would not fix.
PERMANENT_ERRORS = frozenset(
    {
        "no_equation",
        "no_answer",
        "no_reference",
        "too_long",
        "context_window",
        "content_filter",
        "empty_step",
        "tag_in_text",
    }
)

# Error classes that the same request meets again, and another setting of the critic mends.
SETTINGS_ERRORS = frozenset({"bad_request", "thinking_cut"})

# Error classes that say nothing about the response.
OUTAGE_ERRORS = frozenset({"timeout", "rate_limit", "connection", "api_error"}) | SETTINGS_ERRORS


class Critic(Protocol):
    """Scores reasoning steps.

    Its ``identity`` names the critic and every setting that its scores depend on; records scored under the same
    identity need not be scored again. None for a critic whose scores cost nothing.
    """

    @property
    def identity(self) -> str | None: ...

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout once, with one score per step, as soon as it is finished and in any order.

        The text of a response never makes it raise; a step that cannot be judged has a missing score.

        Args:
            rollouts: with question, response and steps; read only as far as work can begin.

        Raises:
            Stopped: a limit was reached; all finished rollouts have been yielded.
            UserError: no rollout could be scored (no key, an unknown model).
        """

    def summary(self) -> dict[str, Any]:
        """Return calls, tokens and cost so far; empty for a critic that has none of these."""

    def close(self) -> None:
        """Release connections, threads and files."""


def score_all(critic: Critic, rollouts: Sequence[Rollout]) -> list[list[StepScore]]:
    """Return the scores of all ``rollouts``, in their order; raises as ``Critic.stream`` does."""
    scores = {id(rollout): mine for rollout, mine in critic.stream(rollouts)}
    assert len(scores) == len(rollouts), (len(scores), len(rollouts))
    return [scores[id(rollout)] for rollout in rollouts]


def should_retry(scores: Iterable[StepScore]) -> bool:
    """Return whether any score is missing for a reason that a retry may fix."""
    return any(score.reward is None and score.error not in PERMANENT_ERRORS for score in scores)


def scored(score: float, kind: str, rationale: str | None = None) -> StepScore:
    """Return a score with its reward: r / 100 for a step (SSR eq. 2), (r - 50) / 50 for a final answer (eq. 3).

    Args:
        score: in [-100, 100] for a step, in [0, 100] for a final answer; outside the range it is missing.
        kind: ``step`` or ``final``.
        rationale: a short reason.
    """
    low, high = FINAL_RANGE if kind == "final" else STEP_RANGE
    if not math.isfinite(score) or not low <= score <= high:
        return missing("out_of_range", rationale)
    return StepScore(score=score, reward=(score - 50) / 50 if kind == "final" else score / 100, rationale=rationale)


def missing(error: str, rationale: str | None = None) -> StepScore:
    """Return a missing score (None, never 0) with its error class."""
    return StepScore(score=None, reward=None, rationale=rationale, error=error)
