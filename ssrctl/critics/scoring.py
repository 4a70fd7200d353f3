"""Scoring of sampled groups: the critic's scores and the check of the final answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssrctl.critics.base import OUTAGE_ERRORS, Critic, score_all
from ssrctl.errors import Stopped

if TYPE_CHECKING:
    from ssrctl.sampling.groups import Group


def score_groups(groups: Sequence[Group], critic: Critic) -> None:
    """Score every response with ``critic`` and check its final answer; fills the records in place.

    Raises:
        Stopped: every score is missing because of an outage, so that there is nothing to learn from.
    """
    from ssrctl.text.answers import check_answers

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    finals = check_answers([(rollout.response or "", rollout.answer) for rollout in rollouts])
    for rollout, scores, final in zip(rollouts, score_all(critic, rollouts), finals, strict=True):
        assert len(scores) == len(rollout.steps or ()), (rollout.id, len(scores))
        assert rollout.response is not None and rollout.answer is not None
        rollout.scores, rollout.final = scores, final
    errors = Counter(score.error for rollout in rollouts for score in rollout.scores or ())
    if errors and set(errors) <= OUTAGE_ERRORS:
        classes = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise Stopped(
            f"the critic gave none of {errors.total()} scores: {classes}",
            "check the critic's server and continue when it answers",
        )
