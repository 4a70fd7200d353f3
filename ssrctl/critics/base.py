"""The protocol of critics, and the reward of a score."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

from ssrctl.configs import CriticOptions, SamplingConfig
from ssrctl.io.records import Rollout, StepScore

if TYPE_CHECKING:
    from ssrctl.models.loading import LoadedModel
    from ssrctl.sampling.engines.base import Engine
    from ssrctl.text.prompts import PromptFormat

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
        "not_judged",
    }
)

# Error classes that the same request meets again, and another setting of the critic mends.
SETTINGS_ERRORS = frozenset({"bad_request", "thinking_cut"})

# Error classes that say nothing about the response.
OUTAGE_ERRORS = frozenset({"timeout", "rate_limit", "connection", "api_error"}) | SETTINGS_ERRORS


@dataclass(frozen=True, kw_only=True)
class CriticResources:
    """Objects that a critic may need in addition to its options.

    Attributes:
        policy: loads the model whose continuations the rollout critic samples; called only by a critic that needs it.
        sampling: settings of that sampling.
        prompt_format: the way to the prompt of a record that has none; None leaves such records without a prompt.
        seed: seed of that sampling.
        device: device of the prm critic's model, as ``--device``.
        ledger: file for the log of the llm critic's calls; None writes no log.
        engine: returns the engine that the rollout critic samples the policy with; None for transformers in this process.
    """

    policy: Callable[[], LoadedModel] | None = None
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    prompt_format: PromptFormat | None = None
    seed: int = 0
    device: str = "auto"
    ledger: Path | None = None
    engine: Callable[[LoadedModel], Engine | None] = lambda loaded: None


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


class ResponseCritic(ABC):
    """Base of critics that judge one response at a time, at no cost: a subclass needs only ``score``.

    A critic that asks a server, judges several responses at once or keeps its scores for the next run overrides ``stream``,
    ``identity`` and ``close`` as well.
    """

    identity: str | None = None

    @classmethod
    def create(cls, options: CriticOptions, resources: CriticResources) -> Self:
        """Return the critic for the settings of a command; this base ignores them."""
        return cls()

    @abstractmethod
    def score(self, rollout: Rollout) -> Sequence[StepScore | float | None]:
        """Return one score per step of ``rollout.steps``.

        A number is in [-100, 100] for a step and in [0, 100] for one of kind ``final``; outside of it, or None, the score is
        missing. A ``StepScore`` (see ``scored``, ``missing``) also says why.
        """

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        """Yield each rollout with its scores, in order, one at a time."""
        for rollout in rollouts:
            kinds = [step.kind for step in rollout.steps or ()]
            given = self.score(rollout)
            if len(given) != len(kinds):
                raise ValueError(f"{len(given)} scores for the {len(kinds)} steps of {rollout.id}")
            yield rollout, [_as_score(score, kind) for score, kind in zip(given, kinds, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Return an empty dict: the scores cost nothing."""
        return {}

    def close(self) -> None:  # noqa: B027 (a default, which most critics keep)
        """Do nothing: no resource is held."""


def _as_score(given: StepScore | float | None, kind: str) -> StepScore:
    if isinstance(given, StepScore):
        return given
    return missing("not_judged") if given is None else scored(float(given), kind)


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
