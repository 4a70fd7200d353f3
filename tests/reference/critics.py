"""A critic of the tests' own: scores by a given function."""

from collections.abc import Callable

from ssrctl.critics.base import ResponseCritic
from ssrctl.io.records import Rollout, StepScore


class FunctionCritic(ResponseCritic):
    """``score_of(rollout, index)`` gives each step's score."""

    def __init__(self, score_of: Callable[[Rollout, int], StepScore]) -> None:
        self.score_of = score_of

    def score(self, rollout: Rollout) -> list[StepScore]:
        return [self.score_of(rollout, index) for index in range(len(rollout.steps or ()))]
