"""Plans of memory from a config alone, next to the live bytes of real passes."""

import copy
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
from ssrctl.io.artifacts import ModelIdentity
from ssrctl.models.loading import LoadedModel
from ssrctl.stages import train
from ssrctl.training import memory_plan
from ssrctl.training.checkpointing import enable_checkpointing
from ssrctl.training.layer_bytes import LayerProbe, UnknownActivations
from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.lora import add_adapters
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


SIZES = {
    "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 512, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip


def build(shape=SHAPE):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(copy.deepcopy(shape)).eval().float()


def adapt(model, config):
    if config.lora_r is not None:
        pytest.importorskip("peft")
        add_adapters(LoadedModel(model, None, ModelIdentity(name="", revision=None, fingerprint=""), None), config)


def measured(config, shape=SHAPE):
    """The most bytes alive in one question of two units, besides the weights."""
    model = build(shape)
    if config.gradient_checkpointing:
        enable_checkpointing(model)
    adapt(model, config)
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
                micro_batch_tokens=config.micro_batch_tokens, on_unit=updater.before_unit, on_entropy=lambda _: None,
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
        {"lora_r": 16, "lora_target_modules": ["all-linear"]},
        {"step_gradient": "kept"},
        {"step_gradient": "recomputed", "units_at_once": 1, "gradient_chunk_tokens": 64},
        {"step_gradient": "recomputed", "units_at_once": 2, "gradient_chunk_tokens": 256},
        {"step_gradient": "kept", "gradient_checkpointing": True, "scope": "tensor"},
    ],
    ids=["dense", "checkpointed", "one response", "lora", "kept", "recomputed", "two at once", "tensor"],
)
def test_plans_are_within_a_fifth_of_what_is_alive(changes):
    assert planned(changes) == pytest.approx(measured(settings(changes)), rel=0.2)


def settings(changes):
    return TrainConfig(
        dtype="float32", num_generations=ROWS, max_new_tokens=RESPONSE, questions_per_step=1, temperature=0.9, **changes
    )


def planned(changes, shape=SHAPE):
    """The planned peak without the weights, from a model without any."""
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(shape))
    config = settings(changes)
    adapt(empty, config)
    plan = MemoryPlanner(empty, PROMPT).breakdown(config)
    state = plan.state if config.optimizer == "kronos" else 0  # adamw makes its own at the first step
    return plan.gradients + plan.activations + plan.logits + state


KINDS = {
    "experts, the first layer dense": transformers.Qwen3MoeConfig(
        **SIZES, num_hidden_layers=5, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=48, mlp_only_layers=[0],
    ),
    "convolutions and attention": transformers.Lfm2Config(
        **{name: size for name, size in SIZES.items() if name != "head_dim"}, num_hidden_layers=4,
        layer_types=["conv", "full_attention", "conv", "conv"],
    ),
    "a state besides keys and values": transformers.FalconH1Config(
        **SIZES, num_hidden_layers=3, mamba_d_ssm=64, mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1,
        mamba_chunk_size=64,
    ),
    "the text part of one that sees": transformers.Gemma3Config(
        text_config={**SIZES, "num_hidden_layers": 4, "sliding_window": 32},
        vision_config={
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
            "patch_size": 14,
        },
        mm_tokens_per_image=4,
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[] if number == 0 else [pytest.mark.slow]) for number, kind in enumerate(KINDS)],
)
def test_plans_know_layers_of_several_kinds(kind):
    shape, checkpointed = KINDS[kind], {"step_gradient": "kept", "gradient_checkpointing": True, "scope": "tensor"}
    for changes in ({"optimizer": "adamw"}, checkpointed):
        assert planned(changes, shape) == pytest.approx(measured(settings(changes), shape), rel=0.2)


def test_one_and_two_rows_of_three_lengths_extend_to_any_batch():
    shape = transformers.Qwen3MoeConfig(
        **SIZES, num_hidden_layers=2, num_experts=64, num_experts_per_tok=2, moe_intermediate_size=48
    )
    probe = LayerProbe(build(shape))  # the gradients of its weights are most of a backward pass
    found = probe.activations(9, 100, False, torch.float32, "auto")
    with probe._without_data(torch.float32, "auto") as model:
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda each: setattr(each, "grad", None))
        direct = probe._measured(model, 9, 100)
    assert (found.kept, found.first) == pytest.approx((direct.kept, direct.first), rel=0.01)
    assert found.kept + found.backward == pytest.approx(direct.kept + direct.backward, rel=0.05)


def test_a_cache_has_keys_and_values_per_token_and_states_of_any_length():
    found = {kind: LayerProbe(build(shape)).cache(torch.float32) for kind, shape in KINDS.items()}
    each = 2 * 2 * 16 * 4  # keys and values of a layer: two heads of 16 numbers
    assert [int(cache.token) for cache in found.values()] == [5 * each, each, 3 * each, 4 * each]
    states = [cache.state for cache in found.values()]
    assert states[1] == 3 * 64 * 3 * 4  # the last inputs of three convolutions
    assert states[2] > 3 * 64 * 8 * 4 > states[0] == 0
    assert not any(cache.per_token for cache in found.values())
    mamba = transformers.MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=2, state_size=4)
    only_states = LayerProbe(build(mamba)).cache(torch.float32)
    assert only_states.token == 0 < only_states.state and only_states.per_token


def test_a_model_that_cannot_be_planned_is_named_in_one_line():
    class Foreign(torch.nn.Module):
        config = SHAPE

        def get_decoder(self):
            return self

    with pytest.raises(
        UnknownActivations, match=r"qwen3 cannot be planned from its config: .*no layers of transformers"
    ):
        LayerProbe(Foreign()).cache(torch.float32)


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
    small = train.run(dataclasses.replace(config, memory_limit=0.018))
    assert small is not None and small["fits"].startswith("no")
    assert "--micro-batch-tokens" in small["cheapest_settings_that_fit"]
    medium = train.run(dataclasses.replace(config, memory_limit=0.05))
    assert medium is not None and "--step-gradient recomputed" in medium["cheapest_settings_that_fit"]
    assert 512 <= small["longest_response_that_fits"]["kronos --scope global"] < 2048 - 256
    assert 0 < medium["longest_response_that_fits"]["kronos --scope tensor"] < 512


def test_a_limit_that_cannot_be_met_says_what_it_would_take(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", str(folder), "--device", "cpu", "--dry-run", "--optimizer", "adamw"]
    assert main([*words, "--max-new-tokens", "8", "--memory-limit", "0.002"]) == 2
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"the run needs 0\.00\d+ GiB at the least \(--.*the limit is 0\.002 GiB", said)
    assert "change --optimizer kronos or --mask" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("device", "first"),
    [("cpu", [(8, 1024), (8, 256), (4, 1024)]), ("cuda", [(8, 8192), (4, 8192), (2, 8192), (1, 8192), (8, 4096)])],
)
def test_on_a_gpu_large_chunks_come_before_more_steps_at_once(monkeypatch, device, first):
    monkeypatch.setattr(memory_plan, "resolve_device", lambda name: torch.device(device))
    tried = MemoryPlanner(build(), 256)._recomputed(TrainConfig(step_gradient="recomputed"))
    dials = [(made.units_at_once, made.gradient_chunk_tokens) for made in itertools.islice(tried, len(first))]
    assert dials == first


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
    # a gradient that fits is not made again, and other updates are only warned about
    tensor = dataclasses.replace(config, scope="tensor")
    assert settle_step_gradient(tensor, loaded, 64, 1.0) is tensor and not capfd.readouterr().err
    assert settle_step_gradient(dataclasses.replace(tensor, memory_limit=0.05), loaded, 64, 1.0).step_gradient == "auto"
    assert re.search(r"planned to take 0\.\d+ GiB, 0\.05 are there", " ".join(capfd.readouterr().err.split()))
