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
    starts, longest = [], 0
    for count in range(len(response_ids)):
        prefix = tokenizer.decode(response_ids[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        # A character cut in two decodes to U+FFFD until its last byte is there.
        longest = min(len(text), max(longest, len(prefix.rstrip("�"))))
        starts.append(longest)
    return starts


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
