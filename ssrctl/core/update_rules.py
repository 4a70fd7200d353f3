"""Update rules of KronosOpt: from the summed, kept gradient of the selected coordinates to a direction.

Each rule is a function of gathered values only: one float32 entry per selected coordinate of one parameter,
shape ``[k]``. The optimizer gathers, applies ``theta <- theta - lr * direction``, and scatters back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Moments = dict[str, Tensor]


@dataclass(frozen=True)
class Hyper:
    """Settings that the rules read from a parameter group.

    Attributes:
        betas: decay of the first and the second moment (``adam``).
        eps: added to the denominator (``adam``, ``rms``).
    """

    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8


@dataclass(frozen=True)
class Contribution:
    """The sums at one parameter's selected coordinates since the last step.

    Attributes:
        gradient: float32 ``[k]``, sum of the kept gradients over units and questions, after the clip.
        squares: float32 ``[k]``, sum over units of each unit's own squared kept gradient, after the clip; empty
            unless the rule asks for it.
        is_new: bool ``[k]``, True where the coordinate was never selected before.
    """

    gradient: Tensor
    squares: Tensor
    is_new: Tensor


@dataclass(frozen=True)
class UpdateRule:
    """An update rule: turns a kept gradient into a direction.

    Attributes:
        direction: (contribution, old moments, settings) -> (direction float32 ``[k]``, new moments).
        unit_scale: RMS of a unit's kept gradient, eps -> factor of the unit's values before the sum; None is 1.
        moments: per-coordinate state, float32, by name.
        uses_squares: True if the rule reads ``Contribution.squares``.
        clips: True if the norm clip applies.
    """

    direction: Callable[[Contribution, Mapping[str, Tensor], Hyper], tuple[Tensor, Moments]]
    unit_scale: Callable[[float, float], float] | None = None
    moments: tuple[str, ...] = ()
    uses_squares: bool = False
    clips: bool = True


def plain(given: Contribution, old: Mapping[str, Tensor], hyper: Hyper) -> tuple[Tensor, Moments]:
    """Return the gradient itself: SSR algorithm 2, line by line."""
    return given.gradient, {}


def adam(given: Contribution, old: Mapping[str, Tensor], hyper: Hyper) -> tuple[Tensor, Moments]:
    """Adam over the coordinates that were ever selected; a step leaves the moments of all others unchanged.

    ``m <- b1 m + (1 - b1) g``; ``v <- b2 v + (1 - b2) s`` with s the sum over units of their own squared
    gradients; direction ``m / (sqrt(v) + eps)``. At a coordinate's first selection v starts at s, so that its
    first update is ``(1 - b1)`` of a full step and grows as gradients agree: bias corrections by step counts
    would make it a full step (counted per coordinate) or ``(1 - b1) / sqrt(1 - b2)`` of one (counted globally).
    """
    b1, b2 = hyper.betas
    first = old["exp_avg"] * b1 + given.gradient * (1 - b1)
    second = torch.where(given.is_new, given.squares, old["exp_avg_sq"] * b2 + given.squares * (1 - b2))
    return first / (second.sqrt() + hyper.eps), {"exp_avg": first, "exp_avg_sq": second}


def _inverse_rms(rms: float, eps: float) -> float:
    return 1.0 / (rms + eps)


RULES: dict[str, UpdateRule] = {
    "sgd": UpdateRule(plain),
    "adam": UpdateRule(adam, moments=("exp_avg", "exp_avg_sq"), uses_squares=True),
    # Every unit's kept gradient has an RMS of 1, whatever its scale; a norm clip would undo just that.
    "rms": UpdateRule(plain, unit_scale=_inverse_rms, clips=False),
}
