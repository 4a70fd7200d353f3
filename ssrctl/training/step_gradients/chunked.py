"""A forward pass in chunks of columns, whose graphs are kept or made again for each unit."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.chunks import Chunk, ChunkedPass
from ssrctl.training.step_gradients.cost import ModelCosts, plan_boundaries
from ssrctl.training.step_gradients.shape import group_shape, units_shape
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient
from ssrctl.training.step_gradients.walk import walk_chunks

# Tokens of a chunk of recomputed gradients, by device, where neither the user nor a plan says: on a GPU a chunk of a few
# thousand takes as long as a small one.
RECOMPUTED_CHUNK_TOKENS = {"cpu": 1024, "cuda": 4096}


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
    ends = plan_boundaries(group_shape(task), ModelCosts.of(task.model))
    if task.needs_all_logprobs:
        ends = sorted({*ends, last_input(task)})
    return walk_chunks(task, ChunkedPass(task.model, task.batch, column_chunks(task.batch, ends), task.head))


def recomputed_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Run the batch once without a graph, and for each unit the tokens before its end again (see ``task.Dials``).

    The second time response after response, each up to its own last token of the unit, in chunks of at most so many tokens, cut
    where units end if that pays as in ``chunked``; short responses share a chunk. The prompt comes once for all, if the cuts of ``chunked`` have it apart.

    Needs a model without a ``cache_obstacle``. Memory: the keys and values of the group, the activations of one chunk,
    and for each of the units at once a gradient of the parameters and the gradients of one response's keys and values.
    """
    rows, prompt = len(task.batch.input_ids), task.batch.prompt_length
    most = task.settled_dials.chunk_tokens or default_chunk_tokens(task.model.device.type)
    costs = ModelCosts.of(task.model)
    planned = plan_boundaries(group_shape(task), costs)
    shared = prompt if prompt in planned else 0
    last = last_input(task) if task.needs_all_logprobs else max(planned, default=0)
    ends = split_range(0, shared, most) + split_range(shared, last, max(1, most // rows))
    run = ChunkedPass(task.model, task.batch, column_chunks(task.batch, ends, shared), task.head)
    return walk_chunks(
        task, run, lambda wanted: row_blocks(run, wanted, most, costs), task.settled_dials.units_at_once or 1
    )


def default_chunk_tokens(device: str) -> int:
    """Return the tokens of a chunk on a device of this type, where neither the user nor a plan says."""
    return RECOMPUTED_CHUNK_TOKENS.get(device, RECOMPUTED_CHUNK_TOKENS["cpu"])


def last_input(task: GradientTask) -> int:
    """Return the number of columns of ``input_ids`` that predict a response token."""
    return int(task.batch.known.sum(1).max()) + task.batch.prompt_length - 1


def split_range(start: int, stop: int, most: int) -> list[int]:
    """Return the ends of the fewest equal parts of at most ``most``; none of an empty range."""
    parts = -(-(stop - start) // most)
    return [start + (stop - start) * part // parts for part in range(1, parts + 1)]


def column_chunks(batch: GroupBatch, ends: Sequence[int], shared: int | None = None) -> list[Chunk]:
    """Cut the batch at columns.

    Args:
        batch: the group.
        ends: ascending columns of ``input_ids`` at which chunks end.
        shared: columns of the prompt that are run for one row; by default all if a chunk is exactly the prompt.
    """
    last = batch.known.sum(1) + batch.prompt_length - 1  # the column that predicts nothing more
    if shared is None:
        shared = batch.prompt_length if ends and ends[0] == batch.prompt_length else 0
    chunks, start = [], 0
    for end in ends:
        rows = (last > start).nonzero().flatten()
        chunks.append(_chunk(rows, start, end, shared=end <= shared))
        start = end
    return chunks


def row_blocks(run: ChunkedPass, wanted: Tensor, most: int, costs: ModelCosts) -> list[list[Chunk]]:
    """Cut the tokens on which the wanted ones depend into blocks of rows, and these into chunks of columns.

    Args:
        run: the pass over the group.
        wanted: bool ``[units, G, R]``, the tokens in the loss of each unit.
        most: tokens of a chunk; a block has several rows only if one chunk holds them whole.
        costs: of the model; they tell which cuts at units' ends pay.

    Returns:
        Blocks of chunks of the same rows, ascending; those of the shared prompt come last.
    """
    past_last = (wanted.any(0) * torch.arange(1, wanted.shape[2] + 1, device=wanted.device)).amax(1)
    # inputs that a row needs beyond the shared ones
    needed = [max(0, count + run.batch.prompt_length - 1 - run.shared) if count else 0 for count in past_last.tolist()]
    order = run.order.tolist()
    blocks, first = [], 0
    while first < len(order):
        width, stop = needed[order[first]], first + 1
        while stop < len(order) and width and (more := needed[order[stop]]):
            if (stop + 1 - first) * max(width, more) > most:
                break
            width, stop = max(width, more), stop + 1
        rows = run.order[first:stop]
        planned = plan_boundaries(units_shape(wanted[:, rows], run.batch.prompt_length), costs) if width else []
        cuts = [run.shared]
        for end in planned:
            cuts += split_range(cuts[-1], end, max(1, most // (stop - first))) if end > cuts[-1] else []
        if block := [_chunk(rows, a, b) for a, b in itertools.pairwise(cuts)]:
            blocks.append(block)
        first = stop
    if bool(past_last.any()) and (prompt := [chunk for chunk in run.chunks if chunk.shared]):
        blocks.append(prompt)
    return blocks


def _chunk(rows: Tensor, start: int, end: int, *, shared: bool = False) -> Chunk:
    return Chunk(rows, torch.arange(start, end, device=rows.device).expand(len(rows), -1), start, shared=shared)
