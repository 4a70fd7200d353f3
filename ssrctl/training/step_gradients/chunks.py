"""Forward passes of a group in chunks, with the keys and values of earlier chunks in a cache.

Shapes: G responses, P prompt tokens, R response tokens; r rows and w columns of one chunk, V logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.training.checkpointing import is_checkpointed
from ssrctl.training.step_gradients.batch import GroupBatch, forward_parameters, last_logits, token_logprobs
from ssrctl.training.step_gradients.task import GradientTask, UnitGradient


@dataclass(frozen=True)
class Chunk:
    """Tokens that go through the model together.

    Attributes:
        rows: int64 ``[r]``, the responses they are from, ascending, among those of the chunk before.
        columns: int64 ``[r, w]``, columns of ``GroupBatch.input_ids``; -1 in the padding.
        with_graph: True if gradients will flow through it.
        past_constant: True if the keys and values before it count as constants.
    """

    rows: Tensor
    columns: Tensor
    with_graph: bool = True
    past_constant: bool = False


@dataclass(frozen=True)
class Piece:
    """The log-probabilities that one chunk gave.

    Attributes:
        rows, columns: int64, places in ``[G, R]``, of shapes that broadcast to that of ``logprobs``.
        logprobs: with a graph if the chunk has one.
    """

    rows: Tensor
    columns: Tensor
    logprobs: Tensor


def cache_obstacle(model: Any) -> str | None:
    """Return the reason why gradients cannot flow through this model's cached keys and values; None if they can."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    if missing := {"past_key_values", "use_cache"} - forward_parameters(model):
        return f"its forward method does not take {', '.join(sorted(missing))}"
    if is_checkpointed(model):
        return "gradient checkpointing is on, which excludes a cache"
    if getattr(model, "_is_stateful", False):
        return "it carries a state besides keys and values"
    config = model.config.get_text_config()
    if getattr(config, "is_encoder_decoder", False) or not getattr(config, "is_causal", True):
        return "it is not a causal decoder"
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if not kinds:
        layers = {type(layer) for layer in DynamicCache(config=config).layers}
        kinds = {layer.__name__ for layer in layers - {DynamicLayer, DynamicSlidingWindowLayer}}
    return f"it has layers of other kinds ({', '.join(sorted(kinds))})" if kinds else None


def position_obstacle(task: GradientTask) -> str | None:
    """Return the reason why a token's logits depend on how many tokens follow it; None if they do not.

    Rotary frequencies of the types ``dynamic`` and ``longrope`` change for all tokens when the sequence outgrows the length
    of pretraining, so a pass over a part of the sequence gives other logits than one over the whole.
    """
    config = task.model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer_type = [one for one in rope.values() if isinstance(one, dict)]
    total = task.batch.input_ids.shape[1]
    for one in by_layer_type or [rope]:
        if one.get("rope_type") not in ("dynamic", "longrope"):
            continue
        length = one.get("original_max_position_embeddings") or config.max_position_embeddings
        if total > length:
            return (
                f"its rotary frequencies ({one['rope_type']}) depend on the length beyond {length} tokens, "
                f"and these are {total}"
            )
    return None


def run_chunks(
    model: Any, batch: GroupBatch, chunks: Sequence[Chunk], temperature: float, *, padded: bool = False
) -> Iterator[Piece]:
    """Run the chunks one after the other; each sees the keys and values of those before it.

    A first chunk of just the prompt is run for one row and serves all. Rows that a chunk does not have are
    dropped from the cache, so no later chunk may have them.

    Args:
        model: a causal LM without a ``cache_obstacle``.
        batch: the group.
        chunks: together every response's tokens from the prompt on, in order.
        temperature: of the sampling.
        padded: True if there are columns of -1; the model then gets each token's position and a mask of the cached
            tokens.

    Yields:
        Per chunk that predicts response tokens, their log-probabilities.

    Raises:
        UserError: the model did not keep its keys and values in the cache.
    """
    from transformers import DynamicCache

    # plain layers even where the model attends within a window: the model's own mask applies the window
    cache = DynamicCache()
    held = torch.zeros(1, dtype=torch.int64, device=batch.input_ids.device)
    seen = torch.zeros(1, 0, dtype=torch.bool, device=held.device)
    for chunk in chunks:
        rows = chunk.rows[:1] if _is_prompt(chunk, batch) else chunk.rows
        columns = chunk.columns[: len(rows)]
        kept = int((columns >= batch.prompt_length - 1).any(0).sum())
        piece = None
        with torch.set_grad_enabled(chunk.with_graph and torch.is_grad_enabled()):
            seen = torch.cat([_keep_rows(cache, held, rows, seen), columns >= 0], dim=1)
            held = rows
            if chunk.past_constant:
                for layer in cache.layers:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            extra: dict[str, Any] = last_logits(model, kept)
            if padded:
                extra |= {"attention_mask": seen.long(), "position_ids": columns.clamp_min(0)}
            inputs = batch.input_ids[rows[:, None], columns.clamp_min(0)]
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True, **extra).logits
            if kept:
                piece = _piece(batch, chunk, logits[:, -kept:], temperature)
        if cache.get_seq_length() != seen.shape[1]:
            raise UserError(
                f"{type(model).__name__} holds {cache.get_seq_length()} keys after {seen.shape[1]} tokens",
                "use --step-gradient kept or truncated",
            )
        if piece is not None:
            yield piece


def _is_prompt(chunk: Chunk, batch: GroupBatch) -> bool:
    """Return whether the chunk is exactly the prompt, which is the same for all rows."""
    return int(chunk.columns[0, -1]) == batch.prompt_length - 1 and int(chunk.columns[0, 0]) == 0


def _keep_rows(cache: Any, held: Tensor, rows: Tensor, seen: Tensor) -> Tensor:
    """Make the cache hold ``rows`` instead of ``held``; return ``seen`` for them."""
    if len(held) == 1 and len(rows) > 1:  # before the first chunk, or after the prompt, which was run for one row
        cache.batch_repeat_interleave(len(rows))
        return seen.expand(len(rows), -1)
    if len(rows) == len(held):
        return seen
    places = torch.searchsorted(held, rows)
    cache.reorder_cache(places)
    return seen[places]


def _piece(batch: GroupBatch, chunk: Chunk, logits: Tensor, temperature: float) -> Piece:
    """Return the chunk's last logits ``[r, kept, V]`` (``[1, 1, V]`` after the prompt) at the tokens they predict."""
    columns = chunk.columns[:, -logits.shape[1] :]
    # a column of input_ids predicts the one after it, which is response token column + 1 - P
    predicted = (columns + 1 - batch.prompt_length).clamp_min(0)
    targets = batch.targets[chunk.rows[:, None], predicted]
    logprobs = token_logprobs(logits, targets, temperature)
    exists = columns >= batch.prompt_length - 1
    if bool(exists.all()):
        return Piece(chunk.rows[:, None], predicted, logprobs)
    rows = chunk.rows[:, None].expand_as(predicted)
    return Piece(rows[exists], predicted[exists], logprobs[exists])


def backpropagate_pieces(task: GradientTask, made: Iterator[Piece]) -> Iterator[UnitGradient]:
    """Backpropagate each unit's loss through the pieces that hold its tokens (and whatever these depend on).

    All chunks run before the first unit, since the sequence-level ratio needs the whole response's
    log-probabilities. A piece is freed after the last unit that has a token in it.
    """
    pieces: list[Piece | None] = list(made)
    dtype = next((piece.logprobs.dtype for piece in pieces if piece is not None), torch.float32)
    values = torch.zeros_like(task.batch.old_logprobs, dtype=dtype)
    for piece in pieces:
        assert piece is not None
        values[piece.rows, piece.columns] = piece.logprobs.detach()
    if task.on_logprobs is not None:
        task.on_logprobs(values)
    held = [
        [number for number, p in enumerate(pieces) if p is not None and bool(active.inside[p.rows, p.columns].any())]
        for active in task.active
    ]
    for place, active in enumerate(task.active):
        logprobs = values
        for number in held[place]:
            piece = pieces[number]
            assert piece is not None
            logprobs = logprobs.index_put((piece.rows, piece.columns), piece.logprobs)
        later = {number for numbers in held[place + 1 :] for number in numbers}
        gradient = task.backpropagate(active.unit, logprobs, retain_graph=bool(later))
        pieces = [p if number in later else None for number, p in enumerate(pieces)]
        del logprobs, piece
        yield gradient
