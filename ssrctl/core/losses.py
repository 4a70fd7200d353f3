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
    epsilon_high: float | None = None,
    token_weights: Tensor | None = None,
    beta: float = 0.0,
    reference: Tensor | None = None,
    num_responses: int | None = None,
    correction: Tensor | None = None,
) -> StepLoss:
    """Negative clipped surrogate of step ``step``: mean over its tokens, then over the responses that have it.

    ``- (1/|J|) sum_{j in J} (1/n_j) sum_{t in step} [min(rho_jt A_j, clip(rho_jt, 1-eps, 1+eps_high) A_j) - beta k3_jt]``

    With ``token_weights`` w, 1/(|J| n_j) is w_j instead. The weights of ``response_weights`` do not depend on the step,
    so the sum over steps is the loss of whole responses.

    With ``correction`` c each surrogate term is c times that; c is constant over a step where the ratio is.

    The KL term is the estimator k3 (Schulman 2020), ``exp(d) - d - 1`` with d = log pi_reference - log pi, of each token.

    The ratio rho is, by ``level``: ``token``, pi/pi_old of the token; ``step``, the length-normalised ratio of
    the step, exp(mean over its tokens of log pi/pi_old); ``sequence``, that of the whole response (GSPO), in
    the form whose gradient flows through the step's own tokens only: sg[s] * pi / sg[pi].

    Args:
        logprobs: float ``[G, R]``, log-probabilities of the sampled tokens now, with a graph.
        old_logprobs: float ``[G, R]``, those at sampling time.
        step_ids: int64 ``[G, R]``, each token's step, -1 for padding.
        step: index of the step.
        advantages: float64 ``[G]``; NaN where the response has no such step or no score for it.
        clip_epsilon: the clip's distance below 1, and above it without ``epsilon_high``.
        level: ``token``, ``step`` or ``sequence``.
        epsilon_high: the clip's distance above 1 (DAPO, "clip higher").
        token_weights: float64 ``[G]``, at least 0: the weight of each token of a response.
        beta: weight of the KL term; 0 leaves it out.
        reference: float ``[G, R]``, log-probabilities under the reference weights; needed with ``beta``.
        num_responses: |J| over the whole question, where these are a part of its responses: the losses of the parts then
            sum to that of the whole. None counts J here.
        correction: float ``[G, R]``, at least 0: weights of ``core.engine_gap.engine_correction``.

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
    clipped = ratio.clamp(1 - clip_epsilon, 1 + (clip_epsilon if epsilon_high is None else epsilon_high)) * advantage
    surrogate = torch.minimum(plain, clipped)
    if correction is not None:
        factors = correction[rows].to(surrogate.dtype)
        surrogate = surrogate * (
            factors if level != "step" else factors.masked_fill(~inside, 0.0).amax(1, keepdim=True)
        )
    per_response = (surrogate * weights).sum(1) / weights.sum(1)
    if beta:
        assert reference is not None
        per_response = per_response - beta * _mean_where(k3(logprobs[rows], reference[rows], inside), inside).squeeze(1)
    active = (clipped < plain) & (weights > 0)
    if token_weights is None:
        loss = -per_response.mean() if num_responses is None else -per_response.sum() / num_responses
    else:
        loss = -(per_response * inside.sum(1) * token_weights[rows].to(per_response.dtype)).sum()
    return StepLoss(loss, int((weights > 0).sum()), int(active.sum()))


def k3(logprobs: Tensor, reference: Tensor, where: Tensor) -> Tensor:
    """Return the estimator k3 of KL(pi || reference), token by token: at least 0; 0 where ``where`` is False.

    Args:
        logprobs, reference: float ``[G, R]``, log-probabilities of the sampled tokens.
        where: bool ``[G, R]``, True at the tokens wanted; elsewhere the values may be anything.
    """
    apart = (reference - logprobs).masked_fill(~where, 0.0)
    return apart.exp() - apart - 1


def response_weights(kind: str, lengths: Tensor, *, longest: int, batch_tokens: float) -> Tensor | None:
    """Return the weight of each token of each response of a group, float64 ``[G]``; None for ``step``.

    Args:
        kind: a key of ``LOSS_TYPES``: ``step``, the mean of a step; as TRL defines them ``grpo``, 1 / (G |y_j|); ``dapo``, 1
            over the mean number of trained tokens of a question of the batch; ``dr_grpo``, 1 / (G times the limit).
        lengths: int64 ``[G]``, trained tokens of each response, 0 where all are masked.
        longest: limit on the length of a response, at least 1.
        batch_tokens: trained tokens of the batch over its number of questions.
    """
    return LOSS_TYPES[kind](lengths.double(), longest, batch_tokens)


Weights = Callable[[Tensor, int, float], "Tensor | None"]

LOSS_TYPES: dict[str, Weights] = {
    "step": lambda lengths, longest, batch_tokens: None,
    "grpo": lambda lengths, longest, batch_tokens: 1 / (len(lengths) * lengths.clamp(min=1)),
    "dapo": lambda lengths, longest, batch_tokens: torch.full_like(lengths, 1 / max(batch_tokens, 1.0)),
    "dr_grpo": lambda lengths, longest, batch_tokens: torch.full_like(lengths, 1 / (len(lengths) * longest)),
}


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
