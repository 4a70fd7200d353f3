"""Responses that are continued from the middle: tokens of a prefix, and the text of what was added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssrctl.sampling.alignment import decode
from ssrctl.text.prompts import without_surrogates


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
