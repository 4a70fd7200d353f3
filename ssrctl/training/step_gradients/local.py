"""The approximation with constant keys and values of earlier steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssrctl.training.step_gradients.chunks import Chunk, ChunkedPass
from ssrctl.training.step_gradients.head import forward_parameters
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient
from ssrctl.training.step_gradients.walk import walk_chunks


def local_gradients(task: GradientTask) -> Iterator[UnitGradient]:
    """Backpropagate each unit's loss through its own tokens only: one forward and one backward pass in all.

    An approximation: the gradient of a unit's loss through the keys and values of earlier tokens is lost. A unit's own
    tokens are, in each response, the inputs that predict the tokens after the unit before it up to its last
    one. The prompt goes with the first unit, whose gradient is therefore exact.

    Responses reach their units at different columns, so the tokens get a new layout: all tokens of a unit
    are in one range of columns, padded to the longest. Needs a model without a ``cache_obstacle`` or a
    ``layout_obstacle``. Memory: the activations of all tokens at first; each unit's are freed after it.
    """
    return walk_chunks(task, ChunkedPass(task.model, task.batch, unit_chunks(task), task.head, padded=True))


def unit_chunks(task: GradientTask) -> list[Chunk]:
    """Return the prompt, then each unit's tokens; those after the last unit, if needed, without a graph."""
    batch, device = task.batch, task.batch.input_ids.device
    prompt = torch.arange(batch.prompt_length, device=device).expand(len(batch.input_ids), -1)
    chunks = [Chunk(torch.arange(len(prompt), device=device), prompt, start=0, shared=True)]
    owner = input_owners(task)
    count = len(task.active) + task.needs_all_logprobs
    for number in range(count):
        # rows stay while they have any token to come
        rows = ((owner >= number) & (owner < count)).any(1).nonzero().flatten()
        mine = owner[rows] == number
        widths = mine.sum(1)
        width = int(widths.max()) if len(rows) else 0
        if not width:
            continue
        start = batch.prompt_length + (owner[rows] < number).sum(1) - (owner[rows] < 0).sum(1)
        slots = torch.arange(width, device=device)
        columns = torch.where(slots < widths[:, None], start[:, None] + slots, -1)
        chunks.append(Chunk(rows, columns, chunks[-1].stop, past_constant=number > 0))
    return chunks


def input_owners(task: GradientTask) -> Tensor:
    """Return the number of the active unit to which each input token belongs, int64 ``[G, R - 1]``.

    An input belongs to the unit of the token that it predicts; tokens between two units to the later one. The
    count of units stands for tokens after the last, -1 for inputs that predict nothing.
    """
    last_steps = torch.tensor([max(active.unit.steps) for active in task.active], device=task.batch.step_ids.device)
    predicted = task.batch.step_ids[:, 1:].contiguous()
    return torch.searchsorted(last_steps, predicted).masked_fill(predicted < 0, -1)


def layout_obstacle(task: GradientTask) -> str | None:
    """Return the reason why this group cannot be laid out by units for this model; None if it can."""
    from transformers import DynamicCache

    if "position_ids" not in forward_parameters(task.model):
        return "its forward method does not take position_ids"
    windows = [
        window
        for layer in DynamicCache(config=task.model.config.get_text_config()).layers
        if (window := getattr(layer, "sliding_window", None)) is not None
    ]
    config = task.model.config.get_text_config()
    if "local" in (getattr(config, "attention_layers", None) or ()):  # GPT-Neo's, which its cache does not know
        windows.append(config.window_size)
    total = sum(chunk.columns.shape[1] for chunk in unit_chunks(task))
    if windows and min(windows) < total:
        return f"it attends to the last {min(windows)} columns only, and the padded steps take {total}"
    return None
