"""The end of a response: end tokens, stop texts, the limit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssrctl.models.loading import LoadedModel
from ssrctl.sampling.alignment import decode
from ssrctl.text.prompts import turn_end_id

_MORE_TOKENS = 8


class StopTexts:
    """Finds the first token that completes one of some texts.

    Args:
        tokenizer: decodes the newest tokens.
        texts: not empty; with none of them nothing stops.
    """

    def __init__(self, tokenizer: Any, texts: Sequence[str]) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        # Every token of the text has a byte of it; a few more keep the start of the window off the text.
        self._window = max((len(text.encode("utf-8", "replace")) for text in texts), default=0) + _MORE_TOKENS

    def completed(self, ids: Sequence[int]) -> bool:
        """Return True if the last of the new tokens ``ids`` completes a text, within them."""
        if not self.texts:
            return False
        tail = decode(self.tokenizer, ids[-self._window :])
        return any(text in tail for text in self.texts)


def end_token_ids(loaded: LoadedModel) -> list[int]:
    """Return the tokens that end a response: those of the generation config, the tokenizer's, the chat template's."""
    configured = loaded.model.generation_config.eos_token_id
    ids = [] if configured is None else [configured] if isinstance(configured, int) else list(configured)
    for token in (loaded.tokenizer.eos_token_id, turn_end_id(loaded.tokenizer)):
        if token is not None and token not in ids:
            ids.append(token)
    return ids


def response_limit(prompt_ids: Sequence[int], max_new_tokens: int, context: int | None) -> int:
    """Return the most tokens of a response: ``max_new_tokens``, or what the context leaves."""
    return max_new_tokens if context is None else min(max_new_tokens, context - len(prompt_ids))
