"""Counts of sets of weights by the power of two of the weights' magnitudes.

A weight of small magnitude has a small step to the next value that its dtype can store, so that the same update moves
it more often (Zhu et al. 2025, arXiv:2511.08567, gate III and lemma E.2). Within a power of two all steps are equal:
a comparison within one is free of this effect.
"""

from __future__ import annotations

import torch
from torch import Tensor

_PART = 1 << 20  # weights counted at once
_LOWEST, _HIGHEST = -148, 128  # of ``frexp`` in float32; exponents beyond count with the last
NUM_CLASSES = _HIGHEST - _LOWEST + 3  # before them 0, after them NaN and infinity


def magnitude_classes(weights: Tensor) -> Tensor:
    """Return the class of each weight, int64 of the same shape: 0 for zero, then by power of two, non-finite ones last.

    Args:
        weights: any real dtype and shape.
    """
    wide = weights if weights.dtype == torch.float64 else weights.to(torch.float32)
    exponent = torch.frexp(wide).exponent.to(torch.int64).clamp_(_LOWEST, _HIGHEST) - _LOWEST + 1
    exponent[wide == 0] = 0
    exponent[~wide.isfinite()] = NUM_CLASSES - 1
    return exponent


def count_by_magnitude(base: Tensor, *sets: Tensor) -> Tensor:
    """Count the weights, and those of each set, in each class of ``magnitude_classes``.

    Args:
        base: any real dtype and shape.
        sets: bool, the same shape.

    Returns:
        int64 ``[1 + sets, classes]``; classes without weights are left out.

    Raises:
        ValueError: different shapes.
    """
    if any(one.shape != base.shape for one in sets):
        raise ValueError(f"shapes differ: {list(base.shape)} and {[list(one.shape) for one in sets]}")
    counts = torch.zeros(1 + len(sets), NUM_CLASSES, dtype=torch.int64)
    for weights, *chosen in zip(*(one.flatten().split(_PART) for one in (base, *sets)), strict=True):
        classes = magnitude_classes(weights)
        counts[0] += torch.bincount(classes, minlength=NUM_CLASSES)
        for place, one in enumerate(chosen, 1):
            counts[place] += torch.bincount(classes[one], minlength=NUM_CLASSES)
    return counts[:, counts[0] > 0]


def widened(weights: Tensor) -> Tensor:
    """Return 8-bit floating-point weights as bfloat16, which holds them exactly; torch hardly computes with 8 bits."""
    return weights.to(torch.bfloat16) if weights.dtype.is_floating_point and weights.itemsize == 1 else weights
