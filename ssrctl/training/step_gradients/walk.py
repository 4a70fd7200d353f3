"""The walk of the units' gradients through chunks, from the last to the first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.chunks import Chunk, ChunkedPass, Piece, StateGradients
from ssrctl.training.step_gradients.task import ActiveUnit, GradientTask, UnitGradient


@dataclass
class _Walker:
    """One unit on its way through the chunks.

    Attributes:
        made: its loss.
        derivative: ``[G, R]``, d(loss)/d(log-probability).
        states: the gradients on keys and values.
        share: of the parameters' gradients, while other units add up theirs.
    """

    made: UnitGradient
    derivative: Tensor
    states: StateGradients
    share: dict[torch.nn.Parameter, Tensor] = field(default_factory=dict)


def walk_chunks(
    task: GradientTask,
    run: ChunkedPass,
    again: Callable[[Tensor], list[list[Chunk]]] | None = None,
    units_at_once: int = 1,
) -> Iterator[UnitGradient]:
    """Backpropagate each unit's loss through the chunks, from the last that holds its tokens to the first.

    All chunks run before the first unit, since the sequence-level ratio needs the whole response's
    log-probabilities.

    Args:
        task: the group.
        run: its chunks.
        again: returns the chunks that are run a second time for the tokens in the loss of some units (bool ``[units, G, R]``):
            blocks of the same rows one after the other, those of the shared prompt last. None keeps the graphs of the
            first pass, each until the last unit that goes through it.
        units_at_once: number of units that share a second run. Their gradients exist together.
    """
    values = torch.zeros_like(task.batch.old_logprobs)
    entropy = torch.zeros_like(values)
    last_use = {} if again is not None else _last_use(run.chunks, task.batch, task.active)
    kept: dict[Chunk, Piece] = {}
    for chunk in run.chunks:
        piece = run.run(chunk, graph=chunk in last_use, first=True)
        values = values.to(piece.logprobs.dtype)
        values[piece.rows, piece.columns] = piece.logprobs.detach()
        if piece.entropy is not None:
            entropy[piece.rows, piece.columns] = piece.entropy.to(entropy.dtype)
        if chunk in last_use:
            kept[chunk] = piece
    piece = None  # type: ignore[assignment]
    task.report(values, entropy)
    named = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    for begin in range(0, len(task.active), units_at_once):
        walkers = [
            _Walker(*task.differentiate(active.unit, values), StateGradients(run.shared))
            for active in task.active[begin : begin + units_at_once]
        ]
        alone = len(walkers) == 1
        if alone:
            task.announce(walkers[0].made.unit)
        by_unit = torch.stack([walker.derivative != 0 for walker in walkers])
        wanted = by_unit.any(0)
        for block in [list(kept)] if again is None else again(by_unit):
            for walker in walkers:
                walker.states.open(len(block[0].rows))
            for chunk in reversed(block):
                piece = kept[chunk] if again is None else run.run(chunk, graph=True, first=False, wanted=wanted)
                paths = [
                    (walker, roots)
                    for walker in walkers
                    if (roots := run.roots(chunk, piece, walker.derivative, walker.states))
                ]
                for walker, roots in paths:
                    if not alone:
                        _exchange(named, walker.share)
                    later = last_use.get(chunk, -1) > begin
                    run.backward(roots, walker.states, retain=later or walker is not paths[-1][0])
                    if not alone:
                        walker.share = _taken(named)
                if last_use.get(chunk) == begin:
                    del kept[chunk]
                del piece, paths
        for walker in walkers:
            del walker.states
            if not alone:
                task.announce(walker.made.unit)
                _exchange(named, walker.share)
                walker.share.clear()
            yield walker.made


def _last_use(chunks: Sequence[Chunk], batch: GroupBatch, units: Sequence[ActiveUnit]) -> dict[Chunk, int]:
    """Return, for the chunks through which the gradient of any unit's loss flows, the number of the last such unit."""
    found = {}
    for place, active in enumerate(units):
        flows = False
        for chunk in reversed(chunks):
            predicted = chunk.columns + 1 - batch.prompt_length
            places = predicted.clamp(0, active.inside.shape[1] - 1)
            inside = active.inside[chunk.rows[:, None], places] & (chunk.columns >= batch.prompt_length - 1)
            if bool(inside.any()) or flows:
                found[chunk] = place
                flows = flows or not chunk.past_constant
    return found


def _exchange(parameters: Sequence[torch.nn.Parameter], gradients: dict[torch.nn.Parameter, Tensor]) -> None:
    """Make these the parameters' gradients."""
    for parameter in parameters:
        parameter.grad = gradients.get(parameter)


def _taken(parameters: Sequence[torch.nn.Parameter]) -> dict[torch.nn.Parameter, Tensor]:
    """Return the parameters' gradients, removed from them."""
    found = {parameter: parameter.grad for parameter in parameters if parameter.grad is not None}
    _exchange(parameters, {})
    return found
