"""Scores and final rewards of sampled groups."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssrctl.critics.base import missing, scored
from ssrctl.critics.scoring import score_groups
from ssrctl.errors import Stopped
from ssrctl.io.records import Rollout, StepScore
from ssrctl.text.answers import Extraction
from ssrctl.text.segment import segment
from ssrctl.training.credit import RESPONSE_REWARDS


class Constant:
    """A critic that gives every step the same score, or the same error."""

    identity = None

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        for rollout in rollouts:
            steps = rollout.steps or []
            yield rollout, [missing(self.error) if self.error else scored(50.0, step.kind) for step in steps]

    def summary(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        pass


def scored_group(
    responses: list[str], answer: str = "12", extraction: Extraction = "strict", error: str | None = None
) -> Any:
    rollouts = [
        Rollout(id=f"q/{k}", question="?", answer=answer, response=text, steps=segment(text))
        for k, text in enumerate(responses)
    ]
    group = SimpleNamespace(
        rollouts=rollouts, rewards=lambda: [[score.reward for score in r.scores or ()] for r in rollouts]
    )
    score_groups([cast("Any", group)], cast("Any", Constant(error)), extraction)
    return group


def test_a_response_without_a_marked_answer_has_a_final_reward() -> None:
    texts = ["5+7=12\n#### 12", "5+7=12\nso it is 12", "5+7=12\nso it is 13", ""]
    strict, lenient = scored_group(texts), scored_group(texts, extraction="lenient")
    assert strict.rewards() == [[0.5, 0.0], [0.5, -1.0], [0.5, -1.0], []]
    assert lenient.rewards() == [[0.5, 0.0], [0.5, 1.0], [0.5, -1.0], []]
    assert [r.steps[-1].kind for r in strict.rollouts if r.steps] == ["final"] * 3
    for group in (strict, lenient):  # the same under every way to credit
        for index, row in enumerate(group.rewards()[:3]):
            assert RESPONSE_REWARDS["final"](group, index) == row[-1]
            assert RESPONSE_REWARDS["cot"](group, index) == sum(row) / 2


def test_a_score_that_the_critic_could_not_give_stays_missing() -> None:
    group = scored_group(["5+7=12\n#### 12", "5+7=12\n#### 13"], error="too_long")
    assert group.rewards() == [[None, None], [None, None]]
    group = scored_group(["5+7=12\n#### 12", "5+7=12\n#### 13"], error="no_answer")
    assert group.rewards() == [[None, 1.0], [None, -1.0]]
    with pytest.raises(Stopped, match="none of 2 scores: timeout 2"):
        scored_group(["5+7=12\nso it is 12"], error="timeout")


def test_a_comparison_that_timed_out_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ssrctl.text.answers.compare_answers", lambda *_, **__: None)
    group = scored_group(["the answer is $x^2$.\nbut wait, 3+5=8"], answer="\\pi^2")
    assert group.rollouts[0].final.outcome == "timed_out"
    assert group.rewards() == [[0.5, 0.5]]
