"""The clipped policy loss of one reasoning step.

Shapes: G responses of one question, R response tokens, padded on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepLoss:
    """The loss of one step and what the clip did.

    Attributes:
        loss: scalar, with a graph; None when no response has the step with a known advantage.
        num_terms: surrogate terms it averages over (tokens, or steps for the step-level ratio).
        num_clipped: those in which the clip was active.
    """

    loss: Tensor | None
    num_terms: int
    num_clipped: int


def step_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    step_ids: Tensor,
    step: int,
    advantages: Tensor,
    *,
    clip_epsilon: float = 0.2,
    level: str = "sequence",
) -> StepLoss:
    """Negative clipped surrogate of step ``step``: mean over its tokens, then over the responses that have it.

    ``- (1/|J|) sum_{j in J} (1/n_j) sum_{t in step} min(rho_jt A_j, clip(rho_jt, 1-eps, 1+eps) A_j)``

    The ratio rho is, by ``level``: ``token``, pi/pi_old of the token; ``step``, the length-normalised ratio of
    the step, exp(mean over its tokens of log pi/pi_old); ``sequence``, that of the whole response (GSPO), in
    the form whose gradient flows through the step's own tokens only: sg[s] * pi / sg[pi].

    Args:
        logprobs: float ``[G, R]``, log-probabilities of the sampled tokens now, with a graph.
        old_logprobs: float ``[G, R]``, those at sampling time.
        step_ids: int64 ``[G, R]``, each token's step, -1 for padding.
        step: index of the step.
        advantages: float64 ``[G]``; NaN where the response has no such step or no score for it.
        clip_epsilon: half-width of the clip.
        level: ``token``, ``step`` or ``sequence``.

    Raises:
        ValueError: unknown level.
    """
    if level not in RATIOS:
        raise ValueError(f"unknown importance level {level!r}; known: {', '.join(RATIOS)}")
    inside = (step_ids == step) & advantages.isfinite().unsqueeze(1)
    present = inside.any(dim=1)
    if not bool(present.any()):
        return StepLoss(None, 0, 0)
    rows, inside, known = present.nonzero().flatten(), inside[present], step_ids[present] >= 0
    ratio, weights = RATIOS[level](logprobs[rows], old_logprobs[rows], inside, known)
    advantage = advantages[present].to(ratio.dtype).unsqueeze(1)
    plain = ratio * advantage
    clipped = ratio.clamp(1 - clip_epsilon, 1 + clip_epsilon) * advantage
    per_response = (torch.minimum(plain, clipped) * weights).sum(1) / weights.sum(1)
    active = (clipped < plain) & (weights > 0)
    return StepLoss(-per_response.mean(), int((weights > 0).sum()), int(active.sum()))


Ratio = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def _token_ratio(logprobs: Tensor, old: Tensor, inside: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    # Outside the step the difference is set to 0 first: padding may hold anything, and inf * 0 is NaN.
    return ((logprobs - old).masked_fill(~inside, 0.0)).exp(), inside.to(logprobs.dtype)


def _step_ratio(logprobs: Tensor, old: Tensor, inside: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    ratio = _mean_where(logprobs - old, inside).exp()
    return ratio, torch.ones_like(ratio)


def _sequence_ratio(logprobs: Tensor, old: Tensor, inside: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    sequence = _mean_where((logprobs - old).detach(), known).exp()
    through = (logprobs - logprobs.detach()).masked_fill(~inside, 0.0).exp()
    return sequence * through, inside.to(logprobs.dtype)


def _mean_where(values: Tensor, where: Tensor) -> Tensor:
    """``[G, 1]``: mean of each row over the positions where ``where`` is True."""
    return values.masked_fill(~where, 0.0).sum(1, keepdim=True) / where.sum(1, keepdim=True)


RATIOS: dict[str, Ratio] = {"token": _token_ratio, "step": _step_ratio, "sequence": _sequence_ratio}
