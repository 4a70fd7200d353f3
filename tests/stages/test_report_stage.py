"""`ssrctl report`: pages of runs and evaluations from their logs, also of runs in progress and damaged logs."""

from __future__ import annotations

import html
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssrctl.cli import main
from ssrctl.configs import EvalConfig, TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.evaluation.eval_page import EvalLog, eval_document, read_evaluation
from ssrctl.evaluation.run_log import read_run
from ssrctl.evaluation.run_page import run_document
from ssrctl.io.mask_log import CONFLICTS, QuestionLog, StepMaskLog, UnitLog, load_claims, save_mask_log
from ssrctl.report.document import Dots, Lines
from ssrctl.report.formats import duration, sparkline
from ssrctl.stages import eval as eval_stage
from ssrctl.stages import report, train

ATTACK = "<script>alert(1)</script>"


def write_run(folder: Path, *, steps: int = 12, version: str = "0.1.0", **settings: object) -> Path:
    """A run whose accuracy rises by 0.05 a step from 0.1 on; the critic's second call cost 0.75 dollars."""
    (folder / "rollouts").mkdir(parents=True)
    (folder / "config.yaml").write_text(json.dumps({"model": "/a/b/base", "max_steps": 12, "seed": 0} | settings))
    (folder / "manifest.json").write_text(json.dumps({"versions": {"ssrctl": version}}))
    rows = [
        {"step": step, "accuracy": 0.05 + 0.05 * step, "reward": None if step == 1 else -0.5, "entropy": 0.25,
         "response_tokens_mean": 40.0, "lost_update_frac": 0.25, "sample_seconds": 3.0, "update_seconds": 1.0}
        for step in range(1, steps + 1)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    calls = [{"cached": True, "cost_usd": 0.0}, {"cached": False, "cost_usd": 0.75}]
    (folder / "critic_calls.jsonl").write_text("".join(json.dumps(row) + "\n" for row in calls))
    step = {"rationale": None, "error": None}
    rollout = {
        "id": "q1/0", "question": "1+1?", "response": f"one{ATTACK}\n#### 2",
        "steps": [{"start": 0, "end": 29, "kind": "step"}, {"start": 29, "end": 35, "kind": "final"}],
        "scores": [{"score": -50, "reward": -0.5} | step, {"score": None, "reward": None} | step],
        "final": {"extracted": "2", "correct": True},
    }  # fmt: skip
    wrong = rollout | {"id": "q1/1", "final": {"extracted": "3", "correct": False}}
    lines = [json.dumps(one) + "\n" for one in (rollout, rollout | {"id": "q1/2"}, wrong)]
    (folder / "rollouts" / f"{steps:06d}.jsonl").write_text("".join(lines))
    return folder


def write_masks(folder: Path) -> None:
    """Two questions: units of 40 and 20 of the 400 unprotected weights, and one of 20."""
    (folder / "masks").mkdir()

    def unit(size: int) -> UnitLog:
        mask = BlockMask.from_indices({"w": (20, 25)}, {"w": torch.arange(size)})
        return UnitLog(steps=[0], budget=0.1, advantages=[0.5], mask=mask)

    conflict: dict[str, list[list[float | None]]] = {name: [[None, 0.25], [0.25, None]] for name in CONFLICTS}
    questions = [
        QuestionLog(id="a", units=[unit(40), unit(20)], gradient_cosine=[[1.0, -0.5], [-0.5, 1.0]], conflict=conflict),
        QuestionLog(id="b", units=[unit(20)]),
    ]
    log = StepMaskLog(step=10, num_coordinates=500, num_protected=100, questions=questions)
    save_mask_log(folder / "masks" / "000010.safetensors", log)


def series(document: Any, title: str) -> dict[str, list[float | None]]:
    figures = [one for section in document.sections for one in section.figures if one.title == title]
    assert len(figures) == 1 and isinstance(figures[0], Lines | Dots)
    return {name: list(values) for name, values in figures[0].series.items()}


def test_a_runs_numbers_are_those_of_its_logs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_masks(run)
    document = run_document([read_run(run, "run")])
    accuracy, reward, length, entropy, took, cost = document.headlines
    assert accuracy.startswith("Accuracy 0.550 (") and "0.200 (" in accuracy  # means of the last and the first 5 steps
    assert (reward, length, entropy) == (
        "Reward -0.500 after -0.500.",
        "Responses of 40.0 tokens.",
        "Entropy 0.250 nats.",
    )
    assert took == "48.0 s (75% sampling, 25% updates)." and cost == "$0.75 for 1 calls of the critic."
    shown = series(document, "Accuracy")["run"]
    assert shown[0] == pytest.approx(0.1) and shown[5] == pytest.approx(0.25)  # of steps 2 to 6
    assert series(document, "Reward")["run"] == [-0.5] * 11  # the first of 12 steps has none
    assert series(document, "Updates that survive storage")["run"] == [0.75] * 12
    assert series(document, "Claimed share by step index")["run"] == pytest.approx([(0.1 + 0.05) / 2, 0.05])
    assert series(document, "Conflict of a question's steps")["run"] == [0.25]
    assert series(document, "Seconds of a training step by phase")["run"] == [3.0, 1.0]
    right, wrong = document.sections[-1].transcripts
    assert (right.title, wrong.title) == ("q1/0, right", "q1/1, wrong")
    assert right.parts == [(f"one{ATTACK}\n", -0.5), ("#### 2", None)]
    assert document.facts == [("run", "base, ?, credit ?; 12 of 12 steps")] and document.notes == []


def test_claims_are_read_without_the_sets(tmp_path: Path) -> None:
    write_masks(tmp_path)
    found = load_claims(tmp_path / "masks" / "000010.safetensors")
    assert found.shares == [[0.1, 0.05], [0.05]] and (found.cosines, found.conflicts) == ([-0.5], [0.25])


@pytest.fixture
def command(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    monkeypatch.chdir(tmp_path)

    def call(*words: object, code: int = 0) -> str:
        capfd.readouterr()
        assert main(["report", *map(str, words)]) == code
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return out + err

    return call


def test_the_page_shows_runs_over_one_another_and_escapes_their_texts(
    tmp_path: Path, command: Callable[..., str]
) -> None:
    write_run(tmp_path / "a" / "run", steps=4)
    write_run(tmp_path / "b" / "run", version="0.2.0", seed=ATTACK)
    (tmp_path / "a" / "run" / "manifest.json").write_text("{}")
    said = command("a/run", "b/run", "-o", "both.html")
    assert "run has 4 of 12 steps" in said and "seed" in said and "does not say which version" in said
    page = (tmp_path / "both.html").read_text(encoding="utf-8")
    assert "<script" not in page and ATTACK in html.unescape(page) and "run #2: accuracy" in page
    assert 'class="bad" style="--score: 33%">one' in page and 'class="unscored">#### 2</span>' in page
    assert "<sup>-0.50</sup></span>\n<span" in page  # before the line's end
    assert not (tmp_path / "a" / "run" / "report.html").exists()


def test_a_run_in_progress_with_a_truncated_line_is_shown(tmp_path: Path, command: Callable[..., str]) -> None:
    run = write_run(tmp_path / "runs" / "one", steps=6)
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole + b'{"step": 7, "accu')
    said = command()
    assert "the newest of 1 run" in said and "metrics.jsonl:7: the last line is torn" in said
    assert "one has 6 of 12 steps" in said and (run / "report.html").is_file()
    assert (run / "metrics.jsonl").read_bytes() == whole + b'{"step": 7, "accu'


def test_a_watched_page_is_written_until_the_run_has_ended(
    tmp_path: Path, command: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = write_run(tmp_path / "run", steps=6)
    seen = []

    def sleep(seconds: float) -> None:
        seen.append('http-equiv="refresh"' in (run / "report.html").read_text(encoding="utf-8"))
        write_run(tmp_path / "done")
        (run / "metrics.jsonl").write_bytes((tmp_path / "done" / "metrics.jsonl").read_bytes())

    monkeypatch.setattr(report.time, "sleep", sleep)
    said = command("run", "--watch")
    assert seen == [True] and "in progress: run" in said and "12 of 12 steps" in said
    assert 'http-equiv="refresh"' not in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda at: None, "run directory not found: run"),
        (lambda at: at.mkdir(), "run has no metrics.jsonl: it is not a run directory"),
        (lambda at: (at.mkdir(), (at / "config.yaml").write_text("{}")), "run has no metrics.jsonl yet"),
        (lambda at: (at.mkdir(), (at / "metrics.jsonl").write_text('{"st')), "metrics.jsonl has no steps yet"),
        (lambda at: (at.mkdir(), (at / "metrics.jsonl").write_text("{]\n{}\n")), "metrics.jsonl:1: not valid json"),
        (lambda at: (at.mkdir(), (at / "samples.jsonl").write_text("")), "run has samples but no summary.json"),
        (lambda at: (at.mkdir(), (at / "summary.json").write_text('{"accuracy": 1}')), "is not a summary of"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(
    tmp_path: Path, command: Callable[..., str], make: Callable[[Path], object], said: str
) -> None:
    make(tmp_path / "run")
    write_run(tmp_path / "good")
    found = [line for line in command("good", "run", code=2).splitlines() if line.startswith("error: ")]
    assert len(found) == 1 and said in found[0]
    assert not (tmp_path / "report.html").exists()


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.1, "high": value + 0.1, "confidence": 0.95, "num_problems": 20}


def test_evaluations_are_shown_with_their_intervals(tmp_path: Path) -> None:
    for name, value in (("base", 0.4), ("tuned", 0.6)):
        (tmp_path / name).mkdir()
        summary: dict[str, Any] = {
            "model": {"name": "m"}, "accuracy": estimate(value), "num_samples": 40, "pass_at_k": {"1": value, "2": 0.7},
            "groups": {"level": {"1": estimate(value)}}, "outcomes": {"correct": 3, "wrong": 1},
        }  # fmt: skip
        if name == "tuned":
            summary["paired"] = {"difference": estimate(0.2), "baseline": "x/base"}
        (tmp_path / name / "summary.json").write_text(json.dumps(summary))
    base, tuned = (read_evaluation(tmp_path / name, name) for name in ("base", "tuned"))
    document = eval_document([base, tuned])
    assert document.headlines == [
        "base: accuracy 0.400 (0.300 to 0.500).",
        "tuned: accuracy 0.600 (0.500 to 0.700), +0.200 (+0.100 to +0.300) against the baseline base, paired.",
    ]
    accuracy = document.sections[0].figures[0]
    assert isinstance(accuracy, Dots) and accuracy.intervals["accuracy"][1] == (0.5, 0.7)
    assert series(document, "Accuracy by level") == {"base": [0.4], "tuned": [0.6]}
    assert series(document, "pass@k")["tuned"] == [0.6, 0.7]
    assert eval_document([base]).headlines == ["Accuracy 0.400 (0.300 to 0.500)."]
    measured = EvalLog(label="m", summary={**base.summary, "kl_to_base": {**estimate(0.2), "value": 0.25}}, samples=[])
    plain, both = (eval_document(logs).sections[0].tables[0] for logs in ([base, tuned], [base, measured]))
    assert len(both.columns) == len(plain.columns) + 1 == len(both.rows[0]) == len(plain.rows[1]) + 1
    assert [row[-1] for row in both.rows] == [None, 0.25]


@pytest.mark.page
def test_train_and_eval_end_with_a_page(tmp_path: Path) -> None:
    small: dict[str, Any] = {"questions_per_step": 1, "num_generations": 2, "max_new_tokens": 8, "max_steps": 1}
    train.run(TrainConfig(output_dir=tmp_path / "run", budget_profile="flat", **small))
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert "What did training do?" in page and "1 of 1 steps" in page
    drawn: dict[str, Any] = {"limit": 2, "num_samples": 1, "max_new_tokens": 8}
    eval_stage.run(EvalConfig(output_dir=tmp_path / "eval", report=False, **drawn))
    assert not (tmp_path / "eval" / "report.html").exists()
    eval_stage.run(EvalConfig(output_dir=tmp_path / "eval", **drawn))  # from the samples that are there
    assert "How accurate is the model?" in (tmp_path / "eval" / "report.html").read_text(encoding="utf-8")


def test_a_sparkline_is_as_high_as_its_values() -> None:
    assert sparkline([]) == sparkline([None]) == "" and sparkline([1.0, 1.0]) == "▄▄"
    assert sparkline([0.0, None, 1.0], 4) == "▁█" and len(sparkline([float(one) for one in range(100)])) == 12
    assert [duration(one) for one in (None, 12.34, 3725)] == ["–", "12.3 s", "1:02:05"]
