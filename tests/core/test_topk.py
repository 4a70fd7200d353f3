"""Exact selection against a sort."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference.topk import largest

from ssrctl.core import topk
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.topk import NonFiniteGradient, select_topk

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SMALLEST = {torch.float32: 2.0**-149, torch.bfloat16: 2.0**-133, torch.float16: 2.0**-24}


def draw_tensors(seed: int, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, set[int]]]:
    """Several tensors of odd shapes with ties, denormals and zeros of both signs, and taken coordinates."""
    generator = torch.Generator().manual_seed(seed)
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, SMALLEST[dtype], -3 * SMALLEST[dtype], 0.5], dtype=dtype)
    gradients, taken = {}, {}
    for name, shape in (("z", (5, 7)), ("a", (9,)), ("none", (0, 3)), ("m", (2, 3, 4)), ("scalar", ())):
        values = torch.randn(shape, generator=generator).to(dtype)
        pick = torch.randint(len(special), shape, generator=generator)
        values = torch.where(torch.rand(shape, generator=generator) < 0.5, special[pick], values)
        gradients[name] = values
        if name not in ("none", "m"):
            blocked = torch.rand(values.numel(), generator=generator) < 0.3
            taken[name] = set(blocked.nonzero().flatten().tolist())
    return gradients, taken


def as_bits(gradients: dict[str, torch.Tensor], taken: dict[str, set[int]]) -> dict[str, torch.Tensor]:
    return {
        name: bits_from_indices(torch.tensor(sorted(indices), dtype=torch.int64), gradients[name].numel())
        for name, indices in taken.items()
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(seed=st.integers(0, 10_000), k=st.one_of(st.integers(0, 80), st.just(10**12)))
def test_equals_a_sort(dtype: torch.dtype, seed: int, k: int) -> None:
    gradients, taken = draw_tensors(seed, dtype)
    selected = select_topk(gradients, k, as_bits(gradients, taken))
    assert {name: indices.tolist() for name, indices in selected.items()} == largest(gradients, k, taken)
    assert all(indices.dtype == torch.int64 for indices in selected.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_do_not_show(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topk, "CHUNK", 8)
    for seed in range(10):
        gradients, taken = draw_tensors(seed, dtype)
        for k in (1, 13, 40):
            selected = select_topk(gradients, k, as_bits(gradients, taken))
            assert {n: i.tolist() for n, i in selected.items()} == largest(gradients, k, taken)


def test_float32_is_exact_where_the_upper_half_ties() -> None:
    # 1 + j * 2^-23 share their upper 16 bits; only the lower ones order them.
    values = 1 + torch.tensor([5.0, 3.0, 9.0, 7.0, 9.0, 1.0]) * 2.0**-23
    assert select_topk({"x": -values}, 3)["x"].tolist() == [2, 3, 4]
    assert select_topk({"x": -values}, 1)["x"].tolist() == [2]


def test_ties_go_to_the_first_tensor_and_the_lowest_index() -> None:
    gradients = {"late": torch.tensor([1.0, -2.0, 2.0]), "early": torch.tensor([2.0, 2.0, 3.0])}
    assert {n: i.tolist() for n, i in select_topk(gradients, 3).items()} == {"late": [1, 2], "early": [2]}
    swapped = {name: gradients[name] for name in ("early", "late")}
    assert {n: i.tolist() for n, i in select_topk(swapped, 3).items()} == {"early": [0, 1, 2], "late": []}


def test_transposed_gradients_are_read_in_logical_order() -> None:
    gradient = torch.tensor([[1.0, 9.0], [5.0, 7.0], [3.0, 2.0]])
    assert select_topk({"x": gradient.T}, 2)["x"].tolist() == [3, 4]  # [[1, 5, 3], [9, 7, 2]]


def test_nothing_to_select() -> None:
    gradients = {"x": torch.ones(3), "none": torch.ones(0)}
    assert [i.numel() for i in select_topk(gradients, 0).values()] == [0, 0]
    everything = {"x": bits_from_indices(torch.arange(3), 3)}
    assert [i.numel() for i in select_topk(gradients, 5, everything).values()] == [0, 0]
    assert select_topk({}, 5) == {}
    assert select_topk({"none": torch.ones(0)}, 5)["none"].numel() == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_gradients_are_named(dtype: torch.dtype, value: float) -> None:
    bad = torch.tensor([1.0, value, value], dtype=dtype)
    gradients = {"fine": torch.ones(4, dtype=dtype), "bad": bad}
    with pytest.raises(NonFiniteGradient, match="bad has 2 values") as caught:
        select_topk(gradients, 1)
    assert caught.value.name == "bad"
    # What is taken already can do no harm.
    taken = {"bad": bits_from_indices(torch.tensor([1, 2]), 3)}
    assert select_topk(gradients, 5, taken)["bad"].tolist() == [0]


def test_the_largest_finite_number_is_no_infinity() -> None:
    for dtype in DTYPES:
        values = torch.tensor([1.0, torch.finfo(dtype).max], dtype=dtype)
        assert select_topk({"x": values}, 1)["x"].tolist() == [1]


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least 0"):
        select_topk({"x": torch.ones(2)}, -1)
    with pytest.raises(ValueError, match="one dtype"):
        select_topk({"x": torch.ones(2), "y": torch.ones(2).bfloat16()}, 1)
    with pytest.raises(ValueError, match="one dtype"):
        select_topk({"x": torch.ones(2).double()}, 1)
