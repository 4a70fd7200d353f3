"""Interventions on attention: the function stays, the weights do not."""

from __future__ import annotations

import math
import re
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.models import interventions
from ssrctl.models.interventions import (
    Kind,
    apply_edits,
    attention_layers,
    chosen_layers,
    edits,
    haar_orthogonal,
    head_orders,
    logit_difference,
    logits_on,
    rotary_rotation,
)

KINDS: tuple[Kind, ...] = ("rotate", "permute-heads")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama with biases": ("Llama", {"attention_bias": True, "head_dim": 8}),
    "llama with one kv head": ("Llama", {"num_key_value_heads": 1}),
    "llama without groups": ("Llama", {"num_key_value_heads": 4}),
    "qwen2": ("Qwen2", {}),  # q, k and v have biases
    "qwen3": ("Qwen3", {"head_dim": 10}),  # q and k are normalised
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 6}),
}
PROMPTS = [torch.arange(3, 40), torch.tensor([5]), torch.arange(60, 20, -2)]
# The projections that an intervention changes, where these are not all four: norms of q and k keep rotations away from
# them, and a single key/value head has no other place.
MOVED = {("qwen3", "rotate"): "v|o", ("llama with one kv head", "permute-heads"): "q|o"}
# Float32 keeps 7 digits; the logits of these models are about 10.
CLOSE = 2e-5


def tiny(family: str) -> Any:
    """A random model whose every parameter matters: biases and norms are random, and attention is far from uniform."""
    import transformers

    name, more = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**SIZES | more)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.4)
    return model


def weights(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def intervened(model: Any, kind: Kind, ranges: list[range] | None = None, seed: int = 0) -> float:
    """Change the model; the difference of its logits relative to the largest."""
    before = logits_on(model, PROMPTS)
    apply_edits(model, edits(chosen_layers(attention_layers(model), ranges), kind, seed))
    return logit_difference(before, logits_on(model, PROMPTS)).relative


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_and_only_attention_of_the_chosen_layers_changes(family: str, kind: Kind) -> None:
    model = tiny(family)
    before = weights(model)
    assert intervened(model, kind, [range(0, 1), range(2, 3)]) < CLOSE
    assert {name for name, old in before.items() if not torch.equal(old, model.get_parameter(name))} == {
        name
        for name in before
        if re.search(rf"layers\.[02]\.self_attn\.({MOVED.get((family, kind), 'q|k|v|o')})_proj\.", name)
        and not name.endswith("o_proj.bias")
    }


@pytest.mark.parametrize("family", ["llama with biases", "qwen2"])
def test_every_part_of_an_intervention_is_needed(family: str) -> None:
    """The models tell: without any one tensor's edit the function is another."""
    for kind in KINDS:
        made = edits(attention_layers(tiny(family))[1:2], kind, 0)
        assert len(made) == 7  # four matrices, the biases of q, k and v
        for left_out in made:
            model = tiny(family)
            before = logits_on(model, PROMPTS)
            apply_edits(model, {name: edit for name, edit in made.items() if name != left_out})
            assert logit_difference(before, logits_on(model, PROMPTS)).relative > 100 * CLOSE, (kind, left_out)


@pytest.mark.parametrize("edit", ["rotate_rows", "rotate_columns"])
def test_a_rotation_that_is_not_transposed_is_seen(edit: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(interventions, edit)
    monkeypatch.setattr(interventions, edit, lambda t, rotations: right(t, rotations.transpose(1, 2)))
    assert intervened(tiny("qwen2"), "rotate") > 0.01


def test_rotations_are_those_of_the_definition_head_by_head() -> None:
    """V_g' = R_g^T V_g, written out with loops over heads."""
    generator = torch.Generator().manual_seed(3)
    rotations = torch.stack([haar_orthogonal(4, seed) for seed in (1, 2)])
    rows = torch.randn(8, 5, generator=generator)
    columns = torch.randn(5, 8, generator=generator)
    turned_rows = interventions.rotate_rows(rows, rotations)
    turned_columns = interventions.rotate_columns(columns, rotations)
    for head in range(2):
        part = slice(4 * head, 4 * head + 4)
        assert torch.allclose(turned_rows[part], rotations[head].T @ rows[part].double())
        assert torch.allclose(turned_columns[:, part], columns[:, part].double() @ rotations[head])


@pytest.mark.parametrize("kind", KINDS)
def test_each_seed_layer_and_head_draws_its_own(kind: Kind) -> None:
    model = tiny("llama")
    attentions = attention_layers(model)
    sample = torch.randn(24, 24, generator=torch.Generator().manual_seed(0))

    def made(seed: int, layer: int) -> Tensor:
        return edits(attentions, kind, seed)[f"model.layers.{layer}.self_attn.q_proj.weight"](sample)

    assert torch.equal(made(0, 1), made(0, 1))
    assert torch.equal(made(0, 1), edits(attentions[1:2], kind, 0)["model.layers.1.self_attn.q_proj.weight"](sample))
    assert any(not torch.equal(made(0, 0), made(0, layer)) for layer in (1, 2))
    assert any(not torch.equal(made(0, 0), made(seed, 0)) for seed in range(1, 4))


def test_permutation_only_moves_rows() -> None:
    model = tiny("qwen2")
    before = weights(model)
    assert intervened(model, "permute-heads") < CLOSE
    for name, old in before.items():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            assert sorted(old.tolist()) == sorted(model.get_parameter(name).tolist())


# --------------------------------------------------------------------------------------------------
# draws


@pytest.mark.parametrize("size", [1, 2, 7, 64])
def test_haar_matrices_are_orthogonal(size: int) -> None:
    matrix = haar_orthogonal(size, 5)
    assert matrix.dtype == torch.float64
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-12)


def test_haar_matrices_have_the_moments_of_the_haar_measure() -> None:
    """On O(3) the trace has mean 0 and variance 1, and half the determinants are -1.

    With 600 draws the means are off by 0.04 (one standard deviation), the share by 0.02.
    """
    drawn = torch.stack([haar_orthogonal(3, seed) for seed in range(600)])
    traces = drawn.diagonal(dim1=1, dim2=2).sum(-1)
    assert abs(float(traces.mean())) < 0.15
    assert abs(float(traces.var()) - 1.0) < 0.2
    assert abs(float((torch.linalg.det(drawn) < 0).double().mean()) - 0.5) < 0.08


def test_rotary_rotations_commute_with_the_rotary_embedding() -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    generator = torch.Generator().manual_seed(0)
    angles = torch.rand(1, 9, 4, generator=generator, dtype=torch.float64) * 6
    turn = partial(
        apply_rotary_pos_emb, cos=torch.cat([angles, angles], -1).cos(), sin=torch.cat([angles, angles], -1).sin()
    )
    q, k = torch.randn(2, 1, 1, 9, 8, generator=generator, dtype=torch.float64)
    rotation = rotary_rotation(8, 11)
    assert torch.allclose(rotation.T @ rotation, torch.eye(8, dtype=torch.float64), atol=1e-12)
    for first, second in zip(turn(q @ rotation, k @ rotation), turn(q, k), strict=True):
        assert torch.allclose(first, second @ rotation, atol=1e-12)
    assert not torch.allclose(rotation, torch.eye(8, dtype=torch.float64), atol=0.1)
    # A rotation of all dimensions does not commute, so the check can fail.
    assert not torch.allclose(turn(q @ haar_orthogonal(8, 0), k)[0], turn(q, k)[0] @ haar_orthogonal(8, 0), atol=0.1)


@pytest.mark.parametrize(
    ("num_kv_heads", "heads_per_kv", "num_different"),
    # Of n things, 1, 2, 9 permutations move all, for n = 2, 3, 4; m query heads have m! orders within each group.
    [(1, 2, 1), (1, 4, 9), (2, 1, 1), (2, 2, 1 * 2**2), (3, 2, 2 * 2**3)],
)
def test_head_orders_move_all_heads_and_keep_query_heads_with_theirs(
    num_kv_heads: int, heads_per_kv: int, num_different: int
) -> None:
    seen = set()
    for seed in range(120):
        kv_order, order = head_orders(num_kv_heads, heads_per_kv, seed, "x")
        assert sorted(order.tolist()) == list(range(num_kv_heads * heads_per_kv))
        for place, old in enumerate(order.tolist()):
            assert old != place
            assert old // heads_per_kv == int(kv_order[place // heads_per_kv])
        seen.add(tuple(order.tolist()))
    assert len(seen) == num_different


def test_one_head_cannot_be_permuted() -> None:
    with pytest.raises(UserError, match="one head"):
        head_orders(1, 1, 0, "model.layers.0.self_attn")


# --------------------------------------------------------------------------------------------------
# refusals


def small(name: str, **more: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES | more))


def test_other_architectures_are_refused_by_name_with_the_reason() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=16))
    with pytest.raises(
        UserError, match=r"transformer\.h\.0\.attn is a GPT2Attention.*c_attn holds query, key and value"
    ):
        attention_layers(gpt2)
    with pytest.raises(UserError, match=r"Phi3Attention.*qkv_proj holds query"):
        attention_layers(small("Phi3"))
    with pytest.raises(UserError, match=r"GemmaAttention, which interventions do not support"):
        attention_layers(small("Gemma", head_dim=8))
    with pytest.raises(UserError, match="has no attention"):
        attention_layers(torch.nn.Linear(2, 2))


def test_a_subclass_that_only_has_the_name_is_refused() -> None:
    model = tiny("llama")

    class LlamaAttention(type(model.model.layers[1].self_attn)):  # type: ignore[misc]
        pass

    model.model.layers[1].self_attn.__class__ = LlamaAttention
    with pytest.raises(UserError, match=r"model\.layers\.1\.self_attn is a LlamaAttention, which"):
        attention_layers(model)


def test_parts_that_are_not_known_are_refused() -> None:
    model = tiny("llama")
    model.model.layers[2].self_attn.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(UserError, match=r"layers\.2\.self_attn\.sinks with shape \[4\]"):
        attention_layers(model)
    model = tiny("qwen3")
    model.model.layers[0].self_attn.q_norm.weight = torch.nn.Parameter(torch.ones(40))  # over all heads together
    with pytest.raises(UserError, match=r"q_norm\.weight with shape \[40\]"):
        attention_layers(model)
    model = tiny("llama")

    class Adapted(torch.nn.Linear):
        pass

    model.model.layers[0].self_attn.v_proj.__class__ = Adapted
    with pytest.raises(UserError, match=r"v_proj is a Adapted, not an ordinary linear layer"):
        attention_layers(model)


def test_a_rotary_embedding_of_a_part_of_the_head_is_refused() -> None:
    model = tiny("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:2]
    with pytest.raises(UserError, match="turns 4 of the 6 dimensions"):
        attention_layers(model)


def test_layers_are_chosen_in_order_and_once() -> None:
    attentions = attention_layers(tiny("llama"))
    assert [one.layer for one in chosen_layers(attentions, [range(2, 3), range(1, 3)])] == [1, 2]
    assert chosen_layers(attentions, None) == attentions
    with pytest.raises(UserError, match=r"layer 3, the model has 3 layers"):
        chosen_layers(attentions, [range(1, 9)])


# --------------------------------------------------------------------------------------------------
# the difference


def test_logit_difference_of_planted_logits() -> None:
    first = [torch.tensor([[0.0, 0.0], [1.0, 3.0]]), torch.tensor([[-4.0, 0.0]])]
    second = [torch.tensor([[0.0, math.log(3.0)], [1.0, 3.0]]), torch.tensor([[-4.0, -5.0]])]
    found = logit_difference(first, second)
    assert (found.max_abs, found.max_logit, found.num_positions) == (5.0, 4.0, 3)
    assert found.relative == 1.25
    assert found.same_top_frac == pytest.approx(1 / 3)
    # KL((1/2, 1/2) || (1/4, 3/4)) at the first position.
    first_kl = 0.5 * math.log(2.0) + 0.5 * math.log(2.0 / 3.0)
    low = 1 / (1 + math.exp(4.0))
    last_kl = low * math.log(low * (1 + math.exp(-1.0))) + (1 - low) * math.log((1 - low) * (1 + math.exp(1.0)))
    assert found.mean_kl == pytest.approx((first_kl + last_kl) / 3)
    assert found.max_kl == pytest.approx(last_kl)


def test_logits_that_are_no_numbers_are_refused() -> None:
    model = tiny("llama")
    with torch.no_grad():
        model.lm_head.weight[3, 3] = math.nan
    with pytest.raises(UserError, match="NaN or infinite"):
        logits_on(model, PROMPTS)
