"""Scoring of sampled groups: the critic's scores and the check of the final answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssrctl.critics.base import OUTAGE_ERRORS, Critic, score_all, scored
from ssrctl.errors import Stopped

if TYPE_CHECKING:
    from ssrctl.sampling.groups import Group
    from ssrctl.text.answers import Extraction


def score_groups(groups: Sequence[Group], critic: Critic, answer_extraction: Extraction = "strict") -> None:
    """Score every response with ``critic`` and check its final answer; fills the records in place.

    A response without a marked answer has a final reward too, the same under every ``--credit``: its last step becomes
    the final one, with the checker's verdict as score. A comparison that timed out leaves the step as it is.

    Raises:
        Stopped: every score is missing because of an outage, so that there is nothing to learn from.
    """
    from ssrctl.text.answers import check_answers

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    pairs = [(rollout.response or "", rollout.answer) for rollout in rollouts]
    finals = check_answers(pairs, extraction=answer_extraction)
    errors: Counter[str | None] = Counter()
    for rollout, scores, final in zip(rollouts, score_all(critic, rollouts), finals, strict=True):
        assert len(scores) == len(rollout.steps or ()), (rollout.id, len(scores))
        assert rollout.response is not None and rollout.answer is not None
        errors.update(score.error for score in scores)
        rollout.scores, rollout.final = scores, final
        if rollout.steps and rollout.steps[-1].kind != "final" and final.correct is not None:
            rollout.steps[-1].kind = "final"
            rollout.scores = [*scores[:-1], scored(100.0 * final.correct, "final", "no marked answer")]
    if errors and set(errors) <= OUTAGE_ERRORS:
        classes = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise Stopped(
            f"the critic gave none of {errors.total()} scores: {classes}",
            "check the critic's server and continue when it answers",
        )
