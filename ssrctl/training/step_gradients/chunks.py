"""Forward passes of a group in chunks, whose graphs are joined by hand at their keys and values.

One pass over all chunks fills a store of keys and values. The graph of a chunk takes earlier ones from there as
constants; its backward pass adds their gradients to a second store, from which the backward passes of earlier chunks
start. So a chunk's graph can be kept from the first pass or made again, and no graph copies what the store holds.

Shapes: G responses, P prompt tokens, R response tokens; r rows and w columns of one chunk.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.training.checkpointing import is_checkpointed
from ssrctl.training.step_gradients.batch import GroupBatch
from ssrctl.training.step_gradients.head import HeadSettings, forward_parameters, run_model
from ssrctl.training.step_gradients.task import ActiveUnit, GradientTask, UnitGradient


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
    """The result of one chunk's forward pass.

    Attributes:
        rows, columns: int64 ``[n]``, places in ``[G, R]``.
        logprobs: ``[n]``, with a graph if the chunk has one.
        entropy: ``[n]``; None unless requested.
        states: (layer, 0 for keys or 1 for values, the new ones ``[r, heads, w, width]`` with a graph).
    """

    rows: Tensor
    columns: Tensor
    logprobs: Tensor
    entropy: Tensor | None
    states: list[tuple[int, int, Tensor]]


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
    """The gradients that chunks leave on the keys and values of earlier ones, for one unit."""

    def __init__(self) -> None:
        self.stores: dict[tuple[int, int], Tensor] = {}
        self.touched = False

    def add(self, layer: int, which: int, gradient: Tensor, like: Tensor) -> None:
        """Add ``[r, heads, n, width]`` to the first r rows and n columns."""
        if (layer, which) not in self.stores:
            self.stores[layer, which] = torch.zeros_like(like)
        rows, _, columns, _ = gradient.shape
        self.stores[layer, which][:rows, :, :columns] += gradient
        self.touched = True

    def clear(self) -> None:
        """Set all to zero for the next unit."""
        for store in self.stores.values():
            store.zero_()
        self.touched = False


class ChunkedPass:
    """Chunks of a group on a model, with the keys and values of all.

    A first chunk of just the prompt is run for one row and serves all.

    Args:
        model: a causal LM without a ``cache_obstacle``.
        batch: the group.
        chunks: together every response's tokens from the prompt on, in order; no chunk has a row that the one before
            lacks.
        settings: of the log-probabilities.
        padded: True if there are columns of -1; the model then gets each token's position and a mask of the cached
            tokens.

    Attributes:
        receiver: takes the gradients on earlier keys and values.
    """

    def __init__(
        self, model: Any, batch: GroupBatch, chunks: Sequence[Chunk], settings: HeadSettings, *, padded: bool = False
    ) -> None:
        from transformers.cache_utils import Cache

        self.model, self.batch, self.settings, self.padded = model, batch, settings, padded
        self.receiver = StateGradients()
        # rows in the order in which they end, the last to end first: those of any chunk are then the first ones
        count = torch.zeros(len(batch.input_ids), dtype=torch.int64, device=batch.input_ids.device)
        for chunk in chunks:
            count[chunk.rows] += 1
        rank = torch.argsort(torch.argsort(-count, stable=True))
        self.chunks = []
        for chunk in chunks:
            order = torch.argsort(rank[chunk.rows])
            self.chunks.append(
                Chunk(chunk.rows[order], chunk.columns[order], chunk.with_graph, past_constant=chunk.past_constant)
            )
        self.starts = [0]
        for chunk in chunks:
            self.starts.append(self.starts[-1] + chunk.columns.shape[1])
        self.seen = torch.zeros(len(count), self.starts[-1], dtype=torch.bool, device=count.device)
        self.number = 0
        self.writes = False
        self.states: list[tuple[int, int, Tensor]] = []
        self.cache = Cache(layer_class_to_replicate=functools.partial(_stored_layer, self))

    def run(self, number: int, *, graph: bool, first: bool, wanted: Tensor | None = None) -> Piece:
        """Run a chunk after those before it.

        Args:
            number: of the chunk.
            graph: keep a graph, from earlier keys and values as constants.
            first: True in the first pass, which stores the chunk's keys and values.
            wanted: bool ``[G, R]``, the tokens whose log-probability is needed; None for all.

        Raises:
            UserError: the model did not keep its keys and values in the cache.
        """
        chunk, batch = self.chunks[number], self.batch
        start, stop = self.starts[number], self.starts[number + 1]
        self.number, self.writes, self.states = number, first, []
        for layer in self.cache.layers:
            layer.length = start
        single = self.is_prompt(number)
        columns = chunk.columns[:1] if single else chunk.columns
        rows = chunk.rows[: len(columns)]
        self.seen[: None if single else len(rows), start:stop] = columns >= 0
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
                "attention_mask": self.seen[: len(rows), :stop].long(),
                "position_ids": columns.clamp_min(0),
            }
        with torch.set_grad_enabled(graph and torch.is_grad_enabled()), _lean_attention():
            logprobs, entropy = run_model(
                self.model,
                batch.targets[each, predicted],
                exists,
                self.settings,
                input_ids=batch.input_ids[rows[:, None], columns.clamp_min(0)],
                past_key_values=self.cache,
                use_cache=True,
                **extra,
            )
        if (held := self.cache.get_seq_length()) != stop:
            raise UserError(
                f"{type(self.model).__name__} holds {held} keys after {stop} tokens",
                "use --step-gradient kept or truncated",
            )
        states, self.states = self.states, []
        return Piece(each[exists], predicted[exists], logprobs, entropy, states)

    def is_prompt(self, number: int) -> bool:
        """Return True if the chunk is exactly the prompt, which is the same for all rows."""
        columns = self.chunks[number].columns
        return int(columns[0, -1]) == self.batch.prompt_length - 1 and int(columns[0, 0]) == 0

    def backward(
        self, number: int, piece: Piece, coefficients: Tensor, gradients: StateGradients, retain: bool
    ) -> None:
        """Backpropagate a chunk's share of a loss, and the gradients that later chunks left on its keys and values.

        Args:
            number: of the chunk.
            piece: its forward pass, with a graph.
            coefficients: ``[G, R]``, d(loss)/d(log-probability).
            gradients: of the keys and values; takes those of earlier chunks.
            retain: keep the graph for another backward pass.
        """
        roots, outer = [], []
        mine = coefficients[piece.rows, piece.columns]
        if bool(mine.count_nonzero()):
            roots.append(piece.logprobs)
            outer.append(mine)
        if gradients.touched:
            columns = slice(self.starts[number], self.starts[number + 1])
            for layer, which, state in piece.states:
                if (layer, which) in gradients.stores:
                    found = gradients.stores[layer, which][:, :, columns]
                    roots.append(state)
                    outer.append(found.sum(0, keepdim=True) if self.is_prompt(number) else found[: len(state)])
        if roots:
            self.receiver = gradients
            torch.autograd.backward(roots, outer, retain_graph=retain)


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
            start, stop = run.starts[run.number], run.starts[run.number + 1]
            states = (key_states, value_states)
            if not self.stores:
                self.stores = [
                    new.new_zeros(run.seen.shape[0], new.shape[1], run.seen.shape[1], new.shape[3]) for new in states
                ]
            constant = run.chunks[run.number].past_constant
            joined = []
            for which, (new, store) in enumerate(zip(states, self.stores, strict=True)):
                if run.writes:
                    rows = len(store) if run.is_prompt(run.number) else len(new)
                    store[:rows, :, start:stop] = new.detach()
                if torch.is_grad_enabled() and new.requires_grad:
                    run.states.append((self.index, which, new))
                place = None if constant else (self.index, which)
                joined.append(_Join.apply(new, store, start, run, place))  # type: ignore[no-untyped-call]
            self.keys, self.values = joined
            self.length = stop
            self.is_initialized = True
            return self.keys, self.values

    return StoredLayer()


class _Join(torch.autograd.Function):
    """New keys or values after the stored ones before them, without a copy."""

    @staticmethod
    def forward(
        ctx: Any, new: Tensor, store: Tensor, start: int, run: ChunkedPass, place: tuple[int, int] | None
    ) -> Tensor:
        ctx.start, ctx.run, ctx.place, ctx.store = start, run, place, store
        # of its own version: later chunks write to other columns of the store
        return store[: len(new), :, : start + new.shape[2]].data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.place is not None and ctx.start:
            ctx.run.receiver.add(*ctx.place, gradient[:, :, : ctx.start], ctx.store)
        return gradient[:, :, ctx.start :], None, None, None, None


@contextlib.contextmanager
def _lean_attention() -> Iterator[None]:
    """Keep the graph of ``sdpa`` attention from holding keys and values repeated for each query head."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["sdpa"] = _lean_sdpa
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


def _lean_sdpa(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **settings: Any
) -> Any:
    from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward

    groups = getattr(module, "num_key_value_groups", 1)
    if groups == 1 or attention_mask is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **settings)
    sources = (key.detach(), value.detach())
    repeated = (repeat_kv(key, groups), repeat_kv(value, groups))
    places = [(each.data_ptr(), each.shape) for each in repeated]

    def pack(tensor: Tensor) -> Tensor | int:
        place = (tensor.data_ptr(), tensor.shape)
        return places.index(place) if place in places else tensor

    def unpack(packed: Tensor | int) -> Tensor:
        return repeat_kv(sources[packed], groups) if isinstance(packed, int) else packed

    ungrouped = types.SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return sdpa_attention_forward(ungrouped, query, *repeated, attention_mask, **settings)


def walk_chunks(
    task: GradientTask, run: ChunkedPass, *, num_kept: int, units_at_once: int = 1
) -> Iterator[UnitGradient]:
    """Backpropagate each unit's loss through the chunks, from the last that holds its tokens to the first.

    All chunks run before the first unit, since the sequence-level ratio needs the whole response's
    log-probabilities.

    Args:
        task: the group.
        run: its chunks.
        num_kept: number of leading chunks whose graph is kept from the first pass; the others are run again for each
            unit. A kept graph is freed after the last unit that goes through it.
        units_at_once: number of units that share the second run of a chunk. Their gradients exist together.
    """
    values = torch.zeros_like(task.batch.old_logprobs)
    entropy = torch.zeros_like(values)
    kept: dict[int, Piece] = {}
    for number, chunk in enumerate(run.chunks):
        piece = run.run(number, graph=chunk.with_graph and number < num_kept, first=True)
        values = values.to(piece.logprobs.dtype)
        values[piece.rows, piece.columns] = piece.logprobs.detach()
        if piece.entropy is not None:
            entropy[piece.rows, piece.columns] = piece.entropy.to(entropy.dtype)
        if chunk.with_graph and number < num_kept:
            kept[number] = piece
    task.report(values, entropy)
    reached = [_reached(run.chunks, task.batch, active) for active in task.active]
    named = [parameter for parameter in task.model.parameters() if parameter.requires_grad]
    slots = [StateGradients() for _ in range(min(units_at_once, len(task.active)))]
    for begin in range(0, len(task.active), units_at_once):
        together = range(begin, min(begin + units_at_once, len(task.active)))
        made = [task.differentiate(task.active[place].unit, values) for place in together]
        if len(made) == 1:
            task.announce(made[0][0].unit)
        shares: list[dict[torch.nn.Parameter, Tensor]] = [{} for _ in together]
        for number in sorted({number for place in together for number in reached[place]}, reverse=True):
            users = [place for place in together if number in reached[place]]
            piece_or_none = kept.get(number)
            if piece_or_none is None:
                wanted = torch.stack([made[place - begin][1] != 0 for place in users]).any(0)
                piece = run.run(number, graph=True, first=False, wanted=wanted)
            else:
                piece = piece_or_none
            later = number in kept and any(number in numbers for numbers in reached[together.stop :])
            for place in users:
                if len(made) > 1:
                    _exchange(named, shares[place - begin])
                run.backward(number, piece, made[place - begin][1], slots[place - begin], later or place != users[-1])
                if len(made) > 1:
                    shares[place - begin] = _taken(named)
            if not later:
                kept.pop(number, None)
            del piece, piece_or_none
        for slot in slots:
            slot.clear()
        for gradient, share in zip([gradient for gradient, _ in made], shares, strict=True):
            if len(made) > 1:
                task.announce(gradient.unit)
                _exchange(named, share)
                share.clear()
            yield gradient


def _reached(chunks: Sequence[Chunk], batch: GroupBatch, active: ActiveUnit) -> set[int]:
    """Return the numbers of the chunks through which the gradient of a unit's loss flows."""
    flows, found = False, set()
    for number in reversed(range(len(chunks))):
        chunk = chunks[number]
        predicted = chunk.columns + 1 - batch.prompt_length
        places = predicted.clamp(0, active.inside.shape[1] - 1)
        inside = active.inside[chunk.rows[:, None], places] & (chunk.columns >= batch.prompt_length - 1)
        if bool(inside.any()) or flows:
            found.add(number)
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
