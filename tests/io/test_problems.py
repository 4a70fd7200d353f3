"""Problems from files, their columns, and what is wrong with them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from ssrctl.configs import DatasetConfig
from ssrctl.errors import UserError
from ssrctl.io.package_data import profile_path, profiles_dir, shipped_names
from ssrctl.io.problems import Problem, load_problems


def jsonl(path: Path, *rows: dict[str, Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(dataset: str, **settings: Any) -> list[Problem]:
    return load_problems(DatasetConfig(dataset=dataset, **settings), "test")


def test_a_jsonl_file(tmp_path: Path) -> None:
    data = jsonl(
        tmp_path / "a.jsonl",
        {"question": "1+1?", "answer": "One and one.\n#### 2", "level": 3},
        {"id": "x7", "problem": "2+2?", "target": 4},
        {"prompt": "3+3?", "answer": " 6 ", "question": None},
    )
    assert load(data) == [
        Problem("1", "1+1?", "2", {"level": 3}),
        Problem("x7", "2+2?", "4", {}),
        Problem("3", "3+3?", "6", {"question": None}),
    ]
    assert [p.id for p in load(data, limit=2)] == ["1", "x7"]


def test_named_columns_win(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"question": "q", "text": "t", "answer": "a", "gold": 0})
    (problem,) = load(data, question_column="text", answer_column="gold")
    assert (problem.question, problem.answer) == ("t", "0")
    assert problem.extra == {"question": "q", "answer": "a"}


def test_the_last_marker_of_a_solution_counts(tmp_path: Path) -> None:
    data = jsonl(tmp_path / "a.jsonl", {"question": "q", "answer": "#### 1\nno,\n#### 2 "})
    assert load(data)[0].answer == "2"


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        ([{"question": "q", "answer": "a"}, {"answer": "a"}], {}, r"a\.jsonl:2: no question: field 'question' or"),
        ([{"question": "q", "answer": "  "}], {}, r"a\.jsonl:1: no answer"),
        ([{"question": "q", "answer": "a"}], {"answer_column": "gold"}, r"field 'gold' is missing or empty"),
        ([{"id": 1, "question": "q", "answer": "a"}] * 2, {}, "the id '1' occurs twice"),
        ([], {}, "no records"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, rows: list[dict[str, Any]], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(jsonl(tmp_path / "a.jsonl", *rows), **settings)


def test_a_missing_column_is_answered_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(jsonl(tmp_path / "a.jsonl", {"q": "?", "answer": "a"}))
    assert caught.value.remedy == "the row has q, answer; name the right one with --question-column"


def test_rows_beyond_the_limit_are_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\nnonsense\n')
    assert len(load(str(path), limit=1)) == 1
    with pytest.raises(UserError, match="not valid json"):
        load(str(path))


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "./a", "a.json"])
def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not found"):
        load(name)


def test_a_csv_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["question", "answer", "note"], ["1+1?", "2", "x"], ["a,b?", "3", ""]])
    found = load(str(path))
    assert [(p.id, p.question, p.answer) for p in found] == [("1", "1+1?", "2"), ("2", "a,b?", "3")]
    assert found[0].extra == {"note": "x"}
    with pytest.raises(UserError, match="is one file: it has no splits"):
        load(str(path), dataset_split="heldout")


def test_bundled_problems() -> None:
    found = load("tiny-arithmetic", limit=5)
    assert len(found) == 5 and found == load("tiny-arithmetic", limit=5)
    train = load_problems(DatasetConfig(limit=200), "train")
    held_out = load_problems(DatasetConfig(limit=200), "test")
    assert not {p.question for p in train} & {p.question for p in held_out}
    assert load_problems(DatasetConfig(limit=5), "train", seed=1) != train[:5]
    with pytest.raises(UserError, match="splits train and heldout, not 'validation'"):
        load("tiny-arithmetic", dataset_split="validation")


def test_published_problem_sets(data_dir: Path) -> None:
    found = load(str(data_dir / "gsm8k_test.jsonl"))
    assert len(found) > 500
    assert all("####" not in p.answer and p.answer for p in found)
    for name in ("math500", "multiarith", "svamp", "aime_1983_2024"):
        assert load(str(data_dir / f"{name}.jsonl"), limit=20), name


def test_shipped_profiles(tmp_path: Path) -> None:
    for folder, suffix in (("prompts", ".txt"), ("rubrics", ".txt"), ("budgets", ".json")):
        assert (profiles_dir() / folder).is_dir()
        for name in shipped_names(folder, suffix):
            assert profile_path(folder, name, suffix).is_file()
    own = tmp_path / "own.txt"
    own.write_text("mine")
    assert profile_path("prompts", str(own), ".txt") == own
    with pytest.raises(UserError, match="rubric 'absent' is neither a file nor one that ships"):
        profile_path("rubrics", "absent", ".txt")


@pytest.mark.parametrize("kind", ["direct", "wrapped"])
def test_a_full_disk_below_the_cache_of_datasets_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    import datasets

    def full(*_: object, **__: object) -> None:
        if kind == "direct":
            raise OSError(28, "No space left on device")
        try:
            raise OSError(28, "[Errno 28] Error writing bytes to file")
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("An error occurred") from error

    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(datasets, "load_dataset", full)
    with pytest.raises(UserError, match="no space left") as caught:
        load_problems(DatasetConfig(dataset=str(tmp_path / "a.parquet")), "train")
    assert caught.value.remedy is not None and "HF_DATASETS_CACHE" in caught.value.remedy


def test_the_variants_of_the_bundled_problems() -> None:
    made = load_problems(DatasetConfig(dataset="tiny-arithmetic:probes", limit=8), "test")
    assert [one.extra["category"] for one in made] == ["in-distribution", "longer", "numbers", "order"] * 2
    assert len({one.id for one in made}) == 8
    longer = load_problems(DatasetConfig(dataset="tiny-arithmetic:longer", limit=2), "test")
    assert [one.question for one in longer] == [one.question for one in made if one.extra["category"] == "longer"]
    assert len(load_problems(DatasetConfig(dataset="tiny-arithmetic:order"), "train")) == 2000
    with pytest.raises(UserError, match="has no variant 'harder'"):
        load_problems(DatasetConfig(dataset="tiny-arithmetic:harder"), "test")
    with pytest.raises(UserError, match="has the splits train and heldout, not 'test'"):
        load_problems(DatasetConfig(dataset="tiny-arithmetic:order", dataset_split="test"), "test")
