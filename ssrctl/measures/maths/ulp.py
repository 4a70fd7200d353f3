"""How many representable numbers lie between two floats: the distance in units in the last place (ULP).

Floats of one dtype, taken as sign and magnitude, are in the order of their bit patterns. So the distance of two is
the difference of two integers, whatever the scale of the weights, and an update that is rounded to the nearest
number moves a weight by 0, 1, 2, ... steps. Zero and minus zero are one point.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor

_MAX = 2**63 - 1
_EXACT_BITS = 53  # of float64, by whose exponent the bins are found


def step_dtype(a: torch.dtype, b: torch.dtype) -> torch.dtype | None:
    """The dtype in which two tensors' distances are counted: the narrower one, by the bits of its significand.

    A weight that is stored wide on one side alone is rounded to the narrow dtype first: its steps are those that the
    narrow side can show. (bfloat16 is narrower than float16.) None when one of them is no floating dtype.
    """
    import torch

    if not (a.is_floating_point and b.is_floating_point):
        return None
    return max((a, b), key=lambda dtype: torch.finfo(dtype).eps)


def ulp_distance(a: Tensor, b: Tensor) -> np.ndarray:
    """How many steps between neighbouring representable numbers lead from ``a`` to ``b``, elementwise.

    Args:
        a: any shape, any floating dtype, finite (infinity lies one step beyond the largest number, NaN nowhere).
        b: the same shape and dtype.

    Returns:
        Integers of 0 or more in the shape of ``a``, as wide as they have to be; distances of 2^63 and more, which
        only float64 has, are given as 2^63 - 1.

    Raises:
        ValueError: two dtypes, or none of floating point.
    """
    import numpy as np

    if a.dtype != b.dtype or not a.is_floating_point():
        raise ValueError(f"distances are between floats of one dtype, not {a.dtype} and {b.dtype}")
    ours, theirs = _ordered(a), _ordered(b)
    if a.element_size() < 8:
        wide = f"i{2 * a.element_size()}"
        return np.abs(np.subtract(ours, theirs, dtype=wide))
    distance = np.maximum(ours, theirs) - np.minimum(ours, theirs)
    return np.where(distance < 0, _MAX, distance)  # the sum of two magnitudes wraps around


def _ordered(values: Tensor) -> np.ndarray:
    """Integers that are ordered as the floats are, 0 and -0 alike 0, neighbours 1 apart."""
    import torch

    size = values.element_size()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    bits = values.contiguous().view(integer).numpy()
    sign = bits >> (8 * size - 1)  # 0 or -1
    magnitude = bits & (2 ** (8 * size - 1) - 1)
    return (magnitude ^ sign) - sign


def count_by_powers(distances: np.ndarray) -> tuple[int, ...]:
    """How many distances lie in the bins 1, 2, 3-4, 5-8, 9-16, ...: as many counts as there is need of.

    Args:
        distances: integers of 0 or more, any shape; those of 0 are in no bin.
    """
    import numpy as np

    # Most updates are of one step or two, and the rest is found only once.
    ones, twos = (int(np.count_nonzero(distances == one)) for one in (1, 2))
    before = distances[distances > 2].astype(np.int64) - 1
    if not before.size:
        return (ones, twos) if twos else (ones,) if ones else ()
    if before.max() >> _EXACT_BITS:
        # float64 would round 2^60 - 1 up into the next bin; without its last bits it is exact.
        before = np.where(before >> _EXACT_BITS, before & ~0x7FF, before)
    # Bin i holds what has i bits once 1 is taken off: 2-3 | 4-7 | ...
    return ones, twos, *np.bincount(np.frexp(before.astype(np.float64))[1])[2:].tolist()


def bin_label(place: int) -> str:
    """The distances in a bin: ``1``, ``2``, ``3-4``, ``5-8``, ..."""
    return str(place + 1) if place < 2 else f"{2 ** (place - 1) + 1}-{2**place}"
