"""Planted rotations and stretches come back; angles are scipy's; baselines and bounds hold."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Literal, cast

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_memory import taken

from ssrctl.measures.maths import low_rank
from ssrctl.measures.maths import spectrum_change as spectrum
from ssrctl.measures.maths.spectrum_change import (
    SpectrumChange,
    curve_places,
    default_k,
    principal_angles,
    spectrum_change,
)
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update
from ssrctl.measures.spectrum import SpectrumMeasure
from ssrctl.report.document import Lines

K = 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def frame(n: int, k: int, seed: int) -> torch.Tensor:
    """Orthonormal ``[n, k]``."""
    return torch.linalg.qr(normal(n, k, seed=seed)).Q


def with_values(m: int, n: int, values: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(left, values, right) vectors of a random matrix with these singular values."""
    return frame(m, len(values), seed), values, frame(n, len(values), seed + 1)


def stepped(m: int, n: int, seed: int, gap: float = 1.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K values of about 3, then a step down by ``gap`` to values of about 2."""
    top = torch.linspace(3.0 + gap, 2.0 + gap, K, dtype=torch.float64)
    rest = torch.linspace(2.0, 0.5, min(m, n) - K, dtype=torch.float64)
    return with_values(m, n, torch.cat((top, rest)), seed)


def joined(left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return left * values @ right.T


def turned(vectors: torch.Tensor, degrees: float) -> torch.Tensor:
    """The K-th vector turned towards the one after it, which makes room."""
    angle = math.radians(degrees)
    found = vectors.clone()
    found[:, K - 1] = math.cos(angle) * vectors[:, K - 1] + math.sin(angle) * vectors[:, K]
    found[:, K] = math.cos(angle) * vectors[:, K] - math.sin(angle) * vectors[:, K - 1]
    return found


def change_of(base: torch.Tensor, tuned: torch.Tensor, k: int | None = K, seed: int = 0) -> SpectrumChange:
    update = read_update(base, tuned)
    assert isinstance(update, UpdateMatrix)
    found = spectrum_change(update, k=k, seed=seed)
    assert isinstance(found, SpectrumChange)
    return found


def reference_angles(base: torch.Tensor, tuned: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) in degrees, ascending: full svds in numpy, angles by scipy."""
    before, after = (np.linalg.svd(one.double().numpy(), full_matrices=False) for one in (base, tuned))
    left = scipy.linalg.subspace_angles(before[0][:, :k], after[0][:, :k])
    right = scipy.linalg.subspace_angles(before[2][:k].T, after[2][:k].T)
    return np.degrees(left)[::-1], np.degrees(right)[::-1]


# --------------------------------------------------------------------------------------------------
# angles


@pytest.mark.parametrize("degrees", [math.degrees(1e-9), math.degrees(1e-4), 1.0, 44.9, 45.1, 89.0, 90.0])
@pytest.mark.parametrize("shape", [(40, 25), (25, 40), (30, 30)])
def test_a_planted_rotation_is_found_on_its_side(degrees: float, shape: tuple[int, int]) -> None:
    left, values, right = stepped(*shape, seed=1)
    found = change_of(joined(left, values, right), joined(turned(left, degrees), values, right))
    assert found.angle_error < 1e-10
    assert found.left[-1] == pytest.approx(degrees, rel=1e-6, abs=found.angle_error)
    assert found.left[-2] < 1e-6 and found.right[-1] < 1e-6
    other = change_of(joined(left, values, right), joined(left, values, turned(right, degrees)))
    assert other.right[-1] == pytest.approx(degrees, rel=1e-6, abs=found.angle_error)
    assert other.left[-1] < 1e-6


def test_a_rotation_within_the_subspace_is_none() -> None:
    left, values, right = stepped(30, 20, seed=2)
    mixed = left.clone()
    mixed[:, :K] = left[:, :K] @ frame(K, K, seed=3)
    found = change_of(joined(left, values, right), joined(mixed, values, right))
    assert found.shift < 1e-13
    assert max(found.left + found.right) < 1e-10


@given(n=st.integers(2, 30), share=st.floats(0, 1), seed=st.integers(0, 1000), size=st.sampled_from([1e-9, 1e-3, 1, 9]))
def test_angles_are_scipys(n: int, share: float, seed: int, size: float) -> None:
    k = 1 + round(share * (n - 1))
    first = frame(n, k, seed)
    second = torch.linalg.qr(first + size * normal(n, k, seed=seed + 1)).Q
    expected = np.degrees(scipy.linalg.subspace_angles(first.numpy(), second.numpy()))[::-1]
    np.testing.assert_allclose(principal_angles(first, second), expected, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(principal_angles(second, first), expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("radians", [1e-12, 1e-7, math.pi / 4, math.pi / 2 - 1e-7, math.pi / 2 - 1e-12])
def test_angles_near_both_ends_keep_their_digits(radians: float) -> None:
    first = torch.eye(5, 2, dtype=torch.float64)
    second = first.clone()
    second[1, 1], second[3, 1] = math.cos(radians), math.sin(radians)
    found = math.radians(principal_angles(first, second)[1])
    # the distance from the nearer end is good to round-off, which that of a right angle itself is
    assert min(found, math.pi / 2 - found) == pytest.approx(min(radians, math.pi / 2 - radians), abs=5e-16)


@pytest.mark.parametrize("shape", [(50, 30), (30, 50)])
@pytest.mark.parametrize("size", [1e-5, 1e-2, 0.3])
def test_real_changes_agree_with_numpy(shape: tuple[int, int], size: float) -> None:
    base = normal(*shape, seed=4).to(torch.bfloat16)
    tuned = (base.double() + size * normal(*shape, seed=5)).float()
    found = change_of(base, tuned, k=6)
    left, right = reference_angles(base, tuned, 6)
    np.testing.assert_allclose(found.left, left, rtol=1e-6, atol=2 * found.angle_error)
    np.testing.assert_allclose(found.right, right, rtol=1e-6, atol=2 * found.angle_error)
    values = [np.linalg.svd(one.double().numpy(), compute_uv=False) for one in (base, tuned)]
    expected = np.linalg.norm(values[1] - values[0]) / np.linalg.norm(values[0])
    assert found.shift == pytest.approx(expected, rel=1e-6)
    top = np.linalg.norm(values[1][:6] - values[0][:6]) / np.linalg.norm(values[0][:6])
    assert found.shift_top_k == pytest.approx(top, rel=1e-6)
    assert found.relative_gap == pytest.approx(values[0][5] / values[0][6] - 1, rel=1e-6)
    assert found.spectral_norm == pytest.approx(np.linalg.norm((tuned.double() - base.double()).numpy(), 2), rel=1e-6)


def test_permutations_signs_and_rotations_of_both_change_nothing() -> None:
    base = normal(30, 20, seed=6)
    tuned = base + 0.05 * normal(30, 20, seed=7)
    expected = change_of(base, tuned)
    rows, columns = (torch.randperm(size, generator=torch.Generator().manual_seed(8)) for size in (30, 20))
    left, right = frame(30, 30, seed=9), frame(20, 20, seed=10)
    for one, other in (
        (base[rows], tuned[rows]),
        (base[:, columns], tuned[:, columns]),
        (-base, -tuned),
        (left @ base @ right, left @ tuned @ right),
    ):
        found = change_of(one, other)
        np.testing.assert_allclose(found.left, expected.left, rtol=1e-8)
        np.testing.assert_allclose(found.right, expected.right, rtol=1e-8)
        for name in ("shift", "energy_left", "energy_right", "energy_both", "relative_gap", "wedin_angle"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-8), name


def test_transposition_swaps_the_sides() -> None:
    base, tuned = normal(30, 20, seed=11), normal(30, 20, seed=12)
    found, other = change_of(base, tuned), change_of(base.T.contiguous(), tuned.T.contiguous())
    np.testing.assert_allclose(found.left, other.right, rtol=1e-9)
    np.testing.assert_allclose(found.right, other.left, rtol=1e-9)
    assert (found.energy_left, found.expected_energy_left) == (
        pytest.approx(other.energy_right),
        other.expected_energy_right,
    )
    assert found.gaussian is not None and other.gaussian is not None
    assert found.gaussian.left_mean == pytest.approx(other.gaussian.right_mean, rel=1e-6)


def test_the_order_of_base_and_tuned_matters_to_neither_angle() -> None:
    base, tuned = normal(25, 25, seed=13), normal(25, 25, seed=14)
    np.testing.assert_allclose(change_of(base, tuned).left, change_of(tuned, base).left, rtol=1e-9)


# --------------------------------------------------------------------------------------------------
# singular values


@pytest.mark.parametrize("factor", [1.5, 0.25, 1 + 1e-6])
def test_a_scaled_matrix_shifts_by_the_factor_and_does_not_turn(factor: float) -> None:
    base = normal(30, 20, seed=15)
    found = change_of(base, factor * base)
    assert found.shift == pytest.approx(abs(factor - 1), rel=1e-6)
    assert found.shift_top_k == pytest.approx(abs(factor - 1), rel=1e-6)
    assert found.shift_bound == pytest.approx(abs(factor - 1), rel=1e-6)
    assert max(found.left + found.right) < 1e-8
    np.testing.assert_allclose(found.curve_tuned, factor * np.array(found.curve_base), rtol=1e-9)


def test_curves_are_the_singular_values_at_their_places() -> None:
    base = normal(60, 50, seed=16)
    found = change_of(base, 2 * base)
    values = np.linalg.svd(base.numpy(), compute_uv=False)
    assert found.curve_index[0] == 1 and found.curve_index[-1] == 50 and len(found.curve_index) <= 32
    np.testing.assert_allclose(found.curve_base, values[np.array(found.curve_index) - 1], rtol=1e-6)
    assert found.numbers()["curve_base"][0] == float(f"{values[0]:.6g}")


@given(length=st.integers(1, 5000))
def test_places_ascend_and_have_both_ends(length: int) -> None:
    places = curve_places(length)
    assert places[0] == 1 and places[-1] == length and len(places) <= 32
    assert all(after > before for before, after in itertools.pairwise(places))


# --------------------------------------------------------------------------------------------------
# baselines and bounds


@given(
    seed=st.integers(0, 10_000),
    size=st.sampled_from([1e-4, 1e-2, 0.1, 1.0]),
    m=st.integers(2, 15),
    n=st.integers(2, 15),
)
def test_no_angle_and_no_shift_exceeds_its_bound(seed: int, size: float, m: int, n: int) -> None:
    base = normal(m, n, seed=seed)
    found = change_of(base, base + size * normal(m, n, seed=seed + 1), k=3)
    assert found.shift <= found.shift_bound * (1 + 1e-9)
    if found.wedin_angle is not None:
        assert max(found.left[-1], found.right[-1]) <= found.wedin_angle + found.angle_error
    assert found.energy_left is not None and found.energy_right is not None and found.energy_both is not None
    assert 0 <= found.energy_both <= min(found.energy_left, found.energy_right) + 1e-12
    assert max(found.energy_left, found.energy_right) <= 1


def test_the_bound_is_reached_by_a_planted_rotation() -> None:
    # in the plane of one vector of each side, sin(angle) is close to the norm of the update over the gap
    left, values, right = stepped(20, 12, seed=17)
    angle = 1e-3
    update = angle * torch.outer(left[:, K], right[:, K - 1]) * (values[K - 1] - values[K])
    update += angle * torch.outer(left[:, K - 1], right[:, K]) * (values[K - 1] - values[K])
    found = change_of(joined(left, values, right), joined(left, values, right) + update)
    assert found.wedin_angle == pytest.approx(math.degrees(angle), rel=1e-3)
    assert found.left[-1] == pytest.approx(math.degrees(angle), rel=1e-3)


def test_the_bound_takes_the_larger_of_two_gaps() -> None:
    # singular values from 4 to 3, then 2: after scaling, 3.6 to 2.7, then 1.8
    base = joined(*stepped(20, 12, seed=46))
    expected = math.degrees(math.asin(0.1 * 4 / (3 - 1.8)))
    assert change_of(base, 0.9 * base).wedin_angle == pytest.approx(expected, rel=1e-9)
    assert change_of(0.9 * base, base).wedin_angle == pytest.approx(expected, rel=1e-9)


def test_errors_of_subspaces_follow_from_the_gap() -> None:
    values = torch.tensor([5.0, 3.0, 2.5], dtype=torch.float64)
    empty = torch.zeros(0)
    found = low_rank.LowRank(empty, values, empty)
    expected = math.degrees(100 * 2.0**-52 * 25 / (9 - 6.25))
    assert spectrum._subspace_error(found, 2, 100) == pytest.approx(expected)
    equal = dataclasses.replace(found, S=torch.tensor([5.0, 3.0, 3.0], dtype=torch.float64))
    assert spectrum._subspace_error(equal, 2, 100) == 90


def test_a_small_gap_is_flagged() -> None:
    left, values, right = stepped(30, 20, seed=18, gap=1.0)
    near, far = values.clone(), values.clone()
    near[K] = near[K - 1] * (1 - 1e-6)
    noise = 1e-3 * normal(30, 20, seed=19)
    found = change_of(joined(left, near, right), joined(left, near, right) + noise)
    assert not found.well_defined and found.wedin_angle is None
    assert found.relative_gap == pytest.approx(1e-6, rel=1e-3)
    assert found.left[-1] > 1  # the two directions have mixed
    clear = change_of(joined(left, far, right), joined(left, far, right) + noise)
    assert clear.well_defined and clear.wedin_angle is not None and clear.left[-1] < 0.3


@pytest.mark.parametrize(("size", "shape"), [(1e-4, (60, 45)), (1e-2, (45, 60)), (0.3, (60, 45)), (1e-3, (200, 20))])
def test_a_random_update_turns_as_random_updates_do(size: float, shape: tuple[int, int]) -> None:
    base = normal(*shape, seed=20) * torch.linspace(0.5, 2, shape[1], dtype=torch.float64)
    noise = normal(*shape, seed=21)
    tuned = base + noise * (size * base.norm() / noise.norm())
    found = change_of(base, tuned, k=5)
    assert found.gaussian is not None and found.signs is not None and found.expected_shift is not None
    # independent draws over the same matrix: means of 5 angles agree within a factor, the shift is a mean of 45
    for random in (found.gaussian, found.signs):
        assert random.left_mean == pytest.approx(np.mean(found.left), rel=0.6)
        assert random.right_mean == pytest.approx(np.mean(found.right), rel=0.6)
    assert found.expected_shift == pytest.approx(found.shift, rel=0.4)
    assert found.energy_left == pytest.approx(found.expected_energy_left, rel=0.3)
    assert found.energy_right == pytest.approx(found.expected_energy_right, rel=0.3)
    assert found.energy_both == pytest.approx(found.expected_energy_both, rel=0.7)


@pytest.mark.parametrize("kind", ["gaussian", "signs"])
def test_a_random_update_is_what_it_says(monkeypatch: pytest.MonkeyPatch, kind: Literal["gaussian", "signs"]) -> None:
    monkeypatch.setattr(low_rank, "_PIECE", 400)
    monkeypatch.setattr(low_rank, "_HELD", 0)
    base, change = normal(50, 40, seed=22), normal(50, 40, seed=23)
    change[:, ::3] = 0
    update = read_update(base, base + change)
    assert isinstance(update, UpdateMatrix)
    rows = spectrum._perturbed(update, kind, 0)
    first, again = (torch.cat([piece for _, _, piece in rows.pieces()]) for _ in range(2))
    assert torch.equal(first, again)
    noise = first - base
    assert float(noise.norm()) == pytest.approx(float(change.norm()), rel=0.05)
    if kind == "signs":
        np.testing.assert_allclose(noise.abs(), change.abs(), atol=1e-12)
        signs = (noise * change).sign()
        assert abs(float(signs.mean())) < 0.1 and set(signs.unique().tolist()) == {-1.0, 0.0, 1.0}
        assert not torch.equal(signs[:10], signs[10:20])  # pieces differ
    else:
        assert abs(float(noise.mean())) < 0.05 and float(noise[:, ::3].std()) == pytest.approx(
            float(noise[:, 1::3].std()), rel=0.1
        )


def test_small_random_updates_are_found_as_exactly_as_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    left, values, right = stepped(40, 30, seed=24, gap=0.1)
    base = joined(left, values, right)
    tuned = base + 1e-3 * normal(40, 30, seed=25)
    quick = change_of(base, tuned)
    monkeypatch.setattr(spectrum, "_SMALL", 0.0)
    slow = change_of(base, tuned)
    for name in ("gaussian", "signs"):
        one, other = dataclasses.asdict(getattr(quick, name)), dataclasses.asdict(getattr(slow, name))
        assert one != other
        assert one == pytest.approx(other, rel=0.01)
    assert quick.expected_shift == pytest.approx(slow.expected_shift, rel=0.4)


def test_an_update_in_the_leading_directions_has_all_its_energy_there() -> None:
    left, values, right = stepped(30, 20, seed=26)
    base = joined(left, values, right)
    found = change_of(base, base + 0.1 * left[:, :K] @ normal(K, 20, seed=27))
    assert found.energy_left == pytest.approx(1)
    assert found.energy_right is not None and found.energy_right < 0.6
    inside = change_of(base, base + 0.1 * left[:, :K] @ normal(K, K, seed=28) @ right[:, :K].T)
    assert (inside.energy_left, inside.energy_right, inside.energy_both) == pytest.approx((1, 1, 1))
    outside = change_of(base, base + 0.1 * left[:, K:] @ normal(16, 16, seed=29) @ right[:, K:].T)
    assert (outside.energy_left, outside.energy_right, outside.energy_both) == pytest.approx((0, 0, 0), abs=1e-12)
    assert (found.expected_energy_left, found.expected_energy_right) == (K / 30, K / 20)
    assert found.expected_energy_both == pytest.approx(K * K / 600)


def test_seeds_decide_the_random_updates_and_nothing_else() -> None:
    base, tuned = normal(30, 20, seed=30), normal(30, 20, seed=31)
    first, again, other = (change_of(base, tuned, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.gaussian != other.gaussian and first.signs != other.signs
    assert dataclasses.replace(first, gaussian=None, signs=None, expected_shift=None) == dataclasses.replace(
        other, gaussian=None, signs=None, expected_shift=None
    )


# --------------------------------------------------------------------------------------------------
# size, edges


def test_iterations_from_the_base_give_what_all_eigenvectors_give(monkeypatch: pytest.MonkeyPatch) -> None:
    left, values, right = stepped(260, 220, seed=32, gap=0.5)
    base = joined(left, values, right)
    tuned = joined(turned(left, 1.0), values, turned(right, 0.5)) + 1e-4 * normal(260, 220, seed=33)
    whole = change_of(base, tuned)
    assert whole.shift_bound < 0.02  # small enough for iterations
    monkeypatch.setattr(spectrum, "eigenvectors", lambda gram: pytest.fail("not near"))
    monkeypatch.setattr(spectrum, "_ITERATED_SIDE", 0)
    found = change_of(base, tuned)
    assert found.left[-1] == pytest.approx(1.0, rel=0.05)
    np.testing.assert_allclose(found.left, whole.left, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(found.right, whole.right, rtol=1e-6, atol=1e-9)
    rest = {"left", "right", "angle_error"}
    for key, value in dataclasses.asdict(whole).items():
        if key not in rest and isinstance(value, float):
            assert getattr(found, key) == pytest.approx(value, rel=1e-8), key


def test_nothing_changed_turns_nothing() -> None:
    base = normal(20, 30, seed=37).to(torch.bfloat16)
    found = change_of(base, base.clone())
    assert found.left == found.right == [0.0] * K
    assert (found.shift, found.shift_bound, found.wedin_angle, found.spectral_norm) == (0, 0, 0, 0)
    assert found.gaussian is None and found.signs is None and found.energy_left is None
    assert found.expected_energy_left == K / 20
    assert found.numbers()["curve_base"] == []


def test_a_base_of_zero_has_no_directions() -> None:
    update = read_update(torch.zeros(4, 3), torch.ones(4, 3))
    assert isinstance(update, UpdateMatrix)
    assert spectrum_change(update, k=2, seed=0) == Unmeasured("the base is zero and has no principal directions")


def test_a_tuned_matrix_of_zero_has_lost_everything() -> None:
    base = normal(12, 9, seed=38)
    found = change_of(base, torch.zeros_like(base))
    assert found.shift == pytest.approx(1) and found.shift_top_k == pytest.approx(1)
    assert all(math.isfinite(angle) for angle in found.left + found.right)


def test_k_stays_below_the_smaller_side_and_within_the_rank_of_the_base() -> None:
    base = normal(10, 6, seed=39)
    assert change_of(base, base + 0.1 * normal(10, 6, seed=40), k=500).k == 5
    flat = normal(10, 2, seed=41) @ normal(2, 6, seed=42)
    found = change_of(flat, flat + 1e-3 * normal(10, 6, seed=43), k=4)
    assert found.k == 2 and len(found.left) == 2 and found.well_defined
    assert found.relative_gap is None  # nothing follows
    assert change_of(torch.ones(2, 2), torch.eye(2), k=None).k == 1


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(576, 1536, 57), (1536, 576, 57), (49152, 576, 57), (4096, 4096, 128), (64, 64, 8), (5, 9, 4), (2, 2, 1)],
)
def test_default_k(m: int, n: int, k: int) -> None:
    assert default_k(m, n) == k


@pytest.mark.parametrize(("shape", "k"), [((1, 5), 1), ((5, 5), 0), ((5, 5), -3)])
def test_what_has_no_directions_is_refused(shape: tuple[int, int], k: int) -> None:
    update = read_update(torch.ones(shape), torch.zeros(shape))
    assert isinstance(update, UpdateMatrix)
    with pytest.raises(ValueError, match=f"k is {k} for a matrix"):
        spectrum_change(update, k=k, seed=0)


def test_rounding_alone_turns_no_more_than_a_random_update() -> None:
    base = normal(80, 60, seed=44).to(torch.bfloat16)
    noise = (torch.rand(80, 60, generator=torch.Generator().manual_seed(45), dtype=torch.float64) - 0.5) * 2.0**-7
    found = change_of(base, (base.double() * (1 + noise)).to(torch.bfloat16), k=10)
    assert found.gaussian is not None
    assert np.mean(found.left) == pytest.approx(found.gaussian.left_mean, rel=0.5)
    assert found.shift == pytest.approx(found.expected_shift, rel=0.3)


# --------------------------------------------------------------------------------------------------
# several checkpoints


def test_spectra_of_several_checkpoints_lie_over_one_another() -> None:
    generator = torch.Generator().manual_seed(5)
    names = [f"model.layers.{layer}.self_attn.q_proj.weight" for layer in range(3)]
    base = {name: torch.randn(40, 40, generator=generator) for name in names}
    moved = [
        base | {names[1]: base[names[1]] + size * torch.randn(40, 40, generator=generator)} for size in (0.01, 0.3)
    ]
    found = taken([SpectrumMeasure], base, base, *moved, mode="several")
    results = {label: one.result for label, one in zip(("still", "rl", "sft"), found, strict=True)}
    [section] = cast(SpectrumMeasure, found[0].measure).side_by_side(results)
    angles, shifts, left, values = (cast(Lines, figure) for figure in section.figures)
    assert list(angles.series) == list(results) and list(angles.x) == [0, 1, 2]
    change = results["sft"].rows.tensors[names[1]]
    assert angles.series["sft"] == [None, max(change.left_largest, change.right_largest), None]
    assert shifts.series["sft"][1] == change.shift > 5 * results["rl"].rows.tensors[names[1]].shift
    assert angles.series["still"] == [None] * 3
    # of the one matrix that changed, by the checkpoints that changed it
    assert names[1] in left.title and list(left.series) == list(values.series) == ["rl", "sft"]
    before, after = (torch.linalg.svdvals(one[names[1]].double()) for one in (base, moved[1]))
    wanted = [float((after[place - 1] - before[place - 1]) / before[0]) for place in values.x]
    assert values.series["sft"] == pytest.approx(wanted, abs=1e-12)
    assert section.tables[0].rows[2][0] == "sft" and len(section.tables[0].rows) == 3
