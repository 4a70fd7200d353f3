"""Scores and final rewards of sampled groups."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from ssrctl.critics.base import ResponseCritic, missing
from ssrctl.critics.rewards import Rewards, make_rewards
from ssrctl.critics.scoring import score_groups
from ssrctl.errors import Stopped
from ssrctl.io.records import Rollout, StepScore
from ssrctl.text.answers import Extraction
from ssrctl.text.segment import segment
from ssrctl.training.credit import RESPONSE_REWARDS


class Constant(ResponseCritic):
    """A critic that gives every step the same score, or the same error."""

    def __init__(self, error: str | None = None) -> None:
        self.error = error

    def score(self, rollout: Rollout) -> list[float | StepScore]:
        return [missing(self.error) if self.error else 50.0 for _ in rollout.steps or []]


def scored_group(
    responses: list[str],
    answer: str = "12",
    extraction: Extraction = "strict",
    error: str | None = None,
    rewards: Rewards | None = None,
    messages: list[dict[str, str]] | None = None,
) -> Any:
    rollouts = [
        Rollout(id=f"q/{k}", question="?", answer=answer, response=text, steps=segment(text), extra={"level": k})
        for k, text in enumerate(responses)
    ]
    group = SimpleNamespace(
        rollouts=rollouts,
        rewards=lambda: [[score.reward for score in r.scores or ()] for r in rollouts],
        response_rewards=None,
        prompted=SimpleNamespace(problem=SimpleNamespace(messages=messages)),
        samples=[SimpleNamespace(response_ids=[1] * len(text)) for text in responses],
    )
    score_groups([cast("Any", group)], Constant(error), extraction, rewards)
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


def test_rewards_take_the_place_of_the_final_score_and_are_added() -> None:
    given: list[dict[str, Any]] = []

    def own(prompts: list[str], completions: list[str], **columns: Any) -> list[float | None]:
        given.append({"prompts": prompts, "completions": completions, **columns})
        return [None if not text else float(len(text)) for text in completions]

    def odd(completions: list[str], level: list[int], **_: Any) -> list[float | None]:
        return [None if number % 2 else 0.5 for number in level]

    texts = ["5+7=12\n#### 12", "5+7=12\nso it is 12", "5+7=12\n#### 13", ""]
    group = scored_group(texts, rewards=Rewards([("own", own), ("odd", odd)]))
    lengths = [float(len(text)) for text in texts]
    totals = [lengths[0] + 0.5, lengths[1], lengths[2] + 0.5, None]
    assert group.rewards() == [[0.5, totals[0]], [0.5, totals[1]], [0.5, totals[2]], []]
    assert [RESPONSE_REWARDS["final"](group, index) for index in range(4)] == totals
    assert [r.steps[-1].kind for r in group.rollouts if r.steps] == ["final"] * 3
    score = group.rollouts[0].scores[-1]
    assert (score.score - 50) / 50 == pytest.approx(score.reward, abs=1e-12)
    (call,) = given
    assert call["prompts"] == ["?"] * 4 and call["completions"] == texts and call["level"] == [0, 1, 2, 3]
    assert call["answer"] == call["solution"] == ["12"] * 4
    assert [len(ids) for ids in call["completion_ids"]] == [len(text) for text in texts]
    none = scored_group(texts[:1], rewards=Rewards([("none", lambda **columns: [None])]))
    assert none.rewards() == [[0.5, None]] and none.rollouts[0].scores[-1].error == "no_reward"


def test_rewards_get_chat_messages_as_in_trl() -> None:
    chat = [{"role": "user", "content": "5+7?"}]

    def own(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
        assert prompts == [chat, chat]
        return [float(completion[0]["content"] == "#### 12") for completion in completions]

    group = scored_group(["#### 12", "#### 13"], rewards=Rewards([("own", own)]), messages=chat)
    assert group.response_rewards == [1.0, 0.0]


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda **_: [1.0], "the reward mine:f gave 1 numbers for 2 responses"),
        (lambda **_: [1.0, float("nan")], "the reward mine:f gave nan for response q/1"),
        (lambda **_: ["good", 1.0], "the reward mine:f raised ValueError: could not convert string to float: 'good'"),
        (lambda completions: [], r"the reward mine:f raised TypeError: .*unexpected keyword argument 'prompts'"),
        (
            lambda **_: 1 / 0,
            r"the reward mine:f raised ZeroDivisionError: division by zero \(test_scoring.py, line \d+\)",
        ),
    ],
)
def test_a_reward_that_fails_stops_the_work_and_is_named(function: Any, said: str) -> None:
    with pytest.raises(Stopped, match=said):
        scored_group(["#### 12", "#### 13"], rewards=make_rewards([("mine:f", function)]))
