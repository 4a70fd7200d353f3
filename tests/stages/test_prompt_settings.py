"""The settings of prompts and files through the commands, on the bundled reasoner."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ssrctl.cli import main
from ssrctl.tiny_reasoner.problems import problems

PROBLEMS = problems("heldout", 6, 0)
# The reasoner knows digits and signs only, and its questions end with a line feed.
TEMPLATE = "{% for m in messages %}{{ {'system': '1=', 'user': '2='}[m['role']] if tags else '' }}{{ m['content'] }}\n{% endfor %}"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "d.jsonl"
    rows = [{"prompt": [{"role": "user", "content": p.question}], "answer": ["999", p.answer]} for p in PROBLEMS]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    return path


def test_eval_of_chat_messages_with_accepted_answers_and_a_stop(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["eval", "--dataset", str(data), "--chat-template", str(tmp_path / "t.jinja"), "--num-samples", "4",
             "--max-new-tokens", "64", "-o", str(tmp_path / "out")]  # fmt: skip
    assert main(words) == 0
    assert f"first prompt: '{PROBLEMS[0].question}\\n'" in capsys.readouterr().err
    rows = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert {row["final"]["correct"] for row in rows} == {True, False}
    for row in rows:
        problem = PROBLEMS[int(row["id"].split("/")[0]) - 1]
        assert row["answer"] == ["999", problem.answer]
        assert (row["question"], row["prompt"]) == (problem.question, problem.question + "\n")
        assert row["final"]["correct"] == (row["final"]["extracted"] == problem.answer)
    assert main([*words, "--stop", "="]) == 2  # other samples than those in the folder
    assert "stop was [], is ['=']" in capsys.readouterr().err
    assert main([*words[:-1], str(tmp_path / "cut"), "--stop", "="]) == 0
    cut = [json.loads(line) for line in (tmp_path / "cut/samples.jsonl").read_text().splitlines()]
    assert all(row["finished"] and row["response"].endswith("=") and row["response"].count("=") == 1 for row in cut)
    for whole, short in zip(rows, cut, strict=True):
        assert whole["response"].startswith(short["response"])


@pytest.mark.parametrize("command", ["eval", "train", "profile-budget"])
def test_dry_runs_show_a_prompt(
    command: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [command, "--dry-run", "--dataset", str(data), "--chat-template", str(tmp_path / "t.jinja"),
             "--system-prompt", "7*8=?", "--chat-template-kwargs", '{"tags": true}', "--max-new-tokens", "9"]  # fmt: skip
    assert main([*words, "--json", *(["-o", "b.json"] if command == "profile-budget" else [])]) == 0
    shown, prompt = capsys.readouterr(), f"'1=7*8=?\\n2={PROBLEMS[0].question}\\n'"
    assert f"first prompt: {prompt}" in shown.err
    assert json.loads(shown.out)["first_prompt"] == prompt


@pytest.mark.parametrize("words", [["segment"], ["critic", "--critic", "rule"], ["eval", "--responses"]])
@pytest.mark.parametrize("content", [b'{"id": "a/0", "resp', b"", b"\n"])
def test_a_file_with_nothing_to_read_is_an_error(
    words: list[str], content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.jsonl").write_bytes(content)
    assert main([*words, str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]) == 2
    assert "no records in it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_keeps_its_chat_template_and_the_applied_model_has_it(data: Path, tmp_path: Path) -> None:
    words = ["train", "--dataset", str(data), "--chat-template", str(tmp_path / "t.jinja"), "--max-steps", "1",
             "--num-generations", "4", "--max-new-tokens", "48", "--output-dir", str(tmp_path / "run")]  # fmt: skip
    assert main(words) == 0
    applied = tmp_path / "applied"
    delta = tmp_path / "run/checkpoints/000001/delta.safetensors"
    assert main(["delta", "apply", "tiny-reasoner", str(delta), "-o", str(applied)]) == 0
    assert (applied / "chat_template.jinja").read_text() == TEMPLATE
