"""KL divergence of a model from a base model, on responses that the model sampled (Zhu et al. 2025, figures 9 and 15)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from ssrctl.configs import EvalConfig
from ssrctl.configs.common import ModelConfig
from ssrctl.core.losses import k3
from ssrctl.errors import UserError
from ssrctl.models.loading import LoadedModel, load_model
from ssrctl.training.step_gradients.accumulated import fixed_logprobs
from ssrctl.training.step_gradients.batch import make_batch
from ssrctl.training.step_gradients.head import HeadSettings

BATCH_TOKENS = 2048  # that go through a model together, without a graph


class KlToBase:
    """The base model, loaded in addition to the model that samples."""

    def __init__(self, loaded: LoadedModel, config: EvalConfig, base: str) -> None:
        """Load the base model in the precision and on the device of the other.

        Args:
            loaded: the model that samples, as it is when ``of`` is called.
            config: of its loading and sampling.
            base: name on the hub or folder of the base model.

        Raises:
            UserError: see ``load_model``; a base with other tokens.
        """
        settings: dict[str, Any] = {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(ModelConfig)}
        self._loaded, self._base = loaded, load_model(ModelConfig(**settings | {"model": base, "revision": None}))
        if self._base.tokenizer.get_vocab() != loaded.tokenizer.get_vocab():
            raise UserError(
                f"--kl-to {base} has other tokens than the model that samples",
                "name the model that the training started from",
            )
        self._settings = HeadSettings(config.temperature)

    def of(self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[float | None]:
        """Return per response the mean over its tokens of the estimator k3 of KL(model || base), nats.

        Distributions are those of the temperature-scaled logits, from which the responses were sampled.

        Args:
            pairs: token ids of a prompt and of a response to it; responses to the same prompt run together.

        Returns:
            In the order of the pairs; None for a response without a token.
        """
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for place, (prompt_ids, response_ids) in enumerate(pairs):
            if response_ids:
                by_prompt.setdefault(tuple(prompt_ids), []).append(place)
        found: list[float | None] = [None] * len(pairs)
        for prompt, places in by_prompt.items():
            for place, mean in zip(places, self._means(prompt, [pairs[place][1] for place in places]), strict=True):
                found[place] = mean
        return found

    def _means(self, prompt_ids: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        batch = make_batch(
            prompt_ids,
            responses,
            [torch.zeros(len(response)) for response in responses],
            [[0] * len(response) for response in responses],
            pad_token_id=self._loaded.tokenizer.pad_token_id,
            device=self._loaded.device,
        )
        ours, base = (
            fixed_logprobs(one.model, batch, self._settings, BATCH_TOKENS) for one in (self._loaded, self._base)
        )
        estimates = k3(ours.double(), base.double(), batch.known)
        return [float(value) for value in estimates.sum(1) / batch.known.sum(1)]
