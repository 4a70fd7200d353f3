"""The gradient of each update unit's loss, by the cheapest method.

The loss of unit i needs no token after unit i, so several methods give the same gradient: one graph kept for all
backward passes, a pass per unit that ends where the unit ends, and passes in chunks, whose graphs are kept or made again
from stored keys and values. A fifth, ``local``, is an approximation. Each is a module of ``training.step_gradients``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ssrctl.core.units import Unit
from ssrctl.distributed.sharding import ResponseShare
from ssrctl.errors import UserError
from ssrctl.training.step_gradients.accumulated import accumulated_gradients
from ssrctl.training.step_gradients.batch import GroupBatch, make_batch, response_logprobs
from ssrctl.training.step_gradients.chunked import chunked_gradients, recomputed_gradients
from ssrctl.training.step_gradients.chunks import cache_obstacle, position_obstacle
from ssrctl.training.step_gradients.compare import GradientPair, gradient_cosine, gradient_dot, paired
from ssrctl.training.step_gradients.cost import ModelCosts, choose_method
from ssrctl.training.step_gradients.head import LOGIT_CHUNK_TOKENS
from ssrctl.training.step_gradients.kept import kept_gradients
from ssrctl.training.step_gradients.local import layout_obstacle, local_gradients
from ssrctl.training.step_gradients.shape import group_shape
from ssrctl.training.step_gradients.sharded import SHARED
from ssrctl.training.step_gradients.task import Dials, GradientTask, NonFiniteLoss, UnitGradient
from ssrctl.training.step_gradients.truncated import truncated_gradients

__all__ = [
    "METHODS",
    "GradientPair",
    "GradientTask",
    "GroupBatch",
    "NonFiniteLoss",
    "UnitGradient",
    "automatic_method",
    "compare_methods",
    "gradient_cosine",
    "gradient_dot",
    "make_batch",
    "method_obstacle",
    "paired_gradients",
    "response_logprobs",
    "trainable",
    "unit_gradients",
]


def automatic_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Use the exact method that ``automatic_method`` chooses."""
    return METHODS[automatic_method(task)](task)


def piecemeal_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Use the cheaper exact method in which each parameter's gradient is final as soon as it exists."""
    return METHODS[automatic_method(task, ("kept", "truncated"))](task)


METHODS: dict[str, Callable[[GradientTask], Iterator[UnitGradient]]] = {
    "auto": automatic_gradients,
    "piecemeal": piecemeal_gradients,
    "kept": kept_gradients,
    "truncated": truncated_gradients,
    "chunked": chunked_gradients,
    "recomputed": recomputed_gradients,
    "local": local_gradients,
    "accumulated": accumulated_gradients,
}

AUTOMATIC = ("auto", "piecemeal")


def method_obstacle(task: GradientTask, method: str) -> str | None:
    """Return the reason why this model cannot compute its gradients by ``method``; None if it can."""
    if method not in (*AUTOMATIC, "kept") and (obstacle := position_obstacle(task)) is not None:
        return obstacle
    if method not in ("chunked", "recomputed", "local"):
        return None
    obstacle = cache_obstacle(task.model)
    return layout_obstacle(task) if obstacle is None and method == "local" else obstacle


def automatic_method(task: GradientTask, methods: Sequence[str] = ("kept", "truncated", "chunked")) -> str:
    """Return the cheapest exact method that the model supports, by lengths only (``step_gradients.cost``)."""
    able = [name for name in methods if method_obstacle(task, name) is None]
    costs = ModelCosts.of(task.model)
    return choose_method(group_shape(task), costs, all_logprobs=task.needs_all_logprobs, methods=able)


def unit_gradients(
    model: Any,
    batch: GroupBatch,
    units: Sequence[Unit],
    *,
    temperature: float = 1.0,
    clip_epsilon: float = 0.2,
    level: str = "sequence",
    loss_scale: float = 1.0,
    method: str = "auto",
    micro_batch_tokens: int | None = None,
    logit_chunk_tokens: int = LOGIT_CHUNK_TOKENS,
    dials: Dials | None = None,
    on_logprobs: Callable[[Tensor], None] | None = None,
    on_entropy: Callable[[Tensor], None] | None = None,
    on_unit: Callable[[Unit], None] | None = None,
    epsilon_high: float | None = None,
    token_weights: Tensor | None = None,
    beta: float = 0.0,
    num_responses: Mapping[int, int] | None = None,
    share: ResponseShare | None = None,
) -> Iterator[UnitGradient]:
    """Backpropagate the units' losses one after the other.

    After each ``next()``, ``parameter.grad`` holds the gradient of only that unit's loss, provided that the
    caller has dropped the one before (``grad = None``). The weights must stay as they are until the last unit,
    and the model must be deterministic (in eval mode, or without dropout).

    The exact methods differ by the rounding of sums taken in another order: about 1e-6 of a tensor's largest entry
    in float32.

    Args:
        model: a causal LM.
        batch: the group.
        units: in step order; those without a finite advantage on any token are skipped.
        temperature: of the sampling.
        clip_epsilon, level, epsilon_high, token_weights, beta: see ``core.losses.step_policy_loss``.
        loss_scale: multiplies each loss before the backward pass, such as 1 / questions in the batch.
        method: one of ``METHODS``; all but ``local`` are exact, and ``auto`` takes the cheapest of these,
            ``piecemeal`` the cheapest that never needs a whole dense gradient to exist.
        micro_batch_tokens: most tokens of a micro-batch of ``accumulated``; None for one batch.
        logit_chunk_tokens: positions whose whole logits may exist at once.
        dials: of ``recomputed``.
        on_logprobs: called with the detached log-probabilities ``[G, R]`` of this pass, before the first unit.
        on_entropy: called with the entropies (nats, float32 ``[G, R]``, 0 in the padding) of the temperature-scaled
            distributions that the tokens were drawn from, before the first unit.
        on_unit: called with each unit right before its backward pass; with several units at once after their shared
            one, before the unit's gradient is handed over.
        num_responses: by step, the responses of the whole question that have it with a known advantage, where the batch
            is a part of them (``step_gradients.parts``).
        share: of a sharded model, the responses that this process runs; all processes call with the same batch. The
            gradients are those of the shards (``ShardedModel.take_gradients``), by ``kept`` or ``truncated``.

    Raises:
        NonFiniteLoss: a loss is NaN or infinite; nothing was backpropagated for it.
        UserError: an unknown method, or one that this model does not support.
    """
    if method not in METHODS:
        raise UserError(f"unknown method for step gradients: {method!r}", f"use one of {', '.join(METHODS)}")
    task = GradientTask(
        model,
        batch,
        units,
        temperature,
        clip_epsilon,
        level,
        loss_scale,
        micro_batch_tokens,
        logit_chunk_tokens,
        dials,
        on_logprobs=on_logprobs,
        on_entropy=on_entropy,
        on_unit=on_unit,
        epsilon_high=epsilon_high,
        token_weights=token_weights,
        beta=beta,
        num_responses=num_responses,
    )
    if share is not None:
        return SHARED[automatic_method(task, list(SHARED)) if method in AUTOMATIC else method](task, share)
    obstacle = method_obstacle(task, method)
    if obstacle is not None:
        raise UserError(
            f"step gradients of {type(model).__name__} cannot be computed by {method}: {obstacle}",
            "use --step-gradient auto",
        )
    return METHODS[method](task)


def paired_gradients(
    model: Any, batch: GroupBatch, units: Sequence[Unit], first: str, second: str, **settings: Any
) -> Iterator[GradientPair]:
    """Compute each unit's gradient by two methods, and the cosine between them.

    Two gradients exist at a time, and the activations of both methods.

    Args:
        model, batch, units: see ``unit_gradients``; ``parameter.grad`` must be None, and is None afterwards.
        first, second: methods.
        settings: the other arguments of ``unit_gradients``.

    Raises:
        ValueError: a parameter already has a gradient.
    """
    named = dict(trainable(model))
    if present := [name for name, parameter in named.items() if parameter.grad is not None]:
        raise ValueError(f"{len(present)} parameters already have a gradient, {present[0]} among them")
    return paired(
        named,
        unit_gradients(model, batch, units, method=first, **settings),
        unit_gradients(model, batch, units, method=second, **settings),
    )


def compare_methods(
    model: Any, batch: GroupBatch, units: Sequence[Unit], first: str, second: str, **settings: Any
) -> list[float]:
    """Return the cosine (float64) of each active unit's gradients by two methods; see ``paired_gradients``."""
    return [pair.cosine for pair in paired_gradients(model, batch, units, first, second, **settings)]


def trainable(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """Return (name, parameter) of every trainable tensor, a tied one once.

    Raises:
        UserError: there is none.
    """
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    if not found:
        raise UserError("the model has no trainable parameter")
    return found
