"""`ssrctl critic`: scores and the final answer are added; the summary counts what is missing."""

import json

import pytest

from ssrctl.cli import main
from ssrctl.configs import CriticConfig, SegmentConfig
from ssrctl.stages import critic as stage
from ssrctl.stages.critic import run
from ssrctl.stages.segment import run as segment

QUESTION = "48*6-2=?"
ROWS = [
    {"id": "q/0", "question": QUESTION, "answer": "86", "response": "48*6=88\n88-2=86\n####86", "modulus": 100},
    {"id": "q/1", "question": QUESTION, "answer": "86", "response": "48*6=88\n88-2=87\n####87", "modulus": 100},
    {"id": "q/2", "question": QUESTION, "answer": "86", "response": "48*6=88\nhm hm\n####", "modulus": 100},
    {"id": "q/3", "question": QUESTION, "response": "", "modulus": 100, "tag": "kept"},
]


@pytest.fixture
def steps(tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "steps.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    segment(SegmentConfig(input=str(source), output=str(target)))
    return target


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_rule_critic_end_to_end(steps, tmp_path):
    target = tmp_path / "scored.jsonl"
    summary = run(CriticConfig(input=str(steps), output=str(target)))
    right, wrong, unclear, empty = read(target)
    assert [score["reward"] for score in right["scores"]] == [1, 1, 1]
    assert [score["reward"] for score in wrong["scores"]] == [1, -1, -1]
    assert [score["error"] for score in unclear["scores"]] == [None, "no_equation", None]
    assert unclear["scores"][2]["reward"] == -1, "an answer marker without an answer is a wrong answer"
    assert unclear["scores"][1]["score"] is None and unclear["scores"][1]["reward"] is None
    assert empty["scores"] == [] and empty["tag"] == "kept" and right["modulus"] == 100
    assert right["final"] == {"extracted": "86", "correct": True, "way": "hashes", "outcome": "correct"}
    assert wrong["final"]["correct"] is False and empty["final"]["correct"] is None
    assert summary["missing"] == 1 and summary["missing_by_class"] == {"no_equation": 1}
    assert summary["mean_reward"] == pytest.approx((1 + 1 + 1 + 1 - 1 - 1 + 1 - 1) / 8)  # missing ones are left out
    assert (summary["responses"], summary["steps"], summary["without_steps"]) == (4, 9, 1)
    assert summary["accuracy"] == pytest.approx(1 / 3)  # of those with a reference answer


def test_old_advantages_do_not_survive_new_scores(steps, tmp_path):
    rows = [row | {"advantages": [0.5] * len(row["steps"])} for row in read(steps)]
    steps.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    run(CriticConfig(input=str(steps), output=str(tmp_path / "scored.jsonl")))
    assert all("advantages" not in row for row in read(tmp_path / "scored.jsonl"))


def test_records_go_to_stdout_and_the_summary_to_stderr(steps, capsys):
    assert main(["critic", str(steps)]) == 0
    out, err = capsys.readouterr()
    assert [json.loads(line)["id"] for line in out.splitlines()] == [row["id"] for row in ROWS]
    assert "mean reward" in err


def test_usage_errors(steps, tmp_path, capsys):
    assert main(["critic", str(steps), "--json"]) == 2
    assert main(["critic", str(tmp_path / "in.jsonl")]) == 2
    assert "ssrctl segment" in capsys.readouterr().err
    assert main(["critic", str(steps), "--critic", "llm"]) == 2
    assert "--critic-model" in capsys.readouterr().err


def test_dry_run_counts_the_calls_and_makes_none(steps, tmp_path, capsys):
    words = ["critic", str(steps), "-o", str(tmp_path / "scored.jsonl"), "--dry-run", "--json"]
    assert main([*words, "--critic", "llm", "--critic-model", "openai/judge"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["calls"] == 3 and plan["steps"] == 9
    assert not (tmp_path / "scored.jsonl").exists()


def test_ctrl_c_leaves_the_old_output(steps, tmp_path, monkeypatch):
    target = tmp_path / "scored.jsonl"
    target.write_text("old", encoding="utf-8")

    class Interrupted:
        identity = None

        def stream(self, rollouts):
            yield next(iter(rollouts)), []
            raise KeyboardInterrupt

        def summary(self):
            return {}

        def close(self):
            pass

    monkeypatch.setattr(stage, "make_critic", lambda options, resources: Interrupted())
    assert main(["critic", str(steps), "-o", str(target)]) == 1
    assert target.read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "scored.jsonl", "steps.jsonl"]
