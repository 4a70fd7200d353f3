"""New weights as all bytes of their bits but the top one; the receiver finds that by the weight it has.

It takes the pattern with these bytes that is nearest to the pattern of its weight. Integer patterns of floats of one sign are
in the order of the floats, so that a small update is a small step between patterns. The rule is safe to repeat: nearest to
the new weight is the new weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssrctl.core.bits import bit_patterns

_INTEGERS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}


def near(values: Tensor, before: Tensor) -> Tensor:
    """Return a bool ``[k]``: the new values that ``place_tails`` finds from their tails and the values before.

    Those are less than half a top byte's unit away: in bfloat16 128 units in the last place, a factor of up to 2.
    """
    if values.dtype not in _INTEGERS:
        return torch.zeros(len(values), dtype=torch.bool)
    patterns = bit_patterns(before)
    return _nearest(patterns, bit_patterns(values)) == bit_patterns(values)


def tails(values: Tensor) -> Tensor:
    """Return all bytes but the top one of the values' bits, uint8 ``[k, itemsize - 1]``."""
    size = values.dtype.itemsize
    return values.contiguous().view(torch.uint8).view(-1, size)[:, : size - 1].contiguous()


def marked(shape: tuple[int, ...], dtype: torch.dtype, indices: Tensor, tails: Tensor) -> Tensor:
    """Return a tensor of ``shape`` and ``dtype`` whose bits are tails with a top byte of 1 at ``indices``, 0 elsewhere.

    Args:
        shape: of the weights.
        dtype: of the weights as they are stored.
        indices: flat, int64 ``[k]``.
        tails: as ``tails`` returns.
    """
    ones = torch.ones(len(tails), 1, dtype=torch.uint8, device=tails.device)
    found = torch.zeros(shape, dtype=_INTEGERS[dtype], device=tails.device)
    found.view(-1)[indices] = torch.cat([tails, ones], 1).view(_INTEGERS[dtype]).squeeze(1)
    return found.view(dtype)


def place_tails(destination: Tensor, source: Tensor) -> None:
    """Write, in place, the weights whose tails are marked in ``source``; it has the shape of ``destination``.

    Raises:
        ValueError: bits in ``source`` that ``marked`` does not make.
    """
    patterns = source.view(_INTEGERS[source.dtype])
    places = patterns.nonzero(as_tuple=True)
    found = patterns[places]
    top = 8 * (source.dtype.itemsize - 1)
    if bool((found >> top != 1).any()):
        raise ValueError("the loader of the weights computes with them instead of copying them")
    old = destination[places].to(source.dtype)  # a wider destination holds values of the source's dtype
    destination[places] = _nearest(bit_patterns(old), found).view(source.dtype).to(destination.dtype)


def _nearest(old: Tensor, tails: Tensor) -> Tensor:
    """Return the patterns nearest to ``old`` that agree with ``tails`` in all bits but the top eight."""
    bits = 8 * (old.element_size() - 1)
    steps = (tails - old) & ((1 << bits) - 1)
    return old + (steps - ((steps >> (bits - 1)) << bits))
