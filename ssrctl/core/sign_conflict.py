"""Do two gradients want the same of a coordinate? Shares of opposite signs, counted and weighted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Products computed at a time in float64, so that the copies stay small compared with the gradients.
CHUNK = 2**22


@dataclass(frozen=True)
class SignConflict:
    """Signs of the products a_c b_c of two gradients over coordinates c.

    Attributes:
        dot: their sum.
        magnitude: the sum of their absolute values.
        num_both: coordinates where neither is 0.
        num_opposite: those where the signs differ.
    """

    dot: float = 0.0
    magnitude: float = 0.0
    num_both: int = 0
    num_opposite: int = 0

    @property
    def frac(self) -> float | None:
        """Share of the coordinates where neither is 0 in which the signs differ; 1/2 for random signs."""
        return self.num_opposite / self.num_both if self.num_both else None

    @property
    def weighted_frac(self) -> float | None:
        """Share of sum |a_c b_c| where the signs differ: (magnitude - dot) / (2 magnitude); 1/2 for random signs.

        It ties the cosine to the signs: cosine = (1 - 2 weighted_frac) magnitude / (|a| |b|).
        """
        return (self.magnitude - self.dot) / (2 * self.magnitude) if self.magnitude else None


def sign_conflict(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], within: Mapping[str, Tensor] | None = None
) -> SignConflict:
    """Compare two gradients coordinate by coordinate.

    Args:
        a, b: gradients by parameter name; an absent name counts as zero.
        within: flat indices (int64, distinct) by name, the only coordinates to look at; None looks at all.
    """
    dot = magnitude = 0.0
    num_both = num_opposite = 0
    for product in _products(a, b, within):
        # float64 holds the product of any two float32 numbers without underflow, so no sign is lost
        dot += float(product.sum())
        magnitude += float(product.abs().sum())
        num_both += int(product.count_nonzero())
        num_opposite += int((product < 0).sum())
    return SignConflict(dot, magnitude, num_both, num_opposite)


def _products(
    a: Mapping[str, Tensor], b: Mapping[str, Tensor], within: Mapping[str, Tensor] | None
) -> Iterator[Tensor]:
    for name in a if within is None else within:
        if name not in a or name not in b:
            continue
        left, right = a[name].reshape(-1), b[name].reshape(-1)
        if within is not None:
            left, right = left[within[name]], right[within[name]]
        for start in range(0, left.numel(), CHUNK):
            part = slice(start, start + CHUNK)
            yield left[part].double() * right[part].double()


def union_indices(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the union of two sets of flat indices by name, ascending."""
    return {name: torch.cat([one[name] for one in (a, b) if name in one]).unique() for name in dict.fromkeys([*a, *b])}
