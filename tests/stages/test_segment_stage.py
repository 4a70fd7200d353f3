"""`ssrctl segment`: records in, records with spans out, by way of the command line."""

import io
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.cli import main
from ssrctl.configs import SegmentConfig
from ssrctl.errors import UserError
from ssrctl.stages.segment import run, tokens_per_step
from ssrctl.text.segment import segment

PIECES = [" ", "\n", ". ", "First add", "12+30=42", "½", "🙂🚀", "次に、", "。", "####", "Therefore, ", "<end>", "x"]
texts = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=40), st.lists(st.sampled_from(PIECES)).map("".join)
)

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
    assert (summary["responses"], summary["steps"]) == (3, 4)
    assert (summary["without_steps"], summary["with_final"], summary["torn_lines"]) == (1, 1, 0)
    assert summary["steps_per_response"] == {"mean": pytest.approx(4 / 3), "median": 1, "max": 3}
    assert summary["chars_per_step"] == {"mean": (8 + 8 + 6 + 14) / 4, "median": 8, "max": 14}
    assert summary["steps_histogram"] == {"0": 1, "1": 1, "3": 1}
    assert summary["tokens_per_step"] is None


def test_scores_of_other_spans_are_dropped(tmp_path):
    row = ROWS[2] | {"steps": [{"start": 0, "end": 14}], "scores": [{"score": 5, "reward": 0.05}], "advantages": [0.1]}
    source, target = write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    run(SegmentConfig(input=str(source), output=str(target)))
    assert "scores" not in read(target)[0] and "advantages" not in read(target)[0]


def test_the_number_and_the_smallest_length_of_steps_are_obeyed(tmp_path):
    source, target = write(tmp_path / "in.jsonl", ROWS), tmp_path / "out.jsonl"
    run(SegmentConfig(input=str(source), output=str(target), max_segments=2))
    assert [step["end"] for step in read(target)[0]["steps"]] == [16, 22]
    run(SegmentConfig(input=str(source), output=str(target), min_segment_chars=8))
    assert [step["end"] for step in read(target)[0]["steps"]] == [22]


def test_style_and_largest_length_are_obeyed(tmp_path):
    row = {"response": "One is. Two is.\nThree is.\n\nFour is."}
    source, target = write(tmp_path / "in.jsonl", [row]), tmp_path / "out.jsonl"
    for options, ends in [
        ({}, [16, 27, 35]),
        ({"segment_style": "newline"}, [16, 27, 35]),
        ({"segment_style": "paragraph"}, [27, 35]),
        ({"segment_style": "paragraph", "max_segment_chars": 40}, [27, 35]),
    ]:
        run(SegmentConfig(input=str(source), output=str(target), **options))
        assert [step["end"] for step in read(target)[0]["steps"]] == ends
    long = {"response": "One is it. " * 8}
    run(
        SegmentConfig(
            input=str(write(source, [long])), output=str(target), segment_style="newline", max_segment_chars=44
        )
    )
    assert [step["end"] for step in read(target)[0]["steps"]] == [44, 88]


def test_every_token_is_counted_in_one_step(tmp_path, bpe_tokenizer):
    bpe_tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [
        *ROWS,
        {"response": "Zuerst ½ plus ¼.\n次に、三を足す。\nUne étape 🙂🚀\n#### 84"},
        {"response": "a \ud800 b\nc d"},
    ]
    source = write(tmp_path / "in.jsonl", rows)
    target = tmp_path / "out.jsonl"
    summary = run(SegmentConfig(input=str(source), output=str(target), tokenizer=str(tmp_path / "tokenizer")))
    texts = [row["response"].replace("\ud800", "\ufffd") for row in rows]
    whole = sum(len(bpe_tokenizer(text, add_special_tokens=False).input_ids) for text in texts)
    assert summary["tokens_per_step"]["mean"] == pytest.approx(whole / summary["steps"])
    assert 1 <= summary["tokens_per_step"]["median"] <= summary["tokens_per_step"]["max"] < whole


def test_code_of_a_tokenizer_is_never_run(tmp_path, bpe_tokenizer):
    folder = tmp_path / "tokenizer"
    bpe_tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["code.Mine", None]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    source = write(tmp_path / "in.jsonl", ROWS)
    with pytest.raises(UserError, match="brings its own code, which is not run"):
        run(SegmentConfig(input=str(source), output=str(tmp_path / "out.jsonl"), tokenizer=str(folder)))
    assert not (tmp_path / "ran").exists()


@given(texts)
def test_tokens_fall_to_the_step_they_start_in(bpe_tokenizer, text):
    steps = segment(text)
    counts = tokens_per_step(bpe_tokenizer, text, steps)
    offsets = bpe_tokenizer(text, add_special_tokens=False, return_offsets_mapping=True).offset_mapping
    assert sum(counts) == len(offsets) and len(counts) == len(steps)
    for step, count in zip(steps, counts, strict=True):
        assert count == sum(step.start <= start < step.end for start, _ in offsets)


@pytest.mark.parametrize("name", ["./absent", "/absent/too"])
def test_a_tokenizer_that_is_not_there(tmp_path, capsys, name):
    source = write(tmp_path / "in.jsonl", ROWS)
    assert main(["segment", str(source), "-o", str(tmp_path / "out.jsonl"), "--tokenizer", name]) == 2
    assert f"tokenizer folder not found: {name}" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert (
        main(["segment", str(source), "-o", str(tmp_path / "out.jsonl"), "--tokenizer", str(tmp_path / "empty")]) == 2
    )
    assert "cannot be loaded" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


def test_what_the_terminal_shows(tmp_path, capsys):
    rows = [{"response": "\n".join(f"line {i}" for i in range(lines))} for lines in (2, 2, 2, 2, 5)]
    source = write(tmp_path / "in.jsonl", rows)
    assert main(["segment", str(source), "-o", str(tmp_path / "out.jsonl")]) == 0
    shown = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["steps", "per", "response", "2.6", "2", "5"] in shown
    assert ["chars", "per", "step", "6.6", "7", "7"] in shown
    assert shown[-5:] == [["steps", "responses"], ["2", "4", "█" * 40], ["3", "0"], ["4", "0"], ["5", "1", "█" * 10]]


def test_many_numbers_of_steps_share_rows(tmp_path, capsys):
    rows = [{"response": "\n".join(f"line {i}" for i in range(lines))} for lines in range(1, 51)]
    source = write(tmp_path / "in.jsonl", rows)
    summary = run(SegmentConfig(input=str(source), output=str(tmp_path / "out.jsonl")))
    assert summary["steps_histogram"] == {str(steps): 1 for steps in range(1, 51)}
    assert summary["steps_per_response"] == {
        "mean": 25.5,
        "median": 25,
        "max": 50,
    }  # the lower of the two in the middle
    shown = [line.split()[:2] for line in capsys.readouterr().err.splitlines() if "█" in line]
    assert shown[0] == ["1-4", "4"] and shown[-1] == ["49-50", "2"] and len(shown) == 13


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
