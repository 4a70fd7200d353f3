"""Training of a model that is sharded over processes: the sets of one process, its weights but for rounding."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import run_processes
from safetensors.torch import load_file

from ssrctl import tiny_reasoner
from ssrctl.checkpoints.run_dir import RunDir, load_checkpoint
from ssrctl.cli import main
from ssrctl.io.mask_log import load_mask_log
from ssrctl.sampling.engines import transformers_engine
from ssrctl.sampling.engines.transformers_engine import NonFiniteLogits
from ssrctl.training.step_gradients.task import GradientTask, NonFiniteLoss

SMALL = [
    "train", "--questions-per-step", "2", "--num-generations", "3", "--max-new-tokens", "24", "--save-steps", "1",
    "--log-masks-every", "1", "--seed", "1",
]  # fmt: skip
TRAIN = [
    "train", "--questions-per-step", "3", "--num-generations", "4", "--max-new-tokens", "32", "--save-steps", "1",
    "--log-masks-every", "1", "--seed", "2", "--max-steps", "2",
]  # fmt: skip
SHARDED = ["--sharding", "fsdp2"]


def one_process(words: list[str], run: Path) -> None:
    assert main([*words, "--sample-together", "question", "-o", str(run)]) == 0


def processes(words: list[str], size: int, run: Path, before: Callable[[int], None] | None = None) -> list[Any]:
    return run_processes([*words, "-o", str(run)], size, run.parent / "logs", before)


def overlap(ours: set[Any], theirs: set[Any]) -> float:
    return len(ours & theirs) / max(1, len(ours | theirs))


def assert_same_training(one: Path, other: Path, steps: int, *, atol: float = 1e-6) -> None:
    """Two runs have the same rollouts, sets and weights.

    Gradients are summed in another order over shards: a coordinate or two at a threshold may change places, and sums that
    are zero but for rounding may differ.
    """
    for step in range(1, steps + 1):
        assert RunDir(one).rollouts(step).read_text() == RunDir(other).rollouts(step).read_text()
        logs = [RunDir(run).masks(step) for run in (one, other)]
        if logs[0].exists():
            ours, theirs = ([unit.mask for q in load_mask_log(path).questions for unit in q.units] for path in logs)
            for mine, its in zip(ours, theirs, strict=True):
                assert mine.count() == its.count() and (mine & its).count() > 0.998 * mine.count() > 0
    first, second = (load_checkpoint(RunDir(run).checkpoint(steps)) for run in (one, other))
    assert first.optimizer.keys() == second.optimizer.keys() and first.delta.count > 1000
    base = load_file(tiny_reasoner.path() / "model.safetensors")
    mine, others = (each.delta.load(lambda name, at: base[name].flatten()[at]).changes for each in (first, second))
    for name, (indices, values) in mine.items():
        theirs, found = others[name]
        assert overlap(set(indices.tolist()), set(theirs.tolist())) > 0.995
        ours, its = values[torch.isin(indices, theirs)], found[torch.isin(theirs, indices)]
        assert float(torch.isclose(ours, its, rtol=1e-3, atol=atol).double().mean()) > 0.998, name


def test_two_shards_train_what_one_process_does_which_continues(tmp_path: Path) -> None:
    one, two = tmp_path / "1" / "run", tmp_path / "2" / "run"
    one_process([*SMALL, "--max-steps", "2"], one)
    ended = processes([*SMALL, *SHARDED, "--max-steps", "1"], 2, two)
    assert [process.code for process in ended] == [0, 0], ended
    manifest = json.loads((two / "manifest.json").read_text())
    assert (manifest["num_processes"], manifest["sharding"]) == (2, "fsdp2")
    row = json.loads((two / "metrics.jsonl").read_text())
    assert [work["questions"] for work in row["processes"]] == [2, 2]
    units, weights = row["num_units"], 4 * manifest["num_coordinates"]
    assert units > 2
    # at the start, to sample, to find the form of the head, forward for each question, back for each unit; the rest is small
    for work in row["processes"]:
        assert work["bytes_sent"] == pytest.approx((1 + 1 + 1 + 2 + 2 * units) * weights / 2, rel=0.01)
    assert_same_training(one, two, 1)
    one_process([*SMALL, "--max-steps", "2", "--resume-from-checkpoint", "latest"], two)
    assert_same_training(one, two, 2)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--step-gradient", "recomputed"], "--step-gradient recomputed does not work with --sharding fsdp2"),
        (["--micro-batch-tokens", "99", "--selection", "block"], "--micro-batch-tokens, --selection block does not"),
        (["--reuse-factor", "2", "--log-gradients", "1"], "--reuse-factor, --log-gradients does not work"),
        (["--log-gradient-cosine"], "--log-gradient-cosine does not"),
        (["--mask", "m.safetensors"], "--optimizer adamw with --mask does not"),
        (["--critic", "rollout", "--sample-together", "step"], "--critic rollout with --sample-together step does not"),
        (["--num-processes", "1"], "divides the model over processes, and there is one"),
    ],
)
def test_what_does_not_work_on_shards_is_refused(words, said, capfd, tmp_path: Path) -> None:
    numbers = [] if "--num-processes" in words else ["--num-processes", "2"]
    assert main(["train", *SHARDED, *numbers, *words, "-o", str(tmp_path / "run")]) == 2
    err = capfd.readouterr().err
    assert said in err and "Traceback" not in err
    assert main(["train", "--sampling-weights", "shards"]) == 2
    assert "is for --sharding fsdp2" in capfd.readouterr().err


VARIANTS = {
    "adam, truncated": (2, ["--update-rule", "adam", "--step-gradient", "truncated"]),
    "rms, by tensor": (3, ["--update-rule", "rms", "--scope", "tensor"]),
    "KL, checkpointed, two passes": (
        2, ["--beta", "0.05", "--gradient-checkpointing", "--num-iterations", "2", "--resample-without-signal", "1",
            "--engine-correction", "truncate"],
    ),
    "pooled, token loss": (3, ["--allocation", "pooled", "--loss-type", "dapo", "--importance-level", "token"]),
    "shuffled, fused": (4, ["--allocation", "shuffled", "--fuse-tol", "0.3", "--max-units", "2", "--num-generations", "3"]),
    "rollout critic": (4, ["--critic", "rollout", "--critic-rollouts", "2", "--questions-per-step", "2"]),
    "adamw": (3, ["--optimizer", "adamw", "--learning-rate", "1e-4"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["whole", "shards"])
@pytest.mark.parametrize("name", VARIANTS)
def test_shards_train_what_one_process_does(name: str, weights: str, tmp_path: Path) -> None:
    size, words = VARIANTS[name]
    one_process([*TRAIN, *words], tmp_path / "1" / "run")
    ended = processes([*TRAIN, *words, *SHARDED, "--sampling-weights", weights], size, tmp_path / "n" / "run")
    assert {process.code for process in ended} == {0}, ended
    # the first steps of adam divide rounding by itself where a gradient is as good as zero
    assert_same_training(tmp_path / "1" / "run", tmp_path / "n" / "run", 2, atol=2e-4 if name == "adamw" else 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["kronos", "adamw"])
def test_masks_and_a_run_that_changes_its_sharding(optimizer: str, tmp_path: Path) -> None:
    mask = tmp_path / "mask.safetensors"
    assert main(["mask", "random", "--model", "tiny-reasoner", "--density", "0.3", "-o", str(mask)]) == 0
    words = [*TRAIN[:-2], "--protect", str(mask), "--optimizer", optimizer, "--dtype", "float32"]
    words += ["--update-rule", "adam"] if optimizer == "kronos" else ["--learning-rate", "1e-4"]
    whole, parts = tmp_path / "whole" / "run", tmp_path / "parts" / "run"
    one_process([*words, "--max-steps", "4"], whole)
    for step, (size, sharding) in enumerate([(2, "fsdp2"), (2, "none"), (3, "fsdp2"), (2, "fsdp2")], start=1):
        more = ["--sharding", sharding, *(["--resume-from-checkpoint", "latest"] if step > 1 else [])]
        ended = processes([*words, *more, "--max-steps", str(step)], size, parts)
        assert {process.code for process in ended} == {0}, ended
    assert_same_training(whole, parts, 4, atol=1e-5 if optimizer == "kronos" else 4e-4)


def broken_question(rank: int) -> None:
    """Make the loss of a question's second unit, and the gradient of another's first, not finite, in every process."""
    differentiate = GradientTask.differentiate
    calls = 0

    def broken(self: GradientTask, *args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise NonFiniteLoss("the loss of steps [1] is nan")
        made, derivative = differentiate(self, *args)
        return made, derivative * torch.nan if calls == 3 else derivative

    GradientTask.differentiate = broken  # type: ignore[method-assign]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["kept", "truncated"])
def test_questions_that_are_not_finite_are_left_out(method: str, tmp_path: Path) -> None:
    runs = {}
    for name, words in (("whole", ["--sample-together", "question"]), ("shards", SHARDED)):
        runs[name] = tmp_path / name / "run"
        words = [*TRAIN, "--questions-per-step", "4", "--step-gradient", method, *words]
        ended = processes(words, 1 if name == "whole" else 2, runs[name], broken_question)
        assert {process.code for process in ended} == {0}, ended
        rows = [json.loads(line) for line in (runs[name] / "metrics.jsonl").read_text().splitlines()]
        assert [row["non_finite_questions"] for row in rows] == [2, 0]
    assert_same_training(runs["whole"], runs["shards"], 2)


@pytest.mark.slow
def test_a_killed_process_ends_the_others(tmp_path: Path) -> None:
    def before(rank: int) -> None:
        differentiate = GradientTask.differentiate
        calls = 0

        def killed(self: GradientTask, *args: Any) -> Any:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 12:
                os.kill(os.getpid(), signal.SIGKILL)
            return differentiate(self, *args)

        GradientTask.differentiate = killed  # type: ignore[method-assign]

    ended = processes([*SMALL, *SHARDED, "--max-steps", "9"], 2, tmp_path / "run", before)
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    lines = [line for line in ended[0].err.splitlines() if line.startswith("error: ")]
    assert lines == ["error: process 0 of 2 lost the others: one of them has ended"] and "Traceback" not in ended[0].err
    load_checkpoint(RunDir(tmp_path / "run").checkpoints()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["whole", "shards"])
def test_an_error_in_one_process_s_sampling_ends_all(weights: str, tmp_path: Path) -> None:
    def before(rank: int) -> None:
        take, calls = transformers_engine._Drawing.take, 0

        def broken(self: Any, tokens: torch.Tensor) -> bool:
            nonlocal calls
            calls += 1
            if rank == 1 and calls == 5:
                raise NonFiniteLogits("no token can be sampled", "use --dtype float32")
            return take(self, tokens)

        transformers_engine._Drawing.take = broken  # type: ignore[method-assign]

    words = [*SMALL, *SHARDED, "--sampling-weights", weights, "--max-steps", "1"]
    ended = processes(words, 2, tmp_path / "run", before)
    assert ended[1].code == 2 and ended[0].code in (1, 2)
    said = [line for process in ended for line in process.err.splitlines() if line.startswith("error: ")]
    assert said == ["error: no token can be sampled"], ended
