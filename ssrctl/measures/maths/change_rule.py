"""The rules by which a weight counts as changed: stored bits, a fixed tolerance, or the bf16-aware rule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ssrctl.configs import DiagnoseConfig
from ssrctl.measures.maths.change import DEFAULT_ATOL, DEFAULT_ETA
from ssrctl.measures.maths.piece_pair import piece_pairs

Rule = Literal["bits", "atol", "bf16"]
Differs = Callable[["Tensor", "Tensor"], "Tensor"]

_WORDS: dict[Rule, str] = {
    "bits": "any stored bit changed",
    "atol": "moved by more than {atol:g}",
    "bf16": "moved by more than {eta:g} of its size, as bf16 (Zhu et al. 2025, definition 2.1)",
}


def change_rule(config: DiagnoseConfig, rule: Rule | None = None) -> tuple[Differs, str]:
    """Return (a function that marks changed weights, the rule in words), by the config's rule unless one is named."""
    chosen: Rule = rule or config.changed_by

    def differs(base: Tensor, tuned: Tensor) -> Tensor:
        return changed(base, tuned, chosen, atol=config.atol, eta=config.bf16_rtol)

    return differs, _WORDS[chosen].format(atol=config.atol, eta=config.bf16_rtol)


def changed(base: Tensor, tuned: Tensor, rule: Rule, *, atol: float = DEFAULT_ATOL, eta: float = DEFAULT_ETA) -> Tensor:
    """Mark the weights that changed by a rule (see the top of this file), in a whole tensor or a piece of one.

    Args:
        base: any shape, any real dtype.
        tuned: the same shape; two dtypes are compared in the one that holds both exactly.
        rule: ``bits``, ``atol`` or ``bf16``.
        atol: of ``atol``, 0 or more.
        eta: of ``bf16``, 0 or more.

    Returns:
        bool in the shape of ``base``, True = changed. NaN and infinite weights changed unless they are equal bit for
        bit (for ``bf16`` also infinities of one sign). For tensors without floating-point numbers ``bf16`` is the
        same as ``bits``.

    Raises:
        ValueError: different shapes, complex tensors, or another rule.
    """
    if rule not in ("bits", "atol", "bf16"):
        raise ValueError(f"no rule {rule!r}: bits, atol or bf16")
    marks = []
    for pair in piece_pairs(base, tuned):
        mark = torch.zeros(pair.numel, dtype=torch.bool)
        mark.numpy()[pair.where] = (
            True if rule == "bits" else ~(pair.moved.within(atol) if rule == "atol" else pair.moved.same_bf16(eta))
        )
        marks.append(mark)
    return torch.cat(marks).view(base.shape)
