"""The gap between the log-probabilities of the engine that sampled and the trainer's, and its correction.

Shapes: G responses of one question, R response tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Correction:
    """Importance weights of what the engine sampled, for the trainer's policy.

    Attributes:
        weights: float64 ``[G, R]``, detached; 0 in the padding, and where the engine gave no log-probability.
        num_hit: spans (tokens, steps or responses) that were capped or masked.
        num_spans: spans with a known weight.
    """

    weights: Tensor
    num_hit: int
    num_spans: int


def engine_correction(
    trainer: Tensor, engine: Tensor, step_ids: Tensor, *, kind: str, level: str, cap: float
) -> Correction:
    """Return pi_trainer / pi_engine of each span, truncated or masked above ``cap``.

    The weight of a span is the product over its tokens, so that the mean of ``weight * f(span)`` over samples of the engine
    is, below the cap, the mean of f over the trainer's (truncated importance sampling: Ionides 2008; for engines Yao et
    al. 2025). A span with a missing log-probability has the weight 0: it gives no gradient.

    Args:
        trainer: float ``[G, R]``, log-probabilities of the sampled tokens under the trainer's weights when they were sampled.
        engine: float ``[G, R]``, those that the engine gave; NaN where missing.
        step_ids: int64 ``[G, R]``, each token's step, -1 for padding.
        kind: ``truncate`` (a larger weight counts as ``cap``) or ``mask`` (a span with a larger weight counts 0).
        level: the span: ``token``, ``step`` or ``sequence``.
        cap: largest weight, at least 1.

    Raises:
        ValueError: unknown kind or level.
    """
    if kind not in KINDS or level not in SPANS:
        raise ValueError(f"unknown kind {kind!r} or level {level!r}; known: {', '.join(KINDS)}; {', '.join(SPANS)}")
    known = step_ids >= 0
    spans = SPANS[level](step_ids)[known]
    count = int(spans.max()) + 1 if spans.numel() else 0
    apart = (trainer.double() - engine.double())[known]
    sums = torch.zeros(count, dtype=torch.float64, device=apart.device).index_add_(0, spans, apart)
    present = torch.zeros(count, dtype=torch.bool, device=apart.device)
    present[spans] = True
    ratios = sums.exp()
    hit = ratios > cap
    bounded = KINDS[kind](ratios, cap).masked_fill(ratios.isnan(), 0.0)
    weights = torch.zeros_like(step_ids, dtype=torch.float64)
    weights[known] = bounded[spans]
    return Correction(weights.detach(), int(hit.sum()), int((present & ~ratios.isnan()).sum()))


KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "truncate": lambda ratios, cap: ratios.clamp(max=cap),
    "mask": lambda ratios, cap: ratios.masked_fill(ratios > cap, 0.0),
}

# Number of the span of each token, from its step; the padding's is not used.
SPANS: dict[str, Callable[[Tensor], Tensor]] = {
    "token": lambda steps: torch.arange(steps.numel(), device=steps.device).view_as(steps),
    "step": lambda steps: steps + (int(steps.max()) + 1) * _rows(steps),
    "sequence": lambda steps: _rows(steps).expand_as(steps),
}


def _rows(steps: Tensor) -> Tensor:
    return torch.arange(len(steps), device=steps.device).unsqueeze(1)


@dataclass(frozen=True)
class Gap:
    """The distance of the engine's log-probabilities from the trainer's.

    Attributes:
        mean, p99, max: of \\|difference\\| over tokens; p99 is the smallest that 99% of the tokens do not exceed.
        kl: estimate (k3, at least 0) of KL(engine || trainer), the mean over tokens of exp(d) - d - 1.
        outside_frac: share of tokens whose ratio exp(d) is outside the clip band.
    """

    mean: float
    p99: float
    max: float
    kl: float
    outside_frac: float


def measure_gap(differences: Tensor, *, low: float, high: float) -> Gap | None:
    """Measure the gap; None without a token.

    Args:
        differences: float ``[N]``, log pi_trainer - log pi_engine of sampled tokens.
        low, high: the clip band of the importance ratio.
    """
    if not differences.numel():
        return None
    d = differences.double()
    ordered = d.abs().sort().values
    ratio = d.exp()
    return Gap(
        mean=float(ordered.mean()),
        p99=float(ordered[-(-99 * len(ordered) // 100) - 1]),
        max=float(ordered[-1]),
        kl=float((ratio - d - 1).mean()),
        outside_frac=float(((ratio < low) | (ratio > high)).double().mean()),
    )
