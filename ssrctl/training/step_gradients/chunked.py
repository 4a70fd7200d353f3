"""A forward pass in chunks of columns, whose graphs are kept or made again for each unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.chunks import Chunk, ChunkedPass, walk_chunks
from ssrctl.training.step_gradients.cost import ModelCosts, plan_boundaries
from ssrctl.training.step_gradients.shape import group_shape
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


def chunked_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Run the batch once in column ranges that end where units end, and keep all graphs.

    Chunks are cut at the longest response's end of each unit (``cost.plan_boundaries`` leaves out cuts that do
    not pay), so the tokens need no other layout: a shorter response has tokens of later units there, and the
    gradient of a unit flows from wherever its tokens are. The prompt is run for one row, and rows that have
    ended are dropped. Tokens after the last unit are run without a graph, and only if their log-probabilities
    are needed.

    Needs a model without a ``cache_obstacle``. Memory: the activations of all chunks until the last unit is
    done, and the keys and values with their gradients. A backward pass adds up each parameter's gradient over the
    chunks before any is final. With bfloat16 weights these sums are rounded to bfloat16, no more than that arithmetic
    loses anyway.
    """
    run = column_pass(task)
    return walk_chunks(task, run, num_kept=len(run.chunks))


def recomputed_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Run the batch once without a graph, and each chunk again for the units that need it (see ``task.Dials``).

    The chunks are those of ``chunked``. Memory: the activations of one chunk, the keys and values, and for each of the
    units at once their gradients and a gradient of the parameters.
    """
    return walk_chunks(task, column_pass(task), num_kept=0, units_at_once=task.settled_dials.units_at_once or 1)


def column_pass(task: GradientTask) -> ChunkedPass:
    """Cut the task's batch into chunks."""
    boundaries = plan_boundaries(group_shape(task), ModelCosts.of(task.model))
    boundaries = split_boundaries(boundaries, task.settled_dials.chunk_tokens)
    chunks = column_chunks(task.batch, boundaries, task.settled_dials.chunk_tokens, to_the_end=task.needs_all_logprobs)
    return ChunkedPass(task.model, task.batch, chunks, task.head)


def split_boundaries(boundaries: Sequence[int], most: int | None, start: int = 0) -> list[int]:
    """Add cuts, at equal distances, until no chunk has more than ``most`` columns."""
    found = []
    for end in boundaries:
        parts = 1 if most is None else -(-(end - start) // most)
        found += [start + (end - start) * part // parts for part in range(1, parts + 1)]
        start = end
    return found


def column_chunks(
    batch: GroupBatch, boundaries: Sequence[int], most: int | None = None, *, to_the_end: bool
) -> list[Chunk]:
    """Cut the batch at columns.

    Args:
        batch: the group.
        boundaries: ascending columns of ``input_ids`` at which chunks end.
        most: columns of a chunk of the rest; None for no limit.
        to_the_end: True adds the rest as chunks without a graph.
    """
    device = batch.input_ids.device
    last = batch.known.sum(1) + batch.prompt_length - 1  # the column that predicts nothing more
    ends = list(boundaries)
    width = int(last.max())
    if to_the_end and (not ends or ends[-1] < width):
        ends += split_boundaries([width], most, ends[-1] if ends else 0)
    chunks, start = [], 0
    for number, end in enumerate(ends):
        rows = (last > start).nonzero().flatten()
        columns = torch.arange(start, end, device=device).expand(len(rows), -1)
        chunks.append(Chunk(rows, columns, with_graph=number < len(boundaries)))
        start = end
    return chunks
