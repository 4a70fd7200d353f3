"""The number of representable steps between two floats: the distance in units in the last place (ULP).

Floats of one dtype, taken as sign and magnitude, are in the order of their bit patterns. So the distance of two is
the difference of two integers, whatever the scale of the weights, and an update that is rounded to the nearest
number moves a weight by 0, 1, 2, ... steps. Zero and minus zero are one point.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MAX = 2**63 - 1
_EXACT_BITS = 53  # of float64, by whose exponent the bins are found


def step_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype | None:
    """Return the dtype in which two tensors' distances are counted: the one with fewer bits of significand.

    A weight that is stored wide on one side only is rounded to the narrow dtype first: its steps are those that the
    narrow side can show. (bfloat16 is narrower than float16.) None when one of them is not a floating dtype.
    """
    if not (a.is_floating_point and b.is_floating_point):
        return None
    return max((a, b), key=lambda dtype: torch.finfo(dtype).eps)


def ulp_distance(a: Tensor, b: Tensor) -> np.ndarray:
    """Count the steps between neighbouring representable numbers from ``a`` to ``b``, elementwise.

    Args:
        a: any shape, any floating dtype, finite (infinity lies one step beyond the largest number, NaN nowhere).
        b: the same shape and dtype.

    Returns:
        Integers of 0 or more in the shape of ``a``, of the width that the dtype needs; distances of 2^63 and more,
        which only float64 has, become 2^63 - 1.

    Raises:
        ValueError: two dtypes, or none of floating point.
    """
    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"distances are between floats of one dtype, not {a.dtype} and {b.dtype}")
    ours, theirs = _ordered(a), _ordered(b)
    distance: np.ndarray
    if a.element_size() < 8:
        distance = np.abs(np.subtract(ours, theirs, dtype=f"i{2 * a.element_size()}"))
        return distance
    distance = np.maximum(ours, theirs) - np.minimum(ours, theirs)
    return np.where(distance < 0, _MAX, distance)  # the sum of two magnitudes wraps around


def _ordered(values: Tensor) -> np.ndarray:
    """Return integers in the order of the floats: neighbours are 1 apart, 0 and -0 are both 0."""
    size = values.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits: np.ndarray = values.contiguous().view(integer).numpy()
    sign = bits >> (8 * size - 1)  # 0 or -1
    magnitude = bits & (2 ** (8 * size - 1) - 1)
    ordered: np.ndarray = (magnitude ^ sign) - sign
    return ordered


def count_by_powers(distances: np.ndarray) -> tuple[int, ...]:
    """Count the distances in the bins 1, 2, 3-4, 5-8, 9-16, ..., up to the last bin that is not empty.

    Args:
        distances: integers of 0 or more, any shape; zeros are not counted.
    """
    # Most updates are of one step or two, and the rest is found only once.
    ones, twos = (int(np.count_nonzero(distances == one)) for one in (1, 2))
    before = distances[distances > 2].astype(np.int64) - 1
    if not before.size:
        return (ones, twos) if twos else (ones,) if ones else ()
    if before.max() >> _EXACT_BITS:
        # float64 would round 2^60 - 1 up into the next bin; without its last bits it is exact.
        before = np.where(before >> _EXACT_BITS, before & ~0x7FF, before)
    # Bin i holds the distances whose predecessor has i bits: 2-3 | 4-7 | ...
    return ones, twos, *np.bincount(np.frexp(before.astype(np.float64))[1])[2:].tolist()


def bin_label(place: int) -> str:
    """Return the distances in a bin: ``1``, ``2``, ``3-4``, ``5-8``, ..."""
    return str(place + 1) if place < 2 else f"{2 ** (place - 1) + 1}-{2**place}"
