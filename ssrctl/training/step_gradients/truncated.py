"""A fresh forward and backward pass per unit, over the tokens that its loss depends on."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssrctl.training.step_gradients.batch import response_logprobs
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def truncated_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """For each unit, run the responses that have it up to its last token, forward and backward.

    Works with every causal LM. Memory: the activations and logits of one unit's prefix at a time, the least of
    the three exact ways. The sequence-level ratio and ``on_logprobs`` need the log-probabilities of whole
    responses, which cost one forward pass without a graph more.
    """
    values = _all_logprobs(task)
    for active in task.active:
        rows = torch.tensor(active.rows, device=values.device)
        made = response_logprobs(task.model, task.batch, task.temperature, rows=rows, end=active.end)
        columns = torch.arange(active.end, device=values.device)
        yield task.backpropagate(
            active.unit, values.to(made.dtype).index_put((rows[:, None], columns), made), retain_graph=False
        )


def _all_logprobs(task: GradientTask) -> Tensor:
    """``[G, R]`` without a graph: the log-probabilities where they are needed, else zeros."""
    if not task.needs_all_logprobs:
        return torch.zeros_like(task.batch.old_logprobs)
    with torch.no_grad():
        values = response_logprobs(task.model, task.batch, task.temperature)
    if task.on_logprobs is not None:
        task.on_logprobs(values)
    return values
