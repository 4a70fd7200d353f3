"""A reward of your own, with the signature of TRL's ``reward_funcs``. In this folder:

    ssrctl train --reward own_reward:right_and_short
    ssrctl train --reward own_reward:right_and_short --credit final --optimizer adamw

It takes the place of the score of the final answer; with ``--credit step`` the critic still judges the steps before. Columns
of the data set come by name, one value per completion: take those you need, and the rest as ``**columns``. The same
function works as ``reward_funcs=right_and_short`` of TRL's GRPOTrainer. From Python:
``ssrctl.train(TrainConfig(), rewards=[right_and_short])``.
"""

from typing import Any

from ssrctl import check_answer

FREE_TOKENS = 64


def right_and_short(
    completions: list[str], completion_ids: list[list[int]], answer: list[str], **columns: Any
) -> list[float | None]:
    """Return 1 for a right answer, less 0.01 for each token beyond 64; None where the comparison took too long."""
    rewards: list[float | None] = []
    for text, ids, reference in zip(completions, completion_ids, answer, strict=True):
        right = check_answer(text, reference).correct
        rewards.append(None if right is None else right - 0.01 * max(0, len(ids) - FREE_TOKENS))
    return rewards
