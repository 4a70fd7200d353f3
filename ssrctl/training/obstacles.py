"""Reasons for which a run learns little: its responses are cut off, have no score, or all have the same reward."""

from __future__ import annotations

from typing import Any

from ssrctl.configs import TrainConfig
from ssrctl.io import console

EARLY_STEPS = 3  # enough responses for a share, early enough to save the rest of the run
MOST_UNFINISHED = 0.5
MOST_UNSCORED = 0.5
LEAST_SIGNAL = 0.1


class Obstacles:
    """Shares of responses that a run cannot learn from; warns after the first steps and at the end.

    Args:
        config: the run's settings.
    """

    def __init__(self, config: TrainConfig) -> None:
        self._config = config
        self._steps: list[int] = []
        self._warned_at = 0
        self._unfinished = self._unscored = self._silent = 0.0

    def add(self, row: dict[str, Any]) -> None:
        """Count a row of metrics."""
        self._steps.append(row["step"])
        self._unfinished += 1 - row["finished_frac"]
        self._unscored += row["missing_score_frac"] or 0.0
        self._silent += row["no_signal_responses"] / (self._config.questions_per_step * self._config.num_generations)
        if len(self._steps) == EARLY_STEPS:
            self.warn()

    def warn(self) -> None:
        """Print a warning if the run can learn little, unless it was printed for these steps."""
        if len(self._steps) != self._warned_at and (text := self.describe()):
            console.warn(text)
            self._warned_at = len(self._steps)

    def describe(self) -> str:
        """Return the shares and the settings to change; an empty text when nothing is in the way."""
        if not self._steps:
            return ""
        config, count = self._config, len(self._steps)
        unfinished, unscored, silent = (each / count for each in (self._unfinished, self._unscored, self._silent))
        changes = []
        if unfinished > MOST_UNFINISHED:
            changes.append(f"raise --max-new-tokens ({config.max_new_tokens})")
        if unscored > MOST_UNSCORED:
            changes.append(f"use another --critic ({config.critic})")
        if silent > 1 - LEAST_SIGNAL:
            changes.append(
                f"raise --temperature ({config.temperature:g}) or --num-generations ({config.num_generations})"
            )
            changes.append("or take problems that the model solves now and then")
        if not changes:
            return ""
        first, last = self._steps[0], self._steps[-1]
        return (
            f"this run learns little: of the responses in steps {first} to {last}, {unfinished:.0%} were cut off, "
            f"{unscored:.0%} of the steps have no score, {silent:.0%} of the responses got no learning signal because "
            f"rewards were equal or missing; {', '.join(changes)}"
        )
