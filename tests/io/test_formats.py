"""Formats of other tools: each is read by its data set's field names, written, and read again; what is refused."""

from __future__ import annotations

import copy
import csv
import gzip
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from ssrctl.cli import main
from ssrctl.errors import UserError
from ssrctl.io.formats.registry import FORMATS, WRITTEN, Writer, read_formatted
from ssrctl.io.labelled import read_labelled
from ssrctl.io.records import FinalAnswer, Rollout, StepScore, StepSpan

QUESTION = "Mia has 3 bags of 4 apples and eats 2. How many are left?"
STEPS = ["3 bags of 4 apples are 12 apples.", "She eats 2: 12 - 2 = 9.", "The answer is 9."]


def completion(text: str, rating: int | None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": False}


ROWS: dict[str, dict[str, Any]] = {
    "ssrctl": {"id": "q/0", "question": QUESTION, "answer": "10", "response": STEPS[1], "mine": 5},
    "processbench": {
        "id": "gsm8k-7",
        "generator": "by hand",
        "problem": QUESTION,
        "steps": STEPS,
        "final_answer_correct": False,
        "label": 1,
    },
    "prm800k": {
        "labeler": "x",
        "timestamp": "2022-07-17T16:56:51",
        "generation": 9,
        "is_quality_control_question": False,
        "is_initial_screening_question": False,
        "question": {"problem": QUESTION, "ground_truth_solution": "...", "ground_truth_answer": "10"},
        "label": {
            "steps": [
                {
                    "completions": [completion("No.", -1), completion(STEPS[0], 1)],
                    "human_completion": None,
                    "chosen_completion": 1,
                },
                {
                    "completions": [completion("Hm.", -1)],
                    "human_completion": completion("She eats two.", None),
                    "chosen_completion": None,
                },
                {"completions": [completion("Fine.", 0)], "human_completion": None, "chosen_completion": 0},
                {"completions": [completion(STEPS[1], -1)], "human_completion": None, "chosen_completion": None},
            ],
            "total_time": 1,
            "finish_reason": "found_error",
        },
    },
    "prmbench": {
        "idx": "circular_1",
        "original_question": "?",
        "modified_question": QUESTION,
        "question": QUESTION,
        "original_process": ["a"],
        "modified_process": STEPS,
        "modified_steps": [2],
        "error_steps": [2],
        "reason": "arithmetic",
        "classification": "circular",
        "ground_truth": "10",
    },
    "stepwise": {"prompt": QUESTION, "completions": STEPS, "labels": [True, False, False]},
    "math-shepherd": {
        "input": f"{QUESTION} Step 1: {STEPS[0]} ки\nStep 2: {STEPS[1]} ки",
        "label": f"{QUESTION} Step 1: {STEPS[0]} +\nStep 2: {STEPS[1]} -",
        "task": "GSM8K",
    },
    "lm-eval": {
        "doc_id": 4,
        "doc": {"question": QUESTION, "answer": "12-2=10\n#### 10"},
        "target": "12-2=10\n#### 10",
        "arguments": {"gen_args_0": {"arg_0": f"Question: {QUESTION}\nAnswer:", "arg_1": {"until": ["\n\n"]}}},
        "resps": [["It is 10.", "It is 9."]],
        "filtered_resps": ["10"],
        "filter": "strict-match",
        "doc_hash": "ab",
        "exact_match": 1.0,
    },
    "lighteval": {
        "doc": {
            "query": QUESTION,
            "choices": ["9", "12-2=10\n#### 10"],
            "gold_index": 1,
            "id": "3",
            "specific": {"level": 2},
        },
        "model_response": {"text": ["It is 10.", "It is 9."], "output_tokens": [[1, 2, 3], [4]]},
        "metric": {"em": 1.0},
    },
    "inspect": {
        "id": "q",
        "epoch": 2,
        "input": [{"role": "system", "content": "Think."}, {"role": "user", "content": QUESTION}],
        "target": ["10", "ten"],
        "output": {
            "choices": [
                {
                    "message": {
                        "role": "assistant",
                        "content": [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "It is 10."}],
                    },
                    "stop_reason": "max_tokens",
                }
            ],
            "usage": {"output_tokens": 7},
        },
        "metadata": {"level": 2, "answer": "not the reference"},
        "scores": {"match": {"value": "C"}},
    },
    "verl": {"input": f"user\n{QUESTION}\nassistant\n", "output": "It is 10.", "gts": "10", "score": 1.0, "step": 3},
}
# Step texts and labels of the labelled formats.
LABELS: dict[str, tuple[list[str], list[bool | None], int]] = {
    "processbench": (STEPS, [True, False, None], 1),
    "prm800k": ([STEPS[0], "She eats two.", "Fine.", STEPS[1]], [True, True, True, False], 3),
    "prmbench": (STEPS, [True, False, True], 1),
    "stepwise": (STEPS, [True, False, False], 1),
    "math-shepherd": ([f"Step 1: {STEPS[0]}", f"Step 2: {STEPS[1]}"], [True, False], 1),
}


def written(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path, name: str = "auto") -> list[Rollout]:
    return list(read_formatted(path, name))


def again(path: Path, name: str, rollouts: list[Rollout]) -> list[Rollout]:
    """The rollouts after they were written in a format and read again."""
    writer = Writer(name)
    return read(written(path, *(row for rollout in rollouts for row in writer.rows(rollout))), name)


@pytest.mark.parametrize("name", WRITTEN)
def test_each_format_is_told_by_its_fields_and_survives_a_round_trip(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / "in.jsonl", ROWS[name])
    found = read(path)
    assert found == read(path, name)
    assert all(QUESTION in (rollout.question or "") for rollout in found)
    back = again(tmp_path / "out.jsonl", name, found)
    for one, other in zip(found, back, strict=True):
        assert (one.question, one.answer, one.response, one.steps) == (
            other.question,
            other.answer,
            other.response,
            other.steps,
        )
        assert one.extra == other.extra | ({"filtered_resps": ["10"]} if name == "lm-eval" else {})


@pytest.mark.parametrize("name", LABELS)
def test_labels_are_those_of_the_data_set(tmp_path: Path, name: str) -> None:
    steps, labels, first = LABELS[name]
    (found,) = read_labelled(written(tmp_path / "in.jsonl", ROWS[name]))
    assert [found.rollout.step_text(i).strip() for i in range(len(steps))] == steps
    assert (list(found.step_labels), found.label) == (labels, first)
    assert not {"label", "labels"} & found.rollout.to_dict().keys()


def test_what_other_formats_say_beside_the_steps(tmp_path: Path) -> None:
    by_name = {name: read(written(tmp_path / "in.jsonl", row)) for name, row in ROWS.items()}
    assert [r.answer for r in by_name["prm800k"] + by_name["prmbench"] + by_name["verl"]] == ["10"] * 3
    assert by_name["prmbench"][0].id == "circular_1"
    assert [(r.id, r.response, r.answer) for r in by_name["lm-eval"]] == [
        ("4/0", "It is 10.", "10"),
        ("4/1", "It is 9.", "10"),
    ]
    assert by_name["lm-eval"][0].prompt == f"Question: {QUESTION}\nAnswer:"
    assert by_name["verl"][0].prompt == ROWS["verl"]["input"]
    # Documents come once per filter, with the same responses.
    other = ROWS["lm-eval"] | {"filter": "flexible-extract"}
    assert len(read(written(tmp_path / "two.jsonl", ROWS["lm-eval"], other))) == 2
    # verl's main_generation: messages, and several responses a row.
    row = {
        "prompt": [{"role": "user", "content": QUESTION}],
        "responses": ["a", "b"],
        "reward_model": {"ground_truth": "10"},
    }
    assert [(r.id, r.question, r.response, r.answer) for r in read(written(tmp_path / "g.jsonl", row))] == [
        ("1/0", QUESTION, "a", "10"),
        ("1/1", QUESTION, "b", "10"),
    ]


def test_logs_of_other_tools(tmp_path: Path) -> None:
    by_name = {name: read(written(tmp_path / "in.jsonl", ROWS[name])) for name in ("lighteval", "inspect")}
    assert [(r.id, r.question, r.response, r.answer, r.extra["num_tokens"]) for r in by_name["lighteval"]] == [
        ("3/0", QUESTION, "It is 10.", "10", 3),
        ("3/1", QUESTION, "It is 9.", "10", 1),
    ]
    (sample,) = by_name["inspect"]
    assert (sample.id, sample.question, sample.answer) == ("q/1", QUESTION, ("10", "ten"))
    assert sample.response == "<think>hm</think>\nIt is 10."
    assert sample.extra == {"level": 2, "finished": False, "num_tokens": 7}


def archive(path: Path, samples: list[dict[str, Any]], *, zstd: bool) -> Path:
    """A log as inspect_ai writes it; with zstd as method 93, which zipfile cannot write before Python 3.14."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("header.json", "{}")
        for sample in samples:
            part = zipfile.ZipInfo(f"samples/{sample['id']}_epoch_{sample['epoch']}.json")
            data = json.dumps(sample).encode()
            made.writestr(part, zstandard.compress(data) if zstd else data)
            part.file_size, part.CRC = (len(data), zlib.crc32(data)) if zstd else (part.file_size, part.CRC)
            part.compress_type = 93 if zstd else part.compress_type
    return path


@pytest.mark.parametrize("zstd", [False, True])
def test_archives_of_inspect_ai(tmp_path: Path, capsys: pytest.CaptureFixture[str], zstd: bool) -> None:
    failed = ROWS["inspect"] | {"epoch": 1, "error": {"message": "429"}, "output": {"choices": []}}
    path = archive(tmp_path / "log.eval", [ROWS["inspect"], failed], zstd=zstd)
    as_json = tmp_path / "log.json"
    as_json.write_text(json.dumps({"eval": {}, "samples": [ROWS["inspect"], failed], "reductions": [{}]}, indent=2))
    assert read(path) == read(as_json) == read(written(tmp_path / "in.jsonl", ROWS["inspect"]))
    assert capsys.readouterr().err.count("1 samples ended in an error without a response") == 2
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    with pytest.raises(UserError, match="is not a whole log of inspect_ai"):
        read(path)
    path.write_bytes(whole.replace(whole[100:110], b"\0" * 10, 1))
    with pytest.raises(UserError, match="is not a whole log of inspect_ai"):
        read(path)


def test_details_of_lighteval(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "details.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([ROWS["lighteval"]]), path)
    assert read(path) == read(written(tmp_path / "in.jsonl", ROWS["lighteval"]))
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UserError, match="not a whole parquet file"):
        read(path)


def test_lists_tables_and_gzip_are_read_alike(tmp_path: Path) -> None:
    row = {"id": "a", "question": "1+1=?", "response": "2"}
    (tmp_path / "a.json").write_text(json.dumps([row], indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(json.dumps(row).encode()))
    with (tmp_path / "a.csv").open("w") as stream:
        table = csv.DictWriter(stream, list(row))
        table.writeheader()
        table.writerow(row)
    assert read(tmp_path / "a.json") == read(tmp_path / "a.jsonl.gz") == read(tmp_path / "a.csv")


def test_an_unrated_step_leaves_a_solution_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.loads(json.dumps(ROWS["prm800k"]))
    row["label"]["steps"][0]["completions"][1]["rating"] = None
    path = written(tmp_path / "in.jsonl", row, ROWS["prm800k"])
    assert len(list(read_labelled(path))) == 1
    assert "1 solutions lack a label" in capsys.readouterr().err


REFUSED = {
    "the row fits the formats processbench and stepwise": ROWS["stepwise"]
    | {"steps": STEPS, "label": -1, "problem": "?"},
    "the row fits the formats ssrctl and verl": ROWS["verl"] | {"response": "x"},
    "2 labels for 3 steps": ROWS["stepwise"] | {"labels": [True, False]},
    'label 1 must be true, false or null, found "+"': ROWS["stepwise"] | {"labels": [True, "+", True]},
    "field 'error_steps' has 4 for 3 steps": ROWS["prmbench"] | {"error_steps": [4]},
    "fields 'input' and 'label' differ at step 2": ROWS["math-shepherd"]
    | {"label": ROWS["math-shepherd"]["label"].replace("She eats", "She ate")},
    "no 'Step 1:'": {"input": "a ки", "label": "a +"},
    "text after the last ки": {"input": "q Step 1: a ки b", "label": "q Step 1: a + b"},
    "has the rating 2": ROWS["prm800k"]
    | {"label": {"steps": [{"completions": [completion("x", 2)], "chosen_completion": 0}]}},
    "step 0 has no completion 0": ROWS["prm800k"] | {"label": {"steps": [{"completions": []}]}},
    "no steps": ROWS["prm800k"] | {"label": {"steps": []}},
    "'doc.gold_index' must number the 2 choices": ROWS["lighteval"]
    | {"doc": ROWS["lighteval"]["doc"] | {"gold_index": 2}},
    "'model_response.text' holds no generated text": ROWS["lighteval"] | {"model_response": {"text": []}},
    "'epoch' must be a whole number from 1 on, found 0": ROWS["inspect"] | {"epoch": 0},
    "holds no generated text": ROWS["lm-eval"] | {"resps": [[["-1.5", "True"]]]},
}


@pytest.mark.parametrize("message", REFUSED)
def test_bad_rows_are_one_line(tmp_path: Path, message: str) -> None:
    path = written(tmp_path / "in.jsonl", REFUSED[message])
    with pytest.raises(UserError) as caught:
        read(path)
    assert message in caught.value.message
    assert caught.value.message.startswith(f"{path}:1: ")
    assert "\n" not in str(caught.value)


JUNK: tuple[Any, ...] = (None, {}, [], -1, True, "", "ки +", [{}], {"a": 1}, 2.5)


def places(value: Any, *path: Any) -> Iterator[tuple[Any, ...]]:
    """The way to every value within a row."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield (*path, key)
        yield from places(value[key], *path, key)


@pytest.mark.parametrize("name", FORMATS)
def test_any_value_in_any_place_is_read_or_refused(tmp_path: Path, name: str) -> None:
    refused = 0
    for number, path in enumerate(places(ROWS[name])):
        for junk in JUNK[number % 2 :: 2]:
            row = copy.deepcopy(ROWS[name])
            inner: Any = row
            for key in path[:-1]:
                inner = inner[key]
            inner[path[-1]] = copy.deepcopy(junk)
            try:
                for rollout in read(written(tmp_path / "in.jsonl", row), name):
                    for other in WRITTEN:
                        list(Writer(other).rows(rollout))
            except UserError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused


def test_a_named_format_must_fit(tmp_path: Path) -> None:
    path = written(tmp_path / "in.jsonl", ROWS["verl"])
    with pytest.raises(UserError, match="not a row of the format stepwise, which has the fields prompt, completions"):
        read(path, "stepwise")


# --------------------------------------------------------------------------------------------------
# labels from scores


def scored(*scores: float | None) -> Rollout:
    texts = ["a\n", "b\n", "c"][: len(scores)]
    spans = [StepSpan(start=2 * i, end=2 * i + len(text)) for i, text in enumerate(texts)]
    spans[-1].kind = "final"
    made = [StepScore(score=score, reward=None) for score in scores]
    final = FinalAnswer(extracted="c", correct=True)
    return Rollout(id="q/0", question="?", response="".join(texts), steps=spans, scores=made, final=final)


def test_scores_become_labels_by_the_threshold() -> None:
    """A final answer's 60 is 20 on the scale of steps."""
    for right_from, labels in ((0, [True, False, True]), (20, [True, False, True]), (20.5, [True, False, False])):
        (row,) = Writer("stepwise", right_from).rows(scored(80, -1, 60))
        assert row == {"prompt": "?", "completions": ["a", "b", "c"], "labels": labels}
    (row,) = Writer("processbench").rows(scored(80, -1, None))
    assert (row["label"], row["final_answer_correct"]) == (1, True)  # what follows the first error has no say
    (row,) = Writer("math-shepherd").rows(scored(80, -1, 60))
    assert row["label"] == "? Step 1: a +\nStep 2: b -\nStep 3: c +"


def test_a_missing_score_is_no_label() -> None:
    writer = Writer("stepwise")
    assert list(writer.rows(scored(80, None, 60))) == []
    assert writer.summary() == {"left_out": 1, "dropped": {}}
    with pytest.raises(UserError, match="none of 1 responses has a label for every step"):
        writer.check()


def run(*args: str) -> int:
    return main([str(arg) for arg in args])


def test_segment_converts_and_keeps_labelled_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, ours, back = (tmp_path / name for name in ("in.jsonl", "ours.jsonl", "back.jsonl"))
    written(source, ROWS["prmbench"])
    assert run("segment", source, "-o", ours) == 0
    (row,) = map(json.loads, ours.read_text().splitlines())
    assert len(row["steps"]) == 3 and row["labels"] == [True, False, True]
    assert run("segment", ours, "--output-format", "stepwise", "-o", back) == 0
    (row,) = map(json.loads, back.read_text().splitlines())
    assert (row["prompt"], row["completions"], row["labels"]) == (QUESTION, STEPS, [True, False, True])
    capsys.readouterr()
    assert run("segment", written(source, ROWS["verl"]), "--output-format", "stepwise", "-o", ours) == 2
    assert "none of 1 responses has a label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "target", "dropped"),
    [
        ("prm800k", "stepwise", {"answer": 1}),
        ("prmbench", "math-shepherd", {"answer": 1, "id": 1}),
        ("processbench", "verl", {"final_answer_correct": 1, "label": 1, "labels": 1, "steps": 1}),
        ("processbench", "processbench", {}),
    ],
)
def test_what_a_format_has_no_place_for_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], source: str, target: str, dropped: dict[str, int]
) -> None:
    path, out = written(tmp_path / "in.jsonl", ROWS[source]), tmp_path / "out.jsonl"
    assert main(["segment", str(path), "--output-format", target, "-o", str(out), "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["dropped"] == dropped
    assert "".join(f"{name} ({count}), " for name, count in dropped.items())[:-2] in shown.err
    assert ("no place" in shown.err) == bool(dropped)
    assert [one.question for one in read(out, target)] == [QUESTION]


def test_critic_makes_training_data_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompt, response = "<bos>55-7*8=?\n", "55-7=48\n48*8=84\n####84"
    steps, out = tmp_path / "steps.jsonl", tmp_path / "prm.jsonl"
    written(steps, {"id": "q/0", "question": "55-7*8=?", "answer": "84", "prompt": prompt, "response": response})
    assert run("segment", steps, "-o", steps) == 0
    command = [
        "critic",
        steps,
        "--critic",
        "rollout",
        "--critic-rollouts",
        "2",
        "--rollout-value",
        "value",
        "--device",
        "cpu",
    ]
    command += ["--max-new-tokens", "32", "--wrong-below", "-99", "--output-format", "stepwise", "-o", out, "--json"]
    capsys.readouterr()
    assert run(*command) == 0
    (row,) = map(json.loads, out.read_text().splitlines())
    assert row["completions"] == response.split("\n") and len(row["labels"]) == 3
    assert all(type(label) is bool for label in row["labels"])
    assert json.loads(capsys.readouterr().out)["left_out"] == 0
    before = out.read_bytes()
    assert run(*command) == 0  # from OUT.records.jsonl
    assert json.loads(capsys.readouterr().out)["kept_from_before"] == 1
    assert out.read_bytes() == before


def test_eval_grades_other_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = written(tmp_path / "samples_gsm8k.jsonl", ROWS["lm-eval"])
    assert run("eval", "--responses", source, "-o", tmp_path / "out", "--json") == 0
    outcomes = json.loads(capsys.readouterr().out)["outcomes"]
    assert outcomes == {"correct": 1, "wrong": 1, "timed_out": 0, "unparsed": 0}
    assert run("eval", "--format", "verl", "-o", tmp_path / "x") == 2


@pytest.mark.parametrize(("least", "code"), [("0.5", 0), ("1.0", 4)])
def test_a_calibration_is_a_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str], least: str, code: int) -> None:
    """The rule critic finds one of two false sums: F1 is 2/3; kappa counts the four labelled steps."""
    rows = [
        {"problem": "1+1=?", "steps": ["1+1=2", "2+1=3"], "label": -1},
        {"problem": "1+2=?", "steps": ["1+2=4"], "label": 0},
        {"problem": "1+3=?", "steps": ["1+3=4"], "label": 0},
    ]
    path = written(tmp_path / "in.jsonl", *rows)
    assert run("critic", "--calibrate", path, "--min-f1", least, "--json") == code
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert found["first_error"]["f1"]["value"] == pytest.approx(2 / 3)
    # by hand: agreement 3/4, chance 3/4 * 1/2 + 1/4 * 1/2 = 1/2
    assert found["step_kappa"] == {"kappa": pytest.approx(0.5), "steps": 4}
    assert ("is below --min-f1 1" in shown.err) == (code == 4)
