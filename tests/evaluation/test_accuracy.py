"""Accuracy over problems, and which samples belong to one problem."""

from __future__ import annotations

import itertools
import random

import pytest

from ssrctl.errors import UserError
from ssrctl.evaluation.accuracy import compare, compare_all, majority, pass_at_k, per_problem, summarise
from ssrctl.io.records import FinalAnswer, Rollout

OUTCOMES = {
    "correct": FinalAnswer(extracted="1", correct=True, way="hashes"),
    "wrong": FinalAnswer(extracted="2", correct=False, way="boxed"),
    "unparsed": FinalAnswer(extracted=None, correct=False),
    "timed_out": FinalAnswer(extracted="9^9", correct=None, way="boxed", outcome="timed_out"),
    "ungraded": FinalAnswer(extracted="1", correct=None, way="hashes"),
}


def sample(identity: str, outcome: str, question: str | None = None, **extra: object) -> Rollout:
    return Rollout(id=identity, question=question, final=OUTCOMES[outcome], extra=dict(extra))


def test_accuracy_is_a_mean_over_problems_not_over_samples() -> None:
    samples = [sample("a/0", "correct"), sample("b/0", "wrong"), sample("b/1", "wrong"), sample("b/2", "correct")]
    summary = summarise(samples, 0.95)
    assert summary["accuracy"]["value"] == pytest.approx((1 + 1 / 3) / 2)
    assert (summary["num_problems"], summary["num_samples"], summary["solved_at_least_once"]) == (2, 4, 1.0)


def test_outcomes_and_ways_are_counted() -> None:
    samples = [sample(str(number), outcome) for number, outcome in enumerate([*OUTCOMES, "wrong"])]
    summary = summarise(samples, 0.95)
    assert summary["outcomes"] == {"correct": 1, "wrong": 2, "unparsed": 1, "timed_out": 1}
    assert summary["ways"] == {"boxed": 3, "hashes": 1}
    assert summary["without_reference"] == 1 and summary["num_samples"] == 5
    assert summary["accuracy"]["value"] == pytest.approx(1 / 5), "what timed out counts as not right"
    assert summary["answered_frac"] == pytest.approx(4 / 5)


def test_what_no_sample_says_is_none() -> None:
    assert summarise([sample("a", "wrong")], 0.95)["finished_frac"] is None
    summary = summarise(
        [sample("a", "wrong", num_tokens=10, finished=True), sample("b", "wrong", finished=False)], 0.95
    )
    assert summary["finished_frac"] == 0.5 and summary["mean_response_tokens"] == 10


def test_nothing_to_compare_with_is_an_error() -> None:
    with pytest.raises(UserError, match="none of the 2 responses has a reference answer"):
        summarise([sample("a", "ungraded"), sample("b", "ungraded")], 0.95)


def test_samples_of_a_problem_are_known_by_id_and_question() -> None:
    by_id = [sample("q1/0", "correct", "1+1?"), sample("q1/1", "wrong", "1+1?"), sample("q2/0", "wrong", "2+2?")]
    assert per_problem(by_id) == {"q1": 0.5, "q2": 0.0}
    # a slash that is part of a name, and no slash at all
    folders = [sample("algebra/1", "correct", "1+1?"), sample("algebra/2", "wrong", "2+2?")]
    assert per_problem(folders) == {"algebra/1": 1.0, "algebra/2": 0.0}
    # ids that are line numbers, as in files without ids
    lines = [sample("1", "correct", "1+1?"), sample("2", "wrong", "1+1?"), sample("3", "wrong", "2+2?")]
    assert per_problem(lines) == {"1": 0.5, "3": 0.0}
    assert per_problem([sample("1", "correct"), sample("2", "wrong")]) == {"1": 1.0, "2": 0.0}


def test_the_order_of_samples_does_not_matter() -> None:
    samples = [sample(f"q{k}/{i}", ("correct", "wrong")[(k * i) % 2], f"{k % 3}?") for k in range(6) for i in range(3)]
    shuffled = random.Random(0).sample(samples, len(samples))
    assert per_problem(shuffled) == per_problem(samples) and len(per_problem(samples)) == 3


def test_differences_are_paired_by_problem() -> None:
    before = [sample("a", "correct", "1+1?"), sample("b", "wrong", "2+2?"), sample("c", "wrong", "3+3?")]
    after = [sample("b", "correct", "2+2?"), sample("a", "correct", "1+1?"), sample("d", "wrong", "4+4?")]
    found = compare(before, after, 0.95)
    assert found["difference"]["value"] == pytest.approx(0.5) and found["baseline_accuracy"]["value"] == 0.5
    assert found["unpaired_problems"] == 2
    assert compare(after, before, 0.95)["difference"]["value"] == pytest.approx(-0.5)


def test_evaluations_of_other_problems_are_not_compared() -> None:
    with pytest.raises(UserError, match="problem a has different questions"):
        compare([sample("a", "correct", "1+1?")], [sample("a", "correct", "2+2?")], 0.95)
    with pytest.raises(UserError, match="none in common"):
        compare([sample("a", "correct")], [sample("b", "correct")], 0.95)


@pytest.mark.parametrize("right", range(6))
def test_pass_at_k_is_what_all_draws_give(right: int) -> None:
    finals = [OUTCOMES["correct"]] * right + [OUTCOMES["wrong"]] * (5 - right)
    for k in range(1, 6):
        draws = list(itertools.combinations(finals, k))
        assert pass_at_k(finals, k) == pytest.approx(sum(any(f.correct for f in draw) for draw in draws) / len(draws))
    with pytest.raises(ValueError, match="pass@6 of 5"):
        pass_at_k(finals, 6)


def answers(*extracted: str | None, right: str = "1") -> list[FinalAnswer]:
    return [FinalAnswer(extracted=one, correct=one == right) for one in extracted]


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (("1", "1", "2"), 1.0),
        (("1", "2", "2"), 0.0),
        (("1", "2"), 0.5),
        (("1", "2", "3", None), 1 / 3),
        (("1", "1/2", "0.5"), 0.0),  # two forms of one wrong answer
        ((None, None), 0.0),
        (("2", "3"), 0.0),
    ],
)
def test_the_majority_and_its_ties(given: tuple[str | None, ...], value: float) -> None:
    assert majority(answers(*given)) == pytest.approx(value)


def test_groups_of_problems_and_runs() -> None:
    samples = [
        sample(f"p{number}/{place}", "correct" if place < right else "wrong", level=level, subject="algebra")
        for number, (level, right) in enumerate([(1, 4), (2, 1), (10, 0)])
        for place in range(4)
    ]
    summary = summarise(samples, 0.95, runs=2)
    assert {name: row["value"] for name, row in summary["groups"]["level"].items()} == {"1": 1.0, "2": 0.25, "10": 0.0}
    assert list(summary["groups"]) == ["level"] and list(summary["groups"]["level"]) == ["1", "2", "10"]
    assert summary["runs"]["accuracies"] == pytest.approx([(1 + 0.5) / 3, 1 / 3])
    assert summary["runs"]["sd"] == pytest.approx(0.25 / 3 * 2**0.5 / 1)
    assert summarise(samples, 0.95)["runs"] is None
    assert summary["pass_at_k"] == pytest.approx({"1": 1.25 / 3, "2": 1.5 / 3, "4": 2 / 3})


def test_repeated_ids_are_refused_unless_they_name_problems() -> None:
    with pytest.raises(UserError, match="1 ids occur more than once, 'a/0' 2 times"):
        summarise([sample("a/0", "correct"), sample("a/0", "wrong"), sample("b/0", "wrong")], 0.95)
    twice = [sample(name, outcome) for name in "ab" for outcome in ("correct", "wrong")]
    assert summarise(twice, 0.95)["accuracy"]["value"] == 0.5
    with pytest.raises(UserError, match="more than once"):
        summarise([*twice, sample("a", "wrong")], 0.95)


def test_several_evaluations_are_compared_over_what_all_have() -> None:
    problems = [f"p{number}" for number in range(12)]
    worse = [sample(f"{name}/0", "wrong") for name in problems]
    better = [sample(f"{name}/0", "correct") for name in problems[:11]]
    same = [sample(f"{name}/0", "wrong") for name in problems[1:]]
    first, second = compare_all([worse, better, same], 0.95)
    assert (first["difference"]["value"], first["difference"]["num_problems"]) == (1.0, 10)
    assert first["difference"]["p_value"] == pytest.approx(2 / 2**10)
    assert first["difference"]["p_value_holm"] == pytest.approx(4 / 2**10)
    assert second["difference"]["p_value_holm"] == 1.0
    assert first["unpaired_problems"] == 2 and first["accuracy"]["value"] == 1.0
    with pytest.raises(UserError, match="none in common"):
        compare_all([worse[:1], worse[1:]], 0.95)


def test_formats_are_in_the_summary_and_compared() -> None:
    def of(response: str) -> list[Rollout]:
        return [
            Rollout(id=f"q{k}/{i}", question=f"{k}?", response=response, final=OUTCOMES["correct"])
            for k in range(8)
            for i in range(2)
        ]

    before = [*of("1+1=2\n#### 2")[:8], *of("We add one and one.\n#### 2")[8:]]
    assert summarise(before, 0.95)["formats"]["entropy"] == pytest.approx(1)
    assert summarise([sample("a", "wrong")], 0.95)["formats"] is None
    found = compare(before, of("1+1=2\n#### 2"), 0.95)["formats"]
    assert found["entropy_difference"] == pytest.approx(-1) and found["evaluation"]["largest_frac"] == 1


def test_runs_need_numbered_responses() -> None:
    numbered = [sample(f"q{k}/{i}", ("correct", "wrong")[i == 1], f"{k}?") for k in range(3) for i in range(3)]
    assert summarise(numbered, 0.95, runs=3)["runs"]["accuracies"] == [1, 0, 1]
    for bad in (numbered[:-1], [sample("a", "correct"), sample("b", "wrong")]):
        with pytest.raises(UserError, match="3 runs need the ids PROBLEM/0 to PROBLEM/N"):
            summarise(bad, 0.95, runs=3)
