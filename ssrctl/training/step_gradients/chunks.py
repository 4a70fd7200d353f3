"""Forward passes of a group in chunks, whose graphs are joined by hand at their keys and values.

One pass over all chunks fills a store of keys and values. The graph of a chunk takes earlier ones from there as
constants; its backward pass adds their gradients to a second store, from which the backward passes of earlier chunks
start. So a chunk's graph can be kept from the first pass or made again, over other rows and columns than those of the
first pass, and no graph copies what the store holds.

Shapes: G responses, P prompt tokens, R response tokens; r rows and w columns of one chunk.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.models.precision import ordered_sums
from ssrctl.training.checkpointing import is_checkpointed
from ssrctl.training.step_gradients.attention import grouped_attention
from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.head import HeadSettings, forward_parameters, run_model
from ssrctl.training.step_gradients.task import GradientTask


@dataclass(frozen=True, eq=False)
class Chunk:
    """Tokens that go through the model together.

    Attributes:
        rows: int64 ``[r]``, the responses they are from.
        columns: int64 ``[r, w]``, columns of ``GroupBatch.input_ids``; -1 in the padding.
        start: column of the store at which it begins.
        shared: True if it is a part of the prompt that is run for one row and serves all.
        past_constant: True if the keys and values before it count as constants.
    """

    rows: Tensor
    columns: Tensor
    start: int
    shared: bool = False
    past_constant: bool = False

    @property
    def stop(self) -> int:
        """One past its last column of the store."""
        return self.start + self.columns.shape[1]


@dataclass(frozen=True)
class Piece:
    """The result of one chunk's forward pass.

    Attributes:
        rows, columns: int64 ``[n]``, places in ``[G, R]``.
        logprobs: ``[n]``, with a graph if the chunk has one.
        entropy: ``[n]``; None unless requested.
        states: by layer and 0 for keys or 1 for values, the new ones ``[r, heads, w, width]`` with a graph.
    """

    rows: Tensor
    columns: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    states: dict[tuple[int, int], Tensor]


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


class StateGradients:
    """The gradients that chunks leave on the keys and values of earlier ones, for one unit.

    Those on a shared prompt are summed over the rows. Memory: the rows of one block, whose chunks have the first of them,
    up to the last of its columns that has a gradient.

    Args:
        shared: columns of the prompt that are run for one row and serve all.
    """

    def __init__(self, shared: int) -> None:
        self.shared, self.count = shared, 0
        self.of_prompt: dict[tuple[int, int], Tensor] = {}
        self.of_block: dict[tuple[int, int], Tensor] = {}

    def open(self, count: int) -> None:
        """Begin with the chunks of a block of ``count`` rows; drop those of the one before."""
        self.count = count
        self.of_block.clear()

    def add(self, place: tuple[int, int], gradient: Tensor) -> None:
        """Add ``[r, heads, n, width]`` to the first n columns of the first rows. The first call has the largest n."""
        if self.shared:
            total = gradient[:, :, : self.shared].sum(0, keepdim=True)
            if place in self.of_prompt:
                self.of_prompt[place][:, :, : total.shape[2]] += total
            else:
                self.of_prompt[place] = total
        gradient = gradient[:, :, self.shared :]
        _, heads, columns, width = gradient.shape
        if columns:
            if place not in self.of_block:
                self.of_block[place] = gradient.new_zeros(self.count, heads, columns, width)
            self.of_block[place][: len(gradient), :, :columns] += gradient

    def get(self, place: tuple[int, int], chunk: Chunk) -> Tensor | None:
        """Return the gradient ``[r, heads, w, width]`` on a chunk's keys or values; None for none."""
        if chunk.shared:
            found = self.of_prompt.get(place)
            return None if found is None else found[:, :, chunk.start : chunk.stop]
        found = self.of_block.get(place)
        if found is None or found.shape[2] <= chunk.start - self.shared:
            return None
        return found[: len(chunk.rows), :, chunk.start - self.shared : chunk.stop - self.shared]


class ChunkedPass:
    """Chunks of a group on a model, with the keys and values of all.

    Args:
        model: a causal LM without a ``cache_obstacle``.
        batch: the group.
        chunks: of the first pass, together every response's tokens from the prompt on, in order; no chunk has a row that
            the one before lacks.
        settings: of the log-probabilities.
        padded: True if there are columns of -1; the model then gets each token's position and a mask of the cached
            tokens.

    Attributes:
        chunks: those of the first pass, their rows in the order of the store.
        order: int64 ``[G]``, the row at each place of the store: the last to end first.
        shared: columns of the prompt that are run for one row and serve all.
        receiver: takes the gradients on earlier keys and values during a backward pass.
    """

    def __init__(
        self, model: Any, batch: GroupBatch, chunks: Sequence[Chunk], settings: HeadSettings, *, padded: bool = False
    ) -> None:
        from transformers.cache_utils import Cache

        self.model, self.batch, self.settings, self.padded = model, batch, settings, padded
        self.shared = max((chunk.stop for chunk in chunks if chunk.shared), default=0)
        self.receiver: StateGradients | None = None
        # the rows of any chunk are then the first ones
        count = torch.zeros(len(batch.input_ids), dtype=torch.int64, device=batch.input_ids.device)
        for chunk in chunks:
            count[chunk.rows] += 1
        self.order = torch.argsort(-count, stable=True)
        self.rank = torch.argsort(self.order)
        self.chunks = []
        for chunk in chunks:
            order = torch.argsort(self.rank[chunk.rows])
            self.chunks.append(replace(chunk, rows=chunk.rows[order], columns=chunk.columns[order]))
        self.seen = torch.zeros(len(count), chunks[-1].stop, dtype=torch.bool, device=count.device)
        self.chunk, self.rows, self.writes = self.chunks[0], slice(0), False
        self.states: dict[tuple[int, int], Tensor] = {}
        self.cache = Cache(layer_class_to_replicate=functools.partial(_stored_layer, self))

    def run(self, chunk: Chunk, *, graph: bool, first: bool, wanted: Tensor | None = None) -> Piece:
        """Run a chunk after those before it.

        Args:
            chunk: its rows are at neighbouring places of the store, in their order.
            graph: keep a graph, from earlier keys and values as constants.
            first: True in the first pass, which stores the chunk's keys and values, and computes the entropy if the
                settings ask for it.
            wanted: bool ``[G, R]``, the tokens whose log-probability is needed; None for all.

        Raises:
            UserError: the model did not keep its keys and values in the cache.
        """
        batch = self.batch
        place = 0 if chunk.shared else int(self.rank[chunk.rows[0]])
        self.chunk, self.writes, self.states = chunk, first, {}
        self.rows = slice(place, place + (1 if chunk.shared else len(chunk.rows)))
        for layer in self.cache.layers:
            layer.length = chunk.start
        columns = chunk.columns[:1] if chunk.shared else chunk.columns
        rows = chunk.rows[: len(columns)]
        self.seen[slice(None) if chunk.shared else self.rows, chunk.start : chunk.stop] = columns >= 0
        kept = int((columns >= batch.prompt_length - 1).any(0).sum())
        last = chunk.columns[:, chunk.columns.shape[1] - kept :]
        # a column of input_ids predicts the one after it, which is response token column + 1 - P
        predicted = (last + 1 - batch.prompt_length).clamp_min(0)
        each = chunk.rows[:, None].expand_as(predicted)
        exists = (last >= batch.prompt_length - 1) & batch.known[each, predicted]
        if wanted is not None:
            exists &= wanted[each, predicted]
        extra: dict[str, Any] = {}
        if self.padded:
            extra = {
                "attention_mask": self.seen[self.rows, : chunk.stop].long(),
                "position_ids": columns.clamp_min(0),
            }
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()), grouped_attention():
            logprobs, entropy = run_model(
                self.model,
                batch.targets[each, predicted],
                exists,
                replace(self.settings, with_entropy=self.settings.with_entropy and first),
                input_ids=batch.input_ids[rows[:, None], columns.clamp_min(0)],
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            )
        if (held := self.cache.get_seq_length()) != chunk.stop:
            raise UserError(
                f"{type(self.model).__name__} holds {held} keys after {chunk.stop} tokens",
                "use --step-gradient kept or truncated",
            )
        states, self.states = self.states, {}
        return Piece(each[exists], predicted[exists], logprobs, entropy, states)

    def roots(
        self, chunk: Chunk, piece: Piece, coefficients: Tensor, gradients: StateGradients
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the tensors at which a unit's backward pass through a chunk begins, each with its gradient.

        Args:
            chunk, piece: the chunk and its forward pass, with a graph.
            coefficients: ``[G, R]``, d(loss)/d(log-probability).
            gradients: left by later chunks.
        """
        mine = coefficients[piece.rows, piece.columns]
        found = [(piece.logprobs, mine)] if bool(mine.count_nonzero()) else []
        for place, state in piece.states.items():
            if (gradient := gradients.get(place, chunk)) is not None:
                found.append((state, gradient))
        return found

    def backward(self, roots: Sequence[tuple[Tensor, Tensor]], gradients: StateGradients, retain: bool) -> None:
        """Backpropagate from ``roots``.

        Args:
            roots: of a chunk and a unit.
            gradients: takes those of earlier chunks' keys and values.
            retain: keep the graph for another backward pass.
        """
        self.receiver = gradients
        with ordered_sums():
            torch.autograd.backward([root for root, _ in roots], [outer for _, outer in roots], retain_graph=retain)
        self.receiver = None


def _stored_layer(run: ChunkedPass) -> Any:
    """Return a layer of the cache, which takes its place in the order of first use."""
    from transformers.cache_utils import DynamicLayer

    class StoredLayer(DynamicLayer):  # type: ignore[misc]
        """Keys and values of all chunks of a pass, in plain layers even where the model attends within a window.

        The model's own mask applies the window.
        """

        def __init__(self) -> None:
            super().__init__()
            self.index, self.length = len(run.cache.layers), 0
            self.stores: list[Tensor] = []

        def get_seq_length(self) -> int:
            return self.length

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            chunk, states = run.chunk, (key_states, value_states)
            if not self.stores:
                self.stores = [
                    new.new_zeros(run.seen.shape[0], new.shape[1], run.seen.shape[1], new.shape[3]) for new in states
                ]
            joined = []
            for which, (new, store) in enumerate(zip(states, self.stores, strict=True)):
                if run.writes:
                    store[slice(None) if chunk.shared else run.rows, :, chunk.start : chunk.stop] = new.detach()
                if torch.is_grad_enabled() and new.requires_grad:
                    run.states[self.index, which] = new
                place = None if chunk.past_constant else (self.index, which)
                joined.append(_Join.apply(new, store, run, place))  # type: ignore[no-untyped-call]
            self.keys, self.values = joined
            self.length = chunk.stop
            self.is_initialized = True
            return self.keys, self.values

    return StoredLayer()


class _Join(torch.autograd.Function):
    """New keys or values after the stored ones before them, without a copy."""

    @staticmethod
    def forward(ctx: Any, new: Tensor, store: Tensor, run: ChunkedPass, place: tuple[int, int] | None) -> Tensor:
        ctx.run, ctx.place, ctx.start = run, place, run.chunk.start
        # of its own version: later chunks write to other columns of the store
        return store[run.rows, :, : run.chunk.stop].data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.place is not None and ctx.start:
            ctx.run.receiver.add(ctx.place, gradient[:, :, : ctx.start])
        return gradient[:, :, ctx.start :], None, None, None
