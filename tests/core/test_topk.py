"""Exact selection, compared with a sort of everything."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import selection

from ssrctl.core import topk
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import NonFiniteGradient, select_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Zeros of both signs, the smallest denormal of each dtype, a larger one, neighbours of 1, the largest.
POOL = {
    torch.float32: [0.0, -0.0, 1e-45, -1e-45, 3e-39, 1.0, -1.0, 1.0000001, -0.9999999, 3.4e38],
    torch.bfloat16: [0.0, -0.0, 9.2e-41, -9.2e-41, 1e-39, 1.0, -1.0, 1.0078125, -0.99609375, 3.3e38],
    torch.float16: [0.0, -0.0, 6e-8, -6e-8, 3e-5, 1.0, -1.0, 1.0009766, -0.9995117, 65504.0],
}
SHAPES = [(), (1,), (7,), (16, 3), (2, 3, 5), (0,), (4, 0)]


def as_sets(taken):
    return {name: set(indices) for name, indices in taken.items()}


def as_bits(taken, gradients):
    return {
        name: bits_from_indices(torch.tensor(sorted(indices), dtype=torch.int64), gradients[name].numel())
        for name, indices in taken.items()
    }


@pytest.mark.parametrize("chunk", [8, 1 << 22])
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shapes=st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4),
    from_pool=st.booleans(),
    share=st.floats(0, 1.2),
    taken_share=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
)
def test_equals_a_sort(chunk, seed, dtype, shapes, from_pool, share, taken_share):
    rng = np.random.default_rng(seed)
    gradients = {}
    for number, shape in enumerate(shapes):
        size = int(np.prod(shape))
        values = rng.choice(POOL[dtype], size) if from_pool else rng.standard_normal(size)
        gradients[f"p{number}"] = torch.tensor(values, dtype=torch.float64).to(dtype).reshape(shape)
    taken = {
        name: np.flatnonzero(rng.random(g.numel()) < taken_share).tolist()
        for name, g in gradients.items()
        if rng.random() < 0.8
    }
    k = int(share * sum(g.numel() for g in gradients.values()))
    old, topk.CHUNK = topk.CHUNK, chunk
    try:
        found = select_topk(gradients, k, as_bits(taken, gradients))
    finally:
        topk.CHUNK = old
    assert {name: indices.tolist() for name, indices in found.items()} == selection.select(gradients, k, as_sets(taken))
    assert all(indices.dtype == torch.int64 for indices in found.values())


def test_ties_go_to_the_first_tensor_and_the_lowest_index():
    gradients = {"z": torch.tensor([1.0, -2.0, 2.0]), "a": torch.tensor([2.0, 3.0, -2.0])}
    found = select_topk(gradients, 3)
    assert found["z"].tolist() == [1, 2]
    assert found["a"].tolist() == [1]


def test_the_threshold_is_found_in_the_lowest_mantissa_bit():
    """Values that agree in the upper 16 bits of their pattern are told apart by the second count."""
    patterns = torch.arange(0x3F800000, 0x3F800000 + 1000, dtype=torch.int32)
    values = patterns.view(torch.float32)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    found = select_topk({"w": values}, 10)["w"]
    assert sorted(values[found].view(torch.int32).tolist()) == list(range(0x3F800000 + 990, 0x3F800000 + 1000))


def test_nothing_asked_for_and_nothing_there():
    gradients = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    assert {n: i.tolist() for n, i in select_topk(gradients, 0).items()} == {"a": [], "b": []}
    assert select_topk({}, 5) == {}
    assert select_topk({"a": torch.empty(0)}, 5)["a"].tolist() == []


def test_more_than_there_are():
    bits = {"a": bits_from_indices(torch.tensor([1]), 3)}
    assert select_topk({"a": torch.zeros(3)}, 10**12, bits)["a"].tolist() == [0, 2]


def test_tensors_that_are_not_contiguous():
    gradient = torch.arange(12.0).reshape(3, 4).t()
    strided = torch.arange(10.0)[::2]
    assert select_topk({"g": gradient}, 2)["g"].tolist() == [8, 11]  # flat indices of the transposed tensor
    assert select_topk({"g": strided}, 2)["g"].tolist() == [3, 4]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite_are_named(dtype, bad):
    good, broken = torch.ones(20, dtype=dtype), torch.ones(30, dtype=dtype)
    broken[4] = broken[7] = bad
    with pytest.raises(NonFiniteGradient, match="broken has 2 values") as caught:
        select_topk({"good": good, "broken": broken}, 1)
    assert caught.value.name == "broken"


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_taken_may_be_nan_and_is_not_blamed(dtype):
    """Only eligible coordinates count, so a NaN in a protected weight does not stop a run."""
    first, second = torch.ones(9, dtype=dtype), torch.arange(1, 10, dtype=dtype)
    first[3] = float("nan")
    taken = {"first": bits_from_indices(torch.tensor([3]), 9)}
    assert select_topk({"first": first, "second": second}, 1, taken)["second"].tolist() == [8]
    second[2] = float("inf")
    with pytest.raises(NonFiniteGradient, match="second has 1 values"):
        select_topk({"first": first, "second": second}, 1, taken)


def test_the_largest_finite_values_are_finite():
    for dtype in DTYPES:
        top = torch.finfo(dtype).max
        assert select_topk({"w": torch.tensor([1.0, -top, top], dtype=dtype)}, 1)["w"].tolist() == [1]


def test_refusals():
    with pytest.raises(ValueError, match="at least 0, got -1"):
        select_topk({"w": torch.ones(3)}, -1)
    with pytest.raises(ValueError, match="one dtype"):
        select_topk({"a": torch.ones(3), "b": torch.ones(3, dtype=torch.bfloat16)}, 1)
    with pytest.raises(ValueError, match="one dtype"):
        select_topk({"a": torch.ones(3, dtype=torch.float64)}, 1)
