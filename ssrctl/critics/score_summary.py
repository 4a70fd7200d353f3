"""Counting what a critic said, one response at a time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from ssrctl.io.records import Rollout


@dataclass
class ScoreTally:
    """Sums over scored responses; ``kept`` of them were scored by an earlier run."""

    kept: int = 0
    responses: int = 0
    without_steps: int = 0
    steps: int = 0
    reward_sum: float = 0.0
    missing: Counter[str] = field(default_factory=Counter)
    right: int = 0
    graded: int = 0

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
            self.graded += 1
            self.right += rollout.final.correct

    def summary(self) -> dict[str, Any]:
        """Counts, the mean reward over the steps that have one, what is missing and why, and the accuracy over the
        responses with a reference answer; None where there is nothing to average."""
        num_scored = self.steps - self.missing.total()
        return {
            "responses": self.responses,
            "kept_from_before": self.kept,
            "steps": self.steps,
            "mean_reward": self.reward_sum / num_scored if num_scored else None,
            "missing": self.missing.total(),
            "missing_by_class": dict(self.missing),
            "without_steps": self.without_steps,
            "accuracy": self.right / self.graded if self.graded else None,
        }
