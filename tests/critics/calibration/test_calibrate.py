"""Calibration: planted critics, the rule critic on chains with known errors, and figures made from the definitions."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from reference.labelled_chains import as_record, labelled_chains

from ssrctl.critics.base import missing, scored
from ssrctl.critics.calibration.calibrate import calibrate, cost_per_trace
from ssrctl.critics.rule import RuleCritic
from ssrctl.errors import Stopped, UserError
from ssrctl.io.labelled import Labelled, read_labelled
from ssrctl.io.records import Rollout, StepScore, StepSpan

Judge = Callable[[Rollout, int], list[StepScore]]


class Planted:
    """Scores by a function of the rollout and the round; yields in reverse, as a critic may."""

    identity = None

    def __init__(self, judge: Judge, stop_after: int | None = None, usage: dict[str, float] | None = None) -> None:
        self.judge, self.left, self.usage = judge, stop_after, usage or {}
        self.repeat, self.num_calls = 5, 100
        self.rounds: list[int] = []

    def stream(self, rollouts: Iterable[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
        self.rounds.append(self.repeat)
        for rollout in reversed(list(rollouts)):
            if self.left is not None and self.left == 0:
                raise Stopped("the budget is reached", "raise it")
            self.left = None if self.left is None else self.left - 1
            self.num_calls += 1
            yield rollout, self.judge(rollout, self.repeat - 5)

    def summary(self) -> dict[str, Any]:
        return {name: each * self.num_calls for name, each in self.usage.items()}

    def close(self) -> None:
        pass


def given(label: int, num_steps: int = 3, *, question: str = "?", final: bool | None = None) -> Labelled:
    """Steps of one letter each, which hold nothing."""
    steps = [StepSpan(start=index, end=index + 1) for index in range(num_steps)]
    rollout = Rollout(id="x", question=question, response="s" * num_steps, steps=steps)
    return Labelled(rollout=rollout, label=label, final_correct=final)


def by_trace(traces: list[Labelled], *rounds: list[list[float | None]]) -> Planted:
    """A critic that gives ``rounds[round][trace]``."""
    places = {id(trace.rollout): place for place, trace in enumerate(traces)}

    def judge(rollout: Rollout, number: int) -> list[StepScore]:
        scores = rounds[number][places[id(rollout)]]
        return [missing("timeout") if score is None else scored(score, "step") for score in scores]

    return Planted(judge)


def chains(folder: Path, num: int, form: str, seed: int = 0) -> list[Labelled]:
    rows = labelled_chains(num, seed)
    path = folder / "chains.jsonl"
    path.write_text("".join(json.dumps(as_record(row) if form == "record" else row) + "\n" for row in rows))
    return list(read_labelled(path))


# --------------------------------------------------------------------------------------------------
# critics whose worth is known


@pytest.mark.parametrize("form", ["bench", "record"])
def test_the_rule_critic_is_perfect_on_its_own_task(tmp_path: Path, form: str) -> None:
    found = calibrate(RuleCritic(), chains(tmp_path, 150, form), repeats=2)
    assert found["first_error"]["f1"]["value"] == found["step_auc"] == 1.0
    assert found["first_error"]["f1"]["low"] > 0.9
    assert found["first_error"]["f1_by_repeat"] == [1.0, 1.0]
    assert found["best_threshold"] == {"wrong_below": 0.0, "f1": 1.0}
    assert found["outcome"]["of"] == "final_answer" and found["outcome"]["min_score"]["auc"] > 0.98
    assert found["noise"]["score_std"] == found["noise"]["first_error_changed_frac"] == 0.0
    assert found["cost"]["calls"] is None
    json.dumps(found, allow_nan=False)


def test_a_critic_that_calls_all_right_earns_nothing(tmp_path: Path) -> None:
    judge: Judge = lambda rollout, number: [scored(80, step.kind) for step in rollout.steps]  # noqa: E731
    found = calibrate(Planted(judge), chains(tmp_path, 60, "bench"))
    assert found["first_error"]["f1"]["value"] == found["best_threshold"]["f1"] == 0.0
    assert (found["first_error"]["erroneous_accuracy"], found["first_error"]["correct_accuracy"]) == (0.0, 1.0)
    assert found["first_error"]["erroneous_verdicts"] == {"missed": 1.0}
    assert found["step_auc"] == found["outcome"]["mean_score"]["auc"] == 0.5
    assert found["outcome"]["mean_score"]["correlation"] is None


def test_random_scores_come_out_at_chance(tmp_path: Path) -> None:
    draw = random.Random(2)
    judge: Judge = lambda rollout, number: [scored(draw.uniform(-20, 80), step.kind) for step in rollout.steps]  # noqa: E731
    traces = chains(tmp_path, 1500, "bench")
    found = calibrate(Planted(judge), traces, repeats=4)
    hit_e = np.mean([0.8**trace.label * 0.2 for trace in traces if trace.label >= 0])
    hit_c = np.mean([0.8 ** len(trace.rollout.steps) for trace in traces if trace.label < 0])
    expected = 2 * hit_e * hit_c / (hit_e + hit_c)
    assert found["first_error"]["f1"]["value"] == pytest.approx(expected, abs=0.015)
    assert expected <= found["random_f1"] < expected + 0.05
    assert found["best_threshold"]["f1"] < found["random_f1"] + 0.03
    assert found["step_auc"] == pytest.approx(0.5, abs=0.03)
    assert found["noise"]["icc"] == pytest.approx(0.0, abs=0.03)
    assert found["noise"]["score_std"] == pytest.approx(100 / 12**0.5, rel=0.03)


def test_a_critic_that_follows_the_answer_alone_is_seen_through(tmp_path: Path) -> None:
    """The same score for all steps by the outcome: AUC of the outcome 1, but no place of an error is found."""
    traces = chains(tmp_path, 200, "bench")
    right = {id(trace.rollout): trace.final_correct for trace in traces}
    judge: Judge = lambda rollout, number: [scored(90 if right[id(rollout)] else -90, "step")] * len(rollout.steps)  # noqa: E731
    found = calibrate(Planted(judge), traces)
    assert found["outcome"]["mean_score"]["auc"] == found["outcome"]["min_score"]["auc"] == 1.0
    assert found["outcome"]["mean_score"]["correlation"] == pytest.approx(1.0)
    assert found["first_error"]["f1"]["value"] < 0.5
    assert found["first_error"]["erroneous_verdicts"]["early"] > 0.6


# --------------------------------------------------------------------------------------------------
# figures by hand

TRACES = [
    given(1, final=False),
    given(0, final=True),
    given(-1, final=True),
    given(-1, final=True),
    given(2, final=None),
]
SCORES: list[list[float | None]] = [[50, -50, 0], [20, -30, 40], [90, 80, 70], [60, None, -10], [None, 30, -80]]


def test_every_trace_counts_by_its_first_error() -> None:
    found = calibrate(by_trace(TRACES, SCORES), TRACES)
    errors = found["first_error"]
    assert errors["erroneous_accuracy"] == pytest.approx(1 / 3)  # right, late, undecided
    assert errors["correct_accuracy"] == 0.5  # right, undecided
    assert errors["f1"]["value"] == pytest.approx(0.4)
    assert errors["undecided_frac"] == 0.4
    third = pytest.approx(1 / 3)
    assert errors["erroneous_verdicts"] == {"late": third, "right": third, "undecided": third}
    assert errors["correct_verdicts"] == {"right": 0.5, "undecided": 0.5}
    # Missing passed over, the fifth is right and the fourth a false alarm.
    assert errors["f1_missing_as_right"] == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert (found["erroneous"], found["correct"], found["traces"], found["problems"], found["steps"]) == (
        3,
        2,
        5,
        1,
        15,
    )


def test_what_is_missing_is_counted_by_class() -> None:
    found = calibrate(by_trace(TRACES, SCORES), TRACES)
    assert found["missing"] == {"frac": pytest.approx(2 / 15), "by_class": {"timeout": pytest.approx(2 / 15)}}
    judge: Judge = lambda rollout, number: [missing("bad_json"), missing("bad_json"), missing("no_equation")]  # noqa: E731
    found = calibrate(Planted(judge), TRACES)
    assert found["missing"]["frac"] == 1.0
    assert found["missing"]["by_class"] == {"bad_json": pytest.approx(2 / 3), "no_equation": pytest.approx(1 / 3)}
    assert found["first_error"]["f1"]["value"] == 0.0 and found["first_error"]["undecided_frac"] == 1.0
    assert (found["step_auc"], found["noise"], found["outcome"]["traces"]) == (None, None, 0)
    json.dumps(found, allow_nan=False)


def test_steps_and_outcomes_by_hand() -> None:
    found = calibrate(by_trace(TRACES, SCORES), TRACES)
    right = [50, 90, 80, 70, 60, -10, 30]  # before the first error
    wrong = [-50, 20, -80]
    pairs = [(a > b) + 0.5 * (a == b) for a in right for b in wrong]
    assert found["step_auc"] == pytest.approx(np.mean(pairs))
    # The fifth trace does not say whether its answer is right; missing scores are left out of the means.
    means, least, outcomes = [0, 10, 80, 25], [-50, -30, 70, -10], [0, 1, 1, 1]
    assert found["outcome"]["traces"] == 4 and found["outcome"]["of"] == "final_answer"
    assert found["outcome"]["mean_score"]["auc"] == found["outcome"]["min_score"]["auc"] == 1.0
    assert found["outcome"]["mean_score"]["correlation"] == pytest.approx(np.corrcoef(means, outcomes)[0, 1])
    assert found["outcome"]["min_score"]["correlation"] == pytest.approx(np.corrcoef(least, outcomes)[0, 1])


def test_without_outcomes_the_label_takes_their_place() -> None:
    traces = [given(0), given(-1), given(-1)]
    found = calibrate(by_trace(traces, [[10, 90, 90], [80, 60, 70], [20, 0, 30]]), traces)
    assert found["outcome"]["of"] == "label" and found["outcome"]["traces"] == 3
    assert found["outcome"]["min_score"]["auc"] == 0.5
    assert found["outcome"]["mean_score"]["auc"] == 0.5
    alone = calibrate(by_trace(traces[:2], [[10, 90, 90], [80, 60, 70]]), traces[:2])
    assert alone["outcome"]["min_score"]["auc"] == 1.0


def test_several_judgements_count_by_their_share() -> None:
    traces = [given(0, 1), given(0, 1), given(-1, 1)]
    critic = by_trace(traces, [[-10], [-10], [10]], [[-20], [30], [30]], [[-30], [20], [None]])
    found = calibrate(critic, traces, repeats=3)
    errors = found["first_error"]
    assert errors["erroneous_accuracy"] == pytest.approx((1 + 1 / 3) / 2)
    assert errors["correct_accuracy"] == pytest.approx(2 / 3)
    assert errors["f1"]["value"] == pytest.approx(2 / 3)
    assert errors["f1_by_repeat"] == [1.0, pytest.approx(2 / 3), 0.0]
    assert errors["undecided_frac"] == pytest.approx(1 / 9)
    assert found["judgements"] == 9
    noise = found["noise"]
    assert noise["num_steps"] == 3
    assert noise["score_std"] == pytest.approx(((2 * 100 + 2 * 433.3333333 + 200) / 5) ** 0.5)
    assert noise["mean_abs_difference"] == pytest.approx((40 / 3 + 80 / 3 + 20) / 3)
    assert noise["first_error_changed_frac"] == pytest.approx((0 + 2 / 3 + 0) / 3)


def test_a_final_answer_is_read_on_the_scale_of_steps() -> None:
    spans = [StepSpan(start=0, end=1), StepSpan(start=1, end=2, kind="final")]
    traces = [
        Labelled(rollout=Rollout(id=str(k), question="?", response="ab", steps=spans), label=label, final_correct=right)
        for k, (label, right) in enumerate([(1, False), (-1, True), (1, False)])
    ]
    finals = {"0": 49.0, "1": 50.0, "2": 0.0}
    judge: Judge = lambda rollout, number: [scored(10, "step"), scored(finals[rollout.id], "final")]  # noqa: E731
    found = calibrate(Planted(judge), traces)
    assert found["first_error"]["f1"]["value"] == 1.0
    assert found["step_auc"] == 1.0
    assert found["outcome"]["mean_score"]["auc"] == 0.5  # of the steps before it, which are all alike
    for wrong_below in (-2.0, -99.0):
        low = calibrate(Planted(judge), traces, wrong_below=wrong_below)
        assert low["first_error"]["erroneous_accuracy"] == 0.5


def test_a_score_equal_to_the_threshold_is_not_below_it() -> None:
    traces = [given(0, 1), given(-1, 1)]
    for level in range(-100, 100):
        critic = by_trace(traces, [[level - 1 if level > -100 else level], [level]])
        assert calibrate(critic, traces, wrong_below=level)["first_error"]["correct_accuracy"] == 1.0


def test_solutions_of_one_problem_are_resampled_together() -> None:
    draw = random.Random(4)
    alone = [given(draw.choice([-1, 0]), question=str(number)) for number in range(120)]
    shared = [given(trace.label, question=str(number // 4)) for number, trace in enumerate(alone)]
    scores = [[draw.choice([-50, 50]), 50, 50] for _ in range(30) for _ in range(4)]
    wide, narrow = calibrate(by_trace(shared, scores), shared), calibrate(by_trace(alone, scores), alone)
    assert (wide["problems"], narrow["problems"]) == (30, 120)
    assert wide["first_error"]["f1"]["value"] == narrow["first_error"]["f1"]["value"]
    assert wide["first_error"]["f1"]["low"] != narrow["first_error"]["f1"]["low"]


def test_with_one_class_f1_is_not_defined() -> None:
    traces = [given(0), given(2)]
    found = calibrate(by_trace(traces, [[-10, 0, 0], [10, 10, -10]]), traces)
    assert found["first_error"]["f1"] is found["best_threshold"] is found["random_f1"] is None
    assert found["first_error"]["erroneous_accuracy"] == 1.0 and found["first_error"]["correct_accuracy"] is None
    assert found["first_error"]["correct_verdicts"] == {}


# --------------------------------------------------------------------------------------------------
# driving the critic


def test_each_round_asks_anew_and_leaves_the_critic_as_it_was() -> None:
    critic, done = by_trace(TRACES, SCORES, SCORES, SCORES), []
    calibrate(critic, TRACES, repeats=3, on_done=done.append)
    assert critic.rounds == [5, 6, 7] and critic.repeat == 5
    assert done == [1] * 15


def test_the_same_seed_gives_the_same_report(tmp_path: Path) -> None:
    traces = chains(tmp_path, 80, "bench")

    def judge(rollout: Rollout, number: int) -> list[StepScore]:
        draw = random.Random(f"{rollout.id}/{number}")
        return [scored(draw.uniform(-30, 90), "step") for _ in rollout.steps]

    first, again, other = (calibrate(Planted(judge), traces, repeats=2, seed=seed) for seed in (0, 0, 1))
    for found in (first, again, other):
        del found["cost"]
    assert first == again
    assert first != other


def test_a_critic_that_stops_is_measured_on_what_it_judged() -> None:
    critic = by_trace(TRACES, SCORES, SCORES)
    critic.left = 7  # five of the first round, two of the second
    found = calibrate(critic, TRACES, repeats=2)
    assert found["stopped"] == {"message": "the budget is reached", "remedy": "raise it"}
    assert (found["judgements"], found["traces"], found["traces_given"]) == (7, 5, 5)
    assert len(found["first_error"]["f1_by_repeat"]) == 1
    assert critic.repeat == 5
    critic = by_trace(TRACES, SCORES)
    critic.left = 2
    found = calibrate(critic, TRACES)
    assert (found["traces"], found["traces_given"], found["judgements"]) == (2, 5, 2)
    json.dumps(found, allow_nan=False)


def test_traces_judged_twice_weigh_no_more_than_others() -> None:
    traces = [given(0, 1), given(-1, 1), given(-1, 1)]
    critic = by_trace(traces, [[-10], [-20], [10]], [[-10], [-20], [10]])
    critic.left = 4  # the last one twice
    found = calibrate(critic, traces, repeats=2)
    assert found["first_error"]["f1"]["value"] == pytest.approx(2 / 3)
    assert found["best_threshold"]["f1"] == pytest.approx(2 / 3)


def test_a_critic_that_stops_at_once_says_why() -> None:
    critic = by_trace(TRACES, SCORES)
    critic.left = 0
    with pytest.raises(Stopped, match="the budget is reached"):
        calibrate(critic, TRACES)


def test_no_traces_are_an_error() -> None:
    with pytest.raises(UserError, match="no labelled solutions"):
        calibrate(by_trace([], []), [])


# --------------------------------------------------------------------------------------------------
# cost


def test_cost_is_per_judgement_and_without_what_was_spent_before() -> None:
    usage = {"calls": 2, "prompt_tokens": 300, "completion_tokens": 40, "cost_usd": 0.01, "cached": 0}
    critic = by_trace(TRACES, SCORES, SCORES)
    critic.usage = usage
    cost = calibrate(critic, TRACES, repeats=2)["cost"]
    assert (cost["calls"], cost["prompt_tokens"], cost["completion_tokens"]) == (2, 300, 40)
    assert cost["cost_usd"] == pytest.approx(0.01) and cost["spent_usd"] == pytest.approx(0.1)
    assert cost["cached_frac"] == 0 and cost["seconds"] > 0


def test_what_the_cache_gave_is_priced_like_the_rest() -> None:
    before = {"calls": 1, "cached": 1, "prompt_tokens": 100, "completion_tokens": 10, "cost_usd": 0.5}
    after = {"calls": 5, "cached": 7, "prompt_tokens": 900, "completion_tokens": 50, "cost_usd": 2.5}
    cost = cost_per_trace(before, after | {"mean_latency_s": 1.5}, num_judgements=10, seconds=3.0)
    assert cost == {
        "calls": 1.0,  # 4 made and 6 from the cache
        "prompt_tokens": 200.0,
        "completion_tokens": 10.0,
        "cost_usd": 0.5,
        "cached_frac": 0.6,
        "seconds": None,
        "seconds_per_call": 1.5,
        "spent_usd": 2.0,
    }


def test_costs_that_nobody_knows_are_not_zero() -> None:
    cost = cost_per_trace({}, {"calls": 0, "cached": 8, "cost_usd": 0.0, "prompt_tokens": 0}, 8, 1.0)
    assert (cost["calls"], cost["cost_usd"], cost["prompt_tokens"], cost["seconds"]) == (1.0, None, None, None)
    unpriced = cost_per_trace({}, {"calls": 8, "cached": 0, "cost_usd": None}, 8, 4.0)
    assert (unpriced["cost_usd"], unpriced["spent_usd"], unpriced["seconds"]) == (None, None, 0.5)
    assert cost_per_trace({}, {}, 8, 4.0)["calls"] is None
