"""Score sampled groups with a critic and check their final answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssrctl.critics.base import OUTAGES, Critic, score_all, scored
from ssrctl.errors import Stopped

if TYPE_CHECKING:
    from ssrctl.sampling.groups import Group
    from ssrctl.text.answers import Extraction


def score_groups(groups: Sequence[Group], critic: Critic, answer_extraction: Extraction = "strict") -> None:
    """Have the critic score every response, and check the final answers; fills the records in place.

    A response without a marked answer has a final reward too, the same under every ``--credit``: its last step becomes
    the final one, with the checker's verdict as score. A comparison that timed out leaves the step as it is.

    Raises:
        Stopped: the critic could not be reached for any of the steps, so that there is nothing to learn from.
    """
    from ssrctl.text.answers import check_answers

    rollouts = [rollout for group in groups for rollout in group.rollouts]
    pairs = [(rollout.response or "", rollout.answer) for rollout in rollouts]
    finals = check_answers(pairs, extraction=answer_extraction)
    for rollout, scores, final in zip(rollouts, score_all(critic, rollouts), finals, strict=True):
        assert len(scores) == len(rollout.steps or ()), (rollout.id, len(scores))
        assert rollout.response is not None and rollout.answer is not None
        rollout.scores, rollout.final = scores, final
        if rollout.steps and rollout.steps[-1].kind != "final" and final.correct is not None:
            rollout.steps[-1].kind = "final"
            rollout.scores = [*scores[:-1], scored(100.0 * final.correct, "final", "no marked answer")]
    errors = Counter(score.error for rollout in rollouts for score in rollout.scores or ())
    if errors and set(errors) <= OUTAGES:
        classes = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise Stopped(f"the critic gave none of {errors.total()} scores: {classes}", "go on when it answers again")
