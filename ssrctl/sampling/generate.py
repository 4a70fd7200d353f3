"""Sampling of responses: batched, with a KV cache and the log-probability of each sampled token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ssrctl.configs import SamplingConfig
from ssrctl.errors import UserError
from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import decode
from ssrctl.text.prompts import turn_end_id

_MORE_TOKENS = 8


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        response_ids: the sampled tokens, through the end token, or the token that completes a text of ``--stop``.
        logprobs: float32 ``[len(response_ids)]`` on the CPU: log-probability of each sampled token under the
            temperature-scaled logits, before top-p or top-k.
        text: the response without special tokens; a text of ``--stop`` stays in it, with the rest of its last token.
        finished: True if an end token or a text of ``--stop`` was sampled within the limit.
    """

    response_ids: list[int]
    logprobs: Tensor
    text: str
    finished: bool


class _SampledLogprobs(LogitsProcessor):
    """Keeps one position's log-probabilities until its token is sampled, then only that token's."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []
        self._current: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._current = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, tokens: Tensor) -> None:
        """Keep the log-probabilities of the tokens (int64 ``[B]``) that were sampled from the last scores."""
        assert self._current is not None
        self.chosen.append(self._current.gather(1, tokens.unsqueeze(1)).squeeze(1))
        self._current = None


class _AfterSampling(StoppingCriteria):
    """Never stops; passes each sampled token to the recorder, since generation calls it right after sampling."""

    def __init__(self, recorder: _SampledLogprobs) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.recorder.take(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


class StopTexts(StoppingCriteria):
    """Stops each row at the first token that completes one of some texts, and remembers where.

    Args:
        tokenizer: decodes the newest tokens.
        texts: not empty; with none of them nothing stops.
        width: tokens before the first new one.
        num_rows: size of the batch.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str], width: int, num_rows: int) -> None:
        self.tokenizer, self.texts, self.width = tokenizer, texts, width
        self.lengths: list[int | None] = [None] * num_rows
        # Every token of the text has a byte of it; a few more keep the start of the window off the text.
        self._window = max((len(text.encode("utf-8", "replace")) for text in texts), default=0) + _MORE_TOKENS

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        length = input_ids.shape[1] - self.width
        if self.texts:
            recent = input_ids[:, max(self.width, input_ids.shape[1] - self._window) :].tolist()
            for row, ids in enumerate(recent):
                if self.lengths[row] is None:
                    tail = decode(self.tokenizer, ids)
                    if any(text in tail for text in self.texts):
                        self.lengths[row] = length
        stopped = [known is not None for known in self.lengths]
        return torch.tensor(stopped, dtype=torch.bool, device=input_ids.device)

    def cut(self, row: int, ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
        """Cut a row's new tokens after its text or its first end token; return them, and whether there is either."""
        length = self.lengths[row]
        kept, finished = through_end_token(ids if length is None else ids[:length], ends)
        return kept, finished or (length is not None and length <= len(ids))


def end_token_ids(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a response: those of the generation config, the tokenizer's, the chat template's."""
    configured = loaded.model.generation_config.eos_token_id
    ids = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    for token in (loaded.tokenizer.eos_token_id, turn_end_id(loaded.tokenizer)):
        if token is not None and token not in ids:
            ids.append(token)
    return ids


class NonFiniteLogits(UserError):
    """A model whose logits are NaN or infinite, from which no token can be sampled."""


@torch.no_grad()
def sample_responses(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int
) -> list[Sample]:
    """Sample one response per prompt, all in one batch.

    The same prompts, settings and seed give the same responses on the same machine. The state of torch's global
    generators neither matters nor changes.

    Args:
        loaded: the model.
        prompts: token ids, one list per response (repeat a prompt for several responses).
        sampling: temperature, top-p, top-k, stop texts, longest response; responses also end where the context does.
        seed: of this batch.

    Raises:
        NonFiniteLogits: the model gives NaN or infinity for some token.
    """
    recorder = _SampledLogprobs()
    ends = end_token_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    input_ids, attention_mask = left_padded(prompts, pad)
    width = input_ids.shape[1]
    stops = StopTexts(loaded.tokenizer, sampling.stop, width, len(prompts))
    room = sampling.max_new_tokens
    if loaded.context_length is not None:
        room = min(room, loaded.context_length - width)
    # Warping is left to the processors, so that log-probabilities are read between temperature and top-k.
    generation = GenerationConfig(
        do_sample=True,
        temperature=1.0,
        top_k=0,
        top_p=1.0,
        max_new_tokens=room,
        eos_token_id=ends or None,
        pad_token_id=pad,
        use_cache=True,
    )
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), plain_generation_config(loaded.model):
        torch.manual_seed(seed)
        try:
            output = loaded.model.generate(
                input_ids=input_ids.to(loaded.device),
                attention_mask=attention_mask.to(loaded.device),
                generation_config=generation,
                logits_processor=warpers(sampling, after_temperature=[recorder]),
                stopping_criteria=StoppingCriteriaList([_AfterSampling(recorder), stops]),
            )
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):  # torch.multinomial's
                raise
            raise NonFiniteLogits(
                f"no token can be sampled: the logits of {loaded.identity.name} are NaN or infinite",
                "its activations are beyond the dtype's range; use --dtype float32 or bfloat16",
            ) from error
    responses = output[:, width:].tolist()
    logprobs = torch.stack(recorder.chosen, dim=1).cpu()
    samples = []
    for row, ids in enumerate(responses):
        kept, finished = stops.cut(row, ids, ends)
        samples.append(Sample(kept, logprobs[row, : len(kept)].clone(), decode(loaded.tokenizer, kept), finished))
    return samples


def left_padded(prompts: Sequence[Sequence[int]], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return the prompts as ``input_ids`` and ``attention_mask``, int64 ``[B, longest]``, padded on the left."""
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), width), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    return input_ids, attention_mask


def warpers(sampling: SamplingConfig, *, after_temperature: Sequence[LogitsProcessor] = ()) -> LogitsProcessorList:
    """Return the processors for temperature, top-k and top-p, with others between temperature and top-k."""
    processors = LogitsProcessorList()
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    processors.extend(after_temperature)
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def through_end_token(ids: list[int], ends: Sequence[int]) -> tuple[list[int], bool]:
    """Cut the tokens after the first end token; return them, and whether there is an end token."""
    for place, token in enumerate(ids):
        if token in ends:
            return ids[: place + 1], True
    return ids, False


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
