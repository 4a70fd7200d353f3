"""In how many directions do a run's gradients point? The spectrum of their Gram matrix (Adewuyi et al. 2026, app. B).

G is ``[T, n]``, one row per stored gradient. The nonzero eigenvalues of G G^T (``[T, T]``) are those of G^T G. Rows are
sketches of d numbers (``io.gradient_log``): with S the sketch, A = G S^T is read in blocks and A A^T computed in
float64. Writing G = U D V^T, Ostrowski's theorem gives every eigenvalue of A A^T as that of G G^T times a factor
between the extreme eigenvalues of V^T S^T S V, which for rank r lie about sqrt(r/d) around 1: small eigenvalues are
as accurate, relatively, as large ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io.gradient_log import GradientHeader, gradient_log_paths, load_gradient_log, read_gradient_header
from ssrctl.measures.base import Findings, RunMeasure, register

if TYPE_CHECKING:
    from torch import Tensor

# Bytes of stored gradients held at a time; the two blocks at hand take three times as much again in float64.
BLOCK_BYTES = 32 * 2**20
ENERGY_SHARES = (0.9, 0.95, 0.99)
# More steps than this cannot be told apart in a heat map, and the matrix would fill the report.
MOST_COSINES = 60


def gram_matrix(load: Callable[[int], Tensor], count: int, size: int) -> Tensor:
    """Inner products of ``count`` vectors of which only some are in memory: float64 ``[count, count]``.

    Args:
        load: gives vector number i, float ``[size]``.
        count: how many there are; 0 gives ``[0, 0]``.
        size: numbers in each.
    """
    import torch

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
    """The eigenvalues of a Gram matrix, and how many count.

    With p_i = eigenvalue i over their sum:

    Attributes:
        eigenvalues: descending, never negative.
        effective_rank: ``exp(-sum p ln p)`` (Roy and Vetterli 2007, of energies), in [1, T]; None when all are 0.
        participation_ratio: ``1 / sum p^2``, in [1, T]; None when all are 0.
        energy_ranks: for 0.9, 0.95, 0.99: how many of the largest hold that share of the sum; None when all are 0.
    """

    eigenvalues: list[float]
    effective_rank: float | None
    participation_ratio: float | None
    energy_ranks: dict[str, int | None]


def spectrum_of(gram: Tensor) -> Spectrum:
    """The spectrum of a symmetric positive semidefinite matrix, float64 ``[T, T]``; T may be 0."""
    import torch

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
    """The Gram matrix of random vectors with independent directions, on average of the given norms.

    Rows have independent normal entries of variance norm^2 / size. The matrix is Wishart and drawn by its Cholesky
    factor (Bartlett 1933), so the cost does not depend on ``size``.

    Args:
        norms: of the vectors.
        size: numbers in each; with fewer than vectors the vectors themselves are drawn.
        seed: of the draw.
    """
    import numpy as np
    import torch

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
    """Relative error of an eigenvalue, about: ``(1 + sqrt(T/d))^2 - 1``; 0 for gradients that are stored exactly.

    The largest eigenvalue of V^T S^T S V for a sketch with independent normal entries (Marchenko and Pastur 1967), to
    which a count sketch of many coordinates of like size comes close.
    """
    return 0.0 if header.sketch == "exact" else (1.0 + math.sqrt(count / header.size)) ** 2 - 1.0


def gradient_numbers(paths: Sequence[Path], seed: int = 0) -> dict[str, Any] | None:
    """What the stored gradients of a run span; None without any.

    Args:
        paths: gradient logs of one run, in order.
        seed: of the random gradients that serve as a yardstick.

    Returns:
        Plain numbers, as the report stores them; see docs/metrics.md.

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
    return {
        "sketch": first.sketch,
        "size": first.size,
        "num_coordinates": first.num_coordinates,
        "num_gradients": len(paths),
        "num_zero": int((~some).sum()),
        "inner_product_error": 0.0 if first.sketch == "exact" else math.sqrt(2.0 / first.size),
        "eigenvalue_error": sketch_error(len(paths), first),
        "steps": steps,
        "norms": norms.tolist(),
        "gradients": _compared(gram, norms.tolist(), first.size, seed),
        "directions": _compared(directions, [1.0] * len(directions), first.size, seed),
    } | _cosines(gram, norms, directions, steps)


def _compared(gram: Tensor, norms: Sequence[float], size: int, seed: int) -> dict[str, Any]:
    """A spectrum beside that of independent directions of the same norms."""
    found, chance = spectrum_of(gram), spectrum_of(random_gram(norms, size, seed))
    largest = max(chance.eigenvalues, default=0.0)
    return vars(found) | {
        "expected_eigenvalues": chance.eigenvalues,
        "expected_effective_rank": chance.effective_rank,
        "expected_participation_ratio": chance.participation_ratio,
        "expected_energy_ranks": chance.energy_ranks,
        "num_shared": sum(value > largest for value in found.eigenvalues),
    }


def _cosines(gram: Tensor, norms: Tensor, directions: Tensor, steps: Sequence[int]) -> dict[str, Any]:
    """Cosines between neighbours, their mean over all pairs, and the matrix of at most ``MOST_COSINES`` steps."""
    count = len(steps)

    def cosine(i: int, j: int) -> float | None:
        scale = float(norms[i] * norms[j])
        return min(1.0, max(-1.0, float(gram[i, j]) / scale)) if scale > 0 else None

    number = min(count, MOST_COSINES)
    chosen = [round(k * (count - 1) / (number - 1)) for k in range(number)] if number > 1 else list(range(number))
    pairs = len(directions) * (len(directions) - 1)
    return {
        "mean_cosine": float(directions.sum() - directions.diagonal().sum()) / pairs if pairs else None,
        "neighbour_cosines": [cosine(i, i + 1) for i in range(count - 1)],
        "cosine_steps": [steps[i] for i in chosen],
        "cosines": [[cosine(i, j) for j in chosen] for i in chosen],
    }


@register
class Gradients(RunMeasure["dict[str, Any] | None"]):
    """In how many directions the logged gradients of a run point."""

    name = "gradients"
    needs = "a run that was trained with --log-gradients"

    def combine(self, parts: Mapping[str, list[Any]]) -> dict[str, Any] | None:
        """Return the spectra of the run's gradient logs; None without any.

        Raises:
            UserError: no logs although the measure was asked for by name, or logs that do not fit each other.
        """
        assert self.run is not None
        paths = gradient_log_paths(self.run)
        if not paths and self.config.measures is not None:
            raise UserError(f"{self.run} has no gradient logs", "train with --log-gradients 10 or so")
        return gradient_numbers(paths)

    def present(self, result: dict[str, Any] | None) -> Findings:
        """Return sentences, figures and tables of the gradients' geometry."""
        from ssrctl.measures.gradients_report import gradient_section, headlines

        section = gradient_section(result)
        if section is None:
            return Findings()
        return Findings(numbers={"gradients": result}, headlines=headlines(result), sections=[section])
