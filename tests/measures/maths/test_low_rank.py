"""Truncated decompositions against numpy's, whatever the dtype and orientation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.measures.maths import low_rank
from ssrctl.measures.maths.low_rank import (
    LowRank,
    Rows,
    difference,
    nearby_top_k,
    plain,
    rank_k_svd,
    singular_values,
    spectrum,
)


def decaying(m: int, n: int, seed: int, rate: float = 0.1) -> torch.Tensor:
    """A float64 matrix with singular values exp(-rate i) in random directions."""
    generator = torch.Generator().manual_seed(seed)
    left = torch.linalg.qr(torch.randn(m, min(m, n), generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(n, min(m, n), generator=generator, dtype=torch.float64)).Q
    return left * torch.exp(-rate * torch.arange(min(m, n), dtype=torch.float64)) @ right.T


def numpy_svd(matrix: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    left, values, right = np.linalg.svd(matrix.to(torch.float64).numpy(), full_matrices=False)
    return left, values, right.T


def largest_angle(first: torch.Tensor, second: np.ndarray) -> float:
    """Radians."""
    return float(scipy.linalg.subspace_angles(first.numpy(), second)[0])


@pytest.mark.parametrize("shape", [(60, 40), (40, 60), (50, 50), (300, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_exact_values_and_subspaces_are_numpys(shape: tuple[int, int], dtype: torch.dtype) -> None:
    matrix = decaying(*shape, seed=1).to(dtype)
    found = rank_k_svd(matrix, 5)
    left, values, right = numpy_svd(matrix)
    np.testing.assert_allclose(found.S, values[:5], rtol=1e-13)
    upright = plain(matrix if shape[0] >= shape[1] else matrix.T)
    # through the Gram matrix, whose round-off is 1e-16 of the largest square
    for all_values in (spectrum(upright).values, singular_values(upright.gram())):
        np.testing.assert_allclose(all_values, values, atol=3e-8)
    assert largest_angle(found.U, left[:, :5]) < 1e-12
    assert largest_angle(found.V, right[:, :5]) < 1e-12
    approximation = left[:, :5] * values[:5] @ right[:, :5].T
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, approximation, atol=1e-13)


def test_all_of_a_matrix_reconstructs_it() -> None:
    matrix = decaying(20, 33, seed=2)
    found = rank_k_svd(matrix, 20)
    assert found.U.shape == (20, 20) and found.V.shape == (33, 20)
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, matrix, atol=1e-13)


def test_a_matrix_of_lower_rank_still_has_orthonormal_vectors() -> None:
    matrix = decaying(30, 20, seed=3)[:, :3] @ decaying(3, 25, seed=4)
    found = rank_k_svd(matrix, 6)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(6), atol=1e-12)
    np.testing.assert_allclose(found.V.T @ found.V, np.eye(6), atol=1e-12)
    assert (found.S[3:] < 1e-15).all()
    np.testing.assert_allclose((found.U * found.S) @ found.V.T, matrix, atol=1e-14)


def test_pieces_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = decaying(57, 11, seed=5).to(torch.bfloat16)
    whole = rank_k_svd(matrix, 4)
    monkeypatch.setattr(low_rank, "_PIECE", 11 * 5 + 3)  # pieces of 5 rows, the last of 2
    assert [(start, stop) for start, stop, _ in plain(matrix).pieces()][-1] == (55, 57)
    pieces = rank_k_svd(matrix, 4)
    np.testing.assert_allclose(pieces.S, whole.S, rtol=1e-13)
    np.testing.assert_allclose((pieces.U * pieces.S) @ pieces.V.T, (whole.U * whole.S) @ whole.V.T, atol=1e-13)


@pytest.mark.parametrize("size", [1e-6, 1e-3])
def test_a_nearby_matrix_is_decomposed_from_its_neighbour(size: float) -> None:
    base_matrix = decaying(90, 60, seed=16, rate=0.05)
    near = base_matrix + size * decaying(90, 60, seed=17, rate=0.02)
    base = spectrum(plain(base_matrix))
    before = base.top(plain(base_matrix), 10)
    left, values, right = numpy_svd(near)
    turned = largest_angle(before.V, right[:, :10])
    assert turned > size / 10
    gram = plain(near).gram()
    for tolerance, times in ((0.01, None), (1e-7, lambda block: gram @ block)):
        found = nearby_top_k(plain(near), base, 10, tolerance=tolerance, iterations=8, normal_times=times)
        assert isinstance(found, LowRank)
        np.testing.assert_allclose(found.S, values[:10], rtol=1e-6)
        assert largest_angle(found.V, right[:, :10]) < tolerance * turned + 1e-13
        assert largest_angle(found.U, left[:, :10]) < tolerance * largest_angle(before.U, left[:, :10]) + 1e-13


def test_a_matrix_that_is_not_near_is_given_up() -> None:
    base = spectrum(plain(decaying(90, 60, seed=18, rate=0.01)))
    other = plain(decaying(90, 60, seed=19, rate=0.01))
    assert nearby_top_k(other, base, 10, tolerance=0.01, iterations=5) is None


def test_differences_are_taken_in_float64() -> None:
    base = torch.full((4, 3), 1.0, dtype=torch.bfloat16)
    tuned = torch.full((4, 3), 1.0 + 2.0**-30, dtype=torch.float64)
    assert singular_values(difference(base, tuned).gram())[0] == pytest.approx(2.0**-30 * math.sqrt(12), rel=1e-12)


def test_products_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(low_rank, "_PIECE", 20)
    matrix = decaying(13, 6, seed=21)
    rows = plain(matrix)
    assert isinstance(rows.held(), Rows)
    monkeypatch.setattr(low_rank, "_GRAM_BLOCK", 4)
    block = decaying(6, 4, seed=22)
    for one in (rows, rows.held()):
        np.testing.assert_allclose(one.gram(), matrix.numpy().T @ matrix.numpy(), atol=1e-15)
        np.testing.assert_allclose(one.times(block), matrix.numpy() @ block.numpy(), atol=1e-15)
        np.testing.assert_allclose(
            one.normal_times(block), matrix.numpy().T @ matrix.numpy() @ block.numpy(), atol=1e-15
        )


@pytest.mark.parametrize("k", [0, 4, -1])
def test_a_rank_out_of_range_is_refused(k: int) -> None:
    with pytest.raises(ValueError, match=rf"rank {k} is out of range for a tensor of shape \[3, 5\]"):
        rank_k_svd(torch.ones(3, 5), k)


def test_only_matrices_are_decomposed() -> None:
    with pytest.raises(ValueError, match="shape"):
        rank_k_svd(torch.ones(3, 5, 5), 1)


@given(m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 1000), share=st.floats(0, 1))
def test_any_shape_and_rank(m: int, n: int, seed: int, share: float) -> None:
    matrix = torch.randn(m, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = 1 + round(share * (min(m, n) - 1))
    found = rank_k_svd(matrix, k)
    left, values, right = numpy_svd(matrix)
    np.testing.assert_allclose(found.S, values[:k], rtol=1e-9, atol=1e-12)
    best = left[:, :k] * values[:k] @ right[:, :k].T
    # the best approximation is the only one unless the next value is as large; its error is then no worse
    tail = math.sqrt(float((values[k:] ** 2).sum()))
    assert float((matrix - (found.U * found.S) @ found.V.T).norm()) <= tail + 1e-7
    if k == min(m, n):
        np.testing.assert_allclose((found.U * found.S) @ found.V.T, best, atol=1e-9)
