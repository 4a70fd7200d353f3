"""Signatures of responses, their diversity, and its comparison."""

from __future__ import annotations

import math

import pytest

from ssrctl.evaluation.step_patterns import FormatDiversity, compare_formats, signature, step_pattern
from ssrctl.io.records import FinalAnswer, Rollout, StepSpan


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("48*6=88\n", "equation"),
        ("1. First we add the numbers: $3 + 4 = 7$.", "number maths equation words"),
        ("Step 2: so the rest follows", "step words"),
        ("- the next item of it", "bullet words"),
        ("### Solution\nWe are done here", "heading words"),
        ("<think>Let me see", "think words"),
        ("```python\nprint(1)\n```", "code words"),
        ("| a | b |\n|---|---|", "table"),
        ("42", "other"),
        ("a" * 200_000 + "\n" * 200_000, "other"),  # in linear time
    ],
)
def test_a_step_has_the_pattern_of_its_opening_and_contents(text: str, pattern: str) -> None:
    assert step_pattern(text) == pattern


def test_a_signature_counts_runs_of_a_pattern_once() -> None:
    final = FinalAnswer(extracted="88", correct=True, way="hashes")
    long = Rollout(id="a", response="48*6=88\n88-2=86\n86+2=88\n####88", final=final)
    short = Rollout(id="b", response="48*6=88\n####88", final=final)
    assert signature(long) == signature(short) == "equation, final other (hashes)"
    assert signature(Rollout(id="c", response="")) == "empty" and signature(Rollout(id="d")) is None
    own_steps = [StepSpan(start=0, end=15, kind="step")]
    assert signature(Rollout(id="e", response="48*6=88\n88-2=86", steps=own_steps)) == "equation"


def test_diversity_of_known_counts() -> None:
    found = FormatDiversity.of(["a"] * 4 + ["b"] * 2 + ["c"] * 2)
    assert (found.num_responses, found.distinct, found.largest, found.largest_frac) == (8, 3, "a", 0.5)
    assert found.entropy == pytest.approx(1.5)
    assert FormatDiversity.of(["x"]) == FormatDiversity(1, 1, 0.0, 1.0, "x")
    assert FormatDiversity.of(["b", "a"]).largest == "a"
    assert FormatDiversity.of(list("abcdefgh")).entropy == pytest.approx(math.log2(8))


def test_a_collapse_is_found_and_equal_evaluations_are_not_told_apart() -> None:
    varied = {f"q{k}": ["a", "b", "c", "d"] for k in range(12)}
    collapsed = {f"q{k}": ["a", "a", "a", "b"] for k in range(12)} | {"other": ["z"]}
    found = compare_formats(varied, collapsed)
    assert found is not None and found["baseline"]["entropy"] == pytest.approx(2)
    assert found["entropy_difference"] == pytest.approx(found["evaluation"]["entropy"] - 2) and found["p_value"] < 0.01
    assert found["evaluation"]["largest_frac"] == 0.75
    back = compare_formats(collapsed, varied)
    assert back is not None and back["entropy_difference"] == pytest.approx(-found["entropy_difference"])
    same = compare_formats(varied, varied)
    assert same is not None and (same["entropy_difference"], same["p_value"]) == (0, 1)
    assert compare_formats(varied, {"other": ["z"]}) is None


def test_as_many_responses_of_each_problem_are_compared() -> None:
    found = compare_formats({"q": ["a", "b", "c"]}, {"q": ["a"]})
    assert found is not None and found["baseline"]["num_responses"] == found["evaluation"]["num_responses"] == 1
    assert found["entropy_difference"] == 0
