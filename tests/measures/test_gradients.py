"""The spectrum of stored gradients against the definition, planted subspaces, and the yardstick's own moments."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.io.gradient_log import GradientHeader, gradient_log_path, gradient_log_paths, save_gradient_log
from ssrctl.measures import gradients as gradient_geometry
from ssrctl.measures.gradients import (
    GradientsResult,
    gradients_result,
    gradients_section,
    gram_matrix,
    headlines,
    random_gram,
    spectrum_of,
)
from ssrctl.report.document import Lines
from ssrctl.report.formats import json_safe
from ssrctl.training.gradient_sketch import GradientSketch


def write(run: Path, gradients: Tensor, max_size: int = 10**6, seed: int = 0) -> list[Path]:
    """One log per row, steps 5, 10, ..."""
    sketch = GradientSketch({"w": gradients.shape[1]}, max_size, seed)
    for number, gradient in enumerate(gradients, start=1):
        total = sketch.zeros()
        sketch.add(total, "w", gradient)
        header = GradientHeader(
            step=5 * number,
            sketch="exact" if sketch.exact else "count-sketch",
            size=sketch.size,
            seed=seed,
            num_coordinates=sketch.num_coordinates,
        )
        save_gradient_log(gradient_log_path(run, 5 * number), header, total)
    return gradient_log_paths(run)


def measured(run: Path, gradients: Tensor, max_size: int = 10**6) -> GradientsResult:
    found = gradients_result(write(run, gradients, max_size))
    assert found is not None
    return found


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(0, 9), st.integers(1, 5))
def test_the_gram_matrix_is_that_of_all_rows_at_once(count: int, rows_at_once: int) -> None:
    rows = randn(count, 6, seed=count).double()
    before, gradient_geometry.BLOCK_BYTES = gradient_geometry.BLOCK_BYTES, 24 * rows_at_once
    try:
        found = gram_matrix(lambda i: rows[i], count, 6)
    finally:
        gradient_geometry.BLOCK_BYTES = before
    torch.testing.assert_close(found, rows @ rows.T, rtol=0, atol=1e-12)


def test_only_two_blocks_are_read_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gradient_geometry, "BLOCK_BYTES", 2 * 4 * 3)  # two rows of three
    loads: list[int] = []

    def load(i: int) -> Tensor:
        loads.append(i)
        return torch.ones(3)

    gram_matrix(load, 6, 3)
    assert loads == [0, 1, 2, 3, 0, 1, 4, 5, 0, 1, 2, 3]


def test_ranks_of_a_spectrum_by_hand() -> None:
    found = spectrum_of(torch.diag(torch.tensor([1.0, 4.0, 3.0, 0.0], dtype=torch.float64)))
    assert found.eigenvalues == [4.0, 3.0, 1.0, 0.0]
    # p = 1/2, 3/8, 1/8: entropy in nats, and the sum of squares 26/64
    entropy = 0.5 * math.log(2) + 3 / 8 * math.log(8 / 3) + 1 / 8 * math.log(8)
    assert found.effective_rank == pytest.approx(math.exp(entropy), rel=1e-12)
    assert found.participation_ratio == pytest.approx(64 / 26, rel=1e-12)
    # held by the first 1, 2, 3: 0.5, 0.875, 1
    assert found.energy_ranks == {"0.9": 3, "0.95": 3, "0.99": 3}
    even = spectrum_of(torch.eye(20, dtype=torch.float64))
    assert even.effective_rank == pytest.approx(20) and even.participation_ratio == pytest.approx(20)
    assert even.energy_ranks == {"0.9": 18, "0.95": 19, "0.99": 20}
    nothing = spectrum_of(torch.zeros(3, 3, dtype=torch.float64))
    assert nothing.eigenvalues == [0.0] * 3 and nothing.effective_rank is None
    assert nothing.energy_ranks == {"0.9": None, "0.95": None, "0.99": None}
    assert spectrum_of(torch.zeros(0, 0, dtype=torch.float64)).eigenvalues == []


def test_exact_gradients_give_the_singular_values_of_their_matrix(tmp_path: Path) -> None:
    rows = randn(8, 50)
    found = measured(tmp_path, rows)
    assert found.sketch == "exact" and found.eigenvalue_error == found.inner_product_error == 0.0
    assert found.steps == [5, 10, 15, 20, 25, 30, 35, 40]
    squares = torch.linalg.svdvals(rows.double()).square()
    assert found.gradients.found.eigenvalues == pytest.approx(squares.tolist(), rel=1e-9)
    assert found.norms == pytest.approx(rows.double().norm(dim=1).tolist(), rel=1e-12)
    cosines = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = cosines @ cosines.T
    assert found.neighbour_cosines == pytest.approx(cosines.diagonal(1).tolist(), abs=1e-12)
    for row, expected in zip(found.cosines, cosines.tolist(), strict=True):
        assert row == pytest.approx(expected, abs=1e-12)
    assert found.mean_cosine == pytest.approx((float(cosines.sum()) - 8) / 56, abs=1e-12)
    assert found.directions.found.effective_rank == pytest.approx(spectrum_of(cosines).effective_rank, rel=1e-9)


def test_a_planted_subspace_is_found_through_the_sketch(tmp_path: Path) -> None:
    # 24 gradients in a space of 4 orthonormal directions with energies 8 : 4 : 2 : 1, in 30,000 coordinates
    basis = torch.linalg.qr(randn(30_000, 4).double()).Q.T
    mix = torch.linalg.qr(randn(24, 4, seed=1).double()).Q * torch.tensor([8.0, 4.0, 2.0, 1.0]).sqrt()
    found = measured(tmp_path, mix @ basis, max_size=4096)
    assert found.sketch == "count-sketch" and found.size == 4096
    values = found.gradients.found.eigenvalues
    # the subspace has rank 4, so factors stay within (1 +- sqrt(4/d))^2 up to fluctuations: 3 times that
    assert values[:4] == pytest.approx([8.0, 4.0, 2.0, 1.0], rel=6 * math.sqrt(4 / 4096))
    assert max(values[4:]) < 1e-6  # float32 storage
    assert found.gradients.found.energy_ranks == {"0.9": 3, "0.95": 4, "0.99": 4}
    shares = torch.tensor([8.0, 4.0, 2.0, 1.0]) / 15
    assert found.gradients.found.effective_rank == pytest.approx(
        math.exp(-float((shares * shares.log()).sum())), rel=0.05
    )
    assert found.gradients.chance.effective_rank > 3 * found.gradients.found.effective_rank
    assert found.gradients.num_shared >= 1
    assert found.eigenvalue_error == pytest.approx((1 + math.sqrt(24 / 4096)) ** 2 - 1)


def test_independent_gradients_look_like_the_yardstick(tmp_path: Path) -> None:
    rows = randn(30, 20_000) * torch.linspace(0.5, 2.0, 30).unsqueeze(1)
    found = measured(tmp_path, rows, max_size=2048).gradients
    assert found.found.effective_rank == pytest.approx(found.chance.effective_rank, rel=0.02)
    for value, expected in zip(found.found.eigenvalues, found.chance.eigenvalues, strict=True):
        assert value == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize(("count", "size"), [(6, 40), (6, 6), (9, 4)])
def test_the_yardstick_has_the_moments_of_independent_directions(count: int, size: int) -> None:
    norms = torch.arange(1.0, count + 1, dtype=torch.float64)
    draws = torch.stack([random_gram(norms.tolist(), size, seed) for seed in range(600)])
    scaled = draws / norms.outer(norms)
    # a diagonal entry is chi-square / size: variance 2/size; another the mean of products: variance 1/size
    mean, spread = scaled.mean(0), scaled.std(0)
    error = 5 * spread / math.sqrt(600)
    assert bool(((mean - torch.eye(count, dtype=torch.float64)).abs() < error + 1e-12).all())
    variance = torch.full((count, count), 1.0 / size, dtype=torch.float64).fill_diagonal_(2.0 / size)
    # the variance of 600 draws is known to about 6% here, with the fourth moments of few degrees of freedom to more
    torch.testing.assert_close(spread.square(), variance, rtol=0.45, atol=0)
    assert int(torch.linalg.matrix_rank(draws[0])) == min(count, size)


def test_one_gradient_and_zero_gradients(tmp_path: Path) -> None:
    one = measured(tmp_path / "one", randn(1, 20))
    assert one.gradients.found.effective_rank == pytest.approx(1.0) and one.mean_cosine is None
    assert one.neighbour_cosines == [] and len(one.cosines) == 1
    rows = randn(3, 20)
    rows[1] = 0
    some = measured(tmp_path / "some", rows)
    assert some.num_zero == 1 and some.neighbour_cosines == [None, None]
    assert some.cosines[0][2] is not None and some.cosines[1] == [None] * 3
    assert len(some.directions.found.eigenvalues) == 2
    none = measured(tmp_path / "none", torch.zeros(2, 20))
    assert none.gradients.found.effective_rank is None and none.directions.found.eigenvalues == []
    assert gradients_result([]) is None
    for numbers in (one, some, none):
        stored = numbers.numbers()
        assert json_safe(stored) == stored  # nothing that json lacks
        assert stored["gradients"]["expected_effective_rank"] == numbers.gradients.chance.effective_rank
        assert len(gradients_section(numbers).tables[1].rows) == numbers.num_gradients
    assert headlines(one) == headlines(none) == [] and len(headlines(some)) == 2


def test_the_report_shows_spectrum_energy_and_cosines(tmp_path: Path) -> None:
    numbers = measured(tmp_path, randn(70, 100))
    section = gradients_section(numbers)
    eigenvalues, energy, cosines, neighbours = section.figures
    assert isinstance(eigenvalues, Lines) and eigenvalues.log_y
    shares = list(eigenvalues.series["measured"])
    assert sum(share for share in shares if share is not None) == pytest.approx(1.0)
    assert isinstance(energy, Lines) and energy.series["measured"][-1] == pytest.approx(1.0)
    assert len(cosines.values) == 60 and cosines.labels[0] == "5" and cosines.labels[-1] == "350"  # type: ignore[union-attr]
    assert neighbours.x == numbers.steps[1:]  # type: ignore[union-attr]
    assert "70 stored gradients" in headlines(numbers)[0] and "stored exactly" in section.text


def test_logs_of_different_sketches_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a", randn(1, 100), max_size=64)
    for name, other in (
        ("seed", write(tmp_path / "b", randn(1, 100), max_size=64, seed=1)),
        ("size", write(tmp_path / "c", randn(1, 100), max_size=65)),
        ("model", write(tmp_path / "d", randn(1, 101), max_size=64)),
    ):
        with pytest.raises(UserError, match="different kinds, sizes, seeds or models"):
            gradients_result(first + other)
        assert name
