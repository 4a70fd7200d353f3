"""Log-probabilities of a group's responses, and the exact gradient of each update unit's loss.

Shapes: G responses of one question, P prompt tokens (the same for all), R response tokens (padded on the
right).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.losses import step_policy_loss
from ssrctl.core.units import Unit
from ssrctl.errors import UserError


@dataclass(frozen=True)
class GroupBatch:
    """The responses to one question as tensors.

    Attributes:
        input_ids: int64 ``[G, P + R]``, prompt and response, padded on the right.
        attention_mask: int64 ``[G, P + R]``, 1 where there is a token.
        prompt_length: P.
        old_logprobs: float32 ``[G, R]``, log-probabilities at sampling time; 0 in the padding.
        step_ids: int64 ``[G, R]``, each token's step, -1 in the padding.
    """

    input_ids: Tensor
    attention_mask: Tensor
    prompt_length: int
    old_logprobs: Tensor
    step_ids: Tensor

    @property
    def known(self) -> Tensor:
        """bool ``[G, R]``: True at response tokens, False in the padding."""
        return self.attention_mask[:, self.prompt_length :].bool()


def make_batch(
    prompt_ids: Sequence[int],
    responses: Sequence[Sequence[int]],
    old_logprobs: Sequence[Tensor],
    step_ids: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
) -> GroupBatch:
    """Pad one group's responses into a batch; every response needs at least one token."""
    prompt_length = len(prompt_ids)
    width = max(len(response) for response in responses)
    rows = len(responses)
    input_ids = torch.full((rows, prompt_length + width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    old = torch.zeros(rows, width)
    steps = torch.full((rows, width), -1, dtype=torch.int64)
    input_ids[:, :prompt_length] = torch.tensor(list(prompt_ids))
    for row, response in enumerate(responses):
        end = prompt_length + len(response)
        input_ids[row, prompt_length:end] = torch.tensor(list(response))
        attention_mask[row, :end] = 1
        old[row, : len(response)] = old_logprobs[row]
        steps[row, : len(response)] = torch.tensor(list(step_ids[row]))
    return GroupBatch(input_ids.to(device), attention_mask.to(device), prompt_length, old.to(device), steps.to(device))


def response_logprobs(model: Any, batch: GroupBatch, temperature: float) -> Tensor:
    """float32 ``[G, R]``: log-probability of every response token under the temperature-scaled logits.

    What stands in the padding has no meaning. The graph is kept where gradients are enabled.
    """
    width = batch.step_ids.shape[1]
    extra = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extra["logits_to_keep"] = width + 1  # from the prompt's last token on
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **extra).logits
    logits = logits[:, -(width + 1) : -1].float() / temperature
    targets = batch.input_ids[:, batch.prompt_length :].unsqueeze(-1)
    return logits.gather(-1, targets).squeeze(-1) - logits.logsumexp(-1)


@dataclass(frozen=True)
class UnitGradient:
    """One unit's loss, after its backward pass has filled ``parameter.grad``.

    Attributes:
        unit: which.
        loss: its value (before ``loss_scale``).
        num_terms: surrogate terms in it.
        num_clipped: those in which the clip was active.
    """

    unit: Unit
    loss: float
    num_terms: int
    num_clipped: int


class NonFiniteLoss(ValueError):
    """A unit's loss is NaN or infinite."""


def unit_gradients(
    model: Any,
    batch: GroupBatch,
    units: Sequence[Unit],
    *,
    temperature: float = 1.0,
    clip_epsilon: float = 0.2,
    level: str = "sequence",
    loss_scale: float = 1.0,
    on_logprobs: Callable[[Tensor], None] | None = None,
) -> Iterator[UnitGradient]:
    """Backpropagate the units' losses one after the other through one kept graph.

    After each ``next()``, ``parameter.grad`` holds the exact gradient of that unit's loss alone, provided that
    the caller has dropped the one before (``grad = None``). The forward pass is run once; the graph is freed
    after the last unit.

    Args:
        model: a causal LM.
        batch: the group.
        units: in step order; those without a finite advantage on any token are passed over.
        temperature: of the sampling.
        clip_epsilon, level: see ``core.losses.step_policy_loss``.
        loss_scale: multiplies each loss before the backward pass, such as 1 / questions in the batch.
        on_logprobs: called with the detached log-probabilities ``[G, R]`` of this pass.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite; nothing was backpropagated for it.
    """
    logprobs = response_logprobs(model, batch, temperature)
    if on_logprobs is not None:
        on_logprobs(logprobs.detach())
    losses = [_unit_loss(logprobs, batch, unit, clip_epsilon, level) for unit in units]
    todo = [(unit, made) for unit, made in zip(units, losses, strict=True) if made is not None]
    for place, (unit, (loss, terms, clipped)) in enumerate(todo):
        value = float(loss.detach())
        if not torch.isfinite(loss.detach()):
            raise NonFiniteLoss(f"the loss of steps {list(unit.steps)} is {value}")
        (loss * loss_scale).backward(retain_graph=place < len(todo) - 1)
        yield UnitGradient(unit, value, terms, clipped)


def _unit_loss(
    logprobs: Tensor, batch: GroupBatch, unit: Unit, clip_epsilon: float, level: str
) -> tuple[Tensor, int, int] | None:
    """The sum of the unit's step losses, its number of terms, and how many were clipped."""
    parts = []
    for step, column in zip(unit.steps, unit.advantages, strict=True):
        values = [float("nan") if a is None else a for a in column]
        advantages = torch.tensor(values, dtype=torch.float64, device=logprobs.device)
        made = step_policy_loss(
            logprobs, batch.old_logprobs, batch.step_ids, step, advantages, clip_epsilon=clip_epsilon, level=level
        )
        if made.loss is not None:
            parts.append((made.loss, made.num_terms, made.num_clipped))
    if not parts:
        return None
    return torch.stack([loss for loss, _, _ in parts]).sum(), sum(t for _, t, _ in parts), sum(c for _, _, c in parts)


def trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of every trainable tensor, a tied one once.

    Raises:
        UserError: there is none.
    """
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not found:
        raise UserError("the model has no trainable parameter")
    return found
