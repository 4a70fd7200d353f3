"""The paper's block selection, compared with a search tile by tile."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import selection

from ssrctl.core import block_selection
from ssrctl.core.bits import bits_from_indices
from ssrctl.core.block_selection import recall, select_blocks
from ssrctl.core.topk import NonFiniteGradient, select_topk

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def as_bits(taken, gradients):
    return {
        name: bits_from_indices(torch.tensor(sorted(indices), dtype=torch.int64), gradients[name].numel())
        for name, indices in taken.items()
    }


@pytest.mark.parametrize("chunk", [1, 1 << 20])
@given(
    seed=st.integers(0, 2**32 - 1),
    dtype=st.sampled_from(DTYPES),
    shapes=st.lists(st.sampled_from([(), (7,), (70,), (33, 20), (5, 4, 9), (0, 3), (40, 1)]), min_size=1, max_size=3),
    tile=st.sampled_from([1, 3, 16]),
    oversample=st.sampled_from([1.0, 2.0, 3.5]),
    levels=st.sampled_from([3, 1000]),
    share=st.floats(0, 1.1),
    taken_share=st.sampled_from([0.0, 0.4, 0.95]),
)
def test_equals_a_search_tile_by_tile(
    monkeypatch, chunk, seed, dtype, shapes, tile, oversample, levels, share, taken_share
):
    rng = np.random.default_rng(seed)
    gradients = {
        f"p{number}": torch.tensor(rng.integers(-levels, levels + 1, shape)).to(dtype)
        for number, shape in enumerate(shapes)
    }
    taken = {n: set(np.flatnonzero(rng.random(g.numel()) < taken_share).tolist()) for n, g in gradients.items()}
    k = int(share * sum(g.numel() for g in gradients.values()))
    monkeypatch.setattr(block_selection, "CHUNK", chunk)
    found = select_blocks(gradients, k, as_bits(taken, gradients), tile=tile, oversample=oversample)
    num_tiles = math.ceil(oversample * k / tile**2)
    assert {n: i.tolist() for n, i in found.items()} == selection.select_in_tiles(gradients, k, taken, tile, num_tiles)


def test_a_large_coordinate_in_a_tile_without_a_larger_one_is_missed():
    gradient = torch.zeros(16, 48)
    gradient[0, :8] = 10.0  # the first tile has eight large coordinates and the largest
    gradient[3, 20] = 9.0  # the second, one
    gradient[5, 40:44] = 8.0  # the third, four
    found = select_blocks({"w": gradient}, 9, oversample=1.0)  # ceil(9 / 256) = 1 tile
    exact = select_topk({"w": gradient}, 9)
    assert exact["w"].tolist() == [*range(8), 3 * 48 + 20]
    assert found["w"].tolist() == [*range(9)]  # zeros of the one tile fill up
    assert recall(found, exact) == pytest.approx(8 / 9)


def test_recall_counts_per_tensor():
    exact = {"a": torch.tensor([1, 2, 5]), "b": torch.tensor([0])}
    assert recall({"a": torch.tensor([5, 7, 0, 1]), "b": torch.tensor([1])}, exact) == 0.5
    assert recall(exact, exact) == 1.0
    with pytest.raises(ValueError, match=r"other tensors: \['b'\]"):
        recall({"a": torch.tensor([1])}, exact)
    with pytest.raises(ValueError, match="empty selection"):
        recall({"a": torch.tensor([1])}, {"a": torch.tensor([], dtype=torch.int64)})


def test_refusals():
    broken = torch.ones(40, 40)
    broken[2, 3] = broken[39, 1] = float("nan")
    with pytest.raises(NonFiniteGradient, match="w has 2 values"):
        select_blocks({"w": broken}, 3)
    both = bits_from_indices(torch.tensor([2 * 40 + 3, 39 * 40 + 1]), 1600)
    assert select_blocks({"w": broken}, 1, {"w": both})["w"].tolist() == [0]
    with pytest.raises(ValueError, match=r"at least 1, got 16 and 0\.5"):
        select_blocks({"w": torch.ones(3)}, 1, oversample=0.5)
    with pytest.raises(ValueError, match="at least 0, got -3"):
        select_blocks({"w": torch.ones(3)}, -3)
