"""Prompts as token ids, refused where the tokenizer does not know their text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ssrctl.errors import UserError
from ssrctl.text.prompts import without_surrogates

MAX_UNKNOWN_FRAC = 0.10


@dataclass(frozen=True)
class TokenisedPrompts:
    """Prompts as token ids.

    Attributes:
        ids: one int64 ``[T]`` per prompt, T at least 2.
        num_cut_tokens: tokens beyond the longest allowed length, which were left out.
    """

    ids: list[Tensor]
    num_cut_tokens: int

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)


def tokenise_prompts(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> TokenisedPrompts:
    """Return token ids of each text, with the special tokens that the tokenizer itself adds.

    Raises:
        UserError: a text with more than 10% unknown to the tokenizer (unknown tokens, and characters
            without a token), or one of fewer than 2 tokens.
    """
    ids, num_cut = [], 0
    for number, text in enumerate(texts, start=1):
        # Lengths are dealt with below, so the tokenizer's own warning about them says nothing new.
        encoded = tokenizer(without_surrogates(text), return_offsets_mapping=True, verbose=False)
        tokens = encoded["input_ids"]
        share = _unknown_share(tokens, encoded["offset_mapping"], text, tokenizer.unk_token_id)
        if share > MAX_UNKNOWN_FRAC:
            raise UserError(
                f"{share:.0%} of the tokens of prompt {number} are unknown to the model's tokenizer "
                f"({MAX_UNKNOWN_FRAC:.0%} are allowed): {text[:40]!r}",
                "give prompts in the model's own vocabulary with --prompts FILE",
            )
        if len(tokens) < 2:
            raise UserError(f"prompt {number} has {len(tokens)} tokens, at least 2 are needed: {text[:40]!r}")
        ids.append(torch.tensor(tokens[:max_tokens], dtype=torch.int64))
        num_cut += max(0, len(tokens) - max_tokens)
    return TokenisedPrompts(ids, num_cut)


def _unknown_share(tokens: list[int], offsets: list[tuple[int, int]], text: str, unknown: int | None) -> float:
    """Return unknown tokens and characters without a token, over all tokens and such characters; in [0, 1]."""
    covered = [False] * len(text)
    for start, end in offsets:
        covered[start:end] = [True] * (end - start)
    dropped = sum(1 for character, has in zip(text, covered, strict=True) if not has and not character.isspace())
    num_unknown = 0 if unknown is None else tokens.count(unknown)
    return (num_unknown + dropped) / max(1, len(tokens) + dropped)
