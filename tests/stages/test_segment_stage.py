"""`ssrctl segment`: records in, records with spans out, by way of the command line."""

import io
import json
import sys

import pytest

from ssrctl.cli import main
from ssrctl.configs import SegmentConfig
from ssrctl.stages.segment import run

ROWS = [
    {"id": "q1/0", "response": "48*6=88\n88-2=86\n####86", "modulus": 100, "note": {"kept": [1, None]}},
    {"id": "q1/1", "response": "", "answer": 86},
    {"id": "q1/2", "response": "no answer here"},
]


def write(path, rows, tail=""):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + tail, encoding="utf-8")
    return path


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_spans_are_added_and_all_else_is_kept(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    summary = run(SegmentConfig(input=str(source), output=str(target)))
    first, second, third = read(target)
    assert {key: first[key] for key in ROWS[0]} == ROWS[0]
    assert first["steps"] == [
        {"start": 0, "end": 8, "kind": "step"},
        {"start": 8, "end": 16, "kind": "step"},
        {"start": 16, "end": 22, "kind": "final"},
    ]
    assert second["steps"] == [] and len(third["steps"]) == 1
    assert (summary["responses"], summary["steps"], summary["most_steps"]) == (3, 4, 3)
    assert (summary["without_steps"], summary["with_final"], summary["torn_lines"]) == (1, 1, 0)
    assert summary["steps_per_response"] == pytest.approx(4 / 3)


def test_scores_of_other_spans_are_dropped(tmp_path):
    row = ROWS[2] | {"steps": [{"start": 0, "end": 14}], "scores": [{"score": 5, "reward": 0.05}], "advantages": [0.1]}
    source, target = write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    run(SegmentConfig(input=str(source), output=str(target)))
    assert "scores" not in read(target)[0] and "advantages" not in read(target)[0]


def test_max_steps_and_min_chars_are_obeyed(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(SegmentConfig(input=str(source), output=str(target), max_steps=2))
    assert [step["end"] for step in read(target)[0]["steps"]] == [16, 22]
    run(SegmentConfig(input=str(source), output=str(target), min_chars=8))
    assert [step["end"] for step in read(target)[0]["steps"]] == [22]


def test_stdin_to_stdout_with_a_torn_last_line(monkeypatch, capsys):
    text = json.dumps(ROWS[0]) + '\n{"id": "q1/1", "resp'
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    assert main(["segment", "-"]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["q1/0"]
    assert "torn" in err


def test_json_summary_needs_the_records_elsewhere(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ROWS)
    assert main(["segment", str(source), "--json"]) == 2
    assert "-o FILE" in capsys.readouterr().err
    assert main(["segment", str(source), "--json", "-o", str(tmp_path / "out.jsonl")]) == 0
    assert json.loads(capsys.readouterr().out)["responses"] == 3


def test_dry_run_writes_nothing(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", ROWS)
    assert main(["segment", str(source), "-o", str(tmp_path / "out.jsonl"), "--dry-run"]) == 0
    assert not (tmp_path / "out.jsonl").exists() and capsys.readouterr().out == ""


def test_a_bad_line_leaves_the_old_output(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", [ROWS[0], {"id": "x", "question": "?"}])
    target = tmp_path / "out.jsonl"
    target.write_text("old", encoding="utf-8")
    assert main(["segment", str(source), "-o", str(target)]) == 2
    assert "in.jsonl:2" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "old" and sorted(p.name for p in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.jsonl",
    ]
