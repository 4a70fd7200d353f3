"""What `ssrctl train` logs of gradients: sets without claims, energies and sketches, without changing what it trains."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TrainConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.artifacts import save_mask
from ssrctl.io.gradient_log import gradient_log_paths, load_gradient_log
from ssrctl.io.jsonl import read_jsonl
from ssrctl.io.mask_log import load_mask_log, mask_log_paths
from ssrctl.io.records import read_rollouts
from ssrctl.models.loading import load_model
from ssrctl.stages import train


def config(out: Path, **changes: object) -> TrainConfig:
    small = {"questions_per_step": 2, "num_generations": 4, "max_new_tokens": 32, "max_steps": 1, "log_masks_every": 1}
    return TrainConfig(**{"output_dir": out, "budget_profile": "flat", **small, **changes})  # type: ignore[arg-type]


def metrics(run: Path) -> list[dict]:
    rows = [row for _, row in read_jsonl(run / "metrics.jsonl")]
    cost = ("_seconds", "_per_second", "_memory_bytes")
    return [{key: v for key, v in row.items() if not key.endswith(cost)} for row in rows]


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_mask_logs_hold_what_steps_wanted_and_how_much_they_got(tmp_path: Path, scope: str) -> None:
    loaded = load_model(TrainConfig())
    generator = torch.Generator().manual_seed(derive_seed(0, "protect"))
    dense = {name: torch.rand(shape, generator=generator) < 0.02 for name, shape in loaded.shapes().items()}
    mask, protected, run = BlockMask.from_dense(dense), tmp_path / "g.safetensors", tmp_path / "run"
    save_mask(protected, mask, mask_kind="superweights", model=loaded.identity, settings={})
    train.run(config(run, protect=protected, scope=scope))
    questions = load_mask_log(mask_log_paths(run)[0]).questions
    lost, shared = 0, 0
    for question in questions:
        for unit in question.units:
            free = unit.unconstrained
            assert free is not None and unit.captured is not None and unit.unconstrained_captured is not None
            assert free.count() == unit.mask.count() > 0 and (free & mask).count() == 0
            assert 0 < unit.captured <= unit.unconstrained_captured < 1 and (unit.gradient_norm or 0) > 0
            lost += unit.captured < unit.unconstrained_captured
        first = question.units[0]
        assert (first.mask - first.unconstrained).count() == 0  # nothing was claimed before it
        assert first.captured == pytest.approx(first.unconstrained_captured, rel=1e-9)
        shared += sum((a.unconstrained & b.unconstrained).count() for a, b in itertools.combinations(question.units, 2))
    assert questions and lost > 0 and shared > 0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"scope": "tensor", "update_rule": "adam"}, marks=pytest.mark.slow),
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
    ],
    ids=["global", "tensor", "adamw"],
)
def test_looking_at_gradients_changes_no_bit(tmp_path: Path, settings: dict) -> None:
    plain, watched = tmp_path / "plain", tmp_path / "watched"
    settings = {"questions_per_step": 1, "max_steps": 2} | settings
    train.run(config(plain, log_masks_every=0, **settings))
    cosine = {"log_gradient_cosine": True} if "scope" not in settings and "optimizer" not in settings else {}
    train.run(config(watched, log_gradients=1, log_gradients_size=4096, **cosine, **settings))
    assert metrics(plain) == metrics(watched)
    for name in ("delta.safetensors", "optimizer.safetensors"):
        first, second = (load_file(RunDir(run).checkpoints()[-1] / name) for run in (plain, watched))
        assert first.keys() == second.keys() and first
        assert all(torch.equal(part, second[key]) for key, part in first.items())
    logs = [load_gradient_log(path) for path in gradient_log_paths(watched)]
    assert [header.step for header, _ in logs] == [1, 2] and not (plain / "gradients").exists()
    assert all(header.size == 4096 and header.sketch == "count-sketch" for header, _ in logs)
    assert all(float(values.norm()) > 0 for _, values in logs)


def test_the_stored_gradient_is_that_of_the_batch(tmp_path: Path) -> None:
    """AdamW logs the norm of the very gradient that is stored; kronos' units add up to it."""
    stored = {}
    for optimizer in ("adamw", "kronos"):
        run = tmp_path / optimizer
        train.run(config(run, optimizer=optimizer, log_gradients=1, log_gradients_size=10**7))
        [path] = gradient_log_paths(run)
        header, stored[optimizer] = load_gradient_log(path)
        assert header.sketch == "exact" and header.size == header.num_coordinates
    (row,) = metrics(tmp_path / "adamw")
    assert float(stored["adamw"].double().norm()) == pytest.approx(row["grad_norm"], rel=1e-5)
    torch.testing.assert_close(stored["kronos"], stored["adamw"], rtol=0, atol=1e-4 * float(stored["adamw"].norm()))


def test_runs_of_earlier_versions_are_continued(tmp_path: Path) -> None:
    """A setting that the run's config does not name yet had its default."""
    run = tmp_path / "run"
    train.run(config(run))
    lines = (run / "config.yaml").read_text().splitlines(keepends=True)
    (run / "config.yaml").write_text("".join(line for line in lines if not line.startswith("log_gradients")))
    with pytest.raises(UserError, match="log_gradients was 0, is 1"):
        train.run(config(run, max_steps=2, log_gradients=1, resume_from_checkpoint="latest"))
    train.run(config(run, max_steps=2, resume_from_checkpoint="latest"))
    assert len(metrics(run)) == 2


def test_questions_get_their_budget_where_the_caps_allow_it(tmp_path: Path) -> None:
    granted = {}
    for rule in ("share", "paper"):
        run = tmp_path / rule
        profile = {"max_new_tokens": 64, "max_steps": 2, "budget_profile": "auto"}
        train.run(config(run, budget_rule=rule, **profile))
        rows = metrics(run)
        granted[rule] = [row["granted_budget_frac"] for row in rows if row["granted_budget_frac"] is not None]
        for row in rows:  # every question here has at least five steps
            assert row["granted_budget_frac"] == pytest.approx(row["granted_frac"] / 0.05)
    assert granted["share"] and min(granted["share"]) >= 0.95
    assert max(granted["share"]) <= 1.0
    assert max(granted["paper"]) < 0.95


def test_short_questions_do_not_count_towards_the_granted_budget(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train.run(config(run, max_step_budget=0.001))
    assert [row["granted_budget_frac"] for row in metrics(run)] == [None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"optimizer": "adamw"}, marks=pytest.mark.slow),
        pytest.param({"credit": "cot", "loss_type": "grpo"}, marks=pytest.mark.slow),
        pytest.param({"allocation": "shuffled", "step_gradient": "truncated"}, marks=pytest.mark.slow),
        pytest.param({"num_iterations": 2}, marks=pytest.mark.slow),
    ],
    ids=["kronos", "adamw", "cot", "shuffled", "iterations"],
)
def test_the_parts_of_both_signs_make_up_the_update(tmp_path: Path, settings: dict) -> None:
    """p + n is the gradient that is applied: |p|^2 + |n|^2 + 2 p n is its squared norm. Measuring changes no bit."""
    one = {"questions_per_step": 1, "num_generations": 8, "max_new_tokens": 64, "num_iterations": 1} | settings
    train.run(config(tmp_path / "plain", **one))
    train.run(config(tmp_path / "run", log_signs_every=1, **one))
    ((plain,), (row,)) = metrics(tmp_path / "plain"), metrics(tmp_path / "run")
    assert {key: row[key] for key in plain} == plain
    p, n, cosine = (row[key] for key in ("positive_norm", "negative_norm", "sign_cosine"))
    assert p > 0 and n > 0 and row["negative_energy_frac"] == pytest.approx(n**2 / (p**2 + n**2))
    assert 0 < row["negative_coordinate_frac"] < 1 and cosine != 0
    if one["num_iterations"] == 1:
        assert p**2 + n**2 + 2 * cosine * p * n == pytest.approx(row["grad_norm"] ** 2, rel=1e-4)
    if "optimizer" not in settings:
        [question] = load_mask_log(mask_log_paths(tmp_path / "run")[0]).questions
        assert sum(unit.positive_norm**2 for unit in question.units) == pytest.approx(p**2)  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["protect", "mask"])
def test_frozen_coordinates_are_in_neither_part(tmp_path: Path, kind: str) -> None:
    loaded = load_model(TrainConfig())
    generator = torch.Generator().manual_seed(derive_seed(0, "frozen"))
    dense = {name: torch.rand(shape, generator=generator) < 0.5 for name, shape in loaded.shapes().items()}
    path = tmp_path / "m.safetensors"
    save_mask(path, BlockMask.from_dense(dense), mask_kind="random", model=loaded.identity, settings={})
    settings = {"questions_per_step": 1, "num_generations": 8, "max_new_tokens": 64, "optimizer": "adamw", kind: path}
    train.run(config(tmp_path / "run", log_signs_every=1, **settings))
    (row,) = metrics(tmp_path / "run")
    p, n, cosine = (row[key] for key in ("positive_norm", "negative_norm", "sign_cosine"))
    assert p**2 + n**2 + 2 * cosine * p * n == pytest.approx(row["grad_norm"] ** 2, rel=1e-4)


@pytest.mark.parametrize("sign", [pytest.param("positive", marks=pytest.mark.slow), "negative"])
def test_learning_from_one_sign(tmp_path: Path, sign: str) -> None:
    train.run(config(tmp_path / "run", advantage_sign=sign, log_signs_every=1))
    (row,) = metrics(tmp_path / "run")
    assert row["negative_energy_frac"] == (1 if sign == "negative" else 0) and row["grad_norm"] > 0
    rollouts = list(read_rollouts(RunDir(tmp_path / "run").rollouts(1)))
    advantages = [a for rollout in rollouts for a in rollout.advantages or () if a]
    assert advantages and all((a > 0) == (sign == "positive") for a in advantages)
    for question in load_mask_log(mask_log_paths(tmp_path / "run")[0]).questions:
        assert all(any(unit.advantages) for unit in question.units)
