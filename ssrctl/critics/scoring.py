"""Scoring of sampled groups: the critic's scores and the check of the final answers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ssrctl.critics.base import OUTAGE_ERRORS, SETTINGS_ERRORS, Critic, missing, score_all, scored
from ssrctl.errors import Stopped
from ssrctl.io.records import StepScore

if TYPE_CHECKING:
    from ssrctl.critics.rewards import Rewards
    from ssrctl.sampling.groups import Group
    from ssrctl.text.answers import Extraction


def score_groups(
    groups: Sequence[Group], critic: Critic, answer_extraction: Extraction = "strict", rewards: Rewards | None = None
) -> None:
    """Score every response with ``critic`` and check its final answer; fills the records in place.

    Every response with a step has a final reward, the same under every ``--credit``: without a marked answer its last
    step becomes the final one, with the checker's verdict as its score. Another score that the critic could not give
    stays missing. A comparison that timed out changes nothing. With ``rewards`` the last step is always the final one, and
    they give its reward; its score is then 50 (reward + 1), which may leave [0, 100].

    Raises:
        Stopped: every score is missing because of an outage, so that there is nothing to learn from; or a user's critic or
            reward failed.
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
        if final.correct is None or not rollout.steps:
            continue
        if (last := rollout.steps[-1]).kind != "final" or scores[-1].error == "no_answer":
            last.kind = "final"
            rollout.scores = [*scores[:-1], scored(100.0 * final.correct, "final", "no marked answer")]
    if rewards is not None:
        for group, given in zip(groups, rewards.of(groups), strict=True):
            group.response_rewards = given
            for rollout, reward in zip(group.rollouts, given, strict=True):
                if rollout.steps:
                    rollout.steps[-1].kind = "final"
                    rollout.scores = [*(rollout.scores or ())[:-1], _final_score(reward)]
    if errors and set(errors) <= OUTAGE_ERRORS:
        classes = ", ".join(f"{kind} {count}" for kind, count in errors.items())
        raise Stopped(
            f"the critic gave none of {errors.total()} scores: {classes}",
            "change the settings of the critic and continue"
            if set(errors) <= SETTINGS_ERRORS
            else "check the critic's server and continue when it answers",
        )


def _final_score(reward: float | None) -> StepScore:
    return missing("no_reward") if reward is None else StepScore(score=50 * (reward + 1), reward=reward)
