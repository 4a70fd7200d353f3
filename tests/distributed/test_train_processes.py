"""Training in several processes: the weights of one, and a clean end whatever happens to one of them."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from processes import run_processes

from ssrctl.checkpoints.run_dir import RunDir, load_checkpoint
from ssrctl.cli import main
from ssrctl.training.training_step import TrainingStep

SMALL = [
    "train", "--questions-per-step", "3", "--num-generations", "2", "--max-new-tokens", "24", "--save-steps", "1",
    "--seed", "1",
]  # fmt: skip
LOGS = ["--log-masks-every", "1", "--log-gradients", "1", "--json"]
OWN = {  # what says how the work was divided, and times
    "num_processes", "processes", "tokens_per_second", "sample_seconds", "score_seconds", "update_seconds",
    "peak_memory_bytes", "reference_seconds",
}  # fmt: skip


def rows(run: Path) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in OWN} for row in found]


def assert_same_run(one: Path, other: Path) -> None:
    """Every file of two runs has the same bytes, but for the settings, the manifest and the times."""
    files = {str(p.relative_to(one)) for p in one.rglob("*") if p.is_file()}
    assert files == {str(p.relative_to(other)) for p in other.rglob("*") if p.is_file()}
    assert any(name.endswith("optimizer.safetensors") for name in files)
    for name in sorted(files - {"metrics.jsonl", "config.yaml", "manifest.json"}):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert rows(one) == rows(other)


def at_step(number: int, happen: Callable[[], None]) -> Callable[[int], None]:
    """Return the preparation of a process that makes ``happen()`` come in the middle of a training step, in process 1."""
    run = TrainingStep._scored
    calls = 0

    def scored(self: TrainingStep, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            happen()
        return run(self, *args)

    def before(rank: int) -> None:
        if rank == 1:
            TrainingStep._scored = scored  # type: ignore[method-assign]

    return before


def test_two_processes_write_the_run_of_one(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Three questions for two processes, one group of masks and a sketch; then resumed by one process."""
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    assert main([*SMALL, *LOGS, "--max-steps", "2", "--sample-together", "question", "-o", str(one)]) == 0
    capfd.readouterr()
    ended = run_processes([*SMALL, *LOGS, "--max-steps", "2", "-o", str(two)], 2, tmp_path / "logs")
    assert [process.code for process in ended] == [0, 0], ended
    assert json.loads(ended[0].out)["steps"] == 2 and ended[1].out == ended[1].err == ""
    assert_same_run(one, two)
    manifest = json.loads((two / "manifest.json").read_text())
    assert manifest["num_processes"] == 2
    last = json.loads((two / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["num_processes"] == 2 and [work["rank"] for work in last["processes"]] == [0, 1]
    assert sum(work["questions"] for work in last["processes"]) == 3
    assert all(work["questions"] and work["learn_seconds"] > 0 for work in last["processes"])
    sent, received = ([work[key] for work in last["processes"]] for key in ("bytes_sent", "bytes_received"))
    assert sent == received[::-1] and all(sent)
    delta = load_checkpoint(RunDir(one).checkpoint(2)).delta
    assert delta.count > 1000, "nothing was trained"


def test_a_process_that_is_killed_ends_the_others_and_the_last_checkpoint_is_whole(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SMALL, "--max-steps", "4", "-o", str(run)]
    ended = run_processes(words, 2, tmp_path / "logs", at_step(3, lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    lines = [line for line in ended[0].err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: process 0 of 2 lost the others: one of them has ended"] and "Traceback" not in ended[0].err
    assert [path.name for path in RunDir(run).checkpoints()] == ["000001", "000002"]
    assert load_checkpoint(RunDir(run).checkpoint(2)).delta.count


@pytest.mark.slow
def test_sigterm_on_one_process_saves_once_and_ends_all(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [*SMALL[:7], "--max-steps", "4", "-o", str(run)]
    ended = run_processes(words, 2, tmp_path / "logs", at_step(2, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    assert [process.code for process in ended] == [3, 3], ended
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("stopped: ")]
    assert said == ["stopped: a signal: after step 2 of 4"]
    assert [path.name for path in RunDir(run).checkpoints()] == ["000002"]


def test_a_process_with_other_files_is_named(tmp_path: Path) -> None:
    for rank in range(2):
        rows = [{"question": f"{3 + place}+4=?", "answer": str(7 + place + rank)} for place in range(4)]
        folder = tmp_path / str(rank)
        folder.mkdir()
        (folder / "short.txt").write_text("{question}\n")
        (folder / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def words(rank: int) -> list[str]:
        return [*SMALL, "--dataset", "problems.jsonl", "--prompt-template", "short.txt", "-o", str(tmp_path / "run")]

    ended = run_processes(words, 2, tmp_path / "logs", lambda rank: os.chdir(tmp_path / str(rank)))
    assert [process.code for process in ended] == [2, 2], ended
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and "process 1 differs from process 0 in contents of dataset: 'sha256:" in said[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
@pytest.mark.parametrize("field", ["dtype", "version of torch"])
def test_a_process_with_another_precision_or_version_is_named(field: str, tmp_path: Path) -> None:
    def words(rank: int) -> list[str]:
        return [*SMALL, "--dtype", "bfloat16" if rank and field == "dtype" else "float32", "-o", str(tmp_path / "run")]

    def before(rank: int) -> None:
        from ssrctl.io import manifest

        if rank and field != "dtype":
            found = manifest.versions() | {"torch": "1.0"}
            manifest.versions = lambda: found

    ended = run_processes(words, 2, tmp_path / "logs", before)
    assert [process.code for process in ended] == [2, 2], ended
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1 and f"process 1 differs from process 0 in {field}: " in said[0], said
