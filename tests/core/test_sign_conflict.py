"""Sign conflicts of two gradients, counted and weighted, by hand and against a loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssrctl.core import sign_conflict as module
from ssrctl.core.sign_conflict import SignConflict, sign_conflict, union_indices

numbers = st.lists(st.sampled_from([-2.0, -0.5, 0.0, 0.25, 1.0, 3.0]), min_size=7, max_size=7)


def gradient(values: list[float]) -> dict[str, Tensor]:
    return {"w": torch.tensor(values[:6]).reshape(2, 3), "b": torch.tensor(values[6:])}


def test_planted_signs() -> None:
    one = gradient([1.0, -2.0, 3.0, 0.0, 0.5, 1.0, -1.0])
    other = gradient([1.0, 1.0, -1.0, 5.0, 0.0, 2.0, -4.0])
    # products 1, -2, -3, 0, 0, 2 and 4: two of five against each other, 5 of 12 by weight
    found = sign_conflict(one, other)
    assert found == SignConflict(dot=2.0, magnitude=12.0, num_both=5, num_opposite=2)
    assert found.frac == 2 / 5 and found.weighted_frac == 5 / 12
    inside = sign_conflict(one, other, {"w": torch.tensor([1, 3, 5])})
    assert (inside.frac, inside.weighted_frac) == (1 / 2, 2 / 4)
    assert sign_conflict(one, one).frac == 0.0 and sign_conflict(one, one).weighted_frac == 0.0
    negative = {name: -part for name, part in one.items()}
    assert sign_conflict(one, negative).frac == sign_conflict(one, negative).weighted_frac == 1.0


def test_what_cannot_be_compared_has_no_share() -> None:
    one = gradient([1.0] * 7)
    for other in ({}, {"w": torch.zeros(2, 3)}, {"v": torch.ones(2)}):
        assert sign_conflict(one, other) == SignConflict() and sign_conflict(one, other).frac is None
        assert sign_conflict(one, other).weighted_frac is None
    assert sign_conflict(one, one, {}) == SignConflict()


def test_tiny_gradients_keep_their_signs() -> None:
    tiny = {"w": torch.full((3,), 1e-44)}  # a product underflows in float32
    found = sign_conflict(tiny, {"w": torch.tensor([1e-44, -1e-44, 0.0])})
    assert (found.num_both, found.num_opposite, found.weighted_frac) == (2, 1, 0.5)


@given(numbers, numbers, st.frozensets(st.integers(0, 5)))
def test_every_coordinate_counts_once(a: list[float], b: list[float], chosen: frozenset[int]) -> None:
    before, module.CHUNK = module.CHUNK, 2
    try:
        everywhere = sign_conflict(gradient(a), gradient(b))
        inside = sign_conflict(gradient(a), gradient(b), {"w": torch.tensor(sorted(chosen), dtype=torch.int64)})
    finally:
        module.CHUNK = before
    for found, places in ((everywhere, range(7)), (inside, chosen)):
        products = [a[i] * b[i] for i in places if a[i] != 0 and b[i] != 0]
        assert found.num_both == len(products)
        assert found.num_opposite == sum(product < 0 for product in products)
        assert found.dot == pytest.approx(sum(products))
        opposite = sum(-product for product in products if product < 0)
        if products:
            assert found.weighted_frac == pytest.approx(opposite / sum(map(abs, products)))


def test_unions_of_indices() -> None:
    one = {"w": torch.tensor([1, 4]), "b": torch.tensor([0])}
    other = {"w": torch.tensor([0, 4]), "v": torch.tensor([2])}
    assert {name: found.tolist() for name, found in union_indices(one, other).items()} == {
        "w": [0, 1, 4], "b": [0], "v": [2],
    }  # fmt: skip
