"""The fp32 master of a half-precision weight, as the weight and a remainder.

An update below half a unit in the last place of a bf16 or fp16 weight is lost when it is stored. The master is
the fp32 value that the updates add up in; the stored weight is its rounding, and the *remainder* is what the
rounding left. A weight that was never updated is its own master: its remainder is 0.

- bf16 has the sign, the exponent and the upper 7 fraction bits of an fp32 value. Both are read as 32-bit
  integers: ``stored = (master + 0x8000) >> 16`` and ``remainder = master - (stored << 16)``, an int16. A carry
  runs from the fraction into the exponent as it should, since the next bit pattern is the next larger
  magnitude; a tie is rounded away from zero, so that the remainder stays below 0x8000.
- fp16 has fewer exponent bits, so 16 more bits are not always enough: the remainder is the fp32 difference
  between the master and the stored value (nearest, ties to even), which fp32 holds exactly.

``join_master(*split_master(master, dtype))`` is ``master``, bit for bit, with two exceptions: NaNs lose their payload,
and a finite master beyond the last one that rounds to a
finite weight is set to that last one, about 3.3961e38 for bf16 and 65520 for fp16, rather than to infinity.
Infinities and NaNs are stored as such, so that they are seen.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: dtype of the remainder per dtype of the weight; other weights need no master
REMAINDER_DTYPES = {torch.bfloat16: torch.int16, torch.float16: torch.float32}

_BF16_LARGEST = 0x7F7F7FFF  # rounds down to the largest finite bf16, 0x7F7F; one more would round to infinity
_INFINITY = 0x7F800000
_MAGNITUDE = 0x7FFFFFFF
_FP16_LARGEST = 65519.99609375  # the fp32 value below the tie between 65504 and what would be 65536


def split_master(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the weight as it is stored, and what the rounding left.

    Args:
        master: fp32, any shape.
        dtype: of the weight.

    Returns:
        (stored weight of ``dtype``, remainder of ``REMAINDER_DTYPES[dtype]``), both of the master's shape.

    Raises:
        ValueError: the master is not fp32, or weights of ``dtype`` have no remainder.
    """
    if master.dtype != torch.float32:
        raise ValueError(f"masters are {torch.float32}, got {master.dtype}")
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        magnitude = bits & _MAGNITUDE
        # Quiet NaN is 0x7FC0; any other payload could carry into the sign or round to infinity.
        magnitude = torch.where(magnitude > _INFINITY, 0x7FC00000, magnitude)
        magnitude = torch.where(magnitude < _INFINITY, magnitude.clamp(max=_BF16_LARGEST), magnitude)
        bits = magnitude | (bits & ~_MAGNITUDE)
        stored = (bits + 0x8000) >> 16
        return stored.to(torch.int16).view(torch.bfloat16), (bits - (stored << 16)).to(torch.int16)
    if dtype == torch.float16:
        finite = torch.where(master.isinf(), master, master.clamp(-_FP16_LARGEST, _FP16_LARGEST))
        stored = finite.to(torch.float16)
        return stored, torch.where(finite.isfinite(), finite - stored.float(), 0.0)
    raise ValueError(_no_remainder(dtype))


def join_master(stored: Tensor, remainder: Tensor) -> Tensor:
    """Return the fp32 master of weights and their remainders, a pair that ``split_master`` made (or remainder 0).

    Args:
        stored: bf16 or fp16, any shape.
        remainder: of the same shape and of ``REMAINDER_DTYPES[stored.dtype]``.

    Returns:
        fp32, same shape.

    Raises:
        ValueError: weights of this dtype have no remainder, or the remainder has another dtype.
    """
    if stored.dtype not in REMAINDER_DTYPES:
        raise ValueError(_no_remainder(stored.dtype))
    if remainder.dtype != REMAINDER_DTYPES[stored.dtype]:
        raise ValueError(f"the remainder of {stored.dtype} is {REMAINDER_DTYPES[stored.dtype]}, got {remainder.dtype}")
    if stored.dtype == torch.float16:
        widened = stored.float()
        return torch.where(remainder == 0, widened, widened + remainder)  # -0 + 0 would be 0
    return ((stored.view(torch.int16).to(torch.int32) << 16) + remainder).view(torch.float32)


def _no_remainder(dtype: torch.dtype) -> str:
    known = " and ".join(str(known) for known in REMAINDER_DTYPES)
    return f"weights of {dtype} have no remainder: masters are kept for {known}"
