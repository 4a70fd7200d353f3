"""Counts and sums over the difference of two checkpoints, and the shares and norms that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

from ssrctl.measures.maths.averages import ratio
from ssrctl.measures.maths.ulp import bin_label

# Mukherjee et al. 2025, table 6.
FIXED_TOLERANCES = (1e-8, 1e-7, 1e-6, 1e-5)
DEFAULT_ATOL = 1e-5
DEFAULT_ETA = 1e-3


@dataclass(frozen=True, kw_only=True)
class Change:
    """Counts and sums over compared weights; two of them add up.

    Attributes:
        numel: weights compared.
        num_within: with ``|difference| <= atol``, or equal bit for bit (as NaN to the same NaN is).
        nums_within: the same for each of ``FIXED_TOLERANCES``.
        num_same_bf16: unchanged by the bf16-aware rule (Zhu et al. 2025, def. 2.1).
        num_equal: equal bit for bit in the dtype of the comparison; 0 and -0 differ.
        num_finite: with a finite difference; the sums and the maximum below are over these.
        sum_abs: sum of ``|difference|``, float64.
        max_abs: largest ``|difference|``, 0 when there is none.
        sum_sq: sum of squared differences, float64.
        base_sum_sq: sum of squares of the base's finite weights, float64.
        ulps: weights that moved by 1, 2, 3-4, 5-8, ... representable steps (``ulp.count_by_powers``), without those
            that were 0: thousands of steps lie between 0 and a small number.
        num_from_zero: weights that were exactly 0 and are not any more.
        num_sign_flipped: weights that went from below 0 to above it, or back.
        num_below_step: finite weights that are not equal bit for bit, yet 0 steps apart: 0 against -0, and where the
            dtypes differ what the narrower one does not show.
        num_nan_base, num_inf_base, num_nan_tuned, num_inf_tuned: NaN or infinite weights.
    """

    numel: int = 0
    num_within: int = 0
    nums_within: tuple[int, ...] = (0,) * len(FIXED_TOLERANCES)
    num_same_bf16: int = 0
    num_equal: int = 0
    num_finite: int = 0
    sum_abs: float = 0.0
    max_abs: float = 0.0
    sum_sq: float = 0.0
    base_sum_sq: float = 0.0
    ulps: tuple[int, ...] = ()
    num_from_zero: int = 0
    num_sign_flipped: int = 0
    num_below_step: int = 0
    num_nan_base: int = 0
    num_inf_base: int = 0
    num_nan_tuned: int = 0
    num_inf_tuned: int = 0

    def __add__(self, other: Change) -> Change:
        return add_up([self, other])

    @property
    def sparsity(self) -> float | None:
        """Share unchanged within the tolerance, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_within, self.numel)

    @property
    def sparsity_bf16(self) -> float | None:
        """Share unchanged by the bf16-aware rule, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_same_bf16, self.numel)

    @property
    def bit_equal_frac(self) -> float | None:
        """Share equal bit for bit, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_equal, self.numel)

    @property
    def fixed_sparsity(self) -> dict[float, float | None]:
        """Share unchanged within each of ``FIXED_TOLERANCES``; None when nothing was compared."""
        return {atol: ratio(num, self.numel) for atol, num in zip(FIXED_TOLERANCES, self.nums_within, strict=True)}

    @property
    def num_changed(self) -> int:
        """Weights that moved by more than the tolerance."""
        return self.numel - self.num_within

    @property
    def num_bf16_changed(self) -> int:
        """Weights that changed by the bf16-aware rule."""
        return self.numel - self.num_same_bf16

    @property
    def num_bit_changed(self) -> int:
        """Weights that are not equal bit for bit."""
        return self.numel - self.num_equal

    @property
    def changed_frac(self) -> float | None:
        """Share that moved by more than the tolerance, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_changed, self.numel)

    @property
    def bf16_changed_frac(self) -> float | None:
        """Share that changed by the bf16-aware rule, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_bf16_changed, self.numel)

    @property
    def bit_changed_frac(self) -> float | None:
        """Share that is not equal bit for bit, in [0, 1]; None when nothing was compared."""
        return ratio(self.num_bit_changed, self.numel)

    @property
    def num_stepped(self) -> int:
        """Finite weights other than 0 that moved by at least one representable step."""
        return sum(self.ulps)

    @property
    def num_one_step(self) -> int:
        """Finite weights other than 0 that moved by exactly one representable step."""
        return self.ulps[0] if self.ulps else 0

    @property
    def one_step_frac(self) -> float | None:
        """Share of exactly one step among the weights that moved by at least one; None when none did."""
        return ratio(self.num_one_step, self.num_stepped)

    @property
    def sign_flip_frac(self) -> float | None:
        """Share of flipped signs among the weights that are not equal bit for bit; None when all are."""
        return ratio(self.num_sign_flipped, self.num_bit_changed)

    @property
    def mean_abs_difference(self) -> float | None:
        """Mean ``|difference|`` over the finite differences, changed or not."""
        return ratio(self.sum_abs, self.num_finite)

    @property
    def max_abs_difference(self) -> float | None:
        """Largest finite ``|difference|``; None when there is none."""
        return self.max_abs if self.num_finite else None

    @property
    def relative_l2(self) -> float | None:
        """``||tuned - base|| / ||base||``; 0 without any change, None when only the base is zero."""
        if self.sum_sq == 0:
            return 0.0
        return math.sqrt(self.sum_sq / self.base_sum_sq) if self.base_sum_sq else None

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the json report: counts as stored, shares and norms derived."""
        return {
            **{key: getattr(self, key) for key in _REPORTED},
            **{f"sparsity_{atol:.0e}": share for atol, share in self.fixed_sparsity.items()},
            "ulp_distances": {bin_label(place): count for place, count in enumerate(self.ulps) if count},
        }


def add_up(changes: Iterable[Change]) -> Change:
    """Return the sum; of nothing, an empty ``Change``."""
    parts = list(changes)
    total: dict[str, Any] = {name: sum(getattr(part, name) for part in parts) for name in _SUMMED}
    for name in ("nums_within", "ulps"):
        columns = [getattr(part, name) for part in parts]
        total[name] = tuple(map(sum, itertools.zip_longest(*columns, fillvalue=0)))
    total["max_abs"] = max((part.max_abs for part in parts), default=0.0)
    return Change(**total) if parts else Change()


_REPORTED = (
    "numel", "sparsity", "sparsity_bf16", "bit_equal_frac", "num_changed", "num_bf16_changed", "num_bit_changed",
    "relative_l2", "mean_abs_difference", "max_abs_difference", "num_stepped", "one_step_frac", "num_below_step", "num_from_zero",
    "num_sign_flipped", "sign_flip_frac",
    "num_nan_base", "num_inf_base", "num_nan_tuned", "num_inf_tuned",
)  # fmt: skip
_SUMMED = [field.name for field in fields(Change) if field.name not in ("nums_within", "ulps", "max_abs")]
