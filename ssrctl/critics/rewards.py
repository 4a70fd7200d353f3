"""Rewards of users (``--reward``): functions with the signature of TRL's ``reward_funcs``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from ssrctl.configs.own_code import REWARDS
from ssrctl.critics.own_code import REPAIR, blamed, load
from ssrctl.errors import Stopped, UserError
from ssrctl.io.problems import ANSWER_COLUMNS

if TYPE_CHECKING:
    from ssrctl.sampling.groups import Group


class RewardFunction(Protocol):
    """Rewards of a batch of responses, as ``reward_funcs`` of TRL's GRPOTrainer takes them."""

    def __call__(self, prompts: list[Any], completions: list[Any], **columns: list[Any]) -> Sequence[float | None]:
        """Return one finite number per completion; None for a completion that the function does not judge.

        Args:
            prompts: of each completion its question as text; of a row with chat messages, the messages.
            completions: the responses as text; for chat messages, a list with one message of the assistant each.
            columns: ``completion_ids`` (token ids), ``answer`` (the reference, also as ``solution``, ``ground_truth`` and by
                the other usual names) and each other column of the data set, one value per completion; None where the row
                has no such column.
        """


class Rewards:
    """The sum of reward functions.

    Args:
        functions: each with the name that errors show.
    """

    def __init__(self, functions: Sequence[tuple[str, RewardFunction]]) -> None:
        self.functions = functions

    def of(self, groups: Sequence[Group]) -> list[list[float | None]]:
        """Return the reward of each response of each group; None if no function judges it.

        Raises:
            Stopped: a function raises, or returns anything but a finite number or None for each response.
        """
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        columns = _columns(groups)
        totals: list[float | None] = [None] * len(rollouts)
        for name, function in self.functions:
            with blamed(f"reward {name}", Stopped):
                values = [None if value is None else float(value) for value in function(**columns)]
            if len(values) != len(rollouts):
                raise Stopped(f"the reward {name} gave {len(values)} numbers for {len(rollouts)} responses", REPAIR)
            for place, (rollout, value) in enumerate(zip(rollouts, values, strict=True)):
                if value is None:
                    continue
                if not math.isfinite(value):
                    raise Stopped(f"the reward {name} gave {value} for response {rollout.id}", REPAIR)
                totals[place] = (totals[place] or 0.0) + value
        found = iter(totals)
        return [[next(found) for _ in group.rollouts] for group in groups]


def _columns(groups: Sequence[Group]) -> dict[str, list[Any]]:
    """Return the arguments of a reward function: prompts, completions and the columns of the data set."""
    columns: dict[str, list[Any]] = {"prompts": [], "completions": []}
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    for group in groups:
        chat = group.prompted.problem.messages
        for rollout in group.rollouts:
            columns["prompts"].append(rollout.question if chat is None else [dict(message) for message in chat])
            reply = [{"role": "assistant", "content": rollout.response}]
            columns["completions"].append(rollout.response if chat is None else reply)
    columns["completion_ids"] = [list(sample.response_ids) for group in groups for sample in group.samples]
    columns["answer"] = answers = [rollout.answer for rollout in rollouts]
    for name in dict.fromkeys(name for rollout in rollouts for name in rollout.extra):
        columns.setdefault(name, [rollout.extra.get(name) for rollout in rollouts])
    for name in ANSWER_COLUMNS:  # the column that was read as the answer, which records do not repeat
        columns.setdefault(name, answers)
    return columns


def load_rewards(names: Sequence[str]) -> Rewards | None:
    """Import the functions that ``--reward`` names; None without any.

    Raises:
        UserError: one cannot be imported, or is not a function.
    """
    functions = [(name, load("reward", name, REWARDS)) for name in names]
    return make_rewards(functions)


def make_rewards(functions: Sequence[tuple[str, RewardFunction]]) -> Rewards | None:
    """Return the sum of functions; None without any.

    Raises:
        UserError: one is not a function.
    """
    for name, function in functions:
        if not callable(function):
            raise UserError(
                f"the reward {name} is a {type(function).__name__}, not a function",
                "name a function (prompts, completions, **columns) -> list of numbers",
            )
    return Rewards(functions) if functions else None
