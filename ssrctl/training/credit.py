"""Credit: the advantages of a group's responses or of their steps (``--credit``)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from ssrctl.core.advantages import of_sign, response_advantages, two_level_advantages
from ssrctl.sampling.groups import Group


def group_advantages(
    group: Group, credit: str, rule: str, *, mask_truncated: bool = False, sign: str = "both"
) -> tuple[Sequence[Sequence[float | None]], int]:
    """Return the advantages of a scored group, and the number of responses without a signal.

    Args:
        group: the responses to one question.
        credit: ``step`` for an advantage per step; a key of ``RESPONSE_REWARDS`` for one per response.
        rule: see ``core.advantages.two_level_advantages``; for ``step`` only.
        mask_truncated: drop the advantages of responses that were cut off, after they counted in the group's mean.
        sign: a key of ``core.advantages.SIGNS``; after the normalisation, advantages of the other sign become 0.

    Returns:
        Per response its steps' advantages (one value with credit per response), None where the score is missing.
    """
    values: list[list[float | None]]
    if credit == "step":
        values = two_level_advantages(group.rewards(), rule).values
    else:
        rewards = [RESPONSE_REWARDS[credit](group, j) for j in range(len(group.rollouts))]
        values = [[value] for value in response_advantages(rewards)]
    if mask_truncated:
        values = [
            row if sample.finished else [None] * len(row) for row, sample in zip(values, group.samples, strict=True)
        ]
    values = of_sign(values, sign)
    return values, sum(1 for row in values if not any(row))


def final_reward(group: Group, index: int) -> float | None:
    """Return that of ``--reward``, or of the final answer: the critic's, or without one +1 if right and -1 if not."""
    if group.response_rewards is not None:
        return group.response_rewards[index]
    rollout = group.rollouts[index]
    for span, score in zip(rollout.steps or (), rollout.scores or (), strict=True):
        if span.kind == "final" and score.reward is not None:
            return score.reward
    if rollout.final is None or rollout.final.correct is None:
        return None
    return 1.0 if rollout.final.correct else -1.0


def cot_reward(group: Group, index: int) -> float | None:
    """Return the mean reward of a response's scored steps, including the final answer."""
    known = [r for r in group.rewards()[index] if r is not None]
    return statistics.fmean(known) if known else None


RESPONSE_REWARDS = {"final": final_reward, "cot": cot_reward}
