"""Update sparsity on pairs whose differences were planted, so that every number is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.analysis.sparsity import (
    Change,
    add_up,
    common_dtype,
    compare_tensors,
    group_changes,
    layer_index,
    matrix_kind,
)
from ssrctl.analysis.sparsity_report import headlines, nonfinite_note, sparsity_numbers

ATOL = 1e-5


def planted() -> tuple[torch.Tensor, torch.Tensor]:
    """200 weights of 0.5 in float64, of which 3 move by half the tolerance and 2 by twice it."""
    base = torch.full((10, 20), 0.5, dtype=torch.float64)
    tuned = base.clone()
    tuned[0, :3] -= ATOL / 2
    tuned[3, 7] = 0.5 + 2 * ATOL
    tuned[9, 19] = 0.5 - 2 * ATOL
    return base, tuned


def test_planted_changes_are_counted() -> None:
    change = compare_tensors(*planted(), ATOL)
    assert (change.numel, change.num_equal, change.num_within) == (200, 195, 198)
    assert change.sparsity == 198 / 200 and change.equal_frac == 195 / 200
    assert change.max_abs == pytest.approx(2 * ATOL, rel=1e-9)
    assert change.mean_abs == pytest.approx((3 * ATOL / 2 + 4 * ATOL) / 200, rel=1e-9)
    squares = 3 * (ATOL / 2) ** 2 + 2 * (2 * ATOL) ** 2
    assert change.relative_l2 == pytest.approx(math.sqrt(squares / (200 * 0.25)), rel=1e-9)
    numbers = change.numbers()
    assert (numbers["num_changed"], numbers["num_bit_changed"]) == (2, 5)


@pytest.mark.parametrize(("steps", "within"), [(7, 1), (8, 1), (9, 0)])
def test_a_change_of_exactly_the_tolerance_is_within_it(steps: int, within: int) -> None:
    # differences of multiples of 2^-20 around 1 are exact, and so is the tolerance
    tuned = torch.tensor([1.0 + steps * 2.0**-20])
    for a, b in ((torch.ones(1), tuned), (tuned, torch.ones(1))):
        change = compare_tensors(a, b, 8 * 2.0**-20)
        assert (change.num_within, change.num_equal) == (within, 0)


def test_tolerance_zero_still_lets_zero_and_minus_zero_agree() -> None:
    change = compare_tensors(torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 0.0)
    assert (change.num_within, change.num_equal) == (2, 1)


def test_identical_checkpoints_are_wholly_sparse() -> None:
    base, _ = planted()
    base[0, 0], base[0, 1] = float("nan"), float("inf")
    change = compare_tensors(base, base.clone(), 0.0)
    assert change.sparsity == change.equal_frac == 1.0
    assert change.relative_l2 == change.mean_abs == change.max_abs == 0.0
    numbers = sparsity_numbers({"w": change})
    assert headlines(numbers, ATOL) == ["The two checkpoints are identical bit for bit: 200 weights, sparsity 1."]


def test_weights_that_are_no_numbers_are_counted_and_left_out_of_norms() -> None:
    nan, inf = float("nan"), float("inf")
    base = torch.tensor([1.0, nan, 2.0, inf, inf, -inf, 2.0])
    tuned = torch.tensor([1.0, nan, nan, inf, 1.0, inf, 4.0])
    change = compare_tensors(base, tuned, ATOL)
    assert (change.num_nan_base, change.num_inf_base, change.num_nan_tuned, change.num_inf_tuned) == (1, 3, 2, 2)
    # equal: 1, the same NaN, the same infinity; finite differences: those and 2 -> 4
    assert (change.num_equal, change.num_within, change.num_finite) == (3, 3, 4)
    assert (change.max_abs, change.sum_abs, change.sum_sq, change.base_sum_sq) == (2.0, 2.0, 4.0, 1 + 4 + 4)
    note = nonfinite_note(change.numbers())
    assert note is not None and "1 nan in base, 3 inf in base, 2 nan in tuned, 2 inf in tuned" in note
    assert nonfinite_note(compare_tensors(torch.ones(2), torch.ones(2), 0.0).numbers()) is None


def test_bf16_against_fp32_is_compared_in_fp32() -> None:
    torch.manual_seed(0)
    base = torch.randn(40, 50).to(torch.bfloat16)
    assert compare_tensors(base, base.float(), 0.0).num_equal == 2000
    tuned = base.float()
    tuned[5, :7] += 3e-3  # under half a unit in the last place of many bf16 weights, yet counted
    for pair in ((base, tuned), (tuned, base)):
        change = compare_tensors(*pair, ATOL)
        assert (change.num_equal, change.num_within) == (1993, 1993)
    assert compare_tensors(base, tuned.to(torch.bfloat16), ATOL).num_within > 1993


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.bfloat16, torch.float16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16, torch.float32),
        (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e4m3fn),
    ],
)
def test_common_dtype_holds_both(a: torch.dtype, b: torch.dtype, expected: torch.dtype) -> None:
    assert common_dtype(a, b) == common_dtype(b, a) == expected
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert compare_tensors(every, every.to(torch.float32), 0.0).num_within >= 254  # all but NaNs


@given(st.lists(st.tuples(*[st.floats(width=32, allow_nan=False, allow_infinity=False)] * 2), max_size=20),
       st.sampled_from([0.0, ATOL, 1.0]))  # fmt: skip
def test_counts_are_those_of_python_floats(pairs: list[tuple[float, float]], atol: float) -> None:
    base, tuned = (torch.tensor([pair[side] for pair in pairs], dtype=torch.float32) for side in (0, 1))
    change = compare_tensors(base, tuned, atol)
    differences = [abs(b - a) for a, b in pairs]
    assert change.num_within == sum(difference <= atol for difference in differences)
    assert change.num_equal == sum(a.hex() == b.hex() for a, b in pairs)
    assert change.sum_abs == pytest.approx(math.fsum(differences))
    assert change.max_abs == max(differences, default=0.0)
    assert change.num_finite == change.numel == len(pairs)


def test_slices_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = planted()
    whole = compare_tensors(base, tuned, ATOL)
    monkeypatch.setattr("ssrctl.analysis.sparsity._CHUNK", 7)
    parts = compare_tensors(base.T, tuned.T, ATOL)  # not contiguous either
    assert parts.max_abs == whole.max_abs  # the largest, not the sum
    assert parts.sum_abs == pytest.approx(whole.sum_abs)
    assert (parts.numel, parts.num_equal, parts.num_within) == (whole.numel, whole.num_equal, whole.num_within)


def test_nothing_compared_has_no_sparsity() -> None:
    for change in (add_up([]), compare_tensors(torch.empty(0, 3), torch.empty(0, 3), ATOL)):
        assert change == Change() and change.sparsity is None and change.mean_abs is None
    assert compare_tensors(torch.zeros(2), torch.ones(2), ATOL).relative_l2 is None
    assert compare_tensors(torch.zeros(2), torch.zeros(2), ATOL).relative_l2 == 0.0


def test_what_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"\[2, 3\] and \[3, 2\]"):
        compare_tensors(torch.ones(2, 3), torch.ones(3, 2), ATOL)
    with pytest.raises(ValueError, match="complex"):
        compare_tensors(torch.ones(2, dtype=torch.complex64), torch.ones(2), ATOL)


NAMES = {
    # Llama and Qwen
    "model.embed_tokens.weight": (None, "embed"),
    "model.layers.0.self_attn.q_proj.weight": (0, "q"),
    "model.layers.11.self_attn.k_proj.bias": (11, "k"),
    "model.layers.1.self_attn.v_proj.weight": (1, "v"),
    "model.layers.1.self_attn.o_proj.weight": (1, "o"),
    "model.layers.1.self_attn.q_norm.weight": (1, "norm"),
    "model.layers.1.mlp.gate_proj.weight": (1, "gate"),
    "model.layers.1.mlp.up_proj.weight": (1, "up"),
    "model.layers.1.mlp.down_proj.weight": (1, "down"),
    "model.layers.1.input_layernorm.weight": (1, "norm"),
    "model.norm.weight": (None, "norm"),
    "lm_head.weight": (None, "lm_head"),
    "model.layers.3.mlp.experts.7.down_proj.weight": (3, "down"),
    "model.layers.3.mlp.experts.gate_up_proj": (3, "gate_up"),
    "model.layers.3.mlp.gate.weight": (3, "other"),  # the router of a mixture of experts
    # GPT-2, with and without the model's prefix
    "transformer.wte.weight": (None, "embed"),
    "wpe.weight": (None, "embed"),
    "transformer.h.10.attn.c_attn.weight": (10, "qkv"),
    "h.2.attn.c_proj.bias": (2, "o"),
    "h.2.mlp.c_fc.weight": (2, "up"),
    "h.2.mlp.c_proj.weight": (2, "down"),
    "h.2.ln_1.weight": (2, "norm"),
    "transformer.ln_f.bias": (None, "norm"),
    # Phi-2, GPT-J, Falcon, GPT-NeoX, InternLM2, BERT
    "model.layers.4.self_attn.dense.weight": (4, "o"),
    "transformer.h.4.mlp.fc_in.weight": (4, "up"),
    "transformer.h.4.mlp.fc_out.weight": (4, "down"),
    "transformer.h.4.self_attention.query_key_value.weight": (4, "qkv"),
    "transformer.h.4.self_attention.dense.weight": (4, "o"),
    "gpt_neox.layers.4.attention.dense.bias": (4, "o"),
    "gpt_neox.layers.4.mlp.dense_4h_to_h.weight": (4, "down"),
    "embed_out.weight": (None, "lm_head"),
    "model.layers.4.attention.wqkv.weight": (4, "qkv"),
    "output.weight": (None, "lm_head"),
    "bert.encoder.layer.4.attention.output.dense.weight": (4, "o"),
    "bert.encoder.layer.4.attention.output.LayerNorm.weight": (4, "norm"),
    "bert.encoder.layer.4.output.dense.weight": (4, "down"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_layer_and_kind_of_a_name(name: str) -> None:
    assert (layer_index(name), matrix_kind(name)) == NAMES[name]


def test_groups_partition_the_weights() -> None:
    changes = {name: Change(numel=2**place, num_within=place) for place, name in enumerate(NAMES)}
    layers, kinds = group_changes(changes)
    assert list(layers) == [0, 1, 2, 3, 4, 10, 11, None]
    assert list(kinds)[:3] == ["embed", "q", "k"] and list(kinds)[-1] == "other"
    for key, groups in ((0, layers), (1, kinds)):
        for value, total in groups.items():
            assert total.numel == sum(changes[name].numel for name, one in NAMES.items() if one[key] == value)
    numbers = sparsity_numbers(changes)
    assert numbers["total"]["numel"] == 2 ** len(NAMES) - 1
    assert [row["name"] for row in numbers["tensors"]] == list(NAMES)


def test_headlines_have_the_numbers() -> None:
    base, tuned = planted()
    changes = {
        "h.0.attn.c_attn.weight": compare_tensors(base, tuned, ATOL),
        "wte.weight": compare_tensors(base, base, ATOL),
    }
    sparsity, bits, norm, kinds = headlines(sparsity_numbers(changes), ATOL)
    assert "Update sparsity 99.50%" in sparsity and "400 weights" in sparsity and "1e-05" in sparsity
    assert "98.75% are unchanged: 5 weights changed, 3 of them by no more" in bits
    assert "largest change of a weight is 2.00e-05" in norm
    assert kinds == "Most changed: qkv (sparsity 99.00%); least: embed (100.00%)."
