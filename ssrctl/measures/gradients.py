"""The number of directions that a run's gradients span: the spectrum of their Gram matrix (Adewuyi et al. 2026, app. B).

G is ``[T, n]``, one row per stored gradient. The nonzero eigenvalues of G G^T (``[T, T]``) are those of G^T G. Rows are
sketches of d numbers (``io.gradient_log``): with S the sketch, A = G S^T is read in blocks and A A^T computed in
float64. Writing G = U D V^T, Ostrowski's theorem gives every eigenvalue of A A^T as that of G G^T times a factor
between the extreme eigenvalues of V^T S^T S V, which for rank r lie about sqrt(r/d) around 1: small eigenvalues are
as accurate, relatively, as large ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.gradient_log import GradientHeader, gradient_log_paths, load_gradient_log, read_gradient_header
from ssrctl.measures.base import Findings, RunMeasure, register
from ssrctl.measures.group_tables import off_diagonal
from ssrctl.report.document import Column, Figure, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, signed, times

# Bytes of stored gradients held at a time; the two blocks in use take three times as much again in float64.
BLOCK_BYTES = 32 * 2**20
ENERGY_SHARES = (0.9, 0.95, 0.99)
# More steps than this cannot be told apart in a heat map, and the matrix would fill the report.
MOST_COSINES = 60
_CHANCE = "expected for independent directions"


def gram_matrix(load: Callable[[int], Tensor], count: int, size: int) -> Tensor:
    """Return the inner products, float64 ``[count, count]``, of vectors of which only some are in memory at a time.

    Args:
        load: gives vector number i, float ``[size]``.
        count: number of vectors; 0 gives ``[0, 0]``.
        size: numbers in each.
    """
    rows = max(1, BLOCK_BYTES // (4 * max(size, 1)))
    starts = range(0, count, rows)
    gram = torch.zeros(count, count, dtype=torch.float64)

    def block(start: int) -> Tensor:
        return torch.stack([load(i).double() for i in range(start, min(start + rows, count))])

    for first in starts:
        one = block(first)
        for second in range(0, first + 1, rows):
            other = one if second == first else block(second)
            product = one @ other.T
            gram[first : first + len(one), second : second + len(other)] = product
            gram[second : second + len(other), first : first + len(one)] = product.T
    return gram


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """The eigenvalues of a Gram matrix, and its ranks.

    With p_i = eigenvalue i over their sum:

    Attributes:
        eigenvalues: descending, never negative.
        effective_rank: ``exp(-sum p ln p)`` (Roy and Vetterli 2007, of energies), in [1, T]; None when all are 0.
        participation_ratio: ``1 / sum p^2``, in [1, T]; None when all are 0.
        energy_ranks: for 0.9, 0.95, 0.99: the number of largest ones that hold that share of the sum; None when all are 0.
    """

    eigenvalues: list[float]
    effective_rank: float | None
    participation_ratio: float | None
    energy_ranks: dict[str, int | None]


def spectrum_of(gram: Tensor) -> Spectrum:
    """Return the spectrum of a symmetric positive semidefinite matrix, float64 ``[T, T]``; T may be 0."""
    # Rounding can leave zeros slightly negative.
    values = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0.0) if len(gram) else gram.new_zeros(0)
    total = float(values.sum())
    if total <= 0:
        return Spectrum(
            eigenvalues=values.tolist(),
            effective_rank=None,
            participation_ratio=None,
            energy_ranks=dict.fromkeys(map(str, ENERGY_SHARES)),
        )
    shares = values / total
    held = shares.cumsum(0)
    # a sum that rounding left below the share at its very end is reached there
    ranks: dict[str, int | None] = {
        str(share): min(int((held < share).sum()) + 1, len(values)) for share in ENERGY_SHARES
    }
    positive = shares[shares > 0]
    return Spectrum(
        eigenvalues=values.tolist(),
        effective_rank=math.exp(-float((positive * positive.log()).sum())),
        participation_ratio=1.0 / float(shares.square().sum()),
        energy_ranks=ranks,
    )


def random_gram(norms: Sequence[float], size: int, seed: int) -> Tensor:
    """Draw the Gram matrix of random vectors with independent directions, on average of the given norms.

    Rows have independent normal entries of variance norm^2 / size. The matrix is Wishart and drawn by its Cholesky
    factor (Bartlett 1933), so the cost does not depend on ``size``.

    Args:
        size: numbers in each; with fewer than vectors the vectors themselves are drawn.
    """
    count = len(norms)
    draw = np.random.default_rng(derive_seed(seed, "random gradients"))
    if size < count:
        factor = draw.standard_normal((count, size))
    else:
        factor = np.tril(draw.standard_normal((count, count)), -1)
        factor += np.diag(np.sqrt(draw.chisquare(size - np.arange(count))))
    scaled = torch.from_numpy(factor * (np.asarray(norms, dtype=float) / math.sqrt(max(size, 1)))[:, None])
    return scaled @ scaled.T


def sketch_error(count: int, header: GradientHeader) -> float:
    """Return the approximate relative error of an eigenvalue, ``(1 + sqrt(T/d))^2 - 1``; 0 for exactly stored gradients.

    The largest eigenvalue of V^T S^T S V for a sketch with independent normal entries (Marchenko and Pastur 1967), to
    which a count sketch of many coordinates of like size comes close.
    """
    return 0.0 if header.sketch == "exact" else (1.0 + math.sqrt(count / header.size)) ** 2 - 1.0


@dataclass(frozen=True)
class ComparedSpectrum:
    """A spectrum, and that of random vectors with independent directions and the same norms."""

    found: Spectrum
    chance: Spectrum

    @property
    def num_shared(self) -> int:
        """The number of eigenvalues above the largest by chance."""
        largest = max(self.chance.eigenvalues, default=0.0)
        return sum(value > largest for value in self.found.eigenvalues)

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        expected = {f"expected_{key}": value for key, value in asdict(self.chance).items()}
        return asdict(self.found) | expected | {"num_shared": self.num_shared}


@dataclass(frozen=True, kw_only=True)
class GradientsResult:
    """Geometry of the T stored gradients of a run.

    Attributes:
        sketch, size, num_coordinates: as in ``GradientHeader``.
        num_gradients: T.
        num_zero: gradients of norm 0.
        inner_product_error: of the sketch, relative to the product of the norms (standard deviation).
        eigenvalue_error: of the sketch, relative.
        gradients: spectrum of the Gram matrix.
        directions: the same of the gradients scaled to norm 1, without those of norm 0.
        mean_cosine: over all pairs of these; None for fewer than two.
        neighbour_cosines: of each gradient with the next; None with one of norm 0.
        cosine_steps, cosines: cosines between at most ``MOST_COSINES`` steps, evenly spread.
    """

    sketch: str
    size: int
    num_coordinates: int
    num_gradients: int
    num_zero: int
    inner_product_error: float
    eigenvalue_error: float
    steps: list[int]
    norms: list[float]
    gradients: ComparedSpectrum
    directions: ComparedSpectrum
    mean_cosine: float | None
    neighbour_cosines: list[float | None]
    cosine_steps: list[int]
    cosines: list[list[float | None]]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        spectra = {"gradients": self.gradients.numbers(), "directions": self.directions.numbers()}
        return asdict(self) | spectra


def gradients_result(paths: Sequence[Path]) -> GradientsResult | None:
    """Measure the stored gradients of a run; None without any.

    Args:
        paths: gradient logs of one run, in order.

    Raises:
        UserError: a log that is torn, or not of the same sketch as the first.
    """
    if not paths:
        return None
    headers = [read_gradient_header(path) for path in paths]
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if header.map != first.map:
            raise UserError(
                f"{path} and {paths[0]} are sketches of different kinds, sizes, seeds or models",
                "keep the logs of one run with one --log-gradients-size",
            )
    gram = gram_matrix(lambda i: load_gradient_log(paths[i])[1], len(paths), first.size)
    norms = gram.diagonal().sqrt()
    some = norms > 0
    directions = gram[some][:, some] / norms[some].outer(norms[some])
    steps = [header.step for header in headers]

    def cosine(i: int, j: int) -> float | None:
        scale = float(norms[i] * norms[j])
        return min(1.0, max(-1.0, float(gram[i, j]) / scale)) if scale > 0 else None

    last, shown = len(paths) - 1, min(len(paths), MOST_COSINES)
    places = [round(k * last / (shown - 1)) for k in range(shown)] if shown > 1 else [0]
    pairs = len(directions) * (len(directions) - 1)
    return GradientsResult(
        sketch=first.sketch,
        size=first.size,
        num_coordinates=first.num_coordinates,
        num_gradients=len(paths),
        num_zero=int((~some).sum()),
        inner_product_error=0.0 if first.sketch == "exact" else math.sqrt(2.0 / first.size),
        eigenvalue_error=sketch_error(len(paths), first),
        steps=steps,
        norms=norms.tolist(),
        gradients=_compared(gram, norms.tolist(), first.size),
        directions=_compared(directions, [1.0] * len(directions), first.size),
        mean_cosine=float(directions.sum() - directions.diagonal().sum()) / pairs if pairs else None,
        neighbour_cosines=[cosine(i, i + 1) for i in range(last)],
        cosine_steps=[steps[i] for i in places],
        cosines=[[cosine(i, j) for j in places] for i in places],
    )


def _compared(gram: Tensor, norms: Sequence[float], size: int) -> ComparedSpectrum:
    return ComparedSpectrum(spectrum_of(gram), spectrum_of(random_gram(norms, size, seed=0)))


# --------------------------------------------------------------------------------------------------
# the measure


@register
class GradientsMeasure(RunMeasure[GradientsResult | None]):
    """The number of directions that the logged gradients of a run span."""

    name = "gradients"
    order = 20
    needs = "a run that was trained with --log-gradients"

    def combine(self, parts: Mapping[str, list[Any]]) -> GradientsResult | None:
        """Return the spectra of the run's gradient logs; None without any.

        Raises:
            UserError: no logs although the measure was asked for by name, or logs that do not fit each other.
        """
        assert self.run is not None
        paths = gradient_log_paths(self.run)
        if not paths and self.config.measures is not None:
            raise UserError(f"{self.run} has no gradient logs", "train with --log-gradients 10 or so")
        return gradients_result(paths)

    def present(self, result: GradientsResult | None) -> Findings:
        """Return sentences, figures and tables of the gradients' geometry."""
        if result is None:
            return Findings()
        return Findings(
            numbers={"gradients": result.numbers()}, headlines=headlines(result), sections=[gradients_section(result)]
        )


def headlines(result: GradientsResult) -> list[str]:
    """Return the answer in sentences; none without two gradients that are not zero."""
    if result.num_gradients - result.num_zero < 2:
        return []
    gradients, directions = result.gradients, result.directions
    ranks = gradients.found.energy_ranks
    lines = [
        f"The {count(result.num_gradients)} stored gradients have an effective rank of "
        f"{number(gradients.found.effective_rank)} (independent directions of the same lengths: "
        f"{number(gradients.chance.effective_rank)}); {times(ranks['0.9'] or 0, 'direction')} hold 90% of their energy, "
        f"{count(ranks['0.99'])} hold 99%."
    ]
    if result.mean_cosine is not None:
        lines.append(
            f"Two stored gradients have a mean cosine of {signed(result.mean_cosine)}; counted by "
            f"direction alone their effective rank is {number(directions.found.effective_rank)} (chance: "
            f"{number(directions.chance.effective_rank)}), with "
            f"{times(directions.num_shared, 'direction')} beyond chance."
        )
    return lines


def gradients_section(result: GradientsResult) -> Section:
    """Return figures and tables: eigenvalues, cumulative energy and cosines."""
    figures: list[Figure] = []
    if result.gradients.found.effective_rank is not None:
        figures = [
            _curve(
                result.gradients,
                _shares,
                title="Eigenvalues of the gradients' Gram matrix",
                x_label="eigenvalue, from the largest",
                log_y=True,
                caption="Where the measured curve lies above the grey one, a direction is shared by more gradients than "
                "chance explains.",
            ),
            _curve(
                result.gradients,
                _cumulative,
                title="Energy in the largest directions together",
                x_label="directions, from the largest",
                shares=True,
            ),
        ]
        if len(result.cosine_steps) > 1:
            figures += [_cosine_map(result), _neighbours(result)]
    return Section(
        title="How many directions the gradients span",
        text=_text(result),
        figures=figures,
        tables=[_rank_table(result), _eigenvalue_table(result.gradients)],
    )


def _text(result: GradientsResult) -> str:
    text = (
        f"Gradients of {times(result.num_gradients, 'training step')} before masking, each the sum over a batch. "
        "Eigenvalues are those of the Gram matrix G G^T, one row of G per stored gradient; they are the energies along "
        "the principal directions, and their sum is that of all squared norms. "
    )
    if result.sketch == "exact":
        text += "The gradients are stored exactly."
    else:
        text += (
            f"Each is stored as a sketch of {count(result.size)} numbers for {count(result.num_coordinates)} "
            f"weights: inner products are off by at most {percent(result.inner_product_error)} of the product of "
            f"the norms (standard deviation), eigenvalues by about {percent(result.eigenvalue_error)} of "
            "themselves. The yardstick is sketched the same way."
        )
    if result.num_zero:
        text += f" {times(result.num_zero, 'gradient')} of norm 0 (no advantage differed from 0) count as rows of G."
    return text


def _shares(values: Sequence[float]) -> list[float | None]:
    total = sum(values)
    return [value / total if total else None for value in values]


def _cumulative(values: Sequence[float]) -> list[float | None]:
    total = sum(values)
    return [min(1.0, held / total) if total else None for held in itertools.accumulate(values)]


def _curve(
    spectra: ComparedSpectrum, values: Callable[[Sequence[float]], list[float | None]], **settings: Any
) -> Lines:
    """Return lines over the eigenvalues of what a function makes of them."""
    return Lines(
        x=list(range(1, len(spectra.found.eigenvalues) + 1)),
        series={"measured": values(spectra.found.eigenvalues), _CHANCE: values(spectra.chance.eigenvalues)},
        y_label="share of all energy",
        **settings,
    )


def _cosine_map(result: GradientsResult) -> Heatmap:
    matrix = off_diagonal(result.cosines)
    largest = max((abs(value) for values in matrix for value in values if value is not None), default=0.0)
    thinned = len(matrix) < result.num_gradients
    return Heatmap(
        title="Cosine between the gradients of two training steps",
        labels=[str(step) for step in result.cosine_steps],
        values=matrix,
        axis="training step",
        scale=largest or None,
        decimals=2,
        caption=f"Full colour is ±{number(largest)}; blue is agreement, orange is conflict."
        + (f" {len(matrix)} of {result.num_gradients} steps are shown." if thinned else ""),
    )


def _neighbours(result: GradientsResult) -> Lines:
    return Lines(
        title="Cosine between the gradients of neighbouring stored steps",
        x=result.steps[1:],
        series={"measured": result.neighbour_cosines},
        x_label="training step",
        y_label="cosine to the one before",
    )


def _rank_table(result: GradientsResult) -> Table:
    rows = [
        [name, one.effective_rank, one.participation_ratio, *one.energy_ranks.values(), shared]
        for label, spectra in (("gradients", result.gradients), ("directions only", result.directions))
        for name, one, shared in (
            (label, spectra.found, spectra.num_shared),
            (f"{label}, by chance", spectra.chance, None),
        )
    ]
    return Table(
        title="Ranks of the stored gradients",
        columns=[
            "of",
            Column("effective rank", number),
            Column("participation ratio", number),
            *(Column(f"{share:.0%} energy", count) for share in ENERGY_SHARES),
            Column("beyond chance", count),
        ],
        rows=rows,
        note=f"Of at most {count(result.num_gradients)}. Directions only: every gradient scaled to norm 1, so "
        "that a few large ones do not decide. By chance: independent random directions of the same norms. Beyond "
        "chance: eigenvalues above the largest of these.",
    )


def _eigenvalue_table(spectra: ComparedSpectrum) -> Table:
    values, expected = spectra.found.eigenvalues, spectra.chance.eigenvalues
    places, shares = range(1, len(values) + 1), ("share", "share by chance", "share of the first N")
    return Table(
        title="Eigenvalues",
        columns=["number", Column("eigenvalue", number), *(Column(name, percent) for name in shares)],
        rows=list(zip(places, values, _shares(values), _shares(expected), _cumulative(values), strict=True)),
        terminal_rows=0,
    )
