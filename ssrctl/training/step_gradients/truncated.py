"""A fresh forward and backward pass per unit, over the tokens that its loss depends on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch

from ssrctl.models.precision import ordered_sums
from ssrctl.training.step_gradients.batch import response_values
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def truncated_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """For each unit, run the responses that have it up to its last token, forward and backward.

    Works with every causal LM. Memory: the activations of one unit's prefix at a time, the least of
    the exact ways that need no cache. The sequence-level ratio and ``on_logprobs`` need the log-probabilities of whole
    responses, which cost one forward pass without a graph more.
    """
    values = torch.zeros_like(task.batch.old_logprobs)
    if task.needs_all_logprobs:
        with torch.no_grad():
            values, entropy = response_values(task.model, task.batch, task.head)
        task.report(values, entropy)
    settings = dataclasses.replace(task.head, with_entropy=False)
    for active in task.active:
        rows = torch.tensor(active.rows, device=values.device)
        made, _ = response_values(task.model, task.batch, settings, rows=rows, end=active.end)
        places = (rows[:, None], torch.arange(active.end, device=values.device))
        gradient, derivative = task.differentiate(active.unit, values.to(made.dtype).index_put(places, made.detach()))
        task.announce(active.unit)
        with ordered_sums():
            made.backward(derivative[places])
        yield gradient
