"""Rows as the field's tools write them, the files they come in, and what is refused."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from ssrctl.configs import DatasetConfig
from ssrctl.errors import UserError
from ssrctl.io.problems import Problem, load_problems
from ssrctl.io.records import Rollout

SYSTEM = {"role": "system", "content": "Think first."}
ASK = {"role": "user", "content": "How many legs have 3 cats?"}
VERL = {
    "data_source": "own/cats",
    "prompt": [ASK],
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "12"},
    "extra_info": {"index": 4, "answer": "3 * 4 = 12\n#### 12"},
}


def load(dataset: Path, **settings: Any) -> list[Problem]:
    return load_problems(DatasetConfig(dataset=str(dataset), **settings), "train")


def one(tmp_path: Path, row: dict[str, Any], **settings: Any) -> Problem:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    (problem,) = load(path, **settings)
    return problem


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"answer": "12"}, "12"),
        ({"answer": 12}, "12"),
        ({"answer": 0.5}, "0.5"),
        ({"answer": "It is 3 * 4.\n#### 12"}, "12"),
        ({"answer": ["12"]}, "12"),
        ({"answer": ["12", 12]}, "12"),
        ({"answer": ["12", "twelve", "a dozen"]}, ("12", "twelve", "a dozen")),
        ({"answer": [12, "\\boxed{24/2}"]}, ("12", "24/2")),
        (
            {"solution": "Each has four.\nSo \\boxed{3 \\cdot \\frac{8}{2}}, and not \\boxed{12."},
            "3 \\cdot \\frac{8}{2}",
        ),
        ({"solution": "Each has four.\n#### 12"}, "12"),
        ({"solution": "#### Counting\nFour each: \\boxed{12}\n#### Check\nYes"}, "12"),
        ({"solution": "$12$"}, "$12$"),
        ({"solution": "Each has four.\n#### 11", "final_answer": "12"}, "12"),
        ({"ground_truth": "12"}, "12"),
        ({"target": "12", "answer": None}, "12"),
        ({"reward_model": {"style": "rule", "ground_truth": "12"}}, "12"),
        ({"reward_model": {"ground_truth": ["12", "XII"]}}, ("12", "XII")),
        ({"reward_model": '{"style": "rule", "ground_truth": "12"}'}, "12"),
        ({"extra_info": {"answer": "4 + 4 + 4\n#### 12"}}, "12"),
        ({"extra_info": '{"answer": 12}'}, "12"),
        ({"answer": "{not json}"}, "{not json}"),
        ({"answer": '{"a": 1}'}, '{"a": 1}'),  # json text is parsed where verl writes it only
        ({"answer": "NaN"}, "NaN"),
        ({"answer": "x", "reward_model": {"ground_truth": "y"}}, "x"),
    ],
    ids=str,
)
def test_answers(tmp_path: Path, row: dict[str, Any], answer: Any) -> None:
    assert one(tmp_path, {"question": "q", **row}).answer == answer


@pytest.mark.parametrize(
    ("row", "question", "roles"),
    [
        ({"question": "q"}, "q", None),
        ({"problem": "q"}, "q", None),
        ({"Question": "q", "input": ""}, "q", None),
        ({"prompt": "q"}, "q", None),
        ({"prompt": [ASK]}, ASK["content"], ["user"]),
        ({"messages": [SYSTEM, ASK]}, ASK["content"], ["system", "user"]),
        ({"question": "q", "prompt": [SYSTEM, ASK]}, ASK["content"], ["system", "user"]),
        ({"problem": "q", "messages": [ASK, {"role": "assistant", "content": "12"}]}, "q", None),
        ({"prompt": [ASK, {"role": "assistant", "content": "12"}, {"role": "user", "content": "And 4?"}]}, "And 4?",
         ["user", "assistant", "user"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}]}]}, "ab", ["user"]),
        ({"prompt": json.dumps([ASK]), "reward_model": {}}, ASK["content"], ["user"]),
        ({"prompt": json.dumps([ASK])}, json.dumps([ASK]), None),
    ],
    ids=str,
)  # fmt: skip
def test_questions(tmp_path: Path, row: dict[str, Any], question: str, roles: list[str] | None) -> None:
    problem = one(tmp_path, {"answer": "12", **row})
    assert problem.question == question
    assert (problem.messages and [message["role"] for message in problem.messages]) == roles


def test_a_row_of_verl_keeps_its_other_columns(tmp_path: Path) -> None:
    problem = one(tmp_path, VERL)
    assert (problem.question, problem.answer, problem.messages) == (ASK["content"], "12", (ASK,))
    assert problem.extra == {key: VERL[key] for key in VERL if key != "prompt"}
    assert one(tmp_path, VERL, answer_column="extra_info.index").answer == "4"
    assert one(tmp_path, VERL, question_column="extra_info.answer").question.startswith("3 * 4")
    assert one(tmp_path, {"a.b": "1", "a": {"b": "2"}, "question": "q"}, answer_column="a.b").answer == "1"


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"answer": {"value": "7", "aliases": []}}, {}, r"field 'answer' is an object with the fields value, aliases.*answer\.value"),
        (VERL, {"answer_column": "reward_model"}, r"object with the fields style, ground_truth.*reward_model\.ground_truth"),
        (VERL | {"reward_model": '{"ground_truth": 1}'}, {"answer_column": "reward_model"}, "is an object"),
        ({"reward_model": "{torn", "question": "q"}, {}, "field 'reward_model' begins like json and is not"),
        (VERL, {"answer_column": "reward_model.gold"}, r"field 'reward_model\.gold' is missing"),
        ({"answer": True}, {}, "field 'answer' must be text or a number, found True"),
        ({"answer": ["7", None]}, {}, r"field 'answer'\[1\] must be text or a number, found None"),
        ({"answer": [["7"]]}, {}, r"field 'answer'\[0\] must be text or a number, found a value of type list"),
        ({"answer": []}, {}, "no answer: field 'answer' or"),
        ({"answer": None}, {}, "no answer"),
        ({"answer": "####"}, {}, "no answer after the ####"),
        ({"solution": "Each has four.\nThat makes twelve."}, {}, "marks no final answer"),
        ({"question": 5}, {}, "field 'question' must be text, found 5"),
        ({"question": False}, {}, "field 'question' must be text, found False"),
        ({"question": ["a", "b"]}, {}, "field 'question' must be text, found a value of type list"),
        ({"question": {"text": "q"}}, {}, "field 'question' must be text, found a value of type dict"),
        ({"question": None, "prompt": [ASK, {"role": "assistant", "content": "12"}]}, {}, "last message is of the role 'assistant', expected 'user'"),
        ({"question": None, "prompt": [{"content": "q"}]}, {}, r"field 'prompt'\[0\] is not a chat message"),
        ({"question": None, "prompt": [ASK, "and?"]}, {}, r"field 'prompt'\[1\] is not a chat message: 'and\?'"),
        ({"question": None, "prompt": [{"role": "user", "content": None}]}, {}, r"\[0\]\.content must be text, found None"),
        ({"question": None, "prompt": [{"role": "user", "content": [{"type": "image"}]}]}, {}, "content must be text"),
        ({"question": None, "prompt": [{"role": "user", "content": " "}]}, {}, "last message of field 'prompt' is empty"),
        ({"id": {"a": 1}}, {}, "field 'id' must be text or an integer"),
    ],
)  # fmt: skip
def test_refused_cells_are_named_by_line_and_field(
    tmp_path: Path, row: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    usual = {"question": "q"} if {"reward_model", "solution"} & row.keys() else {"question": "q", "answer": "12"}
    with pytest.raises(UserError, match=message) as caught:
        one(tmp_path, usual | row, **settings)
    assert "rows.jsonl:1: " in str(caught.value) and "\n" not in str(caught.value)


ROWS = [{"question": "1, or 2?\nSay.", "answer": "2", "id": "a"}, {"question": "¿3?", "answer": "3", "id": "b"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
CSV = 'question,answer,id\n"1, or 2?\nSay.",2,a\n¿3?,3,b\n'.encode()
FILES = {
    "a.jsonl": LINES,
    "a.ndjson": b"\xef\xbb\xbf" + LINES,
    "a.jsonl.gz": gzip.compress(LINES),
    "packed.jsonl": gzip.compress(b"\xef\xbb\xbf" + LINES),
    "a.json": json.dumps(ROWS).encode(),
    "lines.json": LINES,
    "a.json.gz": gzip.compress(b"\xef\xbb\xbf" + json.dumps({"version": 1, "data": ROWS}).encode()),
    "a.csv": CSV,
    "a.CSV": b"\xef\xbb\xbf" + CSV,
    "crlf.csv": CSV.replace(b"\n", b"\r\n").replace(b"?\r\n", b"?\n"),
    "a.csv.gz": gzip.compress(CSV),
    "a.tsv": 'question\tanswer\tid\n"1, or 2?\nSay."\t2\ta\n¿3?\t3\tb\n'.encode(),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert load(tmp_path / name) == [Problem(r["id"], r["question"], r["answer"]) for r in ROWS]


BAD_FILES = {
    "utf16.jsonl": (LINES.decode().encode("utf-16"), "UTF-16, not UTF-8"),
    "utf16.csv": (CSV.decode().encode("utf-16"), "UTF-16, not UTF-8"),
    "latin.csv": (CSV.decode().encode("latin-1"), "row 1: not UTF-8"),
    "latin.json": ('[{"question": "é"}]'.encode("latin-1"), "not UTF-8"),
    "cut.jsonl.gz": (gzip.compress(LINES)[:-9], "corrupt gzip file"),
    "bz.jsonl": (bz2.compress(LINES), "is a bzip2 file"),
    "a.xlsx": (b"PK\x03\x04", "a file of a kind that is not read"),
    "a.txt": (b"q", "a file of a kind that is not read"),
    "ragged.csv": (b"question,answer\nq,1\na,b,2\n", "row 2 has 3 cells, the header names 2"),
    "open.csv": (b'question,answer\n"q,1\na,2\n', "row 1: malformed"),
    "twice.csv": (b"question,answer,answer\nq,1,2\n", "the column 'answer' occurs twice"),
    "head.csv": (b"question,answer\n", "no rows in it"),
    "nothing.csv": (b"", "no rows in it"),
    "twice.jsonl": (b'{"question": "q", "answer": 1, "answer": 2}\n', ":1: not valid json: the key 'answer' occurs twice"),
    "twice.json": (b'[{"question": "q", "question": "r"}]', "the key 'question' occurs twice"),
    "deep.json": (b"[" * 100_000, "not valid json"),
    "text.json": (b'"text"', "expected a list of json objects, found str"),
    "mixed.json": (b'[{"question": "q", "answer": "1"}, 2]', "row 2: expected a json object, found int"),
    "torn.jsonl": (b'{"question": "q", "answ', "not valid json"),
    "huge.jsonl": (b'{"question": "q", "answer": ' + b"9" * 5000 + b"}\n", "not valid json"),
    "empty.csv": (b"question,answer\nq,\n", "row 1: no answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD_FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load(tmp_path / name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


def test_parquet_with_nested_columns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [VERL, VERL | {"prompt": [SYSTEM, ASK], "reward_model": {"style": "rule", "ground_truth": "13"}}]
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    found = load(tmp_path / "a.parquet")
    assert [(p.id, p.question, p.answer) for p in found] == [("1", ASK["content"], "12"), ("2", ASK["content"], "13")]
    assert found[1].messages == (SYSTEM, ASK)


def test_a_long_question_and_lone_surrogates_are_text(tmp_path: Path) -> None:
    assert one(tmp_path, {"question": "9" * 1_000_000, "answer": "1"}).question == "9" * 1_000_000
    assert one(tmp_path, {"question": "a\ud800", "answer": "1"}).question == "a\ud800"
    (tmp_path / "long.csv").write_text("question,answer\n" + "9" * 1_000_000 + ",1\n")
    assert len(load(tmp_path / "long.csv")[0].question) == 1_000_000


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"answer": ["7"]}, {"answer": "7"}),
        ({"answer": ["7", "seven"]}, {"answer": ("7", "seven")}),
        ({"answer": 7}, {"answer": "7"}),
        ({"ground_truth": 7}, {"answer": "7"}),
        ({"reward_model": {"ground_truth": "7"}}, {"answer": "7"}),
        ({"response": [{"role": "assistant", "content": "It is 7."}]}, {"response": "It is 7."}),
        ({"completion": [{"role": "assistant", "content": "It is 7."}]}, {"response": "It is 7."}),
        ({"completion": "It is 7."}, {"response": "It is 7."}),
        ({"completion": "It is 8.", "response": "It is 7."}, {"response": "It is 7."}),
        ({"prompt": [SYSTEM, ASK]}, {"question": ASK["content"], "prompt": None}),
        ({"prompt": [SYSTEM, ASK], "question": "q"}, {"question": "q"}),
    ],
    ids=str,
)
def test_records_of_other_tools(row: dict[str, Any], expected: dict[str, Any]) -> None:
    made = Rollout.from_dict({"id": "a/0", **row}, where="x:1")
    assert {name: getattr(made, name) for name in expected} == expected
    assert Rollout.from_dict(json.loads(json.dumps(made.to_dict())), where="x:1") == made


def test_messages_of_a_record_are_kept() -> None:
    made = Rollout.from_dict({"prompt": [SYSTEM, ASK]}, where="x:1")
    assert made.to_dict()["messages"] == [SYSTEM, ASK]
    with pytest.raises(UserError, match="x:1: field 'answer' is an object"):
        Rollout.from_dict({"answer": {"value": 7}}, where="x:1")
    with pytest.raises(UserError, match="x:1: field 'answer' must be text or a number, found True"):
        Rollout.from_dict({"answer": True}, where="x:1")
