"""Rollouts to and from jsonl rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ssrctl.errors import UserError
from ssrctl.io.jsonl import dump_line, write_jsonl
from ssrctl.io.records import FinalAnswer, Rollout, StepScore, StepSpan, read_rollouts

WHERE = "file.jsonl:7"


def full() -> dict[str, Any]:
    return {
        "id": "q17/3",
        "question": "6*7?",
        "answer": "42",
        "prompt": "Q: 6*7?",
        "response": "6*7=42. 42",
        "steps": [{"start": 0, "end": 8, "kind": "step"}, {"start": 8, "end": 10, "kind": "final"}],
        "scores": [
            {"score": 85, "reward": 0.85, "rationale": "fine", "error": None},
            {"score": None, "reward": None, "rationale": None, "error": "timeout"},
        ],
        "final": {"extracted": "42", "correct": True, "way": "hashes", "outcome": "correct"},
        "advantages": [0.4, None],
        "colour": {"nested": [1, None]},
        "extra": "a column of the user's that is called so",
    }


def parse(row: dict[str, Any], needs: tuple[str, ...] = ()) -> Rollout:
    return Rollout.from_dict(row, where=WHERE, needs=needs)


def test_there_and_back_with_unknown_fields() -> None:
    rollout = parse(full())
    assert rollout.to_dict() == full()
    assert json.loads(json.dumps(rollout.to_dict())) == full()
    assert rollout.steps == [StepSpan(start=0, end=8), StepSpan(start=8, end=10, kind="final")]
    assert rollout.scores is not None and rollout.scores[1] == StepScore(score=None, reward=None, error="timeout")
    assert rollout.final == FinalAnswer(extracted="42", correct=True, way="hashes", outcome="correct")
    assert rollout.extra.keys() == {"colour", "extra"}


@pytest.mark.parametrize(
    ("extracted", "correct", "outcome"),
    [
        ("42", True, "correct"),
        ("42", False, "wrong"),
        (None, False, "unparsed"),
        ("42", None, None),
        (None, None, None),
    ],
)
def test_outcomes_of_earlier_versions_follow_from_the_other_fields(
    extracted: str | None, correct: bool | None, outcome: str | None
) -> None:
    final = parse({"final": {"extracted": extracted, "correct": correct}}).final
    assert final is not None and final.outcome == outcome and final.correct is correct and final.way is None


def test_a_comparison_that_was_given_up_is_no_verdict() -> None:
    row = {"extracted": "9^9^9", "correct": None, "way": "boxed", "outcome": "timed_out"}
    assert parse({"id": "a", "final": row}).to_dict() == {"id": "a", "final": row}


def test_fields_that_no_stage_filled_are_left_out() -> None:
    assert parse({"id": "a", "response": "x"}).to_dict() == {"id": "a", "response": "x"}


def test_a_step_is_cut_by_characters() -> None:
    rollout = parse(full())
    assert [rollout.step_text(i) for i in range(2)] == ["6*7=42. ", "42"]
    wide = parse({"response": "ü\U0001f600x", "steps": [{"start": 0, "end": 2}, {"start": 2, "end": 3}]})
    assert wide.step_text(1) == "x"


def test_ids() -> None:
    assert parse(full()).group == "q17"
    assert parse({"id": "a/b/3"}).group == "a/b"
    assert parse({"id": 17}).id == "17" and parse({"id": 0}).id == "0"
    assert parse({"response": "x"}).id == "7", "a line without an id goes by its number"


def test_numeric_answers_become_text() -> None:
    assert parse({"answer": 42}).answer == "42"
    assert parse({"answer": 0}).answer == "0"


def test_needed_fields() -> None:
    with pytest.raises(UserError, match=r"file.jsonl:7: field 'steps' is missing") as caught:
        parse({"response": "x", "steps": None}, needs=("response", "steps"))
    assert caught.value.remedy == "run `ssrctl segment` first"
    assert parse({"response": ""}, needs=("response",)).response == ""


def spans(*ends: tuple[int, int]) -> list[dict[str, int]]:
    return [{"start": start, "end": end} for start, end in ends]


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (spans((0, 3), (4, 10)), "step 1 spans 4-10, expected it to start at 3"),
        (spans((0, 3), (2, 10)), "step 1 spans 2-10"),
        (spans((1, 10)), "step 0 spans 1-10, expected it to start at 0"),
        (spans((0, 0), (0, 10)), "step 0 spans 0-0"),
        (spans((0, 9)), "the steps end at 9, the response has 10 characters"),
        (spans((0, 11)), "the steps end at 11, the response has 10 characters"),
    ],
)
def test_spans_must_cover_the_response(steps: list[dict[str, int]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse({"response": "0123456789", "steps": steps})


def test_spans_need_a_response() -> None:
    with pytest.raises(UserError, match="no response"):
        parse({"steps": spans((0, 1))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"response": 5}, "'response' must be a valid string, found 5"),
        ({"question": ["x"]}, r"'question' must be a valid string, found \['x'\]"),
        ({"steps": {"start": 0}}, "'steps' must be a valid list, found {'start': 0}"),
        ({"steps": [[0, 8]]}, r"'steps\[0\]' must be a dictionary .* found \[0, 8\]"),
        ({"steps": [{"start": 0}]}, r"'steps\[0\].end' is missing"),
        ({"steps": [{"start": 0.0, "end": 10}]}, r"'steps\[0\].start' must be a valid integer, found 0.0"),
        ({"steps": [{"start": 0, "end": True}]}, r"'steps\[0\].end' must be a valid integer, found True"),
        (
            {"steps": [{"start": 0, "end": 10, "kind": "middle"}]},
            r"'steps\[0\].kind' must be 'step' or 'final', found 'middle'",
        ),
        ({"steps": [{"start": 0, "end": 10, "colour": 1}]}, r"'steps\[0\].colour' is not known"),
        ({"scores": [{"score": 1, "reward": 0.01}]}, "'scores' has 1 entries for 2 steps"),
        ({"scores": [{"score": "1", "reward": 0.01}] * 2}, r"'scores\[0\].score' must be a valid number"),
        ({"scores": [{"score": True, "reward": 0.01}] * 2}, r"'scores\[0\].score' must be a valid number"),
        ({"scores": [{"score": 1}] * 2}, r"'scores\[0\].reward' is missing"),
        ({"steps": None}, "'scores' has 2 entries for 0 steps"),
        ({"final": "42"}, "'final' must be a dictionary"),
        ({"final": {"extracted": "42", "correct": "yes"}}, "'final.correct' must be a valid boolean, found 'yes'"),
        ({"final": {"extracted": "42", "correct": True, "outcome": "right"}}, "'final.outcome' must be"),
        ({"final": {"extracted": "42", "correct": True, "outcome": ["correct"]}}, "'final.outcome' must be"),
        ({"final": {"extracted": "42", "correct": True, "outcome": "wrong"}}, "wrong contradicts 'correct' True"),
        ({"final": {"extracted": "42", "correct": False, "outcome": "timed_out"}}, "timed_out contradicts"),
        ({"final": {"extracted": "42", "correct": None, "outcome": "correct"}}, "correct contradicts"),
        ({"advantages": ["1", None]}, r"'advantages\[0\]' must be a valid number, found '1'"),
        ({"advantages": [True, None]}, r"'advantages\[0\]' must be a valid number, found True"),
    ],
)
def test_wrong_types_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse(full() | change)
    assert str(caught.value).startswith(WHERE)


def test_a_column_called_like_our_field_does_not_win() -> None:
    rollout = Rollout(id="a", response="ours", extra={"response": "theirs", "id": "b", "kept": 1})
    assert rollout.to_dict() == {"id": "a", "response": "ours", "kept": 1}


def test_reading_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [full(), {"response": "x"}])
    assert [r.id for r in read_rollouts(path)] == ["q17/3", "2"]
    with pytest.raises(UserError, match=rf"{path}:2: field 'scores' is missing"):
        list(read_rollouts(path, needs=("scores",)))


def test_a_line_is_written_as_it_was_read() -> None:
    row = full() | {
        "scores": [
            {"score": 1, "reward": 1.0, "rationale": "\ud800", "error": None},
            {"score": 0.1, "reward": -0.0, "rationale": None, "error": None},
        ],
        "advantages": [10**30, 1e-300],
        "extra": "\ud800",
    }
    assert dump_line(parse(row).to_dict()) == dump_line(row)
