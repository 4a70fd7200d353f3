import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from reference.critics import FunctionCritic

from ssrctl.configs import ProfileBudgetConfig
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.core.unions import random_coordinates
from ssrctl.critics.base import score_all
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, save_mask
from ssrctl.io.budget_file import load_budget_profile
from ssrctl.io.jsonl import write_jsonl
from ssrctl.io.problems import load_problems
from ssrctl.io.records import Rollout, StepScore
from ssrctl.models.loading import load_model
from ssrctl.sampling.groups import prepare_prompts, sample_groups
from ssrctl.stages import profile_budget
from ssrctl.text.prompts import PromptFormat


def score_of(rollout: Rollout, index: int) -> StepScore:
    """Depends on the step's text alone."""
    reward = (sum(map(ord, rollout.step_text(index))) % 7 - 3) / 3
    return StepScore(score=100 * reward, reward=reward)


@pytest.fixture(autouse=True)
def fake_critic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_budget, "make_critic", lambda options: FunctionCritic(score_of))


def config(tmp_path: Path, **given: Any) -> ProfileBudgetConfig:
    small = {"num_problems": 2, "num_generations": 4, "max_new_tokens": 48, "device": "cpu"}
    return ProfileBudgetConfig(output=tmp_path / "out" / "b.json", **(small | given))


def scored_rollouts(made: ProfileBudgetConfig) -> list[dict[str, Any]]:
    """The responses that the stage samples, as `ssrctl critic` would have written them."""
    loaded = load_model(made)
    problems = load_problems(made, "train", derive_seed(made.seed, "problems"))[: made.num_problems]
    prompts, _ = prepare_prompts(loaded, problems, PromptFormat(), made.max_new_tokens)
    rows = []
    for prompt in prompts:
        seed = derive_seed(made.seed, "profile-budget", prompt.problem.id)
        group = sample_groups(loaded, [prompt], made, num_generations=made.num_generations, seed=seed)[0]
        for rollout, scores in zip(group.rollouts, score_all(FunctionCritic(score_of), group.rollouts), strict=True):
            rollout.scores = scores
            rows.append(rollout.to_dict())
    return rows


def test_profile_from_sampling(tmp_path: Path) -> None:
    made = config(tmp_path, claim_fraction=0.02)
    result = profile_budget.run(made)
    profile = load_budget_profile(made.output)
    assert profile.to_dict() == json.loads(json.dumps(result))
    assert profile.model.name == "tiny-reasoner" and profile.claim_fraction == 0.02
    assert profile.share is not None
    assert profile.mass.mean[0] == 1.0 and profile.mass.num_problems[0] == 2
    assert len(profile.mass.mean) == len(profile.share.mean) >= 4
    # nothing is protected, so that both are shares of the whole gradient
    assert profile.share.mean == pytest.approx(profile.energy_available, rel=1e-12)
    assert profile.share.num_problems == profile.mass.num_problems
    assert profile.energy_available[0] == 1.0  # nothing is protected and nothing claimed yet
    assert all(share < 1.0 for share in profile.energy_available[1:])
    assert all(0 < c <= a for c, a in zip(profile.energy_claimed, profile.energy_available, strict=True))
    assert str(tmp_path) not in made.output.read_text()
    assert (made.output.parent / "b.svg").read_text().startswith("<?xml")


def test_stored_traces_give_the_same_profile_as_the_sampling_they_come_from(tmp_path: Path) -> None:
    made = config(tmp_path)
    sampled = profile_budget.run(made)
    traces = tmp_path / "scored.jsonl"
    write_jsonl(traces, scored_rollouts(made))
    stored = profile_budget.run(config(tmp_path / "traces", traces=traces))
    # Sampled log-probabilities come from a cached pass, stored ones from a plain one: ratios within 1e-5 of 1.
    for key in ("share", "mass"):
        assert stored[key]["mean"] == pytest.approx(sampled[key]["mean"], rel=1e-3)
        assert stored[key]["num_problems"] == sampled[key]["num_problems"]
    assert stored["energy_available"] == pytest.approx(sampled["energy_available"], rel=1e-3)
    assert stored["settings"]["traces"] == "scored.jsonl" and stored["settings"]["traces_hash"].startswith("sha256:")
    assert str(tmp_path) not in json.dumps(stored)


def test_protected_coordinates_count_as_claimed_from_the_start(tmp_path: Path) -> None:
    made = config(tmp_path, num_problems=1)
    loaded = load_model(made)
    half = BlockMask.from_indices(
        loaded.shapes(), random_coordinates(loaded.shapes(), loaded.num_parameters // 2, seed=0)
    )
    mask = tmp_path / "g.safetensors"
    save_mask(mask, half, mask_kind="superweights", model=loaded.identity, settings={})
    result = profile_budget.run(config(tmp_path, num_problems=1, protect=mask))
    # A random half of the coordinates holds about half of the energy.
    assert 0.3 < result["energy_available"][0] < 0.7
    assert result["share"]["mean"][0] == 1.0
    other = ModelIdentity(name="other", revision=None, fingerprint="xxh3:other")
    save_mask(mask, half, mask_kind="superweights", model=other, settings={})
    with pytest.raises(UserError, match="made for other weights"):
        profile_budget.run(config(tmp_path, protect=mask))


def test_profile_ends_at_max_steps(tmp_path: Path) -> None:
    assert len(profile_budget.run(config(tmp_path, num_problems=1, max_steps=2))["mass"]["mean"]) == 2


def test_equal_scores_leave_nothing_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = FunctionCritic(lambda rollout, index: StepScore(score=50, reward=0.5))
    monkeypatch.setattr(profile_budget, "make_critic", lambda options: flat)
    made = config(tmp_path)
    with pytest.raises(UserError, match=r"none of 2 problems has a first step with a gradient.*profile more problems"):
        profile_budget.run(made)
    assert not made.output.exists()


def test_problems_without_signal_are_counted_aloud(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    made = config(tmp_path)
    rows = scored_rollouts(made)
    second = rows[-1]["id"].rsplit("/", 1)[0]
    for row in rows:
        if row["id"].startswith(second):
            row["scores"] = [{"score": None, "reward": None, "error": "no_verdict"} for _ in row["scores"]]
    traces = tmp_path / "scored.jsonl"
    write_jsonl(traces, rows)
    assert profile_budget.run(config(tmp_path / "traces", traces=traces))["mass"]["num_problems"][0] == 1
    said = " ".join(capfd.readouterr().err.split())
    assert "1 of 2 problems gave no gradient" in said
    assert "step 2 was measured on fewer than 8 problems: rule share holds v_1 from there on" in said
    assert "budgets with B = 5%, k_max = 1%" in said


def test_an_interrupt_keeps_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def pressed() -> Iterator[Callable[[], bool]]:
        yield lambda: True

    monkeypatch.setattr(profile_budget, "deferred_interrupt", pressed)
    made = config(tmp_path, num_problems=3)
    with pytest.raises(KeyboardInterrupt):
        profile_budget.run(made)
    profile = load_budget_profile(made.output)
    assert profile.mass.num_problems[0] == 1
    assert profile.settings["num_problems"] == 3 and profile.settings["measured_problems"] == 1


def test_dry_run_writes_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    made = config(tmp_path, dry_run=True)
    plan = profile_budget.run(made)
    assert plan["problems"] == 2 and plan["claimed_per_step"] == int(0.01 * plan["parameters"])
    assert not made.output.parent.exists()
    assert capfd.readouterr().err.startswith("model: tiny-reasoner")


def test_traces_that_are_not_scored(tmp_path: Path) -> None:
    traces = tmp_path / "t.jsonl"
    write_jsonl(traces, [{"id": "q/0", "prompt": "1", "response": "2", "steps": [{"start": 0, "end": 1}]}])
    with pytest.raises(UserError, match=r"t\.jsonl:1: field 'scores' is missing.*ssrctl critic"):
        profile_budget.run(config(tmp_path, traces=traces))


def test_traces_without_prompt_or_question(tmp_path: Path) -> None:
    traces = tmp_path / "t.jsonl"
    row = {"id": "q/0", "response": "2", "steps": [{"start": 0, "end": 1}], "scores": [{"score": 1, "reward": 0.01}]}
    write_jsonl(traces, [row])
    with pytest.raises(UserError, match="q/0 has neither 'prompt' nor 'question'"):
        profile_budget.run(config(tmp_path, traces=traces))
