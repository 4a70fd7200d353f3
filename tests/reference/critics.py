"""A critic of the tests' own: scores by a given function."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ssrctl.io.records import Rollout, StepScore


class FunctionCritic:
    """``score_of(rollout, index)`` gives each step's score."""

    identity = None

    def __init__(self, score_of: Callable[[Rollout, int], StepScore]) -> None:
        self.score_of = score_of

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        for rollout in rollouts:
            yield rollout, [self.score_of(rollout, index) for index in range(len(rollout.steps or ()))]

    def summary(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass
