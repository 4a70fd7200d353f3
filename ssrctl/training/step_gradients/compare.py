"""Comparison of gradients from two methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.units import Unit
from ssrctl.training.step_gradients.task import UnitGradient

# Elements turned into float64 at a time, so that the copies stay small compared with the gradient.
DOT_CHUNK = 2**22


@dataclass(frozen=True)
class GradientPair:
    """One unit's gradient by two methods.

    Attributes:
        unit: the unit.
        first, second: by parameter name; a parameter without a gradient is absent.
        cosine: between the two over all parameters, float64; 0 where one of them is zero.
    """

    unit: Unit
    first: dict[str, Tensor]
    second: dict[str, Tensor]
    cosine: float


def gradient_dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the inner product over all tensors that both have, products and sums in float64.

    In float32 the sum over 1e8 products of unlike size is off by percents.
    """
    total = 0.0
    for name in a:
        if name not in b:
            continue
        left, right = a[name].reshape(-1), b[name].reshape(-1)
        for start in range(0, left.numel(), DOT_CHUNK):
            part = slice(start, start + DOT_CHUNK)
            total += float(torch.dot(left[part].double(), right[part].double()))
    return total


def gradient_cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    """Return the cosine between two gradients, in float64; 0 where one is zero."""
    scale = (gradient_dot(a, a) * gradient_dot(b, b)) ** 0.5
    return gradient_dot(a, b) / scale if scale > 0 else 0.0


def paired(
    named: Mapping[str, torch.nn.Parameter], first: Iterator[UnitGradient], second: Iterator[UnitGradient]
) -> Iterator[GradientPair]:
    """Advance two methods together, so that only two gradients exist at any time.

    Args:
        named: the parameters; their ``grad`` is None before and after each unit.
        first, second: over the same units of the same model.
    """
    for (unit, mine), (_, theirs) in zip(_taken(named, first), _taken(named, second), strict=True):
        yield GradientPair(unit, mine, theirs, gradient_cosine(mine, theirs))


def _taken(
    named: Mapping[str, torch.nn.Parameter], made: Iterator[UnitGradient]
) -> Iterator[tuple[Unit, dict[str, Tensor]]]:
    """Yield each unit with its gradient, removed from the parameters."""
    for gradient in made:
        found = {name: p.grad for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        yield gradient.unit, found
