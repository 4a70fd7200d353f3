"""The rank of the update of a weight matrix by four definitions, each next to its value by chance.

An update that is stored with rounding has full rank whatever training did, because rounding errors do. Next to the
numerical rank (Mukherjee et al. 2025, arXiv:2505.11711, table 2) are measures that weigh the singular values, and
the number of them that independent entries of the same sizes cannot explain.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import numpy as np

from ssrctl.checkpoints.pairs import TensorPair
from ssrctl.measures.base import Findings, register
from ssrctl.measures.group_tables import RowColumn, group_tables, layer_lines, row_dots
from ssrctl.measures.maths.averages import mean, means
from ssrctl.measures.maths.low_rank import EPS, singular_values
from ssrctl.measures.maths.update_matrix import UpdateMatrix
from ssrctl.measures.matrix_measure import MatrixMeasure, MatrixResult
from ssrctl.measures.published import references
from ssrctl.report.document import Figure, Section
from ssrctl.report.formats import count, number, percent

_RANKS = (
    "rank",
    "pattern_rank",
    "effective_rank",
    "expected_effective_rank",
    "stable_rank",
    "expected_stable_rank",
    "signal_rank",
)


@dataclass(frozen=True, kw_only=True)
class UpdateRank:
    """Ranks of D = tuned - base, ``[m, n]``; s_i are its singular values, descending.

    Attributes:
        max_rank: min(m, n).
        rank: number of s_i above ``tolerance``; 0 when nothing changed.
        tolerance: max(m, n) * 2^-23 * s_1, numpy's rule for a float32 matrix.
        pattern_rank: min(rows, columns) of D that are not all zero: no update of these coordinates has a larger rank.
        effective_rank: exp(-sum p_i ln p_i), p_i = s_i / sum(s), over the s_i above ``tolerance`` (Roy and Vetterli
            2007), in [1, max_rank]; 0 when nothing changed.
        expected_effective_rank: the same for a random matrix of this shape with independent entries, in the limit of
            large matrices (Marchenko and Pastur 1967).
        stable_rank: sum(s_i^2) / s_1^2, in [1, max_rank]; 0 when nothing changed.
        expected_stable_rank: m n / (sqrt(m) + sqrt(n))^2, as for ``expected_effective_rank``.
        signal_rank: number of s_i above ``chance_norm``: directions that the sizes of the entries do not explain by themselves.
            A lower bound: an update of high rank with even singular values has none.
        chance_norm: largest row norm plus largest column norm of D, which bounds, to leading order, the expected
            largest singular value after the sign of every entry is drawn at random (Bandeira and van Handel 2016, thm. 3.1;
            random signs as a yardstick: Hong, Sheng and Dobriban 2020).
        spectral_norm, frobenius_norm: s_1 and sqrt(sum of s_i^2).
        rounding_ratio: expected Frobenius norm of the rounding of the stored weights over that of D
            (``UpdateMatrix.rounding_norm``): near 1 or above, D may be rounding; None when nothing changed.
    """

    max_rank: int
    rank: int
    tolerance: float
    pattern_rank: int
    effective_rank: float
    expected_effective_rank: float
    stable_rank: float
    expected_stable_rank: float
    signal_rank: int
    chance_norm: float
    spectral_norm: float
    frobenius_norm: float
    rounding_ratio: float | None

    def __getattr__(self, name: str) -> float:
        """Return a rank as a share of ``max_rank``: ``rank_frac``, ``effective_rank_frac``, ..."""
        rank = name.removesuffix("_frac")
        if rank == name or rank not in _RANKS:
            raise AttributeError(name)
        return float(getattr(self, rank) / self.max_rank)

    def numbers(self) -> dict[str, Any]:
        """Return the attributes, and the ranks as shares of ``max_rank``."""
        return asdict(self) | {f"{rank}_frac": getattr(self, f"{rank}_frac") for rank in _RANKS}


def update_rank(update: UpdateMatrix) -> UpdateRank:
    """Return the ranks of an update, exact at any size: the time is that of the Gram matrix and its eigenvalues."""
    rows, columns = update.shape
    chance_norm = update.largest_row + update.largest_column
    if update.norm == 0:
        largest = tolerance = effective = stable = 0.0
        rank = signal = 0
    else:
        values = singular_values(update.update_rows.gram())
        largest = float(values[0])
        tolerance = rows * EPS * largest
        kept = values[values > tolerance]
        rank = kept.numel()
        weights = kept / kept.sum()
        effective = math.exp(-float((weights * weights.log()).sum()))
        stable = (update.norm / largest) ** 2
        signal = int((values > chance_norm).sum())
    return UpdateRank(
        max_rank=columns,
        rank=rank,
        tolerance=tolerance,
        pattern_rank=min(update.changed_rows, update.changed_columns),
        effective_rank=effective,
        expected_effective_rank=columns * random_effective_frac(columns / rows),
        stable_rank=stable,
        expected_stable_rank=rows * columns / (math.sqrt(rows) + math.sqrt(columns)) ** 2,
        signal_rank=signal,
        chance_norm=chance_norm,
        spectral_norm=largest,
        frobenius_norm=update.norm,
        rounding_ratio=update.rounding_norm / update.norm if update.norm else None,
    )


@functools.lru_cache(maxsize=256)
def random_effective_frac(aspect: float) -> float:
    """Return effective rank / min(m, n) of a large matrix with independent entries of mean 0 and equal variance.

    The singular values over sqrt(max(m, n)) have the density sqrt((x^2 - a^2)(b^2 - x^2)) / (pi c x) on [a, b] =
    [1 - sqrt(c), 1 + sqrt(c)] (Marchenko and Pastur 1967); with e = mean(x), the share is
    exp(-mean(x/e ln(x/e))).

    Args:
        aspect: c = min(m, n) / max(m, n), in (0, 1].
    """
    root = math.sqrt(aspect)
    # With x = 1 - sqrt(c) cos(t) both square roots lose their kinks, and even steps of t converge fast.
    steps = 4096
    angle = (np.arange(steps) + 0.5) * (math.pi / steps)
    x = 1.0 - root * np.cos(angle)
    weight = np.sin(angle) ** 2 * np.sqrt((x + 1.0) ** 2 - aspect) / x
    weight /= weight.sum()
    relative = x / float((weight * x).sum())
    return math.exp(-float((weight * relative * np.log(relative)).sum()))


# --------------------------------------------------------------------------------------------------
# the result


@dataclass(frozen=True, kw_only=True)
class RankShares:
    """Means of the shares of ``UpdateRank`` over several matrices that changed, None when none did."""

    rank_frac: float | None
    pattern_rank_frac: float | None
    effective_rank_frac: float | None
    expected_effective_rank_frac: float | None
    stable_rank_frac: float | None
    expected_stable_rank_frac: float | None


@dataclass(frozen=True, kw_only=True)
class RankRow(RankShares):
    """Ranks of several matrices; means are over those that changed, None when none did.

    Attributes:
        num_matrices, num_unchanged: counts; the following three are among the matrices that changed.
        num_full_rank: matrices of the largest possible rank.
        num_beyond_chance: matrices with directions that stand out from independent changes of the same sizes.
        num_within_rounding: matrices whose update is no larger than what rounding them once would change.
        signal_rank: mean number of directions that stand out.
        rounding_ratio: median.
    """

    num_matrices: int
    num_unchanged: int
    num_full_rank: int
    num_beyond_chance: int
    num_within_rounding: int
    signal_rank: float | None
    rounding_ratio: float | None


# --------------------------------------------------------------------------------------------------
# the measure


RankResult = MatrixResult[RankRow, UpdateRank]


@register
class RankMeasure(MatrixMeasure[UpdateRank, RankRow]):
    """The rank of each matrix's update."""

    name = "rank"
    order = 40

    def matrix(self, pair: TensorPair, label: str, update: UpdateMatrix) -> UpdateRank:
        """Return the ranks of one matrix's update; the spectral norm is left in the memo for the spectrum."""
        found = update_rank(update)
        pair.memo["spectral_norm", label] = found.spectral_norm
        return found

    @staticmethod
    def row(matrices: Sequence[tuple[str, UpdateRank]]) -> RankRow:
        """Summarise the ranks of several matrices."""
        changed = [one for _, one in matrices if one.rank > 0]
        ratios = [one.rounding_ratio for one in changed if one.rounding_ratio is not None]
        return RankRow(
            num_matrices=len(matrices),
            num_unchanged=len(matrices) - len(changed),
            num_full_rank=sum(one.rank == one.max_rank for one in changed),
            num_beyond_chance=sum(one.signal_rank > 0 for one in changed),
            num_within_rounding=sum(ratio >= 1 for ratio in ratios),
            signal_rank=mean(one.signal_rank for one in changed),
            rounding_ratio=median(ratios) if ratios else None,
            **means(RankShares, changed),
        )

    def describe(self, result: RankResult) -> Findings:
        """Return sentences, figures and tables of ranks."""
        total = result.rows.total
        return Findings(
            headlines=rank_headlines(total), sections=[rank_section(result)], published={"rank": total.rank_frac}
        )


def rank_headlines(total: RankRow) -> list[str]:
    """Return the answer in sentences."""
    if total.num_matrices == 0:
        return []
    if total.rank_frac is None:
        return [f"Rank: no update, since nothing changed in {_matrices(total.num_matrices)}."]
    changed = total.num_matrices - total.num_unchanged
    return [
        f"Rank: the updates of {_matrices(changed)} have {percent(total.rank_frac)} of the largest possible rank on "
        f"average, {count(total.num_full_rank)} of them all of it. Weighted by their singular values it is "
        f"{percent(total.effective_rank_frac)} (effective rank; random matrices: "
        f"{percent(total.expected_effective_rank_frac)}).",
    ]


def _rounding_text(total: RankRow) -> str:
    """Return the number of updates beyond chance, and the part of rounding in them."""
    if total.rank_frac is None:
        return ""
    return (
        f" {count(total.num_beyond_chance)} of the {count(total.num_matrices - total.num_unchanged)} updates have "
        "directions that stand out from independent changes of the same sizes. Rounding the tuned weights once would "
        f"change a typical matrix by {number(total.rounding_ratio)} times the norm of its update."
    )


def _matrices(value: int) -> str:
    return "1 weight matrix" if value == 1 else f"{value:,} weight matrices"


_SHARED: tuple[RowColumn, ...] = (
    ("rank", "rank_frac", percent),
    ("effective", "effective_rank_frac", percent),
    ("random effective", "expected_effective_rank_frac", percent),
    ("stable", "stable_rank_frac", percent),
    ("random stable", "expected_stable_rank_frac", percent),
)
_GROUP: tuple[RowColumn, ...] = (
    ("matrices", "num_matrices", count),
    ("unchanged", "num_unchanged", count),
    ("full rank", "num_full_rank", count),
    *_SHARED,
    ("beyond chance", "signal_rank", count),
    ("rounding ratio", "rounding_ratio", number),
)
_MATRIX: tuple[RowColumn, ...] = (
    ("maximum", "max_rank", count),
    ("changed rows or columns", "pattern_rank", count),
    *_SHARED,
    ("beyond chance", "signal_rank", count),
    ("tolerance", "tolerance", number),
    ("largest singular value", "spectral_norm", number),
    ("rounding ratio", "rounding_ratio", number),
)
_SERIES = {
    "rank": "rank_frac",
    "effective rank": "effective_rank_frac",
    "expected effective rank of a random matrix": "expected_effective_rank_frac",
}
_GROUP_NOTE = (
    "Means over the matrices that changed, as shares of the smaller side. Rank: singular values above max(m, n) * "
    "2^-23 of the largest. Effective: exp of the entropy of the singular values. Stable: squared norms, Frobenius "
    "over spectral. Beyond chance: singular values above what random signs would give. Rounding ratio: what "
    "rounding the tuned weights once would change, over the update (median)."
)
_MATRIX_NOTE = (
    "Changed rows or columns: the smaller number of rows and columns that are not all unchanged, which no rank "
    "of these coordinates can exceed. Tolerance: as used for this matrix."
)


def rank_section(result: RankResult) -> Section:
    """Return figures and tables."""
    rows = result.rows
    axis = "share of the largest possible rank"
    figures: list[Figure] = []
    if rows.kinds:
        caption = "Published: mean rank of the update matrices, tolerance not stated."
        title = "Rank of the updates by kind of matrix"
        figures.append(row_dots(title, rows.kinds, _SERIES, axis, references=references("rank"), caption=caption))
    figures += layer_lines("Rank of the updates over layers", rows, _SERIES, axis, shares=True)
    return Section(
        title="Rank of the updates",
        text="Does training move each matrix in a few directions or in all of them? An update that is stored with "
        "rounding has full rank whatever training did, so look at the effective rank next to that of a random matrix, "
        "and at how many singular values stand out." + _rounding_text(rows.total),
        figures=figures,
        tables=group_tables("Rank", rows, (_GROUP, _GROUP_NOTE), (_MATRIX, _MATRIX_NOTE), result.unmeasured),
    )
