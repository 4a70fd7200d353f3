"""Gradients accumulated over micro-batches of responses: a forward and backward pass per unit and micro-batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ssrctl.models.precision import ordered_sums
from ssrctl.training.step_gradients.batch import GroupBatch, response_logprobs, response_values
from ssrctl.training.step_gradients.head import HeadSettings
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def accumulated_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """For each unit, add up the gradients of micro-batches of at most ``micro_batch_tokens`` tokens.

    The gradient is that of one batch: each response keeps its weight in the loss of the whole group, and its ratio
    depends on its own tokens only. ``parameter.grad`` is rounded to its dtype after each micro-batch.

    Works with every causal LM. Memory: the activations and logits of one micro-batch. A single unit takes one pass
    over each micro-batch. Several units take one each, after a pass without a graph for the log-probabilities outside
    the unit, where these are needed.
    """
    lengths = task.batch.known.sum(1)
    parts = micro_batches(task.batch, task.micro_batch_tokens or task.batch.input_ids.numel())
    # a response that has not run yet counts as unchanged; the gradient of another does not depend on it
    values = task.batch.old_logprobs.to(torch.promote_types(task.model.dtype, torch.float32), copy=True)
    entropy = torch.zeros_like(values) if task.head.with_entropy else None
    run_once = len(task.active) == 1
    if task.needs_all_logprobs and not run_once:
        for part in parts:
            _run(task, part, int(lengths[part].max()), values, entropy, with_graph=False)
        task.report(values, entropy)
    for active in task.active:
        task.announce(active.unit)
        for part in parts:
            has_unit = active.inside[part].any(1)
            whole = task.needs_all_logprobs and run_once
            rows = part if whole else part[has_unit]
            if not len(rows):
                continue
            end = int(lengths[rows].max()) if whole else min(active.end, int(lengths[rows].max()))
            made = _run(task, rows, end, values, entropy if run_once else None, with_graph=bool(has_unit.any()))
            if made.requires_grad:
                with ordered_sums():
                    made.backward(task.differentiate(active.unit, values)[1][rows, :end])
        if run_once:
            task.report(values, entropy)
        yield task.differentiate(active.unit, values)[0]


@torch.no_grad()
def fixed_logprobs(model: Any, batch: GroupBatch, settings: HeadSettings, tokens: int | None) -> Tensor:
    """Compute the log-probabilities ``[G, R]`` without a graph, in micro-batches of at most ``tokens`` tokens; None for one."""
    if tokens is None:
        return response_logprobs(model, batch, settings=settings)
    lengths, parts = batch.known.sum(1), micro_batches(batch, tokens)
    values = torch.zeros_like(batch.old_logprobs, dtype=torch.promote_types(model.dtype, torch.float32))
    for rows in parts:
        end = int(lengths[rows].max())
        values[rows, :end] = response_logprobs(model, batch, rows=rows, end=end, settings=settings)
    return values


def micro_batches(batch: GroupBatch, tokens: int) -> list[Tensor]:
    """Deal the responses out to micro-batches, the longest first.

    Args:
        batch: the group.
        tokens: most tokens of a micro-batch, with prompts and padding; a longer response has one of its own.

    Returns:
        Per micro-batch, the indices of its responses, int64 and ascending.
    """
    lengths = batch.known.sum(1)
    parts: list[list[int]] = []
    width = 0
    for row in lengths.argsort(descending=True, stable=True).tolist():
        if not parts or (len(parts[-1]) + 1) * width > tokens:
            parts.append([])
            width = batch.prompt_length + int(lengths[row])
        parts[-1].append(row)
    return [torch.tensor(sorted(part), device=lengths.device) for part in parts]


def _run(
    task: GradientTask, rows: Tensor, end: int, values: Tensor, entropy: Tensor | None, *, with_graph: bool
) -> Tensor:
    """Return the rows' first ``end`` log-probabilities; write them to ``values``, and entropies where wanted."""
    settings = dataclasses.replace(task.head, with_entropy=entropy is not None)
    with torch.set_grad_enabled(with_graph):
        made, spread = response_values(task.model, task.batch, settings, rows=rows, end=end)
    known = task.batch.known[rows, :end]
    values[rows, :end] = torch.where(known, made.detach().to(values.dtype), values[rows, :end])
    if entropy is not None and spread is not None:
        entropy[rows, :end] = spread.to(entropy.dtype)
    return made
