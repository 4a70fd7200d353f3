"""One forward pass in chunks, whose keys and values stay in the graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.chunks import Chunk, backpropagate_pieces, run_chunks
from ssrctl.training.step_gradients.cost import ModelCosts, plan_boundaries
from ssrctl.training.step_gradients.shape import group_shape
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def chunked_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Run the batch in column ranges that end where units end; each backward pass stops at its unit's end.

    Chunks are cut at the longest response's end of each unit (``cost.plan_boundaries`` leaves out cuts that do
    not pay), so the tokens need no other layout: a shorter response has tokens of later units there, and the
    gradient of a unit flows from wherever its tokens are. The prompt is run for one row, and rows that have
    ended are dropped. Tokens after the last unit are run without a graph, and only if their log-probabilities
    are needed.

    Needs a model without a ``cache_obstacle``. Memory: the activations of all chunks until the last unit is
    done, about as much as the kept graph. A backward pass adds up each parameter's gradient over the chunks
    before any is final, so a whole dense gradient exists even if each is consumed as it becomes final. With
    bfloat16 weights these sums are rounded to bfloat16, no more than that arithmetic loses anyway.
    """
    boundaries = plan_boundaries(group_shape(task), ModelCosts.of(task.model))
    chunks = column_chunks(task.batch, boundaries, to_the_end=task.needs_all_logprobs)
    yield from backpropagate_pieces(task, run_chunks(task.model, task.batch, chunks, task.temperature))


def column_chunks(batch: GroupBatch, boundaries: Sequence[int], *, to_the_end: bool) -> list[Chunk]:
    """Cut the batch at columns.

    Args:
        batch: the group.
        boundaries: ascending columns of ``input_ids`` at which chunks end.
        to_the_end: True adds the rest as a last chunk without a graph.
    """
    device = batch.input_ids.device
    last = batch.known.sum(1) + batch.prompt_length - 1  # the column that predicts nothing more
    ends = list(boundaries)
    width = int(last.max())
    if to_the_end and (not ends or ends[-1] < width):
        ends.append(width)
    chunks, start = [], 0
    for number, end in enumerate(ends):
        rows = (last > start).nonzero().flatten()
        columns = torch.arange(start, end, device=device).expand(len(rows), -1)
        chunks.append(Chunk(rows, columns, with_graph=number < len(boundaries)))
        start = end
    return chunks
