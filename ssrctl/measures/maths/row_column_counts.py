"""Changed weights by row and by column of a matrix: how unevenly they are spread, and whether that stays the same.

Zhu et al. 2025 (arXiv:2511.08567), section 2.2 and figures 2 and 3: changes form stripes of rows and columns that
persist over training and between runs. A *profile* is the number of changed weights in each row, or in each column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import Tensor

from ssrctl.measures.maths.averages import mean, means

_PART = 1 << 20  # coordinates counted at once


@dataclass(frozen=True)
class Profile:
    """Changed weights of a matrix ``[m, n]``.

    Attributes:
        rows: int64 ``[m]``, in each row, at most n.
        columns: int64 ``[n]``, in each column, at most m.
    """

    rows: Tensor
    columns: Tensor

    @property
    def num_changed(self) -> int:
        """The number of changed weights."""
        return int(self.rows.sum())


def profile(changed: Tensor) -> Profile | None:
    """Count the changes of each row and column.

    Args:
        changed: bool ``[m, n]``, True = changed.

    Returns:
        None for a tensor that is not a matrix.
    """
    if changed.dim() != 2:
        return None
    rows, columns = (torch.zeros(size, dtype=torch.int64) for size in changed.shape)
    height = max(1, _PART // max(1, columns.numel()))
    for part, counts in zip(changed.split(height), rows.split(height), strict=True):
        counts.copy_(part.sum(dim=1))
        columns += part.sum(dim=0)
    return Profile(rows, columns)


def stacked(parts: Sequence[Profile | None]) -> Profile | None:
    """Join the profiles of a matrix's blocks of rows, given in order; None without any."""
    kept = [one for one in parts if one is not None]
    if not kept:
        return None
    return Profile(torch.cat([one.rows for one in kept]), torch.stack([one.columns for one in kept]).sum(dim=0))


# --------------------------------------------------------------------------------------------------
# how unevenly


def gini(counts: Sequence[float] | Tensor) -> float | None:
    """Return the Gini coefficient of counts, or of other numbers from 0 up: ``sum_ij |x_i - x_j| / (2 n^2 mean(x))``, 0 (all equal) to 1 - 1/n.

    None for counts that are all 0, or none.
    """
    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    total = float(ordered.sum())
    if total == 0:
        return None
    size = ordered.size
    weights = 2 * np.arange(1, size + 1) - size - 1
    return float(weights @ ordered) / (size * total)


def expected_gini(num_lines: int, length: int, num_changed: int) -> float | None:
    """Return the mean ``gini`` of the profile of a random set.

    The count of a line is hypergeometric with distribution function F; of two independent ones the mean distance is
    ``2 sum F (1 - F)``. The counts of lines add up to a constant, which makes two of them differ a little more, by
    ``sqrt(n / (n - 1))`` for n lines (exact for the root mean square distance).

    Args:
        num_lines: n, rows or columns.
        length: coordinates of each line.
        num_changed: size of the set, at most ``num_lines * length``.

    Returns:
        None when nothing changed.
    """
    from scipy.stats import hypergeom

    numel = num_lines * length
    if not 0 <= num_changed <= numel:
        raise ValueError(f"{num_changed} of {numel} coordinates")
    if num_changed == 0:
        return None
    below = hypergeom(numel, num_changed, length).cdf(np.arange(min(length, num_changed)))
    distance = 2 * float((below * (1 - below)).sum())
    return math.sqrt((num_lines - 1) / num_lines) * distance / (2 * num_changed / num_lines)


@dataclass(frozen=True, kw_only=True)
class Concentration:
    """Gini coefficients of the changes per row and per column, and those of a random set of as many coordinates.

    All are None when nothing changed.
    """

    row_gini: float | None
    expected_row_gini: float | None
    column_gini: float | None
    expected_column_gini: float | None


def concentration(found: Profile) -> Concentration:
    """Measure how unevenly the changes of a matrix are spread."""
    rows, columns, changed = found.rows.numel(), found.columns.numel(), found.num_changed
    return Concentration(
        row_gini=gini(found.rows),
        expected_row_gini=expected_gini(rows, columns, changed),
        column_gini=gini(found.columns),
        expected_column_gini=expected_gini(columns, rows, changed),
    )


def mean_concentration(found: Sequence[Concentration]) -> Concentration:
    """Average over several matrices, each value over those that have changes."""
    return Concentration(**means(Concentration, found))


# --------------------------------------------------------------------------------------------------
# the same ones?


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Return Spearman's rank correlation of two profiles, in [-1, 1], 0 on average by chance; ties share their mean rank.

    None when one of them is constant, or has fewer than 3 lines.

    Raises:
        ValueError: different lengths.
    """
    from scipy.stats import spearmanr

    if a.shape != b.shape:
        raise ValueError(f"profiles of {a.numel()} and {b.numel()} lines")
    if a.numel() < 3 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return None
    return float(spearmanr(a.numpy(), b.numpy()).statistic)


def stability(series: Sequence[Profile]) -> tuple[list[float | None], list[float | None]]:
    """Return the rank correlation of each profile of a series with the last one, of (rows, columns).

    The last value is 1, or None where its profile is constant. An empty series gives empty lists.
    """
    return (
        [rank_correlation(one.rows, series[-1].rows) for one in series],
        [rank_correlation(one.columns, series[-1].columns) for one in series],
    )


def agreement(runs: Sequence[Profile]) -> tuple[float | None, float | None]:
    """Return the mean rank correlation over the pairs of runs, of (rows, columns); pairs without one are left out."""
    pairs = list(combinations(runs, 2))
    return (
        mean(rank_correlation(a.rows, b.rows) for a, b in pairs),
        mean(rank_correlation(a.columns, b.columns) for a, b in pairs),
    )


# --------------------------------------------------------------------------------------------------
# for figures


@dataclass(frozen=True)
class CoarseMap:
    """A small picture of a matrix.

    Attributes:
        rows, columns: where the blocks start.
        shares: ``[rows][columns]``, the mean of each block.
    """

    rows: list[int]
    columns: list[int]
    shares: list[list[float]]


def coarse_map(changed: Tensor, blocks: int = 48) -> CoarseMap:
    """Average a matrix over blocks.

    Args:
        changed: ``[m, n]``, bool, or for each weight the share of several runs that changed it.
        blocks: along each side, at most; a side is cut as evenly as possible.
    """
    rows, columns = (
        [int(part[0]) for part in torch.arange(size).tensor_split(min(blocks, size))] for size in changed.shape
    )
    heights, widths = (
        [end - start for start, end in pairwise([*starts, size])]
        for starts, size in zip((rows, columns), changed.shape, strict=True)
    )
    shares = [
        [float(block.double().mean()) for block in strip.split(widths, dim=1)] for strip in changed.split(heights)
    ]
    return CoarseMap(rows, columns, shares)
