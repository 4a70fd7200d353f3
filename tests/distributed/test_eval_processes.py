"""Evaluation in several processes: the samples and the summary of one."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import run_processes

from ssrctl.cli import main

SMALL = ["eval", "--limit", "5", "--num-samples", "2", "--max-new-tokens", "16", "--sampling-batch-size", "3", "--json"]


@pytest.mark.slow
def test_two_processes_draw_the_samples_of_one(tmp_path: Path) -> None:
    """Four chunks; a part of them is there already, and the last one is short."""
    one, two = tmp_path / "one", tmp_path / "two"
    assert main([*SMALL, "-o", str(one)]) == 0
    lines = (one / "samples.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 10
    ended = run_processes([*SMALL, "-o", str(two)], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    for name in ("samples.jsonl", "summary.json", "settings.json"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    assert ended[1].out == ended[1].err == "" and '"accuracy"' in ended[0].out
    (two / "samples.jsonl").write_text("".join(lines[:3]))
    ended = run_processes([*SMALL, "-o", str(two)], 2, tmp_path / "logs")
    assert "3 of 10 samples are already in" in ended[0].err
    assert sorted((two / "samples.jsonl").read_text().splitlines(keepends=True)) == sorted(lines)


def test_given_responses_are_graded_in_one_process(tmp_path: Path) -> None:
    ended = run_processes(["eval", "--responses", str(tmp_path / "r.jsonl")], 2, tmp_path / "logs")
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert [process.code for process in ended] == [2, 2]
    assert said == ["error: nothing is sampled, and 2 processes were launched"]
