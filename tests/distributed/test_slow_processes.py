"""More processes, every update rule, masks, resuming with another number, and the real launchers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import run_processes
from test_train_processes import SMALL, assert_same_run, rows

from ssrctl.checkpoints.run_dir import RunDir, load_checkpoint
from ssrctl.cli import main

pytestmark = pytest.mark.slow
TRAIN = ["train", "--questions-per-step", "5", "--num-generations", "3", "--max-new-tokens", "40", "--seed", "2"]
KRONOS = {
    "sgd, bfloat16": ["--dtype", "bfloat16"],
    "adam, fused": ["--update-rule", "adam", "--fuse-tol", "0.3", "--max-units", "2"],
    "rms, by tensor": ["--update-rule", "rms", "--scope", "tensor"],
    "overlap, two passes": ["--allocation", "overlap", "--num-iterations", "2"],
    "pooled, block": ["--allocation", "pooled", "--selection", "block"],
    "reuse": ["--reuse-factor", "1.5", "--log-masks-every", "1", "--log-gradients", "1", "--log-gradient-cosine"],
    "KL, masks, again": ["--beta", "0.05", "--mask-truncated", "--resample-without-signal", "1", "--loss-type", "grpo"],
    "rollout critic": ["--critic", "rollout", "--critic-rollouts", "2"],
}


@pytest.mark.parametrize("name", KRONOS)
def test_two_and_four_processes_write_the_run_of_one(name: str, tmp_path: Path) -> None:
    words = [*TRAIN, *KRONOS[name], "--max-steps", "3", "--save-steps", "2", "--sample-together", "question"]
    assert main([*words, "-o", str(tmp_path / "1" / "run")]) == 0
    for size in (2, 4):
        run = tmp_path / str(size) / "run"
        ended = run_processes([*words, "-o", str(run)], size, tmp_path / "logs")
        assert {process.code for process in ended} == {0}, ended
        assert_same_run(tmp_path / "1" / "run", run)
    assert load_checkpoint(RunDir(tmp_path / "4" / "run").checkpoint(3)).delta.count


def test_masks_and_a_number_of_processes_that_changes_on_the_way(tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    assert main(["mask", "random", "--model", "tiny-reasoner", "--density", "0.3", "-o", str(mask)]) == 0
    settings = ["--mask", str(mask), "--optimizer", "kronos", "--update-rule", "adam", "--sample-together", "question"]
    words = [*TRAIN, *settings, "--save-steps", "1"]
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    assert main([*words, "--max-steps", "4", "-o", str(whole)]) == 0
    more = ["--resume-from-checkpoint", "latest"]
    for size, steps in ((4, 1), (2, 2), (1, 3), (3, 4)):
        now = [*words, "--max-steps", str(steps), "-o", str(parts), *(more if steps > 1 else [])]
        ended = run_processes(now, size, tmp_path / "logs")
        assert {process.code for process in ended} == {0}, ended
    for step in (1, 2, 3, 4):
        for file in ("delta.safetensors", "optimizer.safetensors"):
            one, other = (load_checkpoint(RunDir(run).checkpoint(step)) for run in (whole, parts))
            assert one.optimizer.keys() == other.optimizer.keys(), file
            assert all(one.optimizer[key].equal(other.optimizer[key]) for key in one.optimizer)
            assert one.delta.count == other.delta.count
    assert rows(whole) == rows(parts)


@pytest.mark.parametrize("masked", [False, True])
def test_dense_updates_are_those_of_one_process_to_rounding(masked: bool, tmp_path: Path) -> None:
    words = [*TRAIN, "--optimizer", "adamw", "--max-steps", "2", "--sample-together", "question"]
    if masked:
        assert (
            main(
                [
                    "mask",
                    "random",
                    "--model",
                    "tiny-reasoner",
                    "--density",
                    "0.3",
                    "-o",
                    str(tmp_path / "m.safetensors"),
                ]
            )
            == 0
        )
        words += ["--mask", str(tmp_path / "m.safetensors")]
    assert main([*words, "-o", str(tmp_path / "one")]) == 0
    ended = run_processes([*words, "-o", str(tmp_path / "three")], 3, tmp_path / "logs")
    assert {process.code for process in ended} == {0}, ended
    one, three = rows(tmp_path / "one"), rows(tmp_path / "three")
    assert three[0]["grad_norm"] == pytest.approx(one[0]["grad_norm"], rel=1e-5) and one[0]["grad_norm"] > 0
    for key in ("reward", "response_tokens", "num_units"):
        assert one[0][key] == three[0][key]


def launched(words: list[str], **more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **more}
    return subprocess.Popen(
        [sys.executable, "-m", *words], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize(
    "launcher",
    [
        ["ssrctl", "train", "--num-processes", "2"],
        ["torch.distributed.run", "--nproc-per-node", "2", "--module", "ssrctl", "train"],
        [
            "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0",
            "--module", "ssrctl", "train",
        ],
    ],
    ids=["num-processes", "torchrun", "accelerate"],
)  # fmt: skip
def test_each_launcher_gives_the_run_of_one_process(launcher: list[str], tmp_path: Path) -> None:
    words = [*SMALL[1:], "--max-steps", "2", "--no-report"]
    assert main(["train", *words, "--sample-together", "question", "-o", str(tmp_path / "1" / "run")]) == 0
    process = launched([*launcher, *words, "-o", str(tmp_path / "2" / "run")])
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    assert_same_run(tmp_path / "1" / "run", tmp_path / "2" / "run")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals_to_a_launched_job(number: signal.Signals, tmp_path: Path) -> None:
    """SIGTERM and Ctrl-C reach the launcher; SIGKILL one of the processes."""
    import psutil

    run = tmp_path / "run"
    process = launched(["ssrctl", "train", "--num-processes", "2", *SMALL[1:], "--max-steps", "500", "-o", str(run)])
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not RunDir(run).checkpoints():
        time.sleep(0.05)
    if number == signal.SIGKILL:
        ours = [one for one in psutil.Process(process.pid).children() if "ssrctl" in " ".join(one.cmdline())]
        assert len(ours) == 2
        ours[1].kill()
    else:
        process.send_signal(number)
    started = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - started < 60, "it did not end within a minute"
    said = [line for line in err.splitlines() if line.startswith(("error: ", "stopped: "))]
    assert len(said) == 1 and "Traceback" not in err, err
    if number == signal.SIGKILL:
        assert process.returncode == 1 and "was killed (SIGKILL)" in said[0]
    else:
        assert process.returncode == 3 and said[0].startswith("stopped: a signal: after step ")
        assert int(RunDir(run).checkpoints()[-1].name) == rows(run)[-1]["step"]
    load_checkpoint(RunDir(run).checkpoints()[-1])
