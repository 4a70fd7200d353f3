"""Labelled solutions: ProcessBench's form, our own records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reference.labelled_chains import as_record, labelled_chains

from ssrctl.errors import UserError
from ssrctl.io.labelled import Labelled, read_labelled
from ssrctl.io.records import Rollout

BENCH = {
    "id": "hand-0",
    "generator": "by hand",
    "problem": "Mia has 3 bags of 4 apples and eats 2. How many are left?",
    "steps": ["3 bags of 4 apples are 3 + 4 = 7 apples.", "She eats 2:\n\n7 - 2 = 5.", "The answer is 5."],
    "final_answer_correct": False,
    "label": 0,
}
RECORD = {
    "id": "q/1",
    "question": "2+3+4=?",
    "answer": "9",
    "response": "2+3=5\n5+4=9\n#### 9",
    "steps": [{"start": 0, "end": 6}, {"start": 6, "end": 12}, {"start": 12, "end": 18, "kind": "final"}],
    "scores": [{"score": 1, "reward": 0.01}] * 3,
    "final": {"extracted": "9", "correct": True},
    "label": -1,
}


def written(folder: Path, *rows: Any) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_one(folder: Path, row: Any) -> Labelled:
    (found,) = read_labelled(written(folder, row))
    return found


def test_processbench_rows_keep_their_steps_and_labels(tmp_path: Path) -> None:
    found = read_one(tmp_path, BENCH)
    rollout = found.rollout
    assert (rollout.id, rollout.question, found.label, found.final_correct) == ("hand-0", BENCH["problem"], 0, False)
    assert rollout.response == "\n\n".join(BENCH["steps"])
    assert [(step.start, step.end, step.kind) for step in rollout.steps] == [
        (0, 42, "step"),
        (42, 67, "step"),
        (67, 83, "step"),
    ]
    assert [rollout.step_text(index).removesuffix("\n\n") for index in range(3)] == BENCH["steps"]
    assert rollout.extra == {"generator": "by hand"}


def test_records_keep_their_spans(tmp_path: Path) -> None:
    found = read_one(tmp_path, RECORD)
    assert (found.label, found.final_correct, found.rollout.answer) == (-1, True, "9")
    assert [step.kind for step in found.rollout.steps] == ["step", "step", "final"]


@pytest.mark.parametrize("row", [BENCH, RECORD], ids=["bench", "record"])
def test_nothing_that_the_critic_sees_gives_the_label_away(tmp_path: Path, row: dict[str, Any]) -> None:
    rollout = read_one(tmp_path, row).rollout
    assert (rollout.scores, rollout.final, rollout.advantages) == (None, None, None)
    assert not {"label", "final_answer_correct", "final", "scores"} & rollout.to_dict().keys()


def test_forms_may_be_mixed_and_ids_left_out(tmp_path: Path) -> None:
    without_id = {key: value for key, value in BENCH.items() if key != "id"}
    found = list(read_labelled(written(tmp_path, RECORD, without_id)))
    assert [mine.rollout.id for mine in found] == ["q/1", "2"]


def test_a_json_list_is_read_like_lines(tmp_path: Path) -> None:
    path = tmp_path / "gsm8k.json"
    rows = [BENCH, {key: value for key, value in BENCH.items() if key != "id"}]
    path.write_text("\n " + json.dumps(rows, indent=2))
    found = list(read_labelled(path))
    assert found[0] == read_one(tmp_path, BENCH)
    assert found[1].rollout.id == "row 2"


@pytest.mark.parametrize(
    ("row", "outcome"),
    [
        (RECORD | {"final": None}, None),
        (RECORD | {"final": {"extracted": None, "correct": None}}, None),
        (RECORD | {"final": None, "final_answer_correct": False}, False),
        (RECORD | {"final_answer_correct": False}, False),
        (BENCH | {"final_answer_correct": None}, None),
    ],
)
def test_whether_the_answer_is_right_may_be_unknown(tmp_path: Path, row: dict[str, Any], outcome: bool | None) -> None:
    assert read_one(tmp_path, row).final_correct is outcome


@given(st.lists(st.text(st.characters(exclude_categories=[])).filter(str.strip), min_size=1, max_size=6))
def test_spans_cover_any_response(tmp_path_factory: pytest.TempPathFactory, steps: list[str]) -> None:
    found = read_one(tmp_path_factory.getbasetemp(), BENCH | {"steps": steps})
    rollout = found.rollout
    # The record's own check of spans, and every text in its place.
    again = Rollout.from_dict(rollout.to_dict(), where="here:1", needs=("steps",))
    assert again.steps == rollout.steps
    assert [rollout.step_text(index) for index in range(len(steps))] == [
        *(step + "\n\n" for step in steps[:-1]),
        steps[-1],
    ]


def test_the_generator_of_the_tests_gives_the_same_in_both_forms(tmp_path: Path) -> None:
    rows = labelled_chains(40, seed=3)
    bench = list(read_labelled(written(tmp_path, *rows)))
    records = list(read_labelled(written(tmp_path, *map(as_record, rows))))
    for row, one, other in zip(rows, bench, records, strict=True):
        assert one.label == other.label == row["label"]
        assert one.final_correct == other.final_correct
        assert one.rollout.extra["modulus"] == other.rollout.extra["modulus"] == 100
        assert len(other.rollout.steps) == len(one.rollout.steps) + 1
    assert {row["label"] for row in rows} > {-1, 0}


REFUSED = {
    "label 3 is out of range for 3 steps": BENCH | {"label": 3},
    "label -2 is out of range for 3 steps": BENCH | {"label": -2},
    "label 4 is out of range": RECORD | {"label": 4},
    "'label' must be a whole number, found true": BENCH | {"label": True},
    "'label' must be a whole number, found 1.0": BENCH | {"label": 1.0},
    "'label' must be a whole number, found \"1\"": BENCH | {"label": "1"},
    "'label' must be a whole number, found nothing": BENCH | {"label": None},
    "at least one step, found an empty list": BENCH | {"steps": []},
    "at least one step, found nothing": {"problem": "1+1=?", "label": -1},
    "at least one step, found str": BENCH | {"steps": "3 + 4 = 7"},
    "only texts or only spans, found int, str": BENCH | {"steps": ["a", 2, "c"]},
    "only texts or only spans, found dict, str": BENCH | {"steps": ["a", {"start": 0, "end": 1}, "c"]},
    "step 1 is blank": BENCH | {"steps": ["a", " \n", "c"]},
    "neither 'problem' nor 'question' is there": {"steps": ["a"], "label": 0},
    "'question' must be a valid string, found 5": BENCH | {"problem": 5},
    "must be true, false or null, found 1": BENCH | {"final_answer_correct": 1},
    'must be true, false or null, found "yes"': RECORD | {"final": {"correct": "yes"}},
    "2 labels for 3 steps": RECORD | {"labels": [True, True]},
    "label 0 must be true, false or null": RECORD | {"labels": ["+", True, True]},
    "label -1 and labels contradict each other: the first false is 1": RECORD | {"labels": [True, False, None]},
    "'response' is missing": {key: value for key, value in RECORD.items() if key != "response"},
    "the steps end at 12, the response has 18": RECORD | {"steps": RECORD["steps"][:2]},
    "'steps[0].end' is missing": RECORD | {"steps": [{"start": 0, "stop": 18}]},
    "expected a json object, found list": [1],
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("form", ["lines", "list"])
def test_bad_rows_are_refused_by_line(tmp_path: Path, message: str, form: str) -> None:
    path = written(tmp_path, BENCH, REFUSED[message])
    if form == "list":
        path.write_text(json.dumps([BENCH, REFUSED[message]]))
    with pytest.raises(UserError) as caught:
        list(read_labelled(path))
    assert message in caught.value.message
    assert caught.value.message.startswith(f"{path}:2: " if form == "lines" else f"{path}:row 2: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no records in it"),
        (b"[]", "no records in it"),
        (b"[" * 100_000, "not valid json"),
        (b'[{"label": 1}', "not valid json"),
        (b'[{"label": NaN}]', "not valid json: NaN"),
        (b'["\xff"]', "not UTF-8"),
        (b'{"label": 1', "not valid json"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_bad_files_are_one_clear_line(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "file.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_labelled(path))
    with pytest.raises(UserError, match="not found"):
        list(read_labelled(tmp_path / "absent.jsonl"))
