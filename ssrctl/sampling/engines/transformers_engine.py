"""Sampling with transformers: batches that rows leave when they end and join when there is room.

``generate`` runs in rounds. A round ends when a quarter of its rows have ended; these leave the batch and its cache, and
when half of the batch is empty, waiting requests are read in a batch of their own and join it. Every row draws from its
own random generator, so a response does not depend on the rows beside it. Logits are rounded differently in batches of
other shapes (about 1e-6 in float32), which changes a token now and then: where two tokens are as good as tied.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ssrctl.configs import SamplingConfig
from ssrctl.errors import UserError
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import decode
from ssrctl.sampling.endings import StopTexts, end_token_ids
from ssrctl.sampling.engines.base import Request, Sample

_LEAVING_SHARE = 0.25  # a round ends when this share of its rows has ended: a dozen rounds empty a batch of 64
_FULL_SHARE = 0.5  # waiting requests join a batch that is at most this full


class NonFiniteLogits(UserError):
    """A model whose logits are NaN or infinite, from which no token can be sampled."""


@dataclass
class _Row:
    """A response in progress.

    Attributes:
        place: of its request.
        request: the request.
        generator: the source of its random numbers.
        ids: the new tokens.
        logprobs: theirs.
        finished: True after an end token or a stop text.
    """

    place: int
    request: Request
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finished: bool = False

    @property
    def finish_reason(self) -> Literal["stop", "length"]:
        """The reason why no token follows."""
        return "stop" if self.finished else "length"

    @property
    def done(self) -> bool:
        """True if no token may follow."""
        return self.finished or len(self.ids) >= self.request.limit


@dataclass
class _Batch:
    """Rows that go through the model together.

    Attributes:
        rows: B of them.
        input_ids: int64 ``[B, W]``, padded on the left.
        attention_mask: int64 ``[B, W]``, 1 where there is a token.
        cache: keys and values of the first W - 1 columns; None where the model keeps no such cache.
    """

    rows: list[_Row]
    input_ids: Tensor
    attention_mask: Tensor
    cache: DynamicCache | None


class TransformersEngine:
    """The engine that samples in this process, with the weights of the model itself.

    Args:
        loaded: the model.
        sampling: temperature, top-p, top-k, stop texts and the size of a batch; requests have their own limits.
        refill: False empties each batch before the next one starts.
        leave: False keeps rows that have ended in the batch until all have.
    """

    def __init__(
        self, loaded: LoadedModel, sampling: SamplingConfig, *, refill: bool = True, leave: bool = True
    ) -> None:
        self.loaded, self.sampling, self.version = loaded, sampling, 0
        layers = cache_layers(loaded.model)
        self._selects = leave and layers <= {DynamicLayer, DynamicSlidingWindowLayer} and bool(layers)
        # keys and values of all columns, which can be padded and cut
        self._trims = self._selects and layers == {DynamicLayer}
        self._joins = refill and self._trims
        self._ends = end_token_ids(loaded)
        self._stops = StopTexts(loaded.tokenizer, sampling.stop)

    @torch.no_grad()
    def sample(self, requests: Sequence[Request]) -> Iterator[tuple[int, Sample]]:
        """Yield (place, sample) as responses end.

        The state of torch's global generators neither matters nor changes.

        Raises:
            NonFiniteLogits: the model gives NaN or infinity for some token.
        """
        size = self.sampling.sampling_batch_size
        # a batch that is trimmed as rows leave never outgrows the context (``_round``)
        context = None if self._trims else self.loaded.context_length
        waiting = deque(sorted(range(len(requests)), key=lambda i: len(requests[i].ids)))
        batch: _Batch | None = None
        while waiting or batch is not None:
            beside = [] if batch is None else batch.rows
            places: list[int] = []
            if batch is None or (self._joins and len(beside) <= _FULL_SHARE * size):
                places = _next_places(waiting, requests, beside, size, context)
            if places:
                batch = self._joined(batch, [self._row(place, requests[place]) for place in places])
            assert batch is not None
            self._round(batch, waits=bool(waiting))
            for row in batch.rows:
                if row.done:
                    text = decode(self.loaded.tokenizer, row.ids)
                    logprobs = torch.tensor(row.logprobs)
                    stopped = row.finished and row.ids[-1] not in self._ends
                    yield row.place, Sample(row.ids, logprobs, text, row.finish_reason, self.version, stopped)
            batch = self._without_done(batch)

    def _row(self, place: int, request: Request) -> _Row:
        return _Row(place, request, torch.Generator(self.loaded.device).manual_seed(request.seed))

    def _joined(self, batch: _Batch | None, rows: list[_Row]) -> _Batch:
        """Return the batch with new rows; with others, these have been read and have their first token."""
        ids, mask = left_padded([row.request.ids for row in rows], self.loaded.tokenizer.pad_token_id)
        device = self.loaded.device
        cache = DynamicCache(config=self.loaded.model.config) if self._selects else None
        new = _Batch(rows, ids.to(device), mask.to(device), cache)
        if batch is None:
            return new
        self._round(new, tokens=1)
        width = max(batch.input_ids.shape[1], new.input_ids.shape[1])
        for one in (batch, new):
            _widen(one, width - one.input_ids.shape[1])
        assert batch.cache is not None and new.cache is not None
        for layer, other in zip(batch.cache.layers, new.cache.layers, strict=True):
            if layer.get_seq_length():  # empty where a layer reads another one's
                layer.keys = torch.cat([layer.keys, other.keys])
                layer.values = torch.cat([layer.values, other.values])
        return _Batch(
            batch.rows + new.rows,
            torch.cat([batch.input_ids, new.input_ids]),
            torch.cat([batch.attention_mask, new.attention_mask]),
            batch.cache,
        )

    def _without_done(self, batch: _Batch) -> _Batch | None:
        """Return the batch without the rows that have ended, and without the columns that only they used."""
        kept = [place for place, row in enumerate(batch.rows) if not row.done]
        if not kept:
            return None
        rows = [batch.rows[place] for place in kept]
        where = torch.tensor(kept, device=batch.input_ids.device)
        ids, mask, cache = batch.input_ids[where], batch.attention_mask[where], batch.cache
        assert cache is not None
        cache.batch_select_indices(where)
        if self._trims and (unused := int(mask.any(0).int().argmax())):
            ids, mask = ids[:, unused:], mask[:, unused:]
            for layer in cache.layers:
                if layer.get_seq_length():
                    layer.keys, layer.values = layer.keys[..., unused:, :], layer.values[..., unused:, :]
        return _Batch(rows, ids, mask, cache)

    def _round(self, batch: _Batch, *, waits: bool = False, tokens: int | None = None) -> None:
        """Generate until enough rows have ended to be worth a smaller batch, or ``tokens`` tokens.

        Args:
            batch: extended in place.
            waits: True if requests wait for rows to leave.
            tokens: tokens to add to each row; None for no limit beside the rows' own.
        """
        num = len(batch.rows)
        room = max(row.request.limit - len(row.ids) for row in batch.rows) if tokens is None else tokens
        if self._trims and self.loaded.context_length is not None:
            # At the context's end a row without padding has reached its own limit: it leaves, and its columns are cut.
            room = min(room, self.loaded.context_length - batch.input_ids.shape[1])
        leaving = max(1, int(num * _LEAVING_SHARE)) if self._selects else num
        if waits and self._joins:
            leaving = max(leaving, num - int(_FULL_SHARE * self.sampling.sampling_batch_size))
        drawing = _Drawing(batch.rows, self._ends, self._stops, leaving, self.loaded.identity.name)
        # Greedy: the drawing has added the noise already. The model's own generation settings must not warp as well.
        generation = GenerationConfig(
            do_sample=False,
            max_new_tokens=room,
            pad_token_id=self.loaded.tokenizer.pad_token_id,
            use_cache=True,
        )
        with plain_generation_config(self.loaded.model):
            output = self.loaded.model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask,
                generation_config=generation,
                synced_gpus=False,  # of a sharded model too: its passes are counted elsewhere
                logits_processor=warpers(self.sampling, drawing),
                stopping_criteria=StoppingCriteriaList([_Stopping(drawing)]),
                **({} if batch.cache is None else {"past_key_values": batch.cache}),
            )
        added = output.shape[1] - batch.input_ids.shape[1]
        batch.input_ids = output
        batch.attention_mask = torch.nn.functional.pad(batch.attention_mask, (0, added), value=1)


class _Drawing:
    """The draws of one round: adds each row's noise to its scores, and keeps the tokens that follow.

    The token is the one with the largest p / q, where the q are exponential random numbers, one per token of the
    vocabulary (Gumbel's trick). Rounding of the logits changes it only where the two largest are as good as tied; with
    one uniform number and cumulative probabilities it would shift every boundary and change rare tokens often.
    """

    def __init__(self, rows: Sequence[_Row], ends: Sequence[int], stops: StopTexts, leaving: int, model: str) -> None:
        self.rows, self.ends, self.stops, self.leaving, self.model = rows, frozenset(ends), stops, leaving, model
        self._scores: Tensor | None = None
        self._noise: Tensor | None = None

    def record(self, scores: Tensor) -> Tensor:
        """Keep the temperature-scaled scores (float32 ``[B, V]``) until the token is known."""
        self._scores = scores
        return scores

    def race(self, scores: Tensor) -> Tensor:
        """Return ``[B, V]``, largest at the drawn token; ``scores`` are the warped ones."""
        likelihood = scores.float().softmax(dim=-1)
        if bool(likelihood[:, 0].isnan().any()):  # softmax spreads a NaN over the row
            raise NonFiniteLogits(
                f"no token can be sampled: the logits of {self.model} are NaN or infinite",
                "its activations are beyond the dtype's range; use --dtype float32 or bfloat16",
            )
        if self._noise is None:
            self._noise = torch.ones_like(likelihood)
        for noise, row in zip(self._noise, self.rows, strict=True):
            if not row.done:
                noise.exponential_(generator=row.generator)
        return likelihood.div_(self._noise.clamp_min_(torch.finfo(torch.float32).tiny))

    def take(self, tokens: Tensor) -> bool:
        """Append the tokens (int64 ``[B]``) to the rows in progress; return True if the round is over."""
        assert self._scores is not None
        scores = self._scores
        logprobs = scores.gather(1, tokens.unsqueeze(1)).squeeze(1) - scores.logsumexp(dim=-1)
        self._scores = None
        for row, token, logprob in zip(self.rows, tokens.tolist(), logprobs.tolist(), strict=True):
            if not row.done:
                row.ids.append(token)
                row.logprobs.append(logprob)
                row.finished = token in self.ends or self.stops.completed(row.ids)
        return sum(row.done for row in self.rows) >= self.leaving


class _Step(LogitsProcessor):
    """One of the drawing's functions of the scores, as a processor."""

    def __init__(self, apply: Any) -> None:
        self.apply = apply

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        made: Tensor = self.apply(scores)
        return made


class _Stopping(StoppingCriteria):
    """Passes each token to the drawing, since generation calls it right after the draw; stops all rows at once."""

    def __init__(self, drawing: _Drawing) -> None:
        self.drawing = drawing

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        over = self.drawing.take(input_ids[:, -1])
        return torch.full((input_ids.shape[0],), over, device=input_ids.device)


def cache_layers(model: Any) -> set[type]:
    """Return the kinds of layers of the model's cache; empty where it carries another state or is no decoder."""
    config = model.config.get_text_config()
    if getattr(model, "_is_stateful", False) or getattr(config, "is_encoder_decoder", False):
        return set()
    if set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}:
        return set()
    return {type(layer) for layer in DynamicCache(config=model.config).layers} or {DynamicLayer}


def _next_places(
    waiting: deque[int], requests: Sequence[Request], beside: Sequence[_Row], size: int, context: int | None
) -> list[int]:
    """Take from ``waiting``, in order, the requests that fit into a batch with the rows ``beside``.

    With a ``context``, the widest row plus the largest number of tokens still to come stays within it, so that the padded
    batch does.
    """
    width = max((len(row.request.ids) + len(row.ids) for row in beside), default=0)
    room = max((row.request.limit - len(row.ids) for row in beside), default=0)
    places: list[int] = []
    while waiting and len(beside) + len(places) < size:
        request = requests[waiting[0]]
        width, room = max(width, len(request.ids)), max(room, request.limit)
        if context is not None and width + room > context and (beside or places):
            break
        places.append(waiting.popleft())
    return places


def _widen(batch: _Batch, columns: int) -> None:
    """Add columns of padding on the left, in place."""
    if not columns:
        return
    pad = torch.nn.functional.pad
    batch.input_ids, batch.attention_mask = pad(batch.input_ids, (columns, 0)), pad(batch.attention_mask, (columns, 0))
    assert batch.cache is not None
    for layer in batch.cache.layers:
        if layer.get_seq_length():
            layer.keys, layer.values = (pad(one, (0, 0, columns, 0)) for one in (layer.keys, layer.values))


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return the prompts as ``input_ids`` and ``attention_mask``, int64 ``[B, longest]``, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def warpers(sampling: SamplingConfig, drawing: _Drawing) -> LogitsProcessorList:
    """Return the processors for temperature, top-k and top-p, with the drawing's between and after them."""
    processors = LogitsProcessorList()
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    processors.append(_Step(drawing.record))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    processors.append(_Step(drawing.race))
    return processors


@contextlib.contextmanager
def plain_generation_config(model: Any) -> Iterator[None]:
    """Set the model's own generation defaults (temperature, top_p, ...) aside while sampling.

    ``generate`` takes every field that the caller leaves unset from the model's own config. A repetition penalty there,
    for example, would silently change the distribution that the importance ratio assumes.
    """
    saved = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = saved
