"""Runs that are stopped: what is kept, what is said, and how they continue."""

from __future__ import annotations

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.cli import main
from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io.files import CannotWrite
from ssrctl.stages import train
from ssrctl.training import training_step

SMALL = {"questions_per_step": 1, "num_generations": 2, "max_new_tokens": 24, "log_masks_every": 0}


def config(run: Path, **more: Any) -> TrainConfig:
    return TrainConfig(output_dir=run, **{**SMALL, **more})


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def steps(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_the_same_command_starts_again_what_stopped_before_its_first_checkpoint(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=2))
    before = files(run)
    delta = RunDir(run).checkpoint(2) / "delta.safetensors"
    first = delta.read_bytes()
    (RunDir(run).checkpoint(2) / "COMPLETE").unlink()  # what a kill at this moment leaves
    (RunDir(run).checkpoint(2) / ".state.json.abcd.part").touch()
    (run / "rollouts" / ".000002.jsonl.abcd.part").touch()
    with pytest.raises(UserError, match=r"before its first checkpoint, and had other settings: num_generations was 2"):
        train.run(config(run, max_steps=2, num_generations=3))
    capfd.readouterr()
    train.run(config(run, max_steps=2))
    assert "stopped before its first checkpoint" in (err := capfd.readouterr().err)
    assert "dropped: 2 rows of metrics, rollouts of 2 steps" in err
    assert files(run) == before and steps(run) == [1, 2]
    assert delta.read_bytes() == first, "the same command gave other bytes"


def test_resuming_from_an_older_checkpoint_says_what_it_drops_and_needs_force(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=3, save_steps=1))
    older = str(RunDir(run).checkpoint(1))
    dropped = "2 rows of metrics, rollouts of 2 steps, checkpoints 000002 000003"
    with pytest.raises(UserError, match=dropped) as caught:
        train.run(config(run, max_steps=3, save_steps=1, resume_from_checkpoint=older))
    assert caught.value.remedy is not None and "--force" in caught.value.remedy and steps(run) == [1, 2, 3]
    train.run(config(run, max_steps=2, save_steps=1, resume_from_checkpoint=older, force=True))
    assert f"after step 1; dropped: {dropped}" in capfd.readouterr().err
    assert steps(run) == [1, 2] and [path.name for path in RunDir(run).checkpoints()] == ["000001", "000002"]
    (RunDir(run).checkpoint(2) / "delta.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match=r"the newest whole checkpoint is .*000001 \(resume") as caught:
        train.run(config(run, max_steps=3, resume_from_checkpoint="latest"))
    assert caught.value.remedy == f"resume with --resume-from-checkpoint {older} --force"
    (RunDir(run).checkpoint(2) / "COMPLETE").unlink()
    with pytest.raises(
        UserError, match=r"000002 is not a complete checkpoint; the newest whole .*000001 \(resume"
    ) as caught:
        train.run(config(run, resume_from_checkpoint=str(RunDir(run).checkpoint(2))))
    assert caught.value.remedy == f"resume with --resume-from-checkpoint {older}"


def test_force_without_a_checkpoint_is_refused() -> None:
    with pytest.raises(UserError, match="--force is for --resume-from-checkpoint"):
        TrainConfig(force=True)


def test_a_full_disk_keeps_the_last_checkpoint_and_says_how_to_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    write_jsonl = train.Trainer._write_logs

    def full_at_step_2(self: Any, result: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.step == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10, before[1]))
        try:
            write_jsonl(self, result)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    with monkeypatch.context() as patch:
        patch.setattr(train.Trainer, "_write_logs", full_at_step_2)
        with pytest.raises(CannotWrite, match=r"cannot write .*000002\.jsonl: File too large") as caught:
            train.run(config(run, max_steps=3, save_steps=1))
    assert [path.name for path in RunDir(run).checkpoints()] == ["000001"] and steps(run) == [1]
    assert not [name for name in files(run) if name.endswith((".part", ".lock"))]
    remedy = caught.value.remedy
    assert remedy is not None and remedy.startswith("make room; to continue: ssrctl train ")
    assert main(shlex.split(remedy.partition("ssrctl ")[2])) == 0
    whole = tmp_path / "uninterrupted" / "run"
    train.run(config(whole, max_steps=3, save_steps=1))
    for name in ("delta.safetensors", "optimizer.safetensors"):
        assert (RunDir(run).checkpoint(3) / name).read_bytes() == (RunDir(whole).checkpoint(3) / name).read_bytes()


def test_half_a_step_is_never_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With several passes over a batch, a NaN in a later one comes when the weights have changed."""
    learn, calls = training_step.TrainingStep._learn, 0

    def nan_in_the_second_pass_of_step_2(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 4:
            args[4].non_finite += 1  # as for a question whose loss is NaN
            return None
        return learn(self, *args, **kwargs)

    run = tmp_path / "run"
    monkeypatch.setattr(training_step.TrainingStep, "_learn", nan_in_the_second_pass_of_step_2)
    with pytest.raises(training_step.NonFiniteBatch, match="step 2 is applied in part and not stored") as caught:
        train.run(config(run, num_iterations=2, max_steps=3))
    assert "there is no checkpoint from before" in str(caught.value.remedy)
    assert calls == 4 and steps(run) == [1] and RunDir(run).checkpoints() == []


def test_another_process_in_the_folder_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ssrctl.io.locks import locked_folder

    with locked_folder(tmp_path / "run"):
        assert main(["train", "-o", str(tmp_path / "run")]) == 2
        assert f"is in use by process {os.getpid()}" in capfd.readouterr().err
        assert main(["eval", "-o", str(tmp_path / "run")]) == 2
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_sigterm_keeps_what_was_done_and_names_the_command_that_continues(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "ssrctl", "train", "-o", str(run), "--max-steps", "4", "--max-new-tokens", "48"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not ((run / "metrics.jsonl").exists() and steps(run)):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3 and "stopped: SIGTERM: after step" in err and "Traceback" not in err
    command = err.partition("to continue: ssrctl ")[2].splitlines()[0]
    again = subprocess.run([*words[:3], *shlex.split(command)], env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert steps(run) == [1, 2, 3, 4]
