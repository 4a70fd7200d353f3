"""Counts and means over scored responses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ssrctl.io.records import Rollout


@dataclass
class ScoreSummary:
    """Sums over scored responses; ``kept`` counts those that an earlier run scored."""

    kept: int = 0
    responses: int = 0
    without_steps: int = 0
    steps: int = 0
    reward_sum: float = 0.0
    missing: Counter[str] = field(default_factory=Counter)
    num_correct: int = 0
    num_checked: int = 0

    def add(self, rollout: Rollout) -> None:
        """Count one response with its scores and final answer."""
        self.responses += 1
        self.without_steps += not rollout.steps
        for score in rollout.scores or ():
            self.steps += 1
            if score.reward is None:
                self.missing[score.error or "unknown"] += 1
            else:
                self.reward_sum += score.reward
        if rollout.final is not None and rollout.final.correct is not None:
            self.num_checked += 1
            self.num_correct += rollout.final.correct

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and means; None where there is nothing to average.

        ``mean_reward`` is over the steps that have a reward, ``accuracy`` over the responses with a checked answer.
        """
        num_scored = self.steps - self.missing.total()
        return {
            "responses": self.responses,
            "kept_from_before": self.kept,
            "steps": self.steps,
            "mean_reward": self.reward_sum / num_scored if num_scored else None,
            "missing": self.missing.total(),
            "missing_by_class": dict(self.missing),
            "without_steps": self.without_steps,
            "accuracy": self.num_correct / self.num_checked if self.num_checked else None,
        }
