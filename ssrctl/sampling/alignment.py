"""Which reasoning step each token of a response belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssrctl.io.records import StepSpan


def token_starts(tokenizer: Any, response_ids: Sequence[int], text: str) -> list[int]:
    """The character at which each response token starts, ascending, in ``[0, len(text)]``.

    The tokenizer's own offsets are used when it would cut ``text`` into these very tokens. A sampled response
    need not be in that canonical form, and pieces are never encoded again: then the starts are the lengths
    of the decoded prefixes. Special tokens start at the end of the text before them.
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
    """Decodes a few tokens at a time, since decoding every prefix whole takes time quadratic in their number.

    ``ids[anchor:read]`` is settled text that ends with a whole character. It is decoded again together with
    what follows, because some tokenizers drop the space before the first word that they decode.
    """

    def decode(begin: int, end: int) -> str:
        return tokenizer.decode(ids[begin:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    starts: list[int] = []
    anchor = read = 0
    before = 0  # characters of ids[:read]
    settled = 0  # characters of ids[anchor:read]
    for count in range(len(ids)):
        window = decode(anchor, count)
        # A character cut in two decodes to U+FFFD until its last byte is there.
        whole = len(window.rstrip("\ufffd"))
        starts.append(min(length, max(before + whole - settled, starts[-1] if starts else 0)))
        stuck = count - read >= _LONGEST_WINDOW
        if stuck or settled < whole == len(window):
            before += len(window) - settled
            settled = len(decode(read, count)) if read else len(window)
            anchor, read = read, count
    return starts


_LONGEST_WINDOW = 16  # no character takes so many tokens; what is no text by then stays none


def step_of_tokens(starts: Sequence[int], steps: Sequence[StepSpan]) -> list[int]:
    """The step of each token, by the character it starts at; what starts at the very end is in the last step.

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
