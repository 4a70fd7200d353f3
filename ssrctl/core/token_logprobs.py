"""Log-probabilities of chosen tokens from hidden states, without the logits of all positions at once.

Shapes: N positions, H hidden size, V vocabulary. The output projection runs over blocks of the vocabulary for all
positions together (a running maximum and sum give the log-sum-exp), so that a block holds about ``chunk_tokens * V``
logits. The backward pass computes the blocks again. A block's part of the weight's gradient is one product over all
positions: no partial sum of it is ever rounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

# Makes the product with a probability of 0 a number; a term this far below the largest logit contributes 0 anyway.
LOWEST = -1e4


@dataclass(frozen=True)
class LogitForm:
    """The elementwise function between an output projection and the logits: ``softcap * tanh(scale * z / softcap)``.

    Attributes:
        scale: factor of the projection's output.
        softcap: bound of the logits; None for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def apply(self, projected: Tensor) -> Tensor:
        """Return the logits, in place where the tensor is a new one; at least in float32."""
        logits = projected.to(torch.promote_types(projected.dtype, torch.float32))
        if self.scale != 1.0:
            logits = logits.mul_(self.scale)
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def chain(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Turn d/d(logits) into d/d(projected), both in place."""
        if self.softcap is not None:
            gradient = gradient.mul_(logits.div_(self.softcap).square_().neg_().add_(1.0))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


@dataclass(frozen=True)
class Projection:
    """Settings of the pass from hidden states to log-probabilities.

    Attributes:
        form: of the model's logits.
        temperature: the logits are divided by it.
        chunk_tokens: positions whose whole logits would fill one block of the vocabulary for all.
        with_entropy: compute the entropy too.
    """

    form: LogitForm = LogitForm()
    temperature: float = 1.0
    chunk_tokens: int = 128
    with_entropy: bool = False


def token_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Projection
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-softmax of the temperature-scaled logits at ``targets``, and the entropy of each distribution.

    Args:
        hidden: float ``[N, H]``, the inputs of the output projection.
        weight: float ``[V, H]``.
        bias: float ``[V]`` or None.
        targets: int64 ``[N]``.
        settings: see ``Projection``.

    Returns:
        The log-probabilities ``[N]`` (float32, or float64 where ``hidden`` is), with a graph where gradients are
        enabled, and the entropies ``[N]`` in nats without one; None unless requested.
    """
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, settings)  # type: ignore[no-untyped-call]
    return logprobs, entropy if settings.with_entropy else None


def _blocks(num_rows: int, num_classes: int, chunk_tokens: int) -> list[slice]:
    width = max(1, min(num_classes, chunk_tokens * num_classes // max(1, num_rows)))
    return [slice(start, min(start + width, num_classes)) for start in range(0, num_classes, width)]


def _scaled(hidden: Tensor, weight: Tensor, bias: Tensor | None, block: slice, settings: Projection) -> Tensor:
    """Return the block's logits ``[N, width]``, not yet divided by the temperature."""
    return settings.form.apply(linear(hidden, weight[block], None if bias is None else bias[block]))


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Multiply two matrices with sums in float32 (float64 for float64) that are not rounded to a shorter type."""
    if left.is_cuda and right.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    return left @ right.to(left.dtype)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, settings: Projection
    ) -> tuple[Tensor, Tensor]:
        top, total, moment, chosen = (torch.zeros(()) for _ in range(4))
        for block in _blocks(len(hidden), len(weight), settings.chunk_tokens):
            logits = _scaled(hidden, weight, bias, block, settings)
            if settings.temperature != 1.0:
                logits /= settings.temperature
            local = targets - block.start
            inside = (local >= 0) & (local < logits.shape[1])
            here = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None]).squeeze(1)
            highest = logits.amax(1)
            if block.start == 0:
                top, chosen = highest, here
                total, moment = torch.zeros_like(top), torch.zeros_like(top)
            else:
                highest = torch.maximum(top, highest)
                chosen = torch.where(inside, here, chosen)
                fall = (top - highest).clamp_min(LOWEST)
                moment = (moment + total * fall) * fall.exp()
                total, top = total * fall.exp(), highest
            logits -= top[:, None]
            if settings.with_entropy:
                weights = logits.exp()
                moment = moment + weights.mul(logits.clamp_min_(LOWEST)).sum(1)
            else:
                weights = logits.exp_()
            total = total + weights.sum(1)
        logsumexp = top + total.log()
        entropy = total.log() - moment / total
        ctx.save_for_backward(hidden, weight, bias, targets, logsumexp)
        ctx.settings = settings
        ctx.mark_non_differentiable(entropy)
        return chosen - logsumexp, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the gradients from the positions whose own gradient is not 0."""
        hidden, weight, bias, targets, logsumexp = ctx.saved_tensors
        settings: Projection = ctx.settings
        rows = gradient.nonzero().flatten()
        inputs, places, lse, outer = hidden[rows], targets[rows], logsumexp[rows], gradient[rows]
        outer = outer.to(lse.dtype)
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.zeros_like(inputs, dtype=lse.dtype)
        of_weight = torch.empty_like(weight) if for_weight else None
        of_bias = torch.empty_like(bias) if for_bias else None
        exact = inputs if inputs.is_cuda else inputs.to(lse.dtype)
        for block in _blocks(len(inputs), len(weight), settings.chunk_tokens):
            logits = _scaled(inputs, weight, bias, block, settings)
            each = (logits / settings.temperature).sub_(lse[:, None]).exp_().mul_(-outer[:, None])
            local = places - block.start
            inside = ((local >= 0) & (local < each.shape[1])).nonzero().flatten()
            each[inside, local[inside]] += outer[inside]
            each = settings.form.chain(each, logits).div_(settings.temperature)
            del logits
            if for_hidden:
                of_hidden += _product(each, weight[block])
            if of_weight is not None:
                of_weight[block] = _product(each.mT, exact)
            if of_bias is not None:
                of_bias[block] = each.sum(0)
        if not for_hidden:
            return None, of_weight, of_bias, None, None
        whole = torch.zeros_like(hidden)
        whole[rows] = of_hidden.to(hidden.dtype)
        return whole, of_weight, of_bias, None, None
