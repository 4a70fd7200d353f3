"""`ssrctl eval --responses`: grading given responses without a model."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ssrctl.cli import main
from ssrctl.configs import EvalConfig
from ssrctl.errors import UserError
from ssrctl.stages import eval as evaluate

ROWS: list[dict[str, Any]] = [
    {"id": "a/0", "question": "40+2?", "answer": "42", "response": "#### 42", "colour": "red"},
    {"id": "a/1", "question": "40+2?", "answer": "42", "response": "It is 41."},
    {"id": "b/0", "question": "6/4?", "answer": 1.5, "response": "\\boxed{\\frac{3}{2}}"},
    {"id": "c/0", "question": "1+1?", "answer": "2", "response": ""},
]


def lines(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text(lines(rows), encoding="utf-8")
    return str(path)


def grade(tmp_path: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    source = write(tmp_path / "responses.jsonl", rows)
    settings: dict[str, Any] = {"responses": source, "output_dir": tmp_path / "out", "json": True, **changes}
    return evaluate.run(EvalConfig(**settings))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_records_come_back_with_their_grade(tmp_path: Path) -> None:
    summary = grade(tmp_path, ROWS)
    out = read(tmp_path / "out" / "samples.jsonl")
    finals = [row.pop("final") for row in out]
    assert out == [row | {"answer": str(row["answer"])} for row in ROWS], "nothing else changed, order kept"
    assert [final["outcome"] for final in finals] == ["correct", "wrong", "correct", "unparsed"]
    assert [final["correct"] for final in finals] == [True, False, True, False]
    assert summary == json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["accuracy"]["value"] == pytest.approx((0.5 + 1 + 0) / 3) and summary["num_problems"] == 3
    assert summary["outcomes"] == {"correct": 2, "wrong": 1, "unparsed": 1, "timed_out": 0}
    assert summary["ways"] == {"hashes": 1, "last-number": 1, "boxed": 1}
    assert summary["responses"] == "responses.jsonl"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    (task,) = results["results"].values()
    # accuracies 1/2, 1 and 0: the standard error of their mean is 1/2 / sqrt(3)
    assert task == {
        "alias": "responses",
        "exact_match,none": pytest.approx(0.5),
        "exact_match_stderr,none": pytest.approx(0.5 / 3**0.5),
    }
    assert results["n-samples"]["responses"]["effective"] == 3 and str(tmp_path) not in json.dumps(results)


def test_the_shares_of_the_ways_and_strict_extraction(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lenient = grade(tmp_path, ROWS)
    assert lenient["way_fracs"] == {"hashes": 0.25, "last-number": 0.25, "boxed": 0.25, "none": 0.25}
    strict = grade(tmp_path, ROWS, answer_extraction="strict", json=False)
    assert strict["way_fracs"] == {"none": 0.5, "hashes": 0.25, "boxed": 0.25}
    assert strict["outcomes"] == {"correct": 2, "wrong": 0, "unparsed": 2, "timed_out": 0}
    assert "none 50%, hashes 25%" in " ".join(capfd.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["answer_extraction"] == "strict"


def test_an_earlier_grade_is_replaced(tmp_path: Path) -> None:
    stale = {"extracted": "0", "correct": False, "way": "boxed"}
    grade(tmp_path, [ROWS[0] | {"final": stale}])
    (row,) = read(tmp_path / "out" / "samples.jsonl")
    assert row["final"] == {"extracted": "42", "correct": True, "way": "hashes", "outcome": "correct"}


def test_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(lines(ROWS).encode())))
    assert main(["eval", "--responses", "-", "-o", str(tmp_path / "out"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["num_samples"] == 4 and summary["responses"] == "<stdin>"
    assert len(read(tmp_path / "out" / "samples.jsonl")) == 4


def test_the_paired_difference(tmp_path: Path) -> None:
    grade(tmp_path, ROWS, output_dir=tmp_path / "before")
    better = [row | {"response": f"#### {row['answer']}"} for row in ROWS]
    paired = grade(tmp_path, better, output_dir=tmp_path / "after", baseline=tmp_path / "before")["paired"]
    assert paired["difference"]["value"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert paired["baseline_accuracy"]["value"] == pytest.approx(0.5) and paired["unpaired_problems"] == 0


def test_references_from_a_data_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = write(
        tmp_path / "problems.jsonl",
        [{"id": "a", "question": "40+2?", "answer": "so 42\n#### 42"}, {"id": "z", "question": "9?", "answer": "9"}],
    )
    rows = [
        {"id": "other", "question": "40+2? ", "response": "#### 42"},  # by its question
        {"id": "a/3", "response": "#### 42"},  # by its id's group
        {"id": "a", "response": "#### 41"},  # by its id
        {"id": "z", "question": "not that one", "response": "#### 9"},  # a question decides, not an id
        {"id": "z", "question": "9?", "answer": "8", "response": "#### 8"},  # its own answer wins
    ]
    summary = grade(tmp_path, rows, dataset=data)
    out = read(tmp_path / "out" / "samples.jsonl")
    assert [row["final"]["outcome"] for row in out] == ["correct", "correct", "wrong", None, "correct"]
    assert [row.get("answer") for row in out] == ["42", "42", "42", None, "8"]
    assert summary["num_samples"] == 4 and summary["without_reference"] == 1
    assert "1 of 5 responses have no reference" in capfd.readouterr().err


def test_no_reference_at_all_is_an_error_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of the 1 responses has a reference answer") as caught:
        grade(tmp_path, [{"response": "#### 42"}])
    assert caught.value.remedy is not None and "--dataset" in caught.value.remedy
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a", "answer": "1"}\n', "r.jsonl:1: field 'response' is missing"),
        (b'{"response": "x", "answer": "1"}\n{"response": 5}\n', "r.jsonl:2: field 'response' must be a valid string"),
        ('{"response": "ü", "answer": "1"}\n'.encode("latin-1"), "r.jsonl:1: not UTF-8"),
        (b"", "no records"),
        (b"[1]\n", "expected a json object"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes, message: str) -> None:
    (tmp_path / "r.jsonl").write_bytes(content)
    assert main(["eval", "--responses", str(tmp_path / "r.jsonl"), "-o", str(tmp_path / "out")]) == 2
    err = capfd.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_hostile_responses_are_graded(tmp_path: Path) -> None:
    rows = [
        {"response": "\ud800 #### 5", "answer": "5"},
        {"response": "x" * 200_000 + "\n#### 5", "answer": "5"},
        {"response": "\\boxed{\ud800\\sqrt{2}}", "answer": "\\pi"},
        {"response": "\x00\\boxed{5}", "answer": "5"},
    ]
    summary = grade(tmp_path, rows)
    assert summary["outcomes"] == {"correct": 3, "wrong": 1, "unparsed": 0, "timed_out": 0}
    assert [row["response"] for row in read(tmp_path / "out" / "samples.jsonl")] == [row["response"] for row in rows]


def test_a_torn_last_line_is_reported_and_left_out(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "r.jsonl"
    source.write_text(lines(ROWS) + '{"id": "d/0", "resp')
    assert evaluate.run(EvalConfig(responses=str(source), output_dir=tmp_path / "out"))["num_samples"] == 4
    assert "torn" in capfd.readouterr().err


def test_grading_again_is_allowed_but_not_over_drawn_samples(tmp_path: Path) -> None:
    first = grade(tmp_path, ROWS)
    assert grade(tmp_path, ROWS) == first
    (tmp_path / "out" / "settings.json").write_text('{"dataset": "d.jsonl", "fingerprint": "x"}')
    before = (tmp_path / "out" / "samples.jsonl").read_bytes()
    with pytest.raises(UserError, match="samples that were not graded from a file"):
        grade(tmp_path, ROWS[:1])
    assert (tmp_path / "out" / "samples.jsonl").read_bytes() == before


def test_an_error_removes_only_new_folders(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    with pytest.raises(UserError, match="none of the 1 responses"):
        grade(tmp_path, [{"response": "#### 42"}], output_dir=tmp_path / "kept" / "new" / "newer")
    assert list((tmp_path / "kept").iterdir()) == []
    with pytest.raises(UserError, match="none of the 1 responses"):
        grade(tmp_path, [{"response": "#### 42"}], output_dir=tmp_path / "kept")
    assert (tmp_path / "kept").is_dir()


@pytest.mark.slow  # loads a model
def test_nothing_is_drawn_into_a_graded_folder(tmp_path: Path) -> None:
    grade(tmp_path, ROWS)
    with pytest.raises(UserError, match="holds another evaluation"):
        evaluate.run(EvalConfig(output_dir=tmp_path / "out", limit=1, num_samples=1, max_new_tokens=4))


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    plan = grade(tmp_path, [*ROWS, {"response": "x"}], dry_run=True)
    assert (plan["count"], plan["with_reference"]) == (5, 4)
    assert not (tmp_path / "out").exists()


def test_the_table_counts_outcomes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "[red]r.jsonl", ROWS)
    assert main(["eval", "--responses", source, "-o", str(tmp_path / "out")]) == 0
    out, _ = capfd.readouterr()
    assert "[red]r.jsonl" in out and "2 correct" in out and "1 unparsed" in out


def test_no_model_library_is_loaded(tmp_path: Path) -> None:
    source = write(tmp_path / "r.jsonl", ROWS)
    words = ["eval", "--responses", source, "-o", str(tmp_path / "out"), "--json", "--no-report"]
    heavy = ["torch", "transformers", "datasets", "litellm", "matplotlib"]
    code = (
        f"import sys\nfrom ssrctl.cli import main\nassert main({words!r}) == 0\n"
        f"sys.stderr.write(' '.join(m for m in {heavy!r} if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_agreement_with_human_labels_through_the_command(tmp_path: Path, data_dir: Path) -> None:
    source = str(data_dir / "gsm8k_model_responses.jsonl")
    summary = evaluate.run(EvalConfig(responses=source, output_dir=tmp_path / "out", json=True))
    rows = read(tmp_path / "out" / "samples.jsonl")
    agree = sum(row["final"]["correct"] is row["is_correct"] for row in rows)
    assert len(rows) == summary["num_problems"] == 1319 and agree / len(rows) >= 0.995


def test_what_is_wrong_with_evaluations_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": f"q{k}/{i}", "question": f"{k}?", "answer": str(k), "response": f"#### {k + i}"}
        for k in range(3)
        for i in range(2)
    ]
    with pytest.raises(UserError, match="1 ids occur more than once, 'q0/0' 2 times"):
        grade(tmp_path, [*rows, rows[0]], output_dir=tmp_path / "twice")
    assert not (tmp_path / "twice" / "samples.jsonl").exists()  # nothing is left behind
    grade(tmp_path, rows, output_dir=tmp_path / "whole")
    torn = tmp_path / "torn"
    torn.mkdir()
    for name in ("samples.jsonl", "settings.json"):
        text = (tmp_path / "whole" / name).read_text()
        (torn / name).write_text(text[:-20] if name == "samples.jsonl" else text)
    capsys.readouterr()
    assert main(["eval", "--compare", str(tmp_path / "whole"), str(torn)]) == 0
    captured = capsys.readouterr()
    said = " ".join(captured.err.split())
    assert "the last line is torn" in said and f"{torn} is not finished: it has 5 samples" in said
    assert f"whole 2, {torn} 1 to 2): p-values are approximate" in said
    assert "3 problems, differences to" in captured.out
    one = grade(tmp_path, rows[:1], output_dir=tmp_path / "one", json=False)
    assert one["num_problems"] == 1 and "responses.jsonl, 1 problem " in capsys.readouterr().out
    ungraded = write(tmp_path / "ungraded.jsonl", rows)
    assert main(["eval", "--compare", ungraded, ungraded]) == 2
    assert "grade the responses first" in capsys.readouterr().err
