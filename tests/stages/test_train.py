"""`ssrctl train` on the bundled reasoner: what it writes, what never moves, and that resuming changes nothing."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference.critics import FunctionCritic

from ssrctl.checkpoints.delta import DeltaFile, apply_delta
from ssrctl.checkpoints.run_dir import RunDir, newest_checkpoint
from ssrctl.cli import main
from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import Stopped, UserError
from ssrctl.io.artifacts import ModelIdentity, save_mask
from ssrctl.io.budget_file import BudgetProfile, MassCurve, ShareCurve
from ssrctl.io.jsonl import read_jsonl
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.io.records import read_rollouts
from ssrctl.models.loading import load_model
from ssrctl.stages import train
from ssrctl.training import training_step
from ssrctl.training.unit_gradients import NonFiniteLoss

TIMES = {
    "peak_memory_bytes",
    "reference_seconds",
    "tokens_per_second",
    "sample_seconds",
    "score_seconds",
    "update_seconds",
}


def config(out: Path, **changes: object) -> TrainConfig:
    small = {"questions_per_step": 2, "num_generations": 4, "max_new_tokens": 48, "max_steps": 2, "log_masks_every": 1}
    return TrainConfig(**{"output_dir": out, "budget_profile": "flat", **small, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def protected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2% of the bundled reasoner as a protected mask."""
    loaded = load_model(TrainConfig())
    generator = torch.Generator().manual_seed(derive_seed(0, "protect"))
    dense = {name: torch.rand(shape, generator=generator) < 0.02 for name, shape in loaded.shapes().items()}
    path = tmp_path_factory.mktemp("mask") / "g.safetensors"
    save_mask(path, BlockMask.from_dense(dense), mask_kind="superweights", model=loaded.identity, settings={})
    return path


def metrics(run: Path) -> list[dict]:
    return [{k: v for k, v in row.items() if k not in TIMES} for _, row in read_jsonl(run / "metrics.jsonl")]


def last_delta(run: Path) -> DeltaFile:
    return DeltaFile(RunDir(run).checkpoints()[-1] / "delta.safetensors")


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The model's tensors with the run's last checkpoint put on top."""
    loaded = load_model(TrainConfig())
    tensors = {name: p.detach() for name, p in loaded.model.named_parameters()}
    apply_delta(last_delta(run), tensors, loaded.identity.fingerprint)
    return tensors


def test_step_sets_are_disjoint_and_protected_weights_never_move(tmp_path: Path, protected: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, protect=protected))
    from ssrctl.io.artifacts import load_mask

    mask, _ = load_mask(protected)
    logs = [load_mask_log(path) for path in mask_log_paths(run)]
    assert [log.step for log in logs] == [1, 2]
    claimed_somewhere = 0
    for question in (question for log in logs for question in log.questions):
        union = mask
        for unit in question.units:
            assert unit.mask.count() > 0
            assert (union & unit.mask).count() == 0
            union = union | unit.mask
        claimed = union.count() - mask.count()
        assert claimed <= 0.05 * (mask.numel - mask.count())
        claimed_somewhere += claimed
    assert claimed_somewhere > 0
    before = {name: p.detach() for name, p in load_model(TrainConfig()).model.named_parameters()}
    after = final_weights(run)
    moved = 0
    for name, tiles in mask.tensors.items():
        frozen = tiles.to_dense()
        assert torch.equal(before[name][frozen], after[name][frozen])
        moved += int((before[name] != after[name]).sum())
    assert moved > 0


def test_adamw_keeps_protected_weights_under_weight_decay(tmp_path: Path, protected: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, protect=protected, optimizer="adamw", weight_decay=0.1))
    from ssrctl.io.artifacts import load_mask

    mask, _ = load_mask(protected)
    before = {name: p.detach() for name, p in load_model(TrainConfig()).model.named_parameters()}
    after = final_weights(run)
    for name, tiles in mask.tensors.items():
        frozen = tiles.to_dense()
        assert torch.equal(before[name][frozen], after[name][frozen])
        assert bool((before[name][~frozen] != after[name][~frozen]).any())


def test_only_the_mask_is_trained(tmp_path: Path, protected: Path) -> None:
    """With a mask adamw is the default, and nothing outside of the mask moves, not even by weight decay."""
    from ssrctl.io.artifacts import load_mask

    mask, _ = load_mask(protected)
    before = {name: p.detach() for name, p in load_model(TrainConfig()).model.named_parameters()}
    for settings in ({"weight_decay": 0.1}, {"optimizer": "kronos"}):
        run = tmp_path / str(len(settings["optimizer"]) if "optimizer" in settings else 0)
        train.run(config(run, mask=protected, learning_rate=1e-2, **settings))
        moved = 0
        for name, tensor in final_weights(run).items():
            changed = before[name] != tensor
            assert not (changed & ~mask.tensors[name].to_dense()).any()
            moved += int(changed.sum())
        assert moved > 0.005 * mask.count()
        (row,) = metrics(run)[-1:]
        assert row["updated_frac"] <= mask.density()


RESUMED = {
    "sgd": {},
    "adam-bfloat16": {"update_rule": "adam", "dtype": "bfloat16"},
    "rms-tensor": {"update_rule": "rms", "scope": "tensor"},
    "adamw": {"optimizer": "adamw"},
    "mask-bfloat16": {"mask": "protected", "dtype": "bfloat16"},
}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=pytest.mark.slow) if kind in ("rms-tensor", "sgd") else kind for kind in RESUMED]
)
def test_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(
    tmp_path: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    shared = {**RESUMED[kind], "lr_scheduler_type": "cosine", "max_steps": 3, "save_steps": 1}
    if "mask" in shared:
        # the mask was made for the float32 weights
        shared |= {"mask": request.getfixturevalue("protected"), "ignore_fingerprint": True}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train.run(config(whole, **shared))
    shutil.copytree(whole, parts)
    # Back to what a kill after step 1 leaves: later files and a torn line in the log.
    for folder in RunDir(parts).checkpoints()[1:]:
        (folder / "COMPLETE").unlink()
    with (parts / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "rew')
    train.run(config(parts, **shared, resume_from_checkpoint="latest"))
    assert metrics(whole) == metrics(parts)
    first, second = (last_delta(run) for run in (whole, parts))
    assert first.count > 100 and first.small and first.counts == second.counts
    for name in first.counts:
        for (ours, steps), (theirs, others) in zip(first.blocks(name), second.blocks(name), strict=True):
            assert torch.equal(ours, theirs) and (steps == others).all()
    rollouts = [list(read_rollouts(run / "rollouts" / "000003.jsonl")) for run in (whole, parts)]
    assert rollouts[0] == rollouts[1]


def test_continuing_under_other_settings_is_refused(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1))
    with pytest.raises(UserError, match="questions_per_step was 2, is 3"):
        train.run(config(run, max_steps=2, questions_per_step=3, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="already holds a run"):
        train.run(config(run))
    with pytest.raises(UserError, match="no complete checkpoint"):
        train.run(config(tmp_path / "none", resume_from_checkpoint="latest"))


@pytest.mark.parametrize("credit", ["final", "cot"])
def test_response_credit_gives_one_advantage_per_response(tmp_path: Path, credit: str) -> None:
    run = tmp_path / "run"
    train.run(config(run, credit=credit, max_steps=1, optimizer="adamw", importance_level="sequence"))
    rollouts = list(read_rollouts(run / "rollouts" / "000001.jsonl"))
    assert all(r.advantages is not None and len(r.advantages) == 1 for r in rollouts)
    (row,) = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    unmarked = [r for r in rollouts if r.final is not None and r.final.way is None]
    assert row["unmarked_frac"] == len(unmarked) / len(rollouts)
    by_outcome: dict[tuple[str, bool], set[float]] = {}
    for r in rollouts:
        assert r.final is not None and r.advantages is not None and r.advantages[0] is not None
        by_outcome.setdefault((r.group, bool(r.final.correct)), set()).add(round(r.advantages[0], 9))
    if credit == "final":
        for group in {r.group for r in rollouts}:
            right, wrong = by_outcome.get((group, True)), by_outcome.get((group, False))
            if right and wrong:
                assert len(right) == len(wrong) == 1 and right.pop() > 0 > wrong.pop()


def test_a_question_with_nan_loss_is_skipped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = training_step.unit_gradients, []

    def sometimes(*args: object, **kwargs: object):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) % 2:
            return _raise()
        return real(*args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(training_step, "unit_gradients", sometimes)
    train.run(config(tmp_path / "run", max_steps=1))
    (row,) = metrics(tmp_path / "run")
    assert row["non_finite_questions"] == 1 and row["updated_frac"] > 0

    monkeypatch.setattr(training_step, "unit_gradients", lambda *a, **k: _raise())
    with pytest.raises(UserError, match="all 2 questions is NaN"):
        train.run(config(tmp_path / "all", max_steps=1))


def _raise():  # type: ignore[no-untyped-def]
    raise NonFiniteLoss("planted")
    yield


def test_equal_or_missing_scores_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssrctl.io.records import StepScore

    scores = [StepScore(score=50.0, reward=0.5), StepScore(score=None, reward=None, error="planted")]
    flat = FunctionCritic(lambda rollout, index: scores[index % 2])
    monkeypatch.setattr(train, "make_critic", lambda options, resources: flat)
    run = tmp_path / "run"
    # Cold and long enough for all to mark an answer: a response without one has the reward -1.
    summary = train.run(config(run, max_steps=1, max_new_tokens=80, temperature=0.1, resample_without_signal=2))
    assert summary is not None and summary["changed_frac"] == 0.0
    row = metrics(run)[0]
    assert row["resampled_questions"] == 2 * 2
    assert row["no_signal_responses"] == 8 and row["num_units"] == 0 and row["missing_score_frac"] > 0.3
    assert row["reward"] == 0.5 and row["loss"] is None


def test_only_questions_without_a_signal_are_sampled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssrctl.io.records import StepScore

    seen: list[str] = []

    def score_of(rollout, index):  # type: ignore[no-untyped-def]
        """The first group of the second question gets equal scores, everything else scores by place."""
        if index == 0:
            seen.append(rollout.question)
        reward = 0.0 if 4 < len(seen) <= 8 else index / 10
        return StepScore(score=100 * reward, reward=reward)

    monkeypatch.setattr(train, "make_critic", lambda options, resources: FunctionCritic(score_of))
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, max_new_tokens=80, resample_without_signal=3))
    (row,) = metrics(run)
    assert row["resampled_questions"] == 1 and row["no_signal_responses"] == 0
    assert len(seen) == 12 and seen[4:8] == seen[8:] != seen[:4]
    kept = list(read_rollouts(RunDir(run).rollouts(1)))
    assert [r.question for r in kept] == seen[:4] + seen[8:]


def test_masked_truncated_responses_give_no_gradient(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, max_new_tokens=40, mask_truncated=True, questions_per_step=4))
    advantages: dict[bool, list[float | None]] = {True: [], False: []}
    for rollout in read_rollouts(RunDir(run).rollouts(1)):
        advantages[rollout.extra["finished"]] += rollout.advantages
    assert advantages[False] and set(advantages[False]) == {None}
    assert any(advantages[True]) and None not in advantages[True]
    (row,) = metrics(run)
    assert 0 < row["finished_frac"] < 1 and row["response_tokens_max"] == 40 > row["response_tokens_mean"]


def test_kl_is_measured_to_the_start_model_also_after_a_resume(tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = {"max_steps": 3, "save_steps": 2, "beta": 0.1, "loss_type": "grpo", "epsilon_high": 0.3}
    train.run(config(run, **settings))
    whole, weights = metrics(run), final_weights(run)
    assert abs(whole[0]["kl_to_start"]) < 1e-9 < 1e-6 < whole[1]["kl_to_start"]
    resume = {"resume_from_checkpoint": str(RunDir(run).checkpoints()[0]), "force": True}
    train.run(config(run, **settings, **resume))
    assert metrics(run) == whole
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final_weights(run).items())


def test_kl_to_the_start_model_is_logged_every_so_often_and_changes_nothing(tmp_path: Path) -> None:
    run, plain = tmp_path / "run", tmp_path / "plain"
    train.run(config(run, max_steps=2, log_base_kl_every=2))
    train.run(config(plain, max_steps=2))
    first, second = metrics(run)
    assert first["kl_to_start"] is None and second["kl_to_start"] > 1e-6
    assert all("kl_to_start" not in row for row in metrics(plain))
    weights = final_weights(plain)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in final_weights(run).items())
    with pytest.raises(UserError, match="no effect with --beta"):
        config(run, beta=0.1, log_base_kl_every=2)


def test_an_outage_of_the_critic_stops_the_run_with_what_was_learned_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ssrctl.io.records import StepScore

    gone = StepScore(score=None, reward=None, error="connection")
    calls = []

    def score_of(rollout, index):  # type: ignore[no-untyped-def]
        calls.append(rollout.id)
        return gone if len(set(calls)) > 8 else StepScore(score=100.0 * (index % 2), reward=float(index % 2))

    monkeypatch.setattr(train, "make_critic", lambda options, resources: FunctionCritic(score_of))
    run = tmp_path / "run"
    with pytest.raises(Stopped, match=r"none of \d+ scores: connection \d+ \(to continue after step 1: .*--resume"):
        train.run(config(run, max_steps=3))
    assert len(metrics(run)) == 1 and newest_checkpoint(run) is not None


def test_allocations_differ_in_what_they_share(tmp_path: Path) -> None:
    for allocation in ("disjoint", "overlap", "pooled", "shuffled"):
        run = tmp_path / allocation
        train.run(config(run, max_steps=1, allocation=allocation))
        for question in load_mask_log(mask_log_paths(run)[0]).questions:
            sets = [unit.mask for unit in question.units]
            shared = sum((a & b).count() for a, b in itertools.combinations(sets, 2))
            if allocation == "pooled":
                assert len(sets) == 1 and len(question.units[0].steps) > 3
            else:
                assert len(sets) > 2 and (shared > 0) == (allocation == "overlap")


def test_reuse_takes_claimed_coordinates_again(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, reuse_factor=2.0))
    (row,) = metrics(run)
    sets = [[unit.mask for unit in question.units] for question in load_mask_log(mask_log_paths(run)[0]).questions]
    shared = sum((a & b).count() for one in sets for a, b in itertools.combinations(one, 2))
    assert row["reused_coordinates"] > 0 and shared >= row["reused_coordinates"]


def test_block_selection_logs_what_it_misses(tmp_path: Path) -> None:
    train.run(config(tmp_path / "block", max_steps=1, selection="block"))
    (row,) = metrics(tmp_path / "block")
    assert 0.05 < row["selection_recall"] < 0.95
    train.run(config(tmp_path / "exact", max_steps=1))
    assert metrics(tmp_path / "exact")[0]["selection_recall"] is None


def test_masters_decide_what_small_updates_of_bfloat16_weights_do(tmp_path: Path) -> None:
    changed = {}
    for masters in (True, False):
        run = tmp_path / str(masters)
        train.run(config(run, max_steps=4, dtype="bfloat16", learning_rate=1e-4, master_weights=masters))
        assert all(row["lost_update_frac"] > 0.5 for row in metrics(run))
        loaded = load_model(TrainConfig(dtype="bfloat16"))
        base = dict(loaded.model.named_parameters())
        after = {name: one.detach().clone() for name, one in base.items()}
        apply_delta(last_delta(run), after, loaded.identity.fingerprint)
        changed[masters] = sum(int((base[name] != one).sum()) for name, one in after.items())
    assert changed[True] > changed[False]


def test_exact_step_gradients_train_alike(tmp_path: Path) -> None:
    runs = {name: tmp_path / name for name in ("auto", "kept", "truncated", "chunked")}
    for name, run in runs.items():
        train.run(config(run, max_steps=1, step_gradient=name))
    start = dict(load_model(TrainConfig()).model.named_parameters())
    first = final_weights(runs.pop("auto"))
    moved = sum(float((first[n] - p.detach()).double().square().sum()) for n, p in start.items()) ** 0.5
    for name, run in runs.items():
        second = final_weights(run)
        distance = sum(float((first[n] - second[n]).double().square().sum()) for n in first) ** 0.5
        assert distance < 0.02 * moved, name  # rounding moves a few coordinates across the selection threshold


def test_max_units_bounds_the_updates_of_a_question(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, max_units=2))
    questions = load_mask_log(mask_log_paths(run)[0]).questions
    assert questions and all(len(question.units) <= 2 for question in questions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "adamw", "update_rule": "adam"}, "--update-rule has no meaning for adamw"),
        ({"optimizer": "adamw", "scope": "tensor", "max_units": 2}, "--scope, --max-units has no meaning"),
        ({"loss_type": "dapo"}, "dapo sums over tokens, --importance-level sequence has one ratio"),
        ({"scope": "tensor", "allocation": "shuffled"}, "shuffled needs whole gradients"),
        ({"scope": "tensor", "log_gradient_cosine": True}, "--log-gradient-cosine needs whole gradients"),
        ({"reuse_factor": 2.0, "allocation": "overlap"}, "--reuse-factor loosens the disjoint"),
        ({"reuse_factor": 0.5}, "--reuse-factor must be at least 1"),
        ({"optimizer": "adamw", "log_gradient_cosine": True}, "--log-gradient-cosine has no meaning"),
        ({"scope": "tensor", "log_signs_every": 1}, "--log-signs-every needs whole gradients"),
        ({"num_processes": 8, "log_signs_every": 1}, "8 processes divide the responses of 4"),
        ({"log_gradients": -1}, "--log-gradients must be 0 or more"),
        ({"log_gradients_size": 63}, "--log-gradients-size must be at least 64"),
        ({"max_units": 0}, "--max-units must be at least 1"),
        ({"adam_beta2": 1.0}, "--adam-beta2"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_fusing_everything_makes_one_unit(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, fuse_tol=1e9, max_step_budget=0.01))
    log = load_mask_log(mask_log_paths(run)[0])
    assert all(len(question.units) == 1 for question in log.questions)
    assert all(len(question.units[0].steps) >= 5 for question in log.questions)


def test_logged_cosines_are_a_correlation_matrix(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, log_gradient_cosine=True))
    for question in load_mask_log(mask_log_paths(run)[0]).questions:
        cosine = torch.tensor(question.gradient_cosine, dtype=torch.float64)
        assert cosine.shape == (len(question.units), len(question.units))
        torch.testing.assert_close(cosine.diagonal(), torch.ones(len(question.units), dtype=torch.float64))
        assert torch.equal(cosine, cosine.T) and float(cosine.abs().max()) <= 1.0
        assert float(cosine.tril(-1).abs().max()) < 0.999


def test_on_policy_log_probabilities_agree_to_rounding(tmp_path: Path) -> None:
    train.run(config(tmp_path / "run", max_steps=1, temperature=0.7))
    (row,) = metrics(tmp_path / "run")
    assert 0 <= row["logprob_gap_max"] < 1e-4 and row["clip_frac"] == 0.0


def test_several_iterations_move_the_ratio(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_steps=1, num_iterations=2, learning_rate=0.3, importance_level="token"))
    (row,) = metrics(run)
    assert row["clip_frac"] > 0
    assert row["logprob_gap_max"] < 1e-4, "the gap is that of the first pass, before an update"


def test_a_prompt_beyond_the_context_is_an_error_with_the_numbers(tmp_path: Path) -> None:
    data = tmp_path / "long.jsonl"
    data.write_text(json.dumps({"question": "1" + "+2" * 80 + "=?", "answer": "61"}) + "\n")
    with pytest.raises(UserError, match=r"none of 1 prompts fits: they have up to 165 tokens and .* context is 128"):
        train.run(config(tmp_path / "run", dataset=str(data), prompt_template="plain"))
    assert not (tmp_path / "run").exists()


def test_one_prompt_beyond_the_context_is_left_out_and_counted(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "mixed.jsonl"
    questions = [{"question": "1" + "+2" * 80 + "=?", "answer": "61"}, {"question": "10+2+3=?", "answer": "15"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in questions))
    train.run(config(tmp_path / "run", dataset=str(data), prompt_template="plain", max_steps=1, max_new_tokens=500))
    assert "1 of 2 questions do not fit the context" in capfd.readouterr().err
    rollouts = list(read_rollouts(tmp_path / "run" / "rollouts" / "000001.jsonl"))
    assert {r.question for r in rollouts} == {"10+2+3=?"}


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    plan = train.run(config(tmp_path / "run", dry_run=True))
    assert plan is not None and plan["responses"] == 2 * 2 * 4 and plan["parameters"] == 421_248
    assert not (tmp_path / "run").exists()


def test_mask_of_another_model_is_refused(tmp_path: Path, protected: Path) -> None:
    from ssrctl.io.artifacts import ModelIdentity, load_mask

    mask, _ = load_mask(protected)
    other = ModelIdentity(name="other", revision=None, fingerprint="xxh3:0")
    save_mask(tmp_path / "other.safetensors", mask, mask_kind="superweights", model=other, settings={})
    with pytest.raises(UserError, match="made for other weights"):
        train.run(config(tmp_path / "run", protect=tmp_path / "other.safetensors", max_steps=1))
    train.run(config(tmp_path / "run", protect=tmp_path / "other.safetensors", max_steps=1, ignore_fingerprint=True))


def test_command_line_says_what_it_trains_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [
        "train",
        "--optimizer",
        "kronos",
        "--max-steps",
        "1",
        "--questions_per_step",
        "1",
        "--num-generations",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    out, err = capfd.readouterr()
    assert err.splitlines()[0].startswith("model: tiny-reasoner, the bundled default")
    assert json.loads(out)["steps"] == 1 and (tmp_path / json.loads(out)["run"] / "metrics.jsonl").is_file()


def test_unreachable_model_ends_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--model", str(tmp_path / "nowhere")]) == 2
    err = capfd.readouterr().err
    assert "model folder not found" in err and "fix:" in err and "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_done_and_the_run_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = [sys.executable, "-m", "ssrctl", "train", "-o", str(run), "--max-steps", "6", "--max-new-tokens", "48"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environment)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (
        (run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size
    ):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and "to continue" in err and "Traceback" not in err
    done = RunDir(run).checkpoints()
    assert len(done) == 1 and len(metrics(run)) == int(done[0].name)
    again = subprocess.run(
        [*words, "--resume-from-checkpoint", "latest"], env=environment, capture_output=True, text=True
    )
    assert again.returncode == 0, again.stderr
    whole = tmp_path / "whole"
    train.run(TrainConfig(output_dir=whole, max_steps=6, max_new_tokens=48))
    assert metrics(whole) == metrics(run)
    first, second = final_weights(whole), final_weights(run)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_find_lr_tries_rates_from_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ssrctl.training import lr_sweep

    monkeypatch.setattr(lr_sweep, "SPREAD", (1e-12, 1.0, 1e9))
    loaded = load_model(TrainConfig())
    before = {name: p.detach().clone() for name, p in loaded.model.named_parameters()}
    monkeypatch.setattr(train, "load_model", lambda *a, **k: loaded)
    result = train.run(config(tmp_path / "run", find_lr=True, find_lr_steps=2, update_rule="rms"))
    assert result is not None and not (tmp_path / "run").exists()
    still, usual, wild = result["rates"]
    assert all(torch.equal(before[name], p.detach()) for name, p in loaded.model.named_parameters())
    # every rate samples its first batch from the same weights with the same seeds
    assert still["reward"][0] == usual["reward"][0] == wild["reward"][0]
    assert still["grad_norm"][1] != usual["grad_norm"][1]
    assert wild["broke"] or wild["late_reward"] < usual["late_reward"]
    assert result["best"] in (still["learning_rate"], usual["learning_rate"])


def test_find_lr_prints_a_curve(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--find-lr-steps", "1", "--questions-per-step", "1", "--num-generations", "2", "--max-new-tokens", "24"]
    assert main(["train", "--find-lr", *flags, "-o", str(tmp_path / "run")]) == 0
    shown = capfd.readouterr().err
    assert "1.0e-03" in shown and "3.0e-01" in shown and "highest late reward at" in shown


def written_profile(path: Path, fingerprint: str, *, share: list[float], num_problems: int = 9) -> Path:
    """A budget profile of other or of the same weights."""
    mass = MassCurve(mean=[1.0, 0.001], std=[0.0, 0.0], num_problems=[9, 9])
    curve = ShareCurve(mean=share, standard_error=[0.0] * 2, num_problems=[num_problems] * 2)
    profile = BudgetProfile(
        model=ModelIdentity(name="org/other", revision=None, fingerprint=fingerprint),
        share=curve,
        mass=mass,
        energy_available=[1.0, 0.5],
        energy_claimed=[0.5, 0.5],
        claim_fraction=0.01,
    )
    path.write_text(json.dumps(profile.to_dict()))
    return path


def test_the_budget_profile_of_these_weights_is_found_under_any_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = load_model(TrainConfig())
    for name in ("renamed", "tiny-reasoner"):
        loaded.model.save_pretrained(tmp_path / name)
        loaded.tokenizer.save_pretrained(tmp_path / name)
    with torch.no_grad():
        next(loaded.model.parameters()).add_(1.0)
    loaded.model.save_pretrained(tmp_path / "tiny-reasoner")  # other weights under the old name

    def profile_of(name: str) -> str:
        small = {"questions_per_step": 1, "num_generations": 2, "max_new_tokens": 8, "max_steps": 1}
        train.run(config(tmp_path / f"run-{name}", model=str(tmp_path / name), budget_profile="auto", **small))
        return json.loads((tmp_path / f"run-{name}" / "manifest.json").read_text())["budget_profile"]

    assert profile_of("renamed") == "tiny-reasoner"
    plan = train.run(config(tmp_path / "a", model=str(tmp_path / "renamed"), budget_profile="auto", dry_run=True))
    assert plan is not None and plan["budget_profile"].startswith("auto (found by the weights' fingerprint")
    plan = train.run(config(tmp_path / "a", budget_profile="auto", dry_run=True))  # the bundled model is read
    assert plan is not None and plan["budget_profile"] == "tiny-reasoner" and plan["budget_rule"] == "share"
    for steps in (5, 8, 20):
        assert plan[f"budgets_at_{steps}_steps"].startswith("100% of B granted, smallest step ")
    capfd.readouterr()
    assert profile_of("tiny-reasoner") == "flat"
    assert "no budget profile ships for the weights of" in capfd.readouterr().err


def test_a_profile_that_starves_steps_or_is_of_other_weights_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    profile = str(written_profile(tmp_path / "p.json", "xxh3:other", share=[1.0, 0.9]))
    plan = train.run(config(tmp_path / "run", budget_profile=profile, dry_run=True))
    said = " ".join(capfd.readouterr().err.split())
    assert "p.json was measured on other weights (org/other)" in said and "tenth of an equal share" not in said
    assert plan is not None and plan["budgets_at_8_steps"].startswith("100% of B granted")
    plan = train.run(config(tmp_path / "run", budget_profile=profile, budget_rule="paper", dry_run=True))
    said = " ".join(capfd.readouterr().err.split())
    # v = 1, 0.001, 0.001, ...: the first of five steps gets 1 of 4,001 parts
    smallest = int(0.05 / 4001 * plan["parameters"]) if plan else 0
    assert f"of 5 steps one gets {smallest} coordinates, less than a tenth of an equal share" in said
    assert plan is not None and plan["budgets_at_5_steps"].startswith("80% of B granted")


def test_a_profile_of_too_few_problems_is_said_to_be_flat(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    own = load_model(TrainConfig()).identity.fingerprint
    profile = str(written_profile(tmp_path / "p.json", own, share=[1.0, 0.5], num_problems=7))
    plan = train.run(config(tmp_path / "run", budget_profile=profile, dry_run=True))
    said = " ".join(capfd.readouterr().err.split())
    assert "fewer than 8 problems for every step after the first: every step gets the same budget" in said
    equal = int(0.05 / 8 * plan["parameters"]) if plan else 0
    assert plan is not None and f"smallest step {equal} coordinates ({equal} in" in plan["budgets_at_8_steps"]
    written_profile(tmp_path / "p.json", own, share=[1.0, 0.5], num_problems=8)
    train.run(config(tmp_path / "run", budget_profile=profile, dry_run=True))
    assert "fewer than 8" not in " ".join(capfd.readouterr().err.split())
