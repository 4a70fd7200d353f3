"""What a model must be able to do for each way to the units' gradients, and two ways side by side."""

import pytest
import torch
import transformers
from reference.unit_gradients import CASES, VOCABULARY, assert_close, build, found_gradients, taken

from ssrctl import tiny_reasoner
from ssrctl.errors import UserError
from ssrctl.training.unit_gradients import (
    GradientTask,
    automatic_method,
    compare_methods,
    gradient_cosine,
    gradient_dot,
    paired_gradients,
    unit_gradients,
)


@pytest.fixture(scope="module")
def qwen():
    return build("qwen3")


def mamba():
    config = transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=16, state_size=4, num_hidden_layers=2)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def checkpointing():
    model = build("llama").train()
    model.gradient_checkpointing_enable()
    return model


@pytest.mark.parametrize(
    ("make", "reason"), [(mamba, "past_key_values"), (checkpointing, "gradient checkpointing is on")]
)
def test_a_model_without_a_usable_cache(make, reason):
    model = make()
    case = CASES["ragged"].near(model)
    for method in ("chunked", "recomputed", "local"):
        with pytest.raises(UserError, match=reason):
            unit_gradients(model, case.batch(), case.units, method=method)
    assert automatic_method(GradientTask(model, case.batch(), case.units)) in ("kept", "truncated")
    assert all(cosine > 1 - 1e-9 for cosine in compare_methods(model, case.batch(), case.units, "auto", "kept"))


def test_layers_that_are_not_attention(qwen, monkeypatch):
    case = CASES["ragged"]
    monkeypatch.setattr(qwen.config, "layer_types", ["full_attention", "linear_attention", "full_attention"])
    with pytest.raises(UserError, match="layers of other kinds"):
        unit_gradients(qwen, case.batch(), case.units, method="chunked")


def test_local_needs_the_window_to_hold_the_padded_steps():
    case = CASES["ragged"]
    with pytest.raises(UserError, match="last 4 columns only, and the padded steps take 12"):
        unit_gradients(build("mistral"), case.batch(), case.units, method="local")
    wide = build("mistral", sliding_window=12)
    assert len(found_gradients(wide, case.near(wide), "local")) == 3


def test_local_knows_the_window_of_gpt_neo():
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY, hidden_size=16, num_layers=2, num_heads=2, window_size=4,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, intermediate_size=16,
    )  # fmt: skip
    model, case = transformers.AutoModelForCausalLM.from_config(config).eval(), CASES["ragged"]
    with pytest.raises(UserError, match="last 4 columns only, and the padded steps take 12"):
        unit_gradients(model, case.batch(), case.units, method="local")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
         "factor": 4.0, "original_max_position_embeddings": 6},
    ],
    ids=["dynamic", "longrope"],
)  # fmt: skip
def test_frequencies_that_depend_on_the_length_need_whole_passes(rope):
    case = CASES["ragged"]

    def model(length):
        config = transformers.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=length,
            rope_parameters=rope | ({} if rope["rope_type"] == "dynamic" else {"original_max_position_embeddings": length}),
        )  # fmt: skip
        return transformers.AutoModelForCausalLM.from_config(config).eval()

    beyond, within = model(6), model(64)
    for method in ("truncated", "chunked", "recomputed", "local"):
        with pytest.raises(UserError, match=rf"{rope['rope_type']}\) depend on the length beyond 6 tokens"):
            unit_gradients(beyond, case.batch(), case.units, method=method)
        assert len(found_gradients(within, case, method)) == len(case.units)
    for methods in (("kept", "truncated", "chunked"), ("kept", "truncated")):
        assert automatic_method(GradientTask(beyond, case.batch(), case.units), methods) == "kept"


def test_gemma_4_whose_layers_differ():
    config = transformers.Gemma4TextConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, hidden_size_per_layer_input=4, vocab_size_per_layer_input=VOCABULARY,
        num_kv_shared_layers=0, sliding_window=32, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    case = CASES["ragged"].near(model)
    assert len(found_gradients(model, case, "auto")) == len(case.units)


def test_a_cache_that_is_not_filled_is_noticed(qwen, monkeypatch):
    case, whole = CASES["ragged"], qwen.forward

    def forward(input_ids, past_key_values=None, use_cache=None):
        return whole(input_ids=input_ids, use_cache=False)

    monkeypatch.setattr(qwen, "forward", forward)
    with pytest.raises(UserError, match="holds 0 keys after"):
        found_gradients(qwen, case, "chunked")


def test_unknown_methods_are_refused(qwen):
    case = CASES["ragged"]
    with pytest.raises(UserError, match=r"'exact'.*auto, piecemeal, kept, truncated, chunked, recomputed, local"):
        unit_gradients(qwen, case.batch(), case.units, method="exact")


def test_pairs_hold_both_gradients_and_leave_none_behind(qwen):
    case = CASES["ragged"].near(qwen)
    pairs = [*paired_gradients(qwen, case.batch(), case.units, "truncated", "local", level="token", loss_scale=2.0)]
    assert not taken(qwen)
    truncated = found_gradients(qwen, case, "truncated", "token", loss_scale=2.0)
    local = found_gradients(qwen, case, "local", "token", loss_scale=2.0)
    for pair, (unit, first), (_, second) in zip(pairs, truncated, local, strict=True):
        assert pair.unit == unit
        assert_close(pair.first, first)
        assert_close(pair.second, second)
        flat = [torch.cat([g.flatten() for g in side.values()]) for side in (first, second)]
        assert pair.cosine == pytest.approx(float(torch.cosine_similarity(*flat, dim=0)), abs=1e-12)
    qwen.lm_head.weight.grad = torch.zeros_like(qwen.lm_head.weight)
    with pytest.raises(ValueError, match="already have a gradient"):
        paired_gradients(qwen, case.batch(), case.units, "kept", "local")
    taken(qwen)


def test_inner_products_are_exact_where_float32_sums_are_not():
    generator = torch.Generator().manual_seed(0)
    big = {"a": torch.rand(5_000_000, generator=generator), "b": torch.tensor([1e4]), "c": torch.ones(3)}
    other = {"a": big["a"], "b": torch.tensor([-2e4])}
    square = sum(float(part.double().square().sum()) for part in big["a"].split(1_000_000))
    assert gradient_dot(big, other) == pytest.approx(square - 2e8, rel=1e-13)
    assert gradient_cosine(big, {}) == 0.0
    assert gradient_cosine(big, big) == pytest.approx(1.0, abs=1e-15)


def test_the_bundled_model_in_the_precision_it_is_trained_in():
    """float32, real weights: angles of 1e-6 between the exact ways, and the approximation far from them."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_reasoner.path()).eval()
    case = CASES["fused"].near(model)
    for method in ("truncated", "chunked", "recomputed", "auto"):
        assert min(compare_methods(model, case.batch(), case.units, "kept", method)) > 1 - 1e-10
    assert max(compare_methods(model, case.batch(), case.units, "kept", "local")[1:]) < 0.99


def test_bfloat16_gradients_agree_to_their_rounding():
    """Parameter gradients are summed over chunks in bfloat16, whose units are 0.4% wide."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_reasoner.path(), dtype=torch.bfloat16).eval()
    case = CASES["fused"].near(model)
    for method in ("truncated", "chunked", "recomputed"):
        assert min(compare_methods(model, case.batch(), case.units, "kept", method)) > 0.998
