"""Divergence between two next-token distributions, position by position (SSR eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def kl_both_ways(logits_p: Tensor, logits_q: Tensor) -> tuple[Tensor, Tensor]:
    """KL(p || q) and KL(q || p) in nats at every position, p and q being the softmax of the logits.

    Computed in float64 (float32 on a device without it, such as mps) from log-softmax, so that neither
    saturates. A token of probability 0 in the first distribution adds nothing; one of probability 0 in the
    second alone makes the divergence infinite.

    Args:
        logits_p: ``[T, V]``, any float dtype; -inf is probability 0.
        logits_q: ``[T, V]``, likewise, on the same device.

    Returns:
        Two tensors ``[T]`` with values in [0, inf] up to rounding. A position where a logit of either is NaN
        or +inf, or where all are -inf, has no distribution: both values are NaN there.

    Raises:
        ValueError: the shapes differ or are not two-dimensional.
    """
    if logits_p.shape != logits_q.shape or logits_p.dim() != 2:
        raise ValueError(f"expected two [T, V] tensors, got {list(logits_p.shape)} and {list(logits_q.shape)}")
    dtype = torch.float32 if logits_p.device.type == "mps" else torch.float64
    log_p, log_q = logits_p.to(dtype).log_softmax(-1), logits_q.to(dtype).log_softmax(-1)
    return _kl(log_p, log_q), _kl(log_q, log_p)


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    # log-softmax spreads a NaN over the whole row, but the line above can hide it where p is 0.
    undefined = log_p.isnan().any(-1) | log_q.isnan().any(-1)
    return terms.sum(-1).masked_fill(undefined, torch.nan)
