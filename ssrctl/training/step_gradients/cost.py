"""The cost of each exact method for the units' gradients, and the choice of the cheapest.

The unit of cost is one token's forward pass through the model's body (all but embeddings and logits). Costs
follow from counts alone, never from a clock, so that the same run uses the same method every time.

The cost of a chunk of r rows and w tokens after p cached ones, h of them predicting a response token, is

    chunk + logits [h > 0] + r (w token + h head + (w p + w (w + 1) / 2) pair + p cached)

with different numbers forward and backward.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Any

from ssrctl.training.checkpointing import is_checkpointed
from ssrctl.training.step_gradients.shape import GroupShape


@dataclass(frozen=True)
class DeviceCosts:
    """A device's overheads, in units of its arithmetic.

    Attributes:
        forward_layer, backward_layer: floating-point operations that would fit into the time in which one
            layer's operations are dispatched, whatever their size.
        forward_weights: tokens whose arithmetic takes as long as one read of the weights.
        backward_weights: the same for reading them and adding to their gradient.
        backward_table: as ``backward_weights`` for the output projection, one large tensor whose gradient is
            allocated again by every chunk.
        forward_copy, backward_copy: multiply-adds that would fit into the time in which one cached number is
            copied and read.
    """

    forward_layer: float
    backward_layer: float
    forward_weights: float
    backward_weights: float
    backward_table: float
    forward_copy: float
    backward_copy: float


# cpu: fitted to the processor time of kept, truncated and chunked in dense passes, 20 groups of 1 to 16 steps on models of
# 0.4M, 3M and 135M parameters in float32 (benchmarks/step_gradients.py --cpu-time). cuda: arithmetic with 2e14 operations/s,
# 2e12 bytes/s and bfloat16; the time per layer, 3 and 1.3 ms, is that of Qwen3-1.7B's sizes on an H100 (docs/benchmarks.md).
DEVICE_COSTS = {
    "cpu": DeviceCosts(5.5e7, 3e7, 26.0, 24.0, 240.0, 26.0, 21.0),
    "cuda": DeviceCosts(6e11, 2.6e11, 100.0, 300.0, 300.0, 400.0, 800.0),
}

# Keeping a cache and gathering log-probabilities from pieces, as a share of a chunk's own forward cost: what one
# chunk took longer than the kept graph in short groups, whose choice depends on it.
CACHE_OVERHEAD = 0.6


@dataclass(frozen=True)
class PassCosts:
    """Coefficients of the module's formula for one direction, in forward passes of one token through the body.

    Attributes:
        chunk: fixed cost of a chunk.
        logits: fixed cost of computing any logits in a chunk.
        head: logits and log-probability of one position.
        token: one token through the body.
        pair: one query against one key.
        cached: one cached key and value, in each chunk that reads it.
        without_logits: share of ``token``, ``pair`` and ``cached`` that remains in a chunk without logits; a
            backward pass then starts from keys and values, which skips most of the last layer.
    """

    chunk: float
    logits: float
    head: float
    token: float
    pair: float
    cached: float
    without_logits: float

    def of(self, rows: int, width: int, past: int, heads: int) -> float:
        """Cost of a chunk of ``rows`` x ``width`` tokens after ``past``, with ``heads`` logits per row."""
        pairs = width * past + width * (width + 1) / 2
        body = width * self.token + pairs * self.pair + past * self.cached
        if not heads:
            return self.chunk + rows * body * self.without_logits
        return self.chunk + self.logits + rows * (body + heads * self.head)


def _attention_widths(config: Any) -> tuple[int, int]:
    """Return (query heads, key and value heads), each times their width; 0 without attention."""
    heads = getattr(config, "num_attention_heads", None) or 0
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    return heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width


def mean_attention_widths(config: Any) -> tuple[float, float]:
    """Return (query heads, key and value heads), each times their width, as means over the layers of a text config."""
    # Gemma 4's layers differ; its config then has no head_dim of its own.
    layers = list(config.per_layer_config) if getattr(config, "is_heterogeneous", False) else [config]
    widths = [_attention_widths(layer) for layer in layers]
    return sum(width for width, _ in widths) / len(widths), sum(width for _, width in widths) / len(widths)


def body_parameters(model: Any) -> int:
    """Count the parameters besides the embeddings and the output projection; at least 1."""
    tables = {
        id(module.weight): module.weight.numel()
        for module in (model.get_input_embeddings(), model.get_output_embeddings())
        if module is not None
    }
    count: int = sum(p.numel() for p in model.parameters()) - sum(tables.values())
    return max(1, count)


@dataclass(frozen=True)
class ModelCosts:
    """Costs of one model on one device."""

    forward: PassCosts
    backward: PassCosts

    @classmethod
    def of(cls, model: Any, device: str | None = None) -> ModelCosts:
        """Return the costs from the model's sizes, on its own device or one of another type.

        Every weight counts as used by every token; a model whose config names no attention heads has no attention.
        """
        config = model.config.get_text_config()
        outputs = model.get_output_embeddings()
        attention, cached = mean_attention_widths(config)
        costs = cls.from_sizes(
            body=body_parameters(model),
            head=outputs.weight.numel() if outputs is not None else 0,
            num_layers=config.num_hidden_layers,
            attention_width=attention,
            cache_width=cached,
            device=model.device.type if device is None else device,
        )
        return costs.recomputing() if is_checkpointed(model) else costs

    def recomputing(self) -> ModelCosts:
        """Return the costs with activation checkpointing, where a backward pass runs the layers forward again."""
        sums = {
            name: getattr(self.backward, name) + getattr(self.forward, name)
            for name in ("chunk", "token", "pair", "cached")
        }
        return replace(self, backward=replace(self.backward, **sums))

    @classmethod
    def from_sizes(
        cls, *, body: int, head: int, num_layers: int, attention_width: float, cache_width: float, device: str = "cpu"
    ) -> ModelCosts:
        """Return the costs from counts.

        Args:
            body: parameters without embeddings and output projection.
            head: parameters of the output projection.
            num_layers: of the model.
            attention_width: query heads times their width, the mean over the layers.
            cache_width: key and value heads times their width, likewise.
            device: its type; an unknown one counts as ``cuda``.
        """
        costs = DEVICE_COSTS.get(device, DEVICE_COSTS["cuda"])
        # one layer more for masks, embeddings and the loss
        dispatched = (num_layers + 1) / (2 * body)
        # keys and values once as they are cached and once as they are repeated for the query heads
        cached = 2 * num_layers * (attention_width + cache_width) / body
        pair = 2 * num_layers * attention_width / body
        forward = PassCosts(
            chunk=dispatched * costs.forward_layer + costs.forward_weights,
            logits=costs.forward_weights * head / body,
            head=head / body,
            token=1.0,
            pair=pair,
            cached=cached * costs.forward_copy,
            without_logits=1.0,
        )
        backward = PassCosts(
            chunk=dispatched * costs.backward_layer + costs.backward_weights,
            logits=costs.backward_table * head / body,
            head=2 * head / body,
            token=2.0,
            pair=2 * pair,
            cached=cached * costs.backward_copy,
            without_logits=1 - 1 / num_layers,
        )
        return cls(forward, backward)


def plan_boundaries(shape: GroupShape, costs: ModelCosts) -> list[int]:
    """Return the cheapest cuts for the chunked method among the end of the prompt and the units' ends.

    A cut spares the units that end at it the backward pass through later chunks, but each chunk has its own
    cost, so short units share one. The end of the last unit is always a cut. With a cut at the end
    of the prompt, the prompt is run once for all rows. Shortest path over the possible cuts.

    Returns:
        Ascending columns of ``input_ids`` at which chunks end; empty without units.
    """
    if not shape.units:
        return []
    nodes = sorted({0, shape.prompt_length, *(shape.input_end(unit.end) for unit in shape.units)})
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    for place, end in enumerate(nodes[1:], start=1):
        best[end] = min(
            (best[start][0] + _chunk_cost(shape, costs, start, end), [*best[start][1], end]) for start in nodes[:place]
        )
    return best[nodes[-1]][1]


def _chunk_cost(shape: GroupShape, costs: ModelCosts, start: int, end: int) -> float:
    """Return the cost of columns ``start`` to ``end``: a forward pass, and a backward pass per unit reaching them."""
    rows = 1 if end == shape.prompt_length else shape.rows_beyond(start)
    # response tokens that the chunk predicts
    first, past_last = max(start, shape.prompt_length - 1) - shape.prompt_length + 1, end - shape.prompt_length + 1
    heads = max(0, past_last - first)
    total = costs.forward.of(rows, end - start, start, heads)
    for unit in shape.units:
        if shape.input_end(unit.end) > start:
            own = unit.start < past_last and unit.end > first
            total += costs.backward.of(rows, end - start, start, heads if own else 0)
    return total


def _forward_all(shape: GroupShape, costs: ModelCosts) -> float:
    return costs.forward.of(len(shape.lengths), shape.input_end(shape.width), 0, shape.width)


def kept_cost(shape: GroupShape, costs: ModelCosts, all_logprobs: bool) -> float:
    """Return the cost of one forward pass over everything, and one backward pass over everything per unit."""
    backward = costs.backward.of(len(shape.lengths), shape.input_end(shape.width), 0, shape.width)
    return _forward_all(shape, costs) + len(shape.units) * backward


def truncated_cost(shape: GroupShape, costs: ModelCosts, all_logprobs: bool) -> float:
    """Return the cost of both directions per unit, up to its end for its rows, and of a forward pass for all values."""
    total = _forward_all(shape, costs) if all_logprobs else 0.0
    for unit in shape.units:
        for direction in (costs.forward, costs.backward):
            total += direction.of(unit.num_rows, shape.input_end(unit.end), 0, unit.end)
    return total


def chunked_cost(shape: GroupShape, costs: ModelCosts, all_logprobs: bool) -> float:
    """Return the cost of the best cuts, and of the tail's forward pass for all values."""
    boundaries = plan_boundaries(shape, costs)
    total = CACHE_OVERHEAD * costs.forward.chunk + sum(
        _chunk_cost(shape, costs, a, b) for a, b in zip([0, *boundaries], boundaries, strict=False)
    )
    start, end = boundaries[-1] if boundaries else 0, shape.input_end(shape.width)
    if all_logprobs and end > start:
        total += costs.forward.of(shape.rows_beyond(start), end - start, start, end - max(start, shape.prompt_length))
    return total


Cost = Callable[[GroupShape, ModelCosts, bool], float]
COSTS: dict[str, Cost] = {"kept": kept_cost, "truncated": truncated_cost, "chunked": chunked_cost}


def choose_method(
    shape: GroupShape, costs: ModelCosts, *, all_logprobs: bool, methods: Collection[str] = tuple(COSTS)
) -> str:
    """Return the cheapest exact method.

    Args:
        shape: the lengths.
        costs: of the model.
        all_logprobs: True if log-probabilities of tokens after the last unit are needed as well.
        methods: those that the model supports, of ``COSTS``.

    Raises:
        ValueError: no method given.
    """
    if not methods:
        raise ValueError("no method to choose from")
    return min(methods, key=lambda name: COSTS[name](shape, costs, all_logprobs))
