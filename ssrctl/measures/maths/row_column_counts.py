"""Which rows and columns of a matrix do changes hit, how unevenly, and do they stay the same ones?

Zhu et al. 2025 (arXiv:2511.08567), section 2.2 and figures 2 and 3: changes form stripes of rows and columns that
persist over training and between runs. A *profile* is the number of changed weights in each row, or in each column.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ssrctl.report.document import Heatmap

if TYPE_CHECKING:
    from torch import Tensor

_PART = 1 << 20  # coordinates counted at once
_SIDES = ("rows", "columns")


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
        return int(self.rows.sum())


def profile(changed: Tensor) -> Profile | None:
    """Count the changes of each row and column.

    Args:
        changed: bool ``[m, n]``, True = changed.

    Returns:
        None for a tensor that is no matrix.
    """
    import torch

    if changed.dim() != 2:
        return None
    rows, columns = (torch.zeros(size, dtype=torch.int64) for size in changed.shape)
    height = max(1, _PART // max(1, columns.numel()))
    for part, counts in zip(changed.split(height), rows.split(height), strict=True):
        counts.copy_(part.sum(dim=1))
        columns += part.sum(dim=0)
    return Profile(rows, columns)


def stacked(parts: Sequence[Profile | None]) -> Profile | None:
    """The profile of a matrix from those of its blocks of rows, in order; None without any."""
    import torch

    kept = [one for one in parts if one is not None]
    if not kept:
        return None
    return Profile(torch.cat([one.rows for one in kept]), torch.stack([one.columns for one in kept]).sum(dim=0))


# --------------------------------------------------------------------------------------------------
# how unevenly


def gini(counts: Sequence[int] | Tensor) -> float | None:
    """How unevenly counts are spread: ``sum_ij |x_i - x_j| / (2 n^2 mean(x))``, from 0 (all equal) to 1 - 1/n.

    None for counts that are all 0, or none.
    """
    import numpy as np

    ordered = np.sort(np.asarray(counts, dtype=np.float64))
    total = float(ordered.sum())
    if total == 0:
        return None
    size = ordered.size
    weights = 2 * np.arange(1, size + 1) - size - 1
    return float(weights @ ordered) / (size * total)


def expected_gini(num_lines: int, length: int, num_changed: int) -> float | None:
    """``gini`` of the profile of a random set, on average.

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
    import numpy as np
    from scipy.stats import hypergeom

    numel = num_lines * length
    if not 0 <= num_changed <= numel:
        raise ValueError(f"{num_changed} of {numel} coordinates")
    if num_changed == 0:
        return None
    below = hypergeom(numel, num_changed, length).cdf(np.arange(min(length, num_changed)))
    distance = 2 * float((below * (1 - below)).sum())
    mean = num_changed / num_lines
    return math.sqrt((num_lines - 1) / num_lines) * distance / (2 * mean)


def concentration(found: Profile) -> dict[str, float | None]:
    """``row_gini`` and ``column_gini``, each beside what a random set of as many coordinates has."""
    rows, columns, changed = found.rows.numel(), found.columns.numel(), found.num_changed
    return {
        "row_gini": gini(found.rows),
        "expected_row_gini": expected_gini(rows, columns, changed),
        "column_gini": gini(found.columns),
        "expected_column_gini": expected_gini(columns, rows, changed),
    }


def mean_concentration(found: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """``concentration`` of several matrices, each value the mean over those that have changes."""
    keys = ("row_gini", "expected_row_gini", "column_gini", "expected_column_gini")
    return {key: mean([one[key] for one in found]) for key in keys}


# --------------------------------------------------------------------------------------------------
# the same ones?


def rank_correlation(a: Tensor, b: Tensor) -> float | None:
    """Spearman's rank correlation of two profiles, in [-1, 1], equal counts sharing their mean rank; 0 on average by chance.

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


def stability(series: Sequence[Profile]) -> dict[str, list[float | None]]:
    """Rank correlation of each profile of a series with the last one: ``rows`` and ``columns``.

    The last value is 1, or None where its profile is constant. An empty series gives empty lists.
    """
    return {
        side: [rank_correlation(getattr(one, side), getattr(series[-1], side)) for one in series] for side in _SIDES
    }


def agreement(runs: Sequence[Profile]) -> dict[str, float | None]:
    """Mean rank correlation over the pairs of runs, ``rows`` and ``columns``; pairs without one are left out."""
    return {
        side: mean([rank_correlation(getattr(a, side), getattr(b, side)) for a, b in combinations(runs, 2)])
        for side in _SIDES
    }


def mean(values: Sequence[float | None]) -> float | None:
    """Of the values that are not None; None when there are none."""
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if kept else None


# --------------------------------------------------------------------------------------------------
# for figures


def coarse_map(changed: Tensor, blocks: int = 48) -> dict[str, Any]:
    """Changed shares of the blocks of a matrix, as a small picture of it.

    Args:
        changed: ``[m, n]``, bool, or for each weight the share of several runs that changed it.
        blocks: along each side, at most; a side is cut as evenly as possible.

    Returns:
        ``rows`` and ``columns``, where the blocks start, and ``shares``, ``[rows][columns]``.
    """
    import torch

    starts = [[int(part[0]) for part in torch.arange(size).tensor_split(min(blocks, size))] for size in changed.shape]
    strips = [changed[first:last] for first, last in zip(starts[0], [*starts[0][1:], None], strict=True)]
    shares = [
        [
            float(strip[:, first:last].double().mean())
            for first, last in zip(starts[1], [*starts[1][1:], None], strict=True)
        ]
        for strip in strips
    ]
    return {"rows": starts[0], "columns": starts[1], "shares": shares}


def map_figure(title: str, picture: Mapping[str, Any], caption: str) -> Heatmap:
    """A ``coarse_map`` in colours around the mean over its blocks, so that bands of rows and columns stand out."""
    values = [value for row in picture["shares"] for value in row]
    centre = math.fsum(values) / len(values)
    return Heatmap(
        title=title,
        values=picture["shares"],
        row_labels=[str(start) for start in picture["rows"]],
        column_labels=[str(start) for start in picture["columns"]],
        row_axis="row",
        column_axis="column",
        centre=centre,
        scale=min(centre, 1 - centre) or None,  # so that the scale's ends are shares, too
        shares=True,
        decimals=0,
        caption=caption,
    )
