"""Sampling responses: batched, with a KV cache, and with each sampled token's own log-probability."""

from __future__ import annotations

from collections.abc import Sequence
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
from ssrctl.models.loading import LoadedModel


@dataclass(frozen=True)
class Sample:
    """One sampled response.

    Attributes:
        response_ids: the sampled tokens, the end token included when one was sampled.
        logprobs: float32 ``[len(response_ids)]`` on the CPU: log-probability of each sampled token under the
            temperature-scaled logits, before top-p or top-k.
        text: the response without special tokens.
        finished: whether an end token was sampled within the limit.
    """

    response_ids: list[int]
    logprobs: Tensor
    text: str
    finished: bool


class _SampledLogprobs(LogitsProcessor):
    """Keeps one step's log-probabilities until the token sampled from them is known, then that token's alone."""

    def __init__(self) -> None:
        self.chosen: list[Tensor] = []
        self._current: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self._current = scores.float().log_softmax(dim=-1)
        return scores

    def take(self, tokens: Tensor) -> None:
        """Called with the tokens (int64 ``[B]``) that were sampled from the last scores."""
        assert self._current is not None
        self.chosen.append(self._current.gather(1, tokens.unsqueeze(1)).squeeze(1))
        self._current = None


class _AfterSampling(StoppingCriteria):
    """Stops nothing: generation calls it right after each token was sampled."""

    def __init__(self, recorder: _SampledLogprobs) -> None:
        self.recorder = recorder

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.recorder.take(input_ids[:, -1])
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def end_token_ids(loaded: LoadedModel) -> list[int]:
    """Every token that ends a response, from the generation config and the tokenizer."""
    configured = loaded.model.generation_config.eos_token_id
    ids = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    if loaded.tokenizer.eos_token_id is not None and loaded.tokenizer.eos_token_id not in ids:
        ids.append(loaded.tokenizer.eos_token_id)
    return ids


@torch.no_grad()
def sample_responses(
    loaded: LoadedModel, prompts: Sequence[Sequence[int]], sampling: SamplingConfig, seed: int
) -> list[Sample]:
    """Sample one response per prompt, all in one batch.

    The same prompts, settings and seed give the same responses on the same machine, whatever was drawn
    before; the state of torch's global generators is left as it was.

    Args:
        loaded: the model.
        prompts: token ids, one list per response (repeat a prompt for several responses).
        sampling: temperature, top-p, top-k, longest response; responses also end where the context does.
        seed: of this batch.
    """
    recorder = _SampledLogprobs()
    processors = LogitsProcessorList()
    if sampling.temperature != 1.0:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    processors.append(recorder)
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(sampling.top_p))
    ends = end_token_ids(loaded)
    pad = loaded.tokenizer.pad_token_id
    width = max(len(prompt) for prompt in prompts)
    room = sampling.max_new_tokens
    if loaded.context_length is not None:
        room = min(room, loaded.context_length - width)
    input_ids = torch.full((len(prompts), width), pad, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, width - len(prompt) :] = torch.tensor(prompt)
        attention_mask[row, width - len(prompt) :] = 1
    # The processors above do the warping, so that log-probabilities are read at the right place among them;
    # a model's own generation config must not warp a second time.
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
        output = loaded.model.generate(
            input_ids=input_ids.to(loaded.device),
            attention_mask=attention_mask.to(loaded.device),
            generation_config=generation,
            logits_processor=processors,
            stopping_criteria=StoppingCriteriaList([_AfterSampling(recorder)]),
        )
    responses = output[:, width:].tolist()
    logprobs = torch.stack(recorder.chosen, dim=1).cpu()
    return [_sample(loaded, ids, logprobs[row], ends) for row, ids in enumerate(responses)]


def _sample(loaded: LoadedModel, ids: list[int], logprobs: Tensor, ends: list[int]) -> Sample:
    length = next((place + 1 for place, token in enumerate(ids) if token in ends), len(ids))
    kept = ids[:length]
    finished = bool(kept) and kept[-1] in ends
    text = loaded.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return Sample(kept, logprobs[:length].clone(), text, finished)


class plain_generation_config:
    """While sampling, the model's own generation defaults (temperature, top_p, ...) are set aside.

    ``generate`` fills every field that ours leaves unset from the model's own config; a repetition penalty
    there, say, would silently change the distribution that the importance ratio assumes.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.saved = self.model.generation_config
        self.model.generation_config = GenerationConfig()

    def __exit__(self, *exc: object) -> None:
        self.model.generation_config = self.saved
