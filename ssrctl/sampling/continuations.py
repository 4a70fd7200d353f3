"""Continuations from the middle of a response, each with its own random numbers.

A batch of samples usually shares one random generator, so a row's draws depend on the other rows. Here
each row has a seed, and with it one uniform number per token; the token is the one whose interval of the
cumulative probabilities holds that number. A continuation is then a function of the model, the
settings, its prefix and its seed, up to the rounding of logits that padding and batching change (about 1e-6).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from ssrctl.configs import SamplingConfig
from ssrctl.errors import UserError
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import decode
from ssrctl.sampling.generate import (
    end_token_ids,
    left_padded,
    plain_generation_config,
    through_end_token,
    warpers,
)

_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Start:
    """Where a continuation starts.

    Attributes:
        ids: tokens of the prompt and of the response so far; at least one.
        limit: most tokens to add, at least 1; ``len(ids) + limit`` is within the model's context.
        seed: decides, with the settings, what is drawn.
    """

    ids: Sequence[int]
    limit: int
    seed: int


@dataclass(frozen=True)
class Continuation:
    """The tokens that were added, the end token included when one was drawn (``finished``)."""

    ids: list[int]
    finished: bool


def without_surrogates(text: str) -> str:
    """``text`` with U+FFFD for every lone surrogate, which no tokenizer takes; as long as before."""
    return _SURROGATE.sub("\ufffd", text)


def encode_response(tokenizer: Any, response: str) -> tuple[list[int], list[int]]:
    """Tokens of a response and the character at which each ends, from one encoding of the whole.

    The response is encoded apart from its prompt, as it was sampled. Names of special tokens in it are plain text.
    """
    encoded = tokenizer(
        without_surrogates(response),
        add_special_tokens=False,
        return_offsets_mapping=True,
        split_special_tokens=True,
    )
    return list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]]


def tokens_before(ends: Sequence[int], place: int) -> int:
    """Count the tokens, from the first on, that end at character ``place`` or before it.

    A token across ``place`` is left out. It is most often a word with the space before it, and what is left
    then stops where a token of the response does, rather than after a space that no word follows.
    """
    return next((index for index, end in enumerate(ends) if end > place), len(ends))


def decode_continuation(tokenizer: Any, before: Sequence[int], added: Sequence[int]) -> str:
    """Return the text of ``added`` after ``before``; some tokenizers drop the first space of a decoded text."""
    head, whole = decode(tokenizer, before), decode(tokenizer, [*before, *added])
    return whole[len(head) :] if whole.startswith(head) else decode(tokenizer, added)


def plan_batches(starts: Sequence[Start], size: int, context: int | None) -> Iterator[list[int]]:
    """Cut ``starts`` into batches of places, of neighbours in length, that fit the context when padded.

    Args:
        starts: any number.
        size: most rows in a batch.
        context: positions of the model; the longest prefix plus the largest limit of a batch stay within it.
    """
    batch: list[int] = []
    for place in sorted(range(len(starts)), key=lambda i: (len(starts[i].ids), -starts[i].limit)):
        rows = [starts[i] for i in (*batch, place)]
        too_wide = context is not None and max(len(r.ids) for r in rows) + max(r.limit for r in rows) > context
        if batch and (len(batch) == size or too_wide):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def sample_continuations(loaded: LoadedModel, starts: Sequence[Start], sampling: SamplingConfig) -> list[Continuation]:
    """Sample one continuation per start, in their order, in batches of ``sampling_batch_size``.

    Raises:
        UserError: the model gives no finite probabilities.
    """
    out: dict[int, Continuation] = {}
    for batch in plan_batches(starts, sampling.sampling_batch_size, loaded.context_length):
        drawn = _sample_batch(loaded, [starts[place] for place in batch], sampling)
        out.update(zip(batch, drawn, strict=True))
    return [out[place] for place in range(len(starts))]


@torch.no_grad()
def _sample_batch(loaded: LoadedModel, starts: Sequence[Start], sampling: SamplingConfig) -> list[Continuation]:
    pad, ends = loaded.tokenizer.pad_token_id, end_token_ids(loaded)
    input_ids, attention_mask = left_padded([start.ids for start in starts], pad)
    width, room = input_ids.shape[1], max(start.limit for start in starts)
    uniforms = torch.zeros((len(starts), room), dtype=torch.float64)
    for row, start in enumerate(starts):
        uniforms[row, : start.limit] = torch.from_numpy(np.random.default_rng(start.seed).random(start.limit))
    processors = warpers(sampling)
    processors.append(_Draw(uniforms.to(loaded.device), width))
    limits = torch.tensor([start.limit for start in starts], device=loaded.device)
    # Greedy, since _Draw has chosen already; the model's own generation settings must not warp a second time.
    generation = GenerationConfig(
        do_sample=False, max_new_tokens=room, eos_token_id=ends or None, pad_token_id=pad, use_cache=True
    )
    with plain_generation_config(loaded.model):
        output = loaded.model.generate(
            input_ids=input_ids.to(loaded.device),
            attention_mask=attention_mask.to(loaded.device),
            generation_config=generation,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_OwnLimits(limits, width)]),
        )
    rows = output[:, width:].tolist()
    return [Continuation(*through_end_token(ids[: start.limit], ends)) for ids, start in zip(rows, starts, strict=True)]


class _Draw(LogitsProcessor):
    """Leaves of each row's scores only the token that its next uniform number selects.

    Args:
        uniforms: float64 ``[B, R]`` in [0, 1), one number per row and new token.
        width: tokens before the first new one.
    """

    def __init__(self, uniforms: Tensor, width: int) -> None:
        self.uniforms, self.width = uniforms, width

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # float64: in float32 the sum over a large vocabulary is off by more than its rarest tokens weigh.
        cumulative = scores.double().softmax(dim=-1).cumsum(dim=-1)
        total = cumulative[:, -1:]
        if not bool(total.isfinite().all()):
            raise UserError("the model's probabilities are not finite", "use --dtype float32, or check the weights")
        # Below the total: otherwise the last token could be drawn although its probability is 0.
        wanted = torch.minimum(self.uniforms[:, input_ids.shape[1] - self.width, None] * total, total * (1 - 1e-15))
        token = torch.searchsorted(cumulative, wanted, right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)


class _OwnLimits(StoppingCriteria):
    """Stops each row at its own limit."""

    def __init__(self, limits: Tensor, width: int) -> None:
        self.limits, self.width = limits, width

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return input_ids.shape[1] - self.width >= self.limits
