"""The shares of an update that positive and negative advantages contribute (``--log-signs-every``).

The policy loss of a unit is a sum over responses, so its gradient is that of the responses with a positive advantage plus
that of those with a negative one. Both are taken apart at the coordinates that the update keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.advantages import of_sign
from ssrctl.core.bits import unpack_bits
from ssrctl.core.claims import KeptUnit
from ssrctl.core.units import Unit
from ssrctl.training.step_gradients.compare import gradient_dot
from ssrctl.training.unit_gradients import UnitGradient

Parts = dict[str, Tensor]
_ZERO = torch.zeros(())  # the gradient of a parameter that one sign does not reach


@dataclass(frozen=True)
class SignSums:
    """Sums over the coordinates that units keep, in float64, of the gradients p and n of the two signs.

    Attributes:
        positive, negative: of p^2 and of n^2.
        dot: of p n.
        num_positive, num_negative: coordinates with \\|p\\| > \\|n\\|, and with \\|n\\| > \\|p\\|.
    """

    positive: float = 0.0
    negative: float = 0.0
    dot: float = 0.0
    num_positive: int = 0
    num_negative: int = 0

    @classmethod
    def of(cls, positive: Mapping[str, Tensor], negative: Mapping[str, Tensor]) -> SignSums:
        """Compare the gradients of the two signs, by parameter name; an absent name counts as zero."""
        num_positive = num_negative = 0
        for name in dict.fromkeys([*positive, *negative]):
            p, n = positive.get(name, _ZERO).abs(), negative.get(name, _ZERO).abs()
            num_positive += int((p > n).sum())
            num_negative += int((n > p).sum())
        return cls(
            gradient_dot(positive, positive),
            gradient_dot(negative, negative),
            gradient_dot(positive, negative),
            num_positive,
            num_negative,
        )

    def __add__(self, other: SignSums) -> SignSums:
        return SignSums(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))

    def metrics(self) -> dict[str, float | None]:
        """Return the metrics of docs/metrics.md; None where nothing was kept, or a sum is not finite."""
        energy, scale = self.positive + self.negative, math.sqrt(self.positive) * math.sqrt(self.negative)
        known = math.isfinite(energy) and math.isfinite(self.dot)
        unequal = self.num_positive + self.num_negative
        return {
            "positive_norm": math.sqrt(self.positive) if known else None,
            "negative_norm": math.sqrt(self.negative) if known else None,
            "negative_energy_frac": self.negative / energy if known and energy else None,
            "negative_coordinate_frac": self.num_negative / unequal if unequal else None,
            "sign_cosine": self.dot / scale if known and scale else None,
        }


def sign_sums(
    named: Mapping[str, torch.nn.Parameter],
    units: Sequence[Unit],
    kept: Sequence[KeptUnit],
    frozen: Mapping[str, Tensor],
    gradients: Callable[[Sequence[Unit]], Iterator[UnitGradient]],
) -> list[SignSums]:
    """Return the sums of each unit of a question.

    Memory: of the gradients at the kept coordinates one copy, and a dense gradient; for dense updates two of these.

    Args:
        named: every trainable tensor; ``parameter.grad`` is None before and after.
        units: those that were backpropagated, in order.
        kept: per unit, the selected part of its gradient; empty for dense updates.
        frozen: bits of the coordinates that never change (True = frozen), by name; for dense updates only.
        gradients: backpropagates units, as ``unit_gradients`` does, with the denominators of the whole question.
    """
    found = {sign: _of_sign(named, units, sign, kept, frozen, gradients) for sign in ("positive", "negative")}
    return [SignSums.of(p, n) for p, n in zip(found["positive"], found["negative"], strict=True)]


def _of_sign(
    named: Mapping[str, torch.nn.Parameter],
    units: Sequence[Unit],
    sign: str,
    kept: Sequence[KeptUnit],
    frozen: Mapping[str, Tensor],
    gradients: Callable[[Sequence[Unit]], Iterator[UnitGradient]],
) -> list[Parts]:
    """Return each unit's gradient of the advantages of one sign where the update keeps it; empty without any."""
    found: list[Parts] = [{} for _ in units]
    places = {unit.steps: place for place, unit in enumerate(units)}
    columns = [of_sign(unit.advantages, sign, other=None) for unit in units]
    mine = [
        dataclasses.replace(unit, advantages=tuple(map(tuple, rows))) for unit, rows in zip(units, columns, strict=True)
    ]
    for made in gradients([unit for unit in mine if unit.has_signal]):
        place = places[made.unit.steps]
        dense = {name: p.grad.reshape(-1) for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        if kept:
            sets = {name: indices.to_indices() for name, indices in kept[place].sets.items()}
            found[place] = {name: dense[name].index_select(0, sets[name]) for name in sets if name in dense}
        else:
            found[place] = {name: _free(gradient, frozen.get(name)) for name, gradient in dense.items()}
    return found


def _free(gradient: Tensor, frozen: Tensor | None) -> Tensor:
    return (
        gradient
        if frozen is None
        else gradient.masked_fill(unpack_bits(frozen.to(gradient.device), 0, gradient.numel()), 0.0)
    )
