"""The rank of the update of a weight matrix, in four readings, and what each would be by chance.

An update that is stored with rounding has full rank whatever training did, because rounding errors do. So beside the
numerical rank (Mukherjee et al. 2025, arXiv:2505.11711, table 2) stand measures that weigh the singular values, and
the number of them that independent entries of the same sizes cannot explain.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.measures.base import Findings, PairMeasure, register
from ssrctl.measures.maths.low_rank import singular_values
from ssrctl.measures.maths.matrices import OfMatrix, skipped_tensors, updates, warn_if_long
from ssrctl.measures.maths.update_matrix import UpdateMatrix

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ssrctl.checkpoints.pairs import Comparison, TensorPair
    from ssrctl.configs import DiagnoseConfig

# Machine epsilon of float32. The weights' own is of no use: with bfloat16's 2^-7 numpy's tolerance passes sigma_1 from
# 128 rows on, and every rank would be 0. Nor is it called for, since the difference of two 16-bit weights is exact.
EPS = 2.0**-23


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
        signal_rank: number of s_i above ``chance_norm``: directions that the sizes of the entries alone do not explain.
            A lower bound: an update of high rank with even singular values has none.
        chance_norm: largest row norm plus largest column norm of D, which bounds, to leading order, the expected
            largest singular value after the sign of every entry is drawn anew (Bandeira and van Handel 2016, thm. 3.1;
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

    def numbers(self) -> dict[str, Any]:
        """The attributes, and the ranks as shares of ``max_rank``."""
        ranks = (
            "rank",
            "pattern_rank",
            "effective_rank",
            "expected_effective_rank",
            "stable_rank",
            "expected_stable_rank",
            "signal_rank",
        )
        shares = {f"{name}_frac": getattr(self, name) / self.max_rank for name in ranks}
        return {name: getattr(self, name) for name in self.__dataclass_fields__} | shares


def update_rank(update: UpdateMatrix) -> UpdateRank:
    """The ranks of an update. Exact at any size: the time is that of the Gram matrix and its eigenvalues."""
    rows, columns = update.shape
    chance_norm = update.largest_row + update.largest_column
    if update.norm == 0:
        largest = tolerance = effective = stable = 0.0
        rank = signal = 0
    else:
        values = singular_values(update.update_rows)
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
    """Effective rank over min(m, n) of a large matrix with independent entries of mean 0 and equal variance.

    The singular values over sqrt(max(m, n)) have the density sqrt((x^2 - a^2)(b^2 - x^2)) / (pi c x) on [a, b] =
    [1 - sqrt(c), 1 + sqrt(c)] (Marchenko and Pastur 1967); with e = mean(x), the share is
    exp(-mean(x/e ln(x/e))).

    Args:
        aspect: c = min(m, n) / max(m, n), in (0, 1].
    """
    import numpy as np

    root = math.sqrt(aspect)
    # With x = 1 - sqrt(c) cos(t) both square roots lose their kinks, and even steps of t converge fast.
    steps = 4096
    angle = (np.arange(steps) + 0.5) * (math.pi / steps)
    x = 1.0 - root * np.cos(angle)
    weight = np.sin(angle) ** 2 * np.sqrt((x + 1.0) ** 2 - aspect) / x
    weight /= weight.sum()
    relative = x / float((weight * x).sum())
    return math.exp(-float((weight * relative * np.log(relative)).sum()))


@register
class Rank(PairMeasure["dict[str, OfMatrix[UpdateRank]]", "dict[str, Any]"]):
    """The rank of each matrix's update."""

    name = "rank"

    def __init__(self, comparison: Comparison, config: DiagnoseConfig, run: Path | None = None) -> None:
        """Find the tensors that are not matrices, and say how long it takes where that is long."""
        super().__init__(comparison, config, run)
        self.skipped = skipped_tensors(comparison)
        warn_if_long(comparison, config.num_workers)

    def tensor(self, pair: TensorPair) -> dict[str, OfMatrix[UpdateRank]] | None:
        """Return the ranks of a tensor's matrices, by label."""
        if pair.name in self.skipped:
            return None
        found = {}
        for label, update in updates(pair).items():
            value = update_rank(update) if isinstance(update, UpdateMatrix) else update
            found[label] = OfMatrix((pair.shape[-2], pair.shape[-1]), value)
            if isinstance(value, UpdateRank):
                pair.memo["spectral_norm", label] = value.spectral_norm
        return found

    def combine(self, parts: Mapping[str, list[dict[str, OfMatrix[UpdateRank]]]]) -> dict[str, Any]:
        """Return the ranks by layer, kind and matrix."""
        from ssrctl.measures.rank_report import rank_numbers

        found = {label: one for (ranks,) in parts.values() for label, one in ranks.items()}
        return {"rank": rank_numbers(found), "skipped": [{"name": n, "reason": r} for n, r in self.skipped.items()]}

    def present(self, result: dict[str, Any]) -> Findings:
        """Return sentences, figures and tables of ranks."""
        from ssrctl.measures.rank_report import rank_headlines, rank_section

        ranks = result["rank"]
        if ranks is None:
            return Findings(numbers=result)
        return Findings(
            numbers=result,
            headlines=rank_headlines(ranks),
            notes=unmeasured_note("rank", ranks["unmeasured"]),
            sections=[rank_section(ranks)],
            published={"rank": ranks["total"]["rank_frac"]},
        )


def unmeasured_note(what: str, found: list[dict[str, str]]) -> list[str]:
    """Return a note on the matrices that lack a measure; none when there are none."""
    return [f"Matrices without a {what}, with the reason in a table: {len(found):,}."] if found else []
