"""Masks from chance and from weights, against plain numpy and python."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ssrctl.core import static_masks
from ssrctl.core.seeds import derive_seed
from ssrctl.core.static_masks import (
    NonFiniteWeights,
    count_of,
    largest_mask,
    low_magnitude_mask,
    principal_mask,
    random_mask,
    rank_of,
    smallest_mask,
)

SHAPES = st.lists(st.integers(0, 9), max_size=3).map(tuple)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


# --------------------------------------------------------------------------------------------------
# by chance


@given(SHAPES, st.floats(0, 1), st.integers(0, 2**63 - 1))
def test_a_random_mask_has_the_shape_and_the_count_asked_for(shape: tuple[int, ...], density: float, seed: int) -> None:
    mask = random_mask(shape, density, seed)
    assert mask.dtype == torch.bool and tuple(mask.shape) == shape
    assert int(mask.sum()) == count_of(density, math.prod(shape))
    assert torch.equal(mask, random_mask(shape, density, seed))


@pytest.mark.parametrize("density", [0.0, 1e-6, 0.01, 0.015, 0.016, 0.3, 0.5, 0.7, 0.99, 1.0])
def test_the_count_is_exact_for_large_tensors_and_every_way_of_drawing(density: float) -> None:
    """More coordinates than one draw or one part of coin flips has."""
    assert int(random_mask((1 << 21, 3), density, 7).count_nonzero()) == round(density * 3 * 2**21)


def test_counts_are_rounded_to_the_nearest() -> None:
    assert [count_of(share, 10) for share in (0.0, 0.04, 0.06, 0.25, 0.35, 1.0)] == [0, 0, 1, 2, 4, 10]
    assert count_of(1e-3, 10**9) == 10**6


def test_every_subset_is_equally_likely() -> None:
    """All 20 subsets of 3 of 6, 4,000 draws."""
    draws = Counter(tuple(random_mask((6,), 0.5, seed).nonzero().flatten().tolist()) for seed in range(4000))
    assert draws.keys() == set(itertools.combinations(range(6), 3))
    assert stats.chisquare(list(draws.values())).pvalue > 0.01


@pytest.mark.parametrize(
    ("numel", "density"),
    [(640, 1 / 64), (300, 0.3), (300, 0.5), (300, 0.8)],
    ids=["one by one", "coin flips", "half", "complement"],
)
def test_coordinates_are_uniform_and_drawn_apart(numel: int, density: float) -> None:
    """Chi-squared of how often each coordinate is selected, and how often two neighbours are, at fixed seeds."""
    repeats = 3000
    masks = torch.stack([random_mask((numel,), density, derive_seed(3, seed)) for seed in range(repeats)]).double()
    count = count_of(density, numel)
    share = count / numel
    # Counts that sum to a constant over draws without replacement: each has variance T p (1 - p), and their
    # scaled squares follow chi-squared with numel - 1 degrees of freedom.
    hits = masks.sum(0)
    statistic = float((hits - repeats * share).square().sum()) / (repeats * share * (1 - share)) * (numel - 1) / numel
    assert 0.005 < stats.chi2.sf(statistic, numel - 1) < 0.995
    for distance in (1, 2, 4):
        both = float((masks[:, distance:] * masks[:, :-distance]).sum(1).mean())
        pairs = (numel - distance) * share * (count - 1) / (numel - 1)
        assert abs(both - pairs) < 4 * math.sqrt(pairs / repeats)


def test_coin_flips_are_not_exceeded_and_leave_little_to_draw() -> None:
    from ssrctl.core.static_masks import _coin_flips

    numel, wanted = 1 << 20, 1 << 18
    flips = _coin_flips(numel, wanted, torch.Generator().manual_seed(1))
    missing = wanted - int(flips.sum())
    assert 0 <= missing <= 12 * math.sqrt(wanted) + numel / 2**16


def test_masks_of_different_seeds_are_independent() -> None:
    """Overlaps of 200 pairs follow the hypergeometric mean; the same seed gives the same mask."""
    numel, density, pairs = 2000, 0.1, 200
    masks = [random_mask((numel,), density, derive_seed(0, "random mask", f"layer.{i}")) for i in range(pairs + 1)]
    overlaps = [int((a & b).sum()) for a, b in itertools.pairwise(masks)]
    expected = stats.hypergeom(numel, 200, 200)
    assert abs(np.mean(overlaps) - expected.mean()) < 4 * expected.std() / math.sqrt(pairs)
    assert 0.7 < np.var(overlaps) / expected.var() < 1.4


# --------------------------------------------------------------------------------------------------
# by magnitude


def smallest(values: list[float], count: int, sign: int = 1) -> set[int]:
    """The slow way: python's sort is stable, so of equal magnitudes the first come first."""
    return set(sorted(range(len(values)), key=lambda place: sign * abs(values[place]))[:count])


@given(
    st.lists(st.one_of(st.floats(-4, 4, width=16), st.sampled_from([0.0, -0.0, 0.5, -0.5, 6e-8])), max_size=80),
    st.floats(0, 1),
    st.sampled_from(DTYPES),
)
def test_selection_by_magnitude(values: list[float], density: float, dtype: torch.dtype) -> None:
    weight = torch.tensor(values, dtype=dtype)
    held, count = weight.tolist(), count_of(density, len(values))
    for found, expected in (
        (low_magnitude_mask(weight, density), smallest(held, count)),
        (smallest_mask(weight, count), smallest(held, count)),
        (largest_mask(weight, count), smallest(held, count, sign=-1)),
    ):
        assert found.dtype == torch.bool and found.shape == weight.shape
        assert set(found.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("part", [1 << 20, 1000], ids=["whole", "in parts"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_selection_in_a_matrix_with_many_ties(dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(static_masks, "_PART", part)
    weight = torch.randn(300, 70, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[::3] = weight[::3].bfloat16().to(dtype)
    weight[5] = 0
    magnitudes = weight.double().abs().numpy().ravel()
    for density in (0.01, 0.3, 0.5, 0.9):
        count = count_of(density, magnitudes.size)
        for found, order in (
            (low_magnitude_mask(weight, density), magnitudes),
            (largest_mask(weight, count), -magnitudes),
        ):
            expected = np.zeros(magnitudes.size, dtype=bool)
            expected[np.argsort(order, kind="stable")[:count]] = True
            assert np.array_equal(found.numpy().ravel(), expected)
    # a view that is not contiguous counts its coordinates in its own order
    turned = low_magnitude_mask(weight.T, 0.5)
    assert torch.equal(turned, low_magnitude_mask(weight.T.contiguous(), 0.5))


def test_the_weights_are_left_as_they_are() -> None:
    weight = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    before = weight.clone()
    low_magnitude_mask(weight, 0.5)
    largest_mask(weight, 50)
    principal_mask(weight, 2, 0.5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_without_an_order_are_refused(bad: float) -> None:
    weight = torch.ones(6, 5)
    weight[0, 1] = weight[5, 4] = bad
    for select in (lambda: low_magnitude_mask(weight, 0.5), lambda: principal_mask(weight, 2, 0.5)):
        with pytest.raises(NonFiniteWeights, match="2 of 30 weights are NaN or infinite") as caught:
            select()
        assert (caught.value.count, caught.value.numel) == (2, 30)


def test_what_cannot_be_selected_is_refused() -> None:
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got float64"):
        low_magnitude_mask(torch.ones(3).double(), 0.5)
    with pytest.raises(ValueError, match="cannot select 4 of 3"):
        largest_mask(torch.ones(3), 4)
    for shape, rank in (((3,), 1), ((2, 3, 4), 1), ((3, 4), 0), ((3, 4), 4)):
        with pytest.raises(ValueError, match=f"has no reconstruction of rank {rank}"):
            principal_mask(torch.ones(shape), rank, 0.5)


# --------------------------------------------------------------------------------------------------
# by the reconstruction


@pytest.mark.parametrize("part", [1 << 20, 50], ids=["whole", "in parts"])
@pytest.mark.parametrize(("shape", "rank"), [((30, 12), 3), ((12, 30), 1), ((16, 16), 16)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_principal_mask_is_that_of_numpy(
    shape: tuple[int, int], rank: int, dtype: torch.dtype, part: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(static_masks, "_PART", part)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(rank)).to(dtype)
    u, s, vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    scores = np.abs(sum(s[i] * np.outer(u[:, i], vh[i]) for i in range(rank))).ravel()
    order = np.argsort(-scores, kind="stable")
    for density in (0.1, 0.5):
        count = round(density * scores.size)
        # the two sides of the cut are further apart than float32 rounds (full rank in bfloat16 has true ties)
        assert rank == 16 or scores[order[count - 1]] > scores[order[count]] * (1 + 1e-6)
        found = principal_mask(weight, rank, density).numpy().ravel()
        assert found.sum() == count
        if rank == 16:
            assert scores[found].min() >= scores[~found].max() * (1 - 1e-6)
        else:
            assert set(np.flatnonzero(found)) == set(order[:count])


def test_a_planted_direction_is_found() -> None:
    """A rank-1 matrix on three rows and four columns under noise: its twelve entries are the principal ones."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.1 * torch.randn(40, 50, generator=generator)
    weight[[[3], [17], [22]], [1, 8, 30, 44]] += 5
    mask = principal_mask(weight, 1, 12 / 2000)
    assert mask.nonzero().tolist() == [[row, column] for row in (3, 17, 22) for column in (1, 8, 30, 44)]
    # the largest weights need not be principal
    weight[0, 0] = 9
    assert not principal_mask(weight, 1, 12 / 2000)[0, 0] and largest_mask(weight, 12)[0, 0]


def test_the_decomposition_can_be_replaced() -> None:
    asked = []

    def low_rank(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        asked.append((tuple(weight.shape), rank))
        return torch.tensor([[1.0], [-3.0]]), torch.tensor([2.0]), torch.tensor([[1.0], [0.0], [-2.0]])

    mask = principal_mask(torch.zeros(2, 3), 1, 0.5, low_rank)
    assert asked == [((2, 3), 1)]
    assert mask.tolist() == [[False, False, True], [True, False, True]]  # |scores| 2 0 4 | 6 0 12


def test_ranks_are_rounded_up() -> None:
    assert [rank_of(share, (100, 400)) for share in (0.001, 0.07, 0.071, 0.1, 1.0)] == [1, 7, 8, 10, 100]
