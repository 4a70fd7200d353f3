"""Attention of a chunk: transformers' own, without copies of what the query heads share."""

import types

import pytest
import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ssrctl.training.live_bytes import LiveBytes
from ssrctl.training.step_gradients.attention import _Grouped, grouped_attention

CUDA = torch.cuda.is_available()


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("kind", ["bool", "numbers"])
def test_it_is_that_of_transformers_and_keeps_no_copy_of_keys(heads, key_heads, kind):
    torch.manual_seed(0)
    query, key, value = (
        torch.randn(2, count, length, width, dtype=torch.float64, requires_grad=True)
        for count, length, width in ((4, 3, 8), (key_heads, 50, 8), (key_heads, 50, 8))
    )
    mask = torch.rand(2, heads, 3, 50) < 0.7
    mask = mask if kind == "bool" else torch.randn(2, heads, 3, 50, dtype=torch.float64)
    module = types.SimpleNamespace(num_key_value_groups=4 // key_heads)
    found = []
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with grouped_attention():
        for attend in (plain, ALL_ATTENTION_FUNCTIONS["sdpa"]):
            saved = set()

            def pack(tensor, saved=saved):
                saved.add((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                outputs = [attend(module, query, key, value, mask, scaling=0.3)[0] for _ in "ab"]
            total = sum(output.square().sum() for output in outputs)
            found.append((outputs[0], *torch.autograd.grad(total, (query, key, value)), sum(size for _, size in saved)))
    *plain_tensors, plain_bytes = found[0]
    *tensors, size = found[1]
    for one, other in zip(plain_tensors, tensors, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)
    if key_heads == 2:  # of one head transformers makes no copy either
        assert plain_bytes - size >= 2 * (key.nbytes + value.nbytes)


@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="no CUDA device")])],
)
def test_a_causal_mask_is_known_and_left_out(past, device):
    torch.manual_seed(0)
    dtype = torch.float64 if device == "cpu" else torch.bfloat16
    query, key, value = (
        torch.randn(2, heads, 7 + more, 16, dtype=dtype, device=device, requires_grad=True)
        for heads, more in ((4, 0), (2, past), (2, past))
    )
    mask = torch.ones(1, 1, 7, 7 + past, dtype=torch.bool, device=device).tril(past)
    grouped = _Grouped(ALL_ATTENTION_FUNCTIONS["sdpa"])
    assert grouped._is_causal(mask) and not grouped._is_causal(mask.flip(3)) and not grouped._is_causal(mask.double())
    windowed = mask & ~mask.tril(past - 3)
    assert not grouped._is_causal(windowed)
    module = types.SimpleNamespace(num_key_value_groups=2)
    found = []
    for output in (
        grouped._without_mask(query, key, value, {"scaling": 0.3}),
        ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, scaling=0.3)[0],
    ):
        found.append((output, *torch.autograd.grad(output.square().sum(), (query, key, value))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one, other, **({"rtol": 1e-12, "atol": 1e-12} if device == "cpu" else {"rtol": 0.05, "atol": 0.05})
        )


def test_the_name_has_its_function_again_after_an_error():
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ZeroDivisionError), grouped_attention():
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain
        raise ZeroDivisionError
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is plain
    ALL_ATTENTION_FUNCTIONS["sdpa"] = print  # somebody's own
    try:
        with grouped_attention():
            pass
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is print
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def test_live_bytes_count_what_a_backward_pass_makes():
    leaf = torch.zeros(1000, requires_grad=True)
    with LiveBytes() as live:
        made = leaf.exp()
        assert (live.now, live.peak) == (4000, 4000)
        # ones, the product with the saved result, and the gradient that stays
        made.sum().backward()
        assert live.peak >= 12000 - 4000
        del made
        assert live.now == leaf.grad.nbytes == 4000
