"""An engine that does not sample from the trainer's distribution is noticed, and its samples are weighed."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io.jsonl import read_jsonl
from ssrctl.sampling.engines.transformers_engine import TransformersEngine
from ssrctl.stages import train
from ssrctl.training import training_step


def trained(out: Path, monkeypatch: pytest.MonkeyPatch, engine: type, **settings: object) -> dict:
    """Train one step on the samples of ``engine``; return its metrics."""
    monkeypatch.setattr(training_step, "TransformersEngine", engine)
    small = {"questions_per_step": 2, "num_generations": 4, "max_new_tokens": 32, "max_steps": 1, "log_masks_every": 0}
    train.run(TrainConfig(output_dir=out, budget_profile="flat", **small | settings))  # type: ignore[arg-type]
    ((_, row),) = read_jsonl(out / "metrics.jsonl")
    return row


class HotEngine(TransformersEngine):
    """Samples at twice the temperature that it is asked for."""

    def __init__(self, loaded, sampling) -> None:
        super().__init__(loaded, dataclasses.replace(sampling, temperature=2 * sampling.temperature))


class ForgetfulEngine(TransformersEngine):
    """Gives no log-probability of the least likely token of each response."""

    def sample(self, requests):
        for place, sample in super().sample(requests):
            logprobs = sample.logprobs.clone()
            logprobs[logprobs.argmin()] = float("nan")
            yield place, dataclasses.replace(sample, logprobs=logprobs)


def test_a_wrong_temperature_in_the_engine_is_warned_about_and_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    right = trained(tmp_path / "right", monkeypatch, TransformersEngine, engine_correction="mask")
    assert right["logprob_gap_max"] < 1e-4 and right["correction_hit_frac"] == 0.0
    assert "log-probabilities are" not in capfd.readouterr().err
    wrong = trained(tmp_path / "wrong", monkeypatch, HotEngine, old_logprobs="trainer")
    told = " ".join(capfd.readouterr().err.split())
    assert re.search(r"step 1: the engine's log-probabilities are 0\.\d+ from the trainer's", told)
    assert "rounding in float32 stays below 0.001" in told and "--engine-correction truncate bounds" in told
    assert "in 1 of 1 steps" in told
    assert wrong["logprob_gap_mean"] < wrong["logprob_gap_p99"] <= wrong["logprob_gap_max"]
    assert wrong["logprob_gap_kl"] > 0.01 and wrong["logprob_gap_outside_frac"] > 0.05
    assert wrong["clip_frac"] == 0.0 and "correction_hit_frac" not in wrong
    weighed = trained(tmp_path / "weighed", monkeypatch, HotEngine, engine_correction="mask")
    assert weighed["reward"] == wrong["reward"] and 0 < weighed["correction_hit_frac"] < 1
    assert weighed["grad_norm"] != wrong["grad_norm"]


def test_a_missing_log_probability_is_the_trainers_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole", monkeypatch, TransformersEngine)
    some = trained(tmp_path / "some", monkeypatch, ForgetfulEngine)
    assert whole["missing_logprob_frac"] == 0.0 and 0 < some["missing_logprob_frac"] < 0.5
    assert some["logprob_gap_max"] < 1e-4, "a missing number counted as 0"
    assert some["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-4)
    left_out = trained(tmp_path / "out", monkeypatch, ForgetfulEngine, engine_correction="truncate", credit="final")
    assert left_out["grad_norm"] == 0.0, "a response without a known weight was learned from"


def test_old_log_probabilities_in_micro_batches_are_those_of_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        trained(
            tmp_path / str(size),
            monkeypatch,
            HotEngine,
            old_logprobs="trainer",
            micro_batch_tokens=size,
            credit="final",
        )
        for size in (None, 60)
    ]
    assert rows[1]["grad_norm"] == pytest.approx(rows[0]["grad_norm"], rel=1e-4)
    assert rows[0]["clip_frac"] == rows[1]["clip_frac"] == 0.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"old_logprobs": "engine", "engine_correction": "mask"}, "would count it twice"),
        ({"engine_correction_cap": 0.5}, "--engine-correction-cap must be at least 1"),
        (
            {"engine_correction": "mask", "importance_level": "step", "engine_correction_level": "token"},
            "one term per step",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings)


def test_the_correction_is_per_step_where_updates_are() -> None:
    assert TrainConfig().correction_level == "step"
    assert TrainConfig(optimizer="adamw", importance_level="token").correction_level == "token"
