"""The clipped surrogate of one step, token by token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def step_loss(
    logprobs: Tensor,
    old: Tensor,
    step_ids: Tensor,
    step: int,
    advantages: Sequence[float],
    clip_epsilon: float,
    level: str,
) -> Tensor | None:
    """- mean over responses of the mean over the step's tokens of min(rho A, clip(rho) A); None without terms.

    Levels, with d_t = log pi_t - log pi_old_t: token, rho_t = exp(d_t); step, rho = exp(mean of d over the step);
    sequence (GSPO-token), rho_t = stop(exp(mean of d over the response)) * pi_t / stop(pi_t).
    """
    per_response = []
    for j, advantage in enumerate(advantages):
        own = [t for t in range(step_ids.shape[1]) if int(step_ids[j, t]) == step]
        if not own or advantage != advantage:
            continue
        real = [t for t in range(step_ids.shape[1]) if int(step_ids[j, t]) >= 0]
        if level == "token":
            ratios = [(logprobs[j, t] - old[j, t]).exp() for t in own]
        elif level == "step":
            ratios = [(sum(logprobs[j, t] - old[j, t] for t in own) / len(own)).exp()]  # type: ignore[union-attr]
        else:
            mean = sum(float((logprobs[j, t] - old[j, t]).detach()) for t in real) / len(real)
            fixed = torch.tensor(mean, dtype=logprobs.dtype).exp()
            ratios = [fixed * logprobs[j, t].exp() / logprobs[j, t].exp().detach() for t in own]
        terms = []
        for rho in ratios:
            clipped = min(max(float(rho.detach()), 1 - clip_epsilon), 1 + clip_epsilon) * advantage
            terms.append(rho * advantage if float(rho.detach()) * advantage <= clipped else logprobs.new_tensor(clipped))
        per_response.append(sum(terms) / len(terms))
    if not per_response:
        return None
    return -sum(per_response) / len(per_response)  # type: ignore[return-value]
