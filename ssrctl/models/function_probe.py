"""A model as a function on prompts, while its weights are exchanged for others."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ssrctl.configs.common import ModelConfig
from ssrctl.core.kl import kl_both_ways
from ssrctl.io.console import note
from ssrctl.models.interventions import logits_on
from ssrctl.models.loading import load_model
from ssrctl.models.stored_parameters import StoredParameters
from ssrctl.text.prompt_tokens import tokenise_prompts

_MAX_PROMPT_TOKENS = 256
# The logits of a model on all prompts stay in memory: 2.5 GB at this many positions and a vocabulary of 150,000.
_MOST_POSITIONS = 4096


class FunctionProbe:
    """A model whose weights are exchanged, and the logits of its own weights on prompts.

    Attributes:
        base: the model's own weights.
        ids: the prompts, int64 ``[T]`` each.
        reference: logits ``[T, V]`` of the own weights on each.
    """

    def __init__(self, base: StoredParameters, texts: Sequence[str]) -> None:
        """Load the model in float32 and compute its logits.

        Raises:
            UserError: see ``load_model`` and ``tokenise_prompts``; logits that are not finite.
        """
        loaded = load_model(ModelConfig(model=str(base.reader.folder), dtype="float32"))
        self.base, self._model = base, loaded.model
        self._parameters = dict(loaded.model.named_parameters())
        longest = min(_MAX_PROMPT_TOKENS, loaded.context_length or _MAX_PROMPT_TOKENS)
        tokenised = tokenise_prompts(loaded.tokenizer, texts, longest)
        if tokenised.num_cut_tokens:
            note(f"{tokenised.num_cut_tokens} tokens beyond {longest} per prompt were cut off")
        self.ids = _first_positions(tokenised.ids)
        if len(self.ids) < len(tokenised.ids):
            note(
                f"the first {len(self.ids)} of {len(tokenised.ids)} prompts are used: they have {_MOST_POSITIONS} tokens"
            )
        self._foreign: set[str] = set()
        self.put(base.names, base.tensor)  # a folder may hold other weights than the file that was named
        self.reference = self.logits()

    def logits(self) -> list[Tensor]:
        """Return the logits ``[T, V]`` of the present weights on each prompt."""
        return logits_on(self._model, self.ids)

    @torch.no_grad()
    def put(self, names: Sequence[str], value: Callable[[str], Tensor]) -> None:
        """Take the values of some tensors; all others are the model's own again."""
        for name in self._foreign.difference(names):
            self._parameters[name].copy_(self.base.tensor(name))
        for name in names:
            self._parameters[name].copy_(value(name))
        self._foreign = set(names)


def _first_positions(ids: Sequence[Tensor]) -> list[Tensor]:
    """Return the first prompts, at least two, with at most ``_MOST_POSITIONS`` tokens together."""
    kept, total = list[Tensor](), 0
    for one in ids:
        total += one.numel()
        if len(kept) >= 2 and total > _MOST_POSITIONS:
            break
        kept.append(one)
    return kept


def divergences(first: Sequence[Tensor], second: Sequence[Tensor]) -> tuple[list[float], list[float]]:
    """Return for each prompt the means over its positions of KL(first || second) and KL(second || first).

    Args:
        first, second: logits ``[T, V]`` of each prompt.
    """
    both = [kl_both_ways(a, b) for a, b in zip(first, second, strict=True)]
    # KL is at least 0; rounding can leave -1e-17 where nothing differs.
    forward, backward = ([max(0.0, float(one[side].mean())) for one in both] for side in (0, 1))
    return forward, backward
