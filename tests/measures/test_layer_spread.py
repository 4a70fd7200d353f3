"""Flipped signs are counted, and the spread over layers is what numpy draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ssrctl.measures.layer_spread import expected_gini, layer_spread, spread_rows
from ssrctl.measures.maths.change import Change, add_up
from ssrctl.measures.maths.grouping import group
from ssrctl.measures.maths.largest_changes import LargestChanges
from ssrctl.measures.maths.piece_pair import Tally, piece_pairs

Q, K = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.k_proj.weight"


def change(base: torch.Tensor, tuned: torch.Tensor) -> Change:
    tally = Tally("w", 1e-5, 1e-3, LargestChanges())
    for piece in piece_pairs(base, tuned):
        tally.add(piece, 0)
    return tally.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
def test_signs_flip_across_zero_only(dtype: torch.dtype) -> None:
    base = torch.tensor([1.0, -1.0, 2.0, -2.0, 0.0, 1.0, -0.0, 1.0, 1.0]).to(dtype)
    tuned = torch.tensor([-1.0, 0.5, 1.0, -1.0, -1.0, 0.0, 0.0, 1.0, float("nan")]).to(dtype)
    found = change(base, tuned)
    assert (found.num_sign_flipped, found.num_bit_changed, found.sign_flip_frac) == (2, 8, 2 / 8)
    assert change(base[-2:-1], base[-2:-1]).sign_flip_frac is None


def test_the_gini_coefficient_of_layers() -> None:
    layers = [Change(numel=100, num_equal=100 - changed, sum_sq=changed**2) for changed in (0, 0, 0, 8)]
    found = layer_spread(layers)
    assert found.changed_gini == found.squared_gini == pytest.approx(1 - 1 / 4)
    assert found.expected_squared_gini == 0
    # sum_ij |x_i - x_j| of 1, 2, 5 is 2 (1 + 4 + 3), over 2 n^2 mean = 2 * 3 * 8
    uneven = layer_spread([Change(numel=size, num_equal=size - moved) for size, moved in ((9, 1), (9, 2), (9, 5))])
    assert uneven.changed_gini == pytest.approx(16 / 48)
    none = layer_spread([Change(numel=4, num_equal=4)] * 3)
    assert (none.changed_gini, none.expected_changed_gini, none.squared_gini, none.expected_squared_gini) == (None,) * 4
    assert layer_spread(layers[:1]).changed_gini is None


@pytest.mark.parametrize(("sizes", "changed"), [([400] * 6, 600), ([400, 800, 50, 400], 300), ([300] * 8, 2300)])
def test_chance_is_that_of_random_sets(sizes: list[int], changed: int) -> None:
    draws = np.random.default_rng(0).multivariate_hypergeometric(sizes, changed, size=4000)
    distances = np.abs(draws[:, :, None] - draws[:, None, :]).sum((1, 2)) / (2 * len(sizes) * changed)
    error = distances.std() / 4000**0.5
    # a count is whole, which a normal law is not: by 1% of the value at these sizes
    assert expected_gini(sizes, changed) == pytest.approx(distances.mean(), abs=4 * error + 0.01 * distances.mean())


def test_kinds_have_the_spread_of_their_own_layers() -> None:
    moved = {Q.format(0): 4, Q.format(1): 4, K.format(0): 8, K.format(1): 0, "lm_head.weight": 9}
    rows = spread_rows(group({name: Change(numel=10, num_equal=10 - n) for name, n in moved.items()}, add_up))
    assert rows["q"].spread.changed_gini == 0 and rows["k"].spread.changed_gini == 0.5
    assert rows["all"].spread.changed_gini == pytest.approx(abs(12 - 4) * 2 / (2 * 4 * 8))
    assert rows["lm_head"].spread.num_layers == 0 and rows["lm_head"].spread.changed_gini is None
