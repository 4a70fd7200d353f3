"""Gradients accumulated over micro-batches of responses: a forward and backward pass per unit and micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssrctl.training.step_gradients.batch import GroupBatch, response_logprobs
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
    run_once = len(task.active) == 1
    if task.needs_all_logprobs and not run_once:
        for part in parts:
            _run(task, part, int(lengths[part].max()), values, with_graph=False)
        if task.on_logprobs is not None:
            task.on_logprobs(values)
    for active in task.active:
        if task.on_unit is not None:
            task.on_unit(active.unit)
        for part in parts:
            has_unit = active.inside[part].any(1)
            whole = task.needs_all_logprobs and run_once
            rows = part if whole else part[has_unit]
            if not len(rows):
                continue
            end = int(lengths[rows].max()) if whole else min(active.end, int(lengths[rows].max()))
            logprobs = _run(task, rows, end, values, with_graph=bool(has_unit.any()))
            if logprobs.requires_grad:
                (task.loss(active.unit, logprobs)[0] * task.loss_scale).backward()
        if run_once and task.on_logprobs is not None:
            task.on_logprobs(values)
        yield task.loss(active.unit, values)[1]


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


def _run(task: GradientTask, rows: Tensor, end: int, values: Tensor, *, with_graph: bool) -> Tensor:
    """Write the rows' first ``end`` log-probabilities to ``values`` ``[G, R]``; return these with the rows' graph."""
    with torch.set_grad_enabled(with_graph):
        made = response_logprobs(task.model, task.batch, task.temperature, rows=rows, end=end)
    places = rows[:, None], torch.arange(end, device=rows.device)
    values[places] = made.detach().to(values.dtype)
    return values.index_put(places, made.to(values.dtype)) if with_graph else values
