"""What a critic is, and how its scores become rewards."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from ssrctl.io.records import Rollout, StepScore

STEP_RANGE = (-100.0, 100.0)
FINAL_RANGE = (0.0, 100.0)


# Reasons to be missing that asking again would not mend.
LASTING = frozenset(
    {"no_equation", "no_answer", "no_reference", "too_long", "context_window", "content_filter", "empty_step"}
)

# Reasons that say nothing about the response.
OUTAGES = frozenset({"timeout", "rate_limit", "connection", "api_error", "bad_request"})


class Critic(Protocol):
    """Scores reasoning steps.

    Its ``identity`` names the critic and every setting that its scores depend on; records scored under the same
    identity need not be scored again. None for a critic whose scores cost nothing.
    """

    @property
    def identity(self) -> str | None: ...

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout with one score per step, as they are finished: in any order, each once.

        What a response says never raises; a step that cannot be judged is missing.

        Args:
            rollouts: with question, response and steps; drawn on only as far as work can begin.

        Raises:
            Stopped: a limit was reached; what was finished before has been yielded.
            UserError: no rollout could be scored (no key, an unknown model).
        """

    def summary(self) -> dict[str, Any]:
        """What the work took so far: calls, tokens, cost; empty for a critic that has none of these."""

    def close(self) -> None:
        """Let go of connections, threads and files."""


def score_all(critic: Critic, rollouts: Sequence[Rollout]) -> list[list[StepScore]]:
    """The scores of all ``rollouts``, in their order; errors as in ``Critic.stream``."""
    places = {id(rollout): place for place, rollout in enumerate(rollouts)}
    scores: list[list[StepScore] | None] = [None] * len(rollouts)
    for rollout, mine in critic.stream(rollouts):
        scores[places[id(rollout)]] = mine
    done = [mine for mine in scores if mine is not None]
    assert len(done) == len(rollouts), (len(done), len(rollouts))
    return done


def needs_another_try(scores: Iterable[StepScore]) -> bool:
    """Whether any score is missing for a reason that may have passed."""
    return any(score.reward is None and score.error not in LASTING for score in scores)


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
