"""Alignment of response tokens with characters and reasoning steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssrctl.io.records import StepSpan


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode tokens as they were sampled: without special tokens, spaces as they are."""
    text: str = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def token_starts(tokenizer: Any, response_ids: Sequence[int], text: str) -> list[int]:
    """Return the character at which each response token starts, ascending, in ``[0, len(text)]``.

    The tokenizer's own offsets are used when it encodes ``text`` as these same tokens. A sampled response need not be
    in that canonical form. The starts are then the lengths of the decoded prefixes; pieces are never encoded again.
    Special tokens start at the end of the text before them.
    """
    special = set(tokenizer.all_special_ids)
    plain = [token for token in response_ids if token not in special]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if encoded["input_ids"] == plain:
        offsets = iter(encoded["offset_mapping"])
        starts, end = [], 0
        for token in response_ids:
            if token in special:
                starts.append(end)
            else:
                start, end = next(offsets)
                starts.append(start)
        return starts
    return _starts_by_decoding(tokenizer, response_ids, len(text))


def _starts_by_decoding(tokenizer: Any, ids: Sequence[int], length: int) -> list[int]:
    """Return the starts by decoding a few tokens at a time; decoding every prefix would take quadratic time.

    ``ids[anchor:read]`` is settled text that ends with a whole character. It is decoded again together with
    what follows, because some tokenizers drop the space before the first word that they decode.
    """
    starts: list[int] = []
    anchor = read = 0
    before = 0  # characters of ids[:read]
    settled = 0  # characters of ids[anchor:read]
    for count in range(len(ids)):
        window = decode(tokenizer, ids[anchor:count])
        # A character cut in two decodes to U+FFFD until its last byte is there.
        whole = len(window.rstrip("\ufffd"))
        starts.append(min(length, max(before + whole - settled, starts[-1] if starts else 0)))
        stuck = count - read >= _LONGEST_WINDOW
        if stuck or settled < whole == len(window):
            before += len(window) - settled
            settled = len(decode(tokenizer, ids[read:count])) if read else len(window)
            anchor, read = read, count
    return starts


_LONGEST_WINDOW = 16  # no character takes this many tokens; bytes that are not text by then never become text


def step_of_tokens(starts: Sequence[int], steps: Sequence[StepSpan]) -> list[int]:
    """Return the step of each token, by the character it starts at; what starts at the very end is in the last step.

    Every token is in exactly one step; with no steps at all it is -1.
    """
    if not steps:
        return [-1] * len(starts)
    owners, current = [], 0
    for start in starts:
        while current < len(steps) - 1 and start >= steps[current].end:
            current += 1
        owners.append(current)
    return owners
