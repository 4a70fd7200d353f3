"""The units' gradients of a sharded model: each process runs its share of a question's responses.

All processes make the same passes at the same time, as FSDP wants it: one without a token of a unit runs a token without
weight. The loss is that of the whole question, from the log-probabilities of all processes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ssrctl.distributed.sharding import ResponseShare
from ssrctl.models.precision import ordered_sums
from ssrctl.training.step_gradients.batch import response_values
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def kept_shares(task: GradientTask, share: ResponseShare) -> Iterator[UnitGradient]:
    """As ``kept``: one pass over the process's responses, whose graph is kept for all units."""
    logprobs, values = _first_pass(task, share)
    for number, active in enumerate(task.active, start=1):
        made, derivative = task.differentiate(active.unit, values)
        task.announce(active.unit)
        wanted = derivative[share.rows, : logprobs.shape[1]] * share.counts
        with ordered_sums():
            share.sharded.backward(logprobs, wanted, retain=number < len(task.active))
        yield made


def truncated_shares(task: GradientTask, share: ResponseShare) -> Iterator[UnitGradient]:
    """As ``truncated``: per unit a pass over those of the process's responses that have it, up to its last token."""
    values = torch.zeros_like(task.batch.old_logprobs)
    if task.needs_all_logprobs:
        with torch.no_grad():
            values = _first_pass(task, share)[1]
    settings = dataclasses.replace(task.head, with_entropy=False)
    columns = torch.arange(values.shape[1], device=values.device)
    for active in task.active:
        inside = torch.isin(share.rows, torch.tensor(active.rows, device=values.device)) & share.counts
        mine = dataclasses.replace(share, rows=share.rows[inside]) if bool(inside.any()) else _without_weight(share)
        end = min(active.end, _longest(task, mine.rows)) if mine.counts else 1
        made, _ = response_values(task.model, task.batch, settings, rows=mine.rows, end=end)
        run = torch.zeros_like(task.batch.known)
        run[list(active.rows)] = columns < active.end
        values = torch.where(run, mine.whole(made, values.shape[1]), values.to(made.dtype))
        gradient, derivative = task.differentiate(active.unit, values)
        task.announce(active.unit)
        with ordered_sums():
            share.sharded.backward(made, derivative[mine.rows, :end] * mine.counts)
        yield gradient


SHARED: dict[str, Callable[[GradientTask, ResponseShare], Iterator[UnitGradient]]] = {
    "kept": kept_shares,
    "truncated": truncated_shares,
}


def _first_pass(task: GradientTask, share: ResponseShare) -> tuple[Tensor, Tensor]:
    """Run the process's responses; return its log-probabilities ``[len(rows), w]`` and those of all ``[G, R]``."""
    width = task.batch.step_ids.shape[1]
    end = _longest(task, share.rows)
    logprobs, entropy = response_values(task.model, task.batch, task.head, rows=share.rows, end=end)
    values = share.whole(logprobs, width)
    task.report(values, None if entropy is None else share.whole(entropy, width))
    return logprobs, values


def _without_weight(share: ResponseShare) -> ResponseShare:
    return dataclasses.replace(share, rows=share.rows[:1], counts=False)


def _longest(task: GradientTask, rows: Tensor) -> int:
    return int(task.batch.known[rows].sum(1).max())
