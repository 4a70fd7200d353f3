"""Plans of memory from a config alone, next to the live bytes of real passes."""

import dataclasses
import itertools
import math
import re
import types
from pathlib import Path

import pytest
import torch
import transformers

from ssrctl.cli import main
from ssrctl.configs import TrainConfig
from ssrctl.core.units import Unit
from ssrctl.errors import UserError
from ssrctl.stages import train
from ssrctl.training.checkpointing import enable_checkpointing
from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.memory_plan import CHUNK_TOKENS, GIB, MemoryPlanner, settle_step_gradient
from ssrctl.training.step_gradients.task import Dials
from ssrctl.training.unit_gradients import make_batch, trainable, unit_gradients
from ssrctl.training.updaters import make_updater

SHAPE = transformers.Qwen3Config(
    vocab_size=300, hidden_size=64, intermediate_size=160, num_hidden_layers=6, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True, bos_token_id=None,
    eos_token_id=1,
)  # fmt: skip
PROMPT, RESPONSE, ROWS = 16, 112, 4


def build():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(SHAPE).eval()


def measured(config):
    """The most bytes alive in one question of two units, besides the weights."""
    model = build()
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    responses = torch.randint(2, 300, (ROWS, RESPONSE)).tolist()
    steps = [[place * 2 // RESPONSE for place in range(RESPONSE)]] * ROWS
    units = [Unit((step,), 0.01, ((0.5, -0.5, 0.2, -0.2),)) for step in (0, 1)]
    updater = make_updater(trainable(model), config)
    with LiveBytes() as live:
        live.ignore(*model.parameters(), *model.buffers())
        # ratios near 1: a clipped token has no gradient, and a response without any is not run
        old = [torch.full((RESPONSE,), -math.log(SHAPE.vocab_size))] * ROWS
        batch = make_batch([5] * PROMPT, responses, old, steps, pad_token_id=0, device="cpu")
        updater.add_question(
            unit_gradients(
                model, batch, updater.plan(units), temperature=0.9, method=config.step_gradient_method,
                micro_batch_tokens=config.micro_batch_tokens, on_unit=updater.before_unit,
                dials=Dials(config.units_at_once, config.gradient_chunk_tokens),
            )
        )  # fmt: skip
    return live.peak


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "adamw"},
        {"optimizer": "adamw", "gradient_checkpointing": True},
        {"optimizer": "adamw", "gradient_checkpointing": True, "micro_batch_tokens": PROMPT + RESPONSE},
        {"step_gradient": "kept"},
        {"step_gradient": "recomputed", "units_at_once": 1, "gradient_chunk_tokens": 64},
        {"step_gradient": "recomputed", "units_at_once": 2, "gradient_chunk_tokens": 256},
        {"step_gradient": "kept", "gradient_checkpointing": True, "scope": "tensor"},
    ],
    ids=["dense", "checkpointed", "one response", "kept", "recomputed", "two at once", "tensor"],
)
def test_plans_are_within_a_fifth_of_what_is_alive(changes):
    config = TrainConfig(
        dtype="float32", num_generations=ROWS, max_new_tokens=RESPONSE, questions_per_step=1, temperature=0.9, **changes
    )
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(SHAPE)
    plan = MemoryPlanner(empty, PROMPT).breakdown(config)
    state = plan.state if config.optimizer == "kronos" else 0  # adamw makes its own at the first step
    planned = plan.gradients + plan.activations + plan.logits + state
    assert planned == pytest.approx(measured(config), rel=0.2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("model")
    SHAPE.save_pretrained(made)
    return made


def test_a_plan_reads_no_weights_and_names_what_fits(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["config.json"]
    config = TrainConfig(model=str(folder), device="cpu", dry_run=True, max_new_tokens=512, memory_limit=1.0)
    plan = train.run(config)
    assert plan is not None and plan["parameters"] == sum(p.numel() for p in build().parameters())
    assert (
        plan["fits"].startswith("yes")
        and plan["cheapest_settings_that_fit"] == "as given"
        and plan["memory_limit_gib"] == 1.0
    )
    assert plan["longest_response_that_fits"]["kronos --scope global"] == 2048 - 256
    assert "no tokenizer" in capfd.readouterr().err
    small = train.run(dataclasses.replace(config, memory_limit=0.022))
    assert small is not None and small["fits"].startswith("no")
    assert "--micro-batch-tokens" in small["cheapest_settings_that_fit"]
    medium = train.run(dataclasses.replace(config, memory_limit=0.07))
    assert medium is not None and "--step-gradient recomputed" in medium["cheapest_settings_that_fit"]
    assert 512 <= small["longest_response_that_fits"]["kronos --scope global"] < 2048 - 256
    assert 0 < medium["longest_response_that_fits"]["kronos --scope tensor"] < 512


def test_a_limit_that_cannot_be_met_says_what_it_would_take(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", str(folder), "--device", "cpu", "--dry-run", "--optimizer", "adamw"]
    assert main([*words, "--max-new-tokens", "8", "--memory-limit", "0.002"]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"the run needs 0\.00\d+ GiB at the least \(--.*the limit is 0\.002 GiB", said)
    assert "change --optimizer kronos or --mask" in said and "Traceback" not in said


@pytest.mark.slow
def test_settings_that_a_plan_found_are_within_the_limit_and_the_cheapest_first(folder: Path) -> None:
    planner = MemoryPlanner(build(), 256)
    config = TrainConfig(dtype="float32", max_new_tokens=512, num_generations=8)
    dials = list(planner._dials(config))
    assert dials[0] == config and all(one != other for one, other in itertools.combinations(dials, 2))
    totals = [planner.breakdown(made).total for made in dials]
    plain = planner.cheapest(config, max(totals) * 2)
    assert plain is not None and plain.micro_batch_tokens is None and not plain.gradient_checkpointing
    for limit in (max(totals), (max(totals) + min(totals)) // 2, int(min(totals) * 1.1)):
        made = planner.cheapest(config, limit)
        assert made is not None and planner.breakdown(made).total <= 0.92 * limit
    assert planner.cheapest(config, min(totals)) is None
    assert planner.breakdown(planner.smallest(config)).total == min(totals) < GIB


def test_memory_decides_whether_step_gradients_are_recomputed(
    folder: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    loaded = types.SimpleNamespace(model=build())
    config = TrainConfig(dtype="float32", max_new_tokens=512, num_generations=8, memory_limit=1.0)
    assert settle_step_gradient(config, loaded, 64, 1.0) is config
    assert settle_step_gradient(dataclasses.replace(config, memory_limit=None), loaded, 64, 1.0) is not None
    planner = MemoryPlanner(loaded.model, 64)
    at_once = []
    for share in (0.6, 0.3):
        limit = share * planner.breakdown(config).total / GIB
        settled = settle_step_gradient(dataclasses.replace(config, memory_limit=limit), loaded, 64, 1.0)
        assert settled.step_gradient == "recomputed" and settled.gradient_chunk_tokens in CHUNK_TOKENS
        assert planner.fits(settled, int(limit * GIB), sampling=False)
        at_once.append(settled.units_at_once)
    assert at_once == sorted(at_once, reverse=True)
    assert "step gradients: recomputed, steps at once" in capfd.readouterr().err
    with pytest.raises(UserError, match=r"the run needs .* GiB at the least"):
        settle_step_gradient(dataclasses.replace(config, memory_limit=0.001), loaded, 64, 1.0)
    # a gradient that fits is not made again
    assert settle_step_gradient(dataclasses.replace(config, scope="tensor"), loaded, 64, 1.0).step_gradient == "auto"
