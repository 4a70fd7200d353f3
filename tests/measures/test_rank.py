"""Planted ranks come back, rounding does not pass for a signal, and no matrix divides by zero."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.measures.maths import low_rank, update_matrix
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update
from ssrctl.measures.rank import UpdateRank, random_effective_frac, update_rank


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def pair(base: torch.Tensor, tuned: torch.Tensor) -> UpdateMatrix:
    update = read_update(base, tuned)
    assert isinstance(update, UpdateMatrix)
    return update


def measured(base: torch.Tensor, tuned: torch.Tensor) -> UpdateRank:
    return update_rank(pair(base, tuned))


def reference(base: torch.Tensor, tuned: torch.Tensor) -> dict[str, float]:
    """The definitions in numpy, from the whole difference and its svd."""
    update = tuned.double().numpy() - base.double().numpy()
    values = np.linalg.svd(update, compute_uv=False)
    tolerance = values[0] * max(update.shape) * np.finfo(np.float32).eps
    kept = [value for value in values if value > tolerance]
    entropy = -sum(value / sum(kept) * math.log(value / sum(kept)) for value in kept)
    chance = np.linalg.norm(update, axis=1).max() + np.linalg.norm(update, axis=0).max()
    return {
        "max_rank": min(update.shape),
        "rank": int(np.linalg.matrix_rank(update, tol=tolerance)),
        "tolerance": tolerance,
        "pattern_rank": min((update != 0).any(axis=1).sum(), (update != 0).any(axis=0).sum()),
        "effective_rank": math.exp(entropy),
        "stable_rank": np.linalg.norm(update) ** 2 / np.linalg.norm(update, 2) ** 2,
        "signal_rank": int((values > chance).sum()),
        "chance_norm": chance,
        "spectral_norm": np.linalg.norm(update, 2),
        "frobenius_norm": np.linalg.norm(update),
    }


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (33, 33)])
@pytest.mark.parametrize("rank", [1, 3, 17])
def test_a_planted_rank_is_found_exactly(shape: tuple[int, int], rank: int) -> None:
    base = normal(*shape, seed=1)
    change = normal(shape[0], rank, seed=2) @ normal(rank, shape[1], seed=3)
    found = measured(base, base + 1e-3 * change)
    assert (found.rank, found.max_rank) == (rank, min(shape))
    assert found.effective_rank <= rank * (1 + 1e-9)
    assert found.numbers()["rank_frac"] == rank / min(shape)


def test_a_single_direction_has_rank_one_in_every_reading() -> None:
    base = normal(50, 30, seed=4)
    found = measured(base, base + normal(50, 1, seed=5) @ normal(1, 30, seed=6))
    assert (found.rank, found.signal_rank) == (1, 1)
    assert found.effective_rank == pytest.approx(1, abs=1e-9)
    assert found.stable_rank == pytest.approx(1, abs=1e-9)


def test_equal_singular_values_have_full_effective_and_stable_rank() -> None:
    base = normal(24, 24, seed=7)
    turn = torch.linalg.qr(normal(24, 24, seed=8)).Q
    found = measured(base, base + 0.5 * turn)
    assert found.rank == 24
    assert found.effective_rank == pytest.approx(24, rel=1e-9)
    assert found.stable_rank == pytest.approx(24, rel=1e-9)
    assert found.signal_rank == 0
    assert found.spectral_norm == pytest.approx(0.5, rel=1e-9)


@given(
    m=st.integers(2, 20),
    n=st.integers(2, 20),
    rank=st.integers(1, 5),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    size=st.sampled_from([1e-2, 1.0]),
)
def test_every_number_is_the_references(m: int, n: int, rank: int, seed: int, dtype: torch.dtype, size: float) -> None:
    base = normal(m, n, seed=seed).to(dtype)
    tuned = (base.double() + size * normal(m, rank, seed=seed + 1) @ normal(rank, n, seed=seed + 2)).to(dtype)
    found = measured(base, tuned)
    if torch.equal(base, tuned):
        assert found.rank == 0
        return
    for name, value in reference(base, tuned).items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-6), name


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = normal(9, 31, seed=9).to(torch.bfloat16), normal(9, 31, seed=10).to(torch.bfloat16)
    whole = measured(base, tuned).numbers()
    monkeypatch.setattr(low_rank, "_PIECE", 50)
    monkeypatch.setattr(update_matrix, "_SMALL", 0)
    assert measured(base, tuned).numbers() == pytest.approx(whole, rel=1e-12)


def test_nothing_changed_has_rank_zero() -> None:
    base = normal(6, 4, seed=11, dtype=torch.bfloat16)
    found = measured(base, base.clone())
    assert (found.rank, found.signal_rank, found.pattern_rank) == (0, 0, 0)
    assert (found.effective_rank, found.stable_rank, found.tolerance, found.spectral_norm) == (0, 0, 0, 0)
    assert found.rounding_ratio is None
    assert all(value is None or math.isfinite(value) for value in found.numbers().values())


def test_permutations_signs_rotations_and_transposition_change_nothing() -> None:
    base, change = normal(30, 20, seed=12), normal(30, 20, seed=13) * torch.linspace(0.1, 1, 20, dtype=torch.float64)
    expected = measured(base, base + change)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    turn = torch.linalg.qr(normal(30, 30, seed=14)).Q
    for one, other in (
        (base[order], (base + change)[order]),
        (-base, -base - change),
        (base.T, (base + change).T),
        (turn @ base, turn @ (base + change)),
    ):
        found = measured(one, other)
        assert found.rank == expected.rank
        assert found.effective_rank == pytest.approx(expected.effective_rank, rel=1e-9)
        assert found.stable_rank == pytest.approx(expected.stable_rank, rel=1e-9)


def test_rows_that_never_change_bound_the_rank() -> None:
    base = normal(40, 20, seed=15)
    tuned = base.clone()
    tuned[[3, 7, 30]] += normal(3, 20, seed=16)
    found = measured(base, tuned)
    assert found.pattern_rank == found.rank == 3
    assert measured(base.T, tuned.T).pattern_rank == 3


# --------------------------------------------------------------------------------------------------
# rounding


def test_rounding_alone_has_full_rank_but_no_signal() -> None:
    base = normal(120, 80, seed=17, dtype=torch.bfloat16)
    # half a step in random directions: what is left after storage is rounding
    noise = (torch.rand(120, 80, generator=torch.Generator().manual_seed(18), dtype=torch.float64) - 0.5) * 2.0**-7
    found = measured(base, (base.double() * (1 + noise)).to(torch.bfloat16))
    assert found.rank > 70
    assert found.signal_rank == 0
    assert found.rounding_ratio is not None and 0.3 < found.rounding_ratio < 3
    assert found.effective_rank == pytest.approx(found.expected_effective_rank, rel=0.1)


def test_a_planted_direction_is_seen_through_rounding() -> None:
    base = normal(120, 80, seed=19, dtype=torch.bfloat16)
    change = 0.02 * normal(120, 1, seed=20) @ normal(1, 80, seed=21)
    found = measured(base, (base.double() + change).to(torch.bfloat16))
    assert found.rank == found.pattern_rank >= 79  # the rounding's
    assert found.signal_rank == 1  # the update's
    assert found.rounding_ratio is not None and found.rounding_ratio < 0.2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_expected_rounding_is_that_of_real_rounding(dtype: torch.dtype) -> None:
    exact = normal(200, 150, seed=22)
    stored = exact.to(dtype)
    update = pair(torch.zeros_like(stored), stored)
    true = float((stored.double() - exact).norm())
    assert update.rounding_norm == pytest.approx(true, rel=0.02)


def test_the_coarser_dtype_decides_about_rounding() -> None:
    base = normal(20, 10, seed=23, dtype=torch.float32)
    coarse = base.to(torch.bfloat16)
    fine = pair(base, base).rounding_norm
    assert pair(coarse, coarse).rounding_norm > 1000 * fine
    mixed = [pair(base, coarse).rounding_norm, pair(coarse, base).rounding_norm]
    assert mixed == pytest.approx(
        [pair(coarse, coarse).rounding_norm] * 2, rel=0.05
    )  # a weight may lie in another binade


def test_steps_are_the_distance_to_the_next_number() -> None:
    for dtype, integer in ((torch.bfloat16, torch.int16), (torch.float16, torch.int16), (torch.float32, torch.int32)):
        values = torch.tensor([1.0, 1.5, 2.0, 0.0, 3e-39, 6e-8, 1e-6, 0.75, 1000.0], dtype=dtype)
        following = (values.view(integer) + 1).view(dtype)
        steps = update_matrix._steps(values.double(), dtype)
        assert torch.equal(steps, following.double() - values.double())
        assert torch.equal(update_matrix._steps(-values.double(), dtype), steps)


def test_random_updates_meet_the_expected_ranks() -> None:
    for shape in ((300, 300), (120, 480)):
        found = measured(torch.zeros(shape), normal(*shape, seed=24))
        assert found.effective_rank == pytest.approx(found.expected_effective_rank, rel=0.01)
        assert found.stable_rank == pytest.approx(found.expected_stable_rank, rel=0.1)
        assert found.signal_rank == 0


def test_the_limit_of_a_very_tall_random_matrix_is_full_rank() -> None:
    assert random_effective_frac(1e-9) == pytest.approx(1, abs=1e-6)
    assert random_effective_frac(1.0) < random_effective_frac(0.5) < random_effective_frac(0.1) < 1


def test_a_tolerance_with_the_epsilon_of_bfloat16_would_make_every_rank_zero() -> None:
    # why the rule takes that of float32: the docstring's claim about 128 rows
    found = measured(torch.zeros(128, 64), normal(128, 64, seed=25))
    assert 128 * torch.finfo(torch.bfloat16).eps * found.spectral_norm >= found.spectral_norm


# --------------------------------------------------------------------------------------------------
# what cannot be measured


@pytest.mark.parametrize(
    ("base", "tuned", "reason"),
    [
        ([[1.0, math.nan], [1, 1]], [[1.0, 1], [1, 1]], "1 weight of the base is NaN or infinite"),
        ([[1.0, 1], [1, 1]], [[math.inf, 1], [-math.inf, 1]], "2 weights of the tuned are NaN or infinite"),
        ([[math.inf, 1], [1, 1]], [[math.inf, 1], [1, 1]], "1 weight of the base is NaN or infinite"),
        ([[1e200, 1], [1, 1]], [[1.0, 1], [1, 1]], "its weights are so large that their squares overflow"),
        ([[0.0, 1], [1, 1]], [[1e-200, 1], [1, 1]], "its differences are so small that their squares vanish"),
    ],
)
def test_weights_without_a_rank_are_named(base: list, tuned: list, reason: str) -> None:
    found = read_update(torch.tensor(base, dtype=torch.float64), torch.tensor(tuned, dtype=torch.float64))
    assert found == Unmeasured(reason)


def test_the_largest_and_smallest_stored_weights_have_a_rank() -> None:
    for dtype, rank in ((torch.float32, 1), (torch.bfloat16, 1), (torch.float8_e4m3fn, 2)):
        limits = torch.finfo(dtype)
        base = torch.zeros(3, 2, dtype=torch.float32).to(dtype)
        tuned = torch.tensor([[limits.max, 0], [0, limits.smallest_normal], [0, 0]], dtype=torch.float32).to(dtype)
        found = measured(base, tuned)
        assert found.rank == rank
        assert all(value is None or math.isfinite(value) for value in found.numbers().values())


@pytest.mark.parametrize("shapes", [((2, 3), (3, 2)), ((4,), (4,)), ((2, 2, 2), (2, 2, 2))])
def test_only_two_matrices_of_one_shape_make_an_update(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match="two matrices of one shape"):
        read_update(torch.ones(shapes[0]), torch.ones(shapes[1]))
