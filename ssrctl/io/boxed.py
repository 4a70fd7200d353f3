"""The content of ``\\boxed{...}`` in a text."""

from __future__ import annotations

import re

MAX_BOXES = 32  # that are joined to one answer
BRACES = re.compile(r"\\[{}]|\\f?boxed[ \t]*\{|[{}]")
# Between boxes that are one answer: "\boxed{2} and \boxed{3}", "$x = \boxed{2}$, $y = \boxed{3}$".
_BETWEEN_BOXES = re.compile(
    r"[\s$]*(?:,|;|,?\s*(?:and|or)\b|,?\s*\\text\{\s*(?:and|or)\s*\}|\\quad)[\s$]*(?:[a-zA-Z](?:_\d)?\s*=\s*)?"
)


def last_boxed(text: str) -> str:
    """Return the content of the last closed ``\\boxed{...}`` (the inner one of nested boxes), with those joined to it."""
    boxes: list[tuple[int, int, int]] = []  # starts of the command and the content, end of the content
    open_braces: list[tuple[int, int] | None] = []
    for match in BRACES.finditer(text):
        token = match.group()
        if token.startswith("\\") and "boxed" not in token:
            continue
        if token == "}":
            opened = open_braces.pop() if open_braces else None
            if opened is not None and not (boxes and boxes[-1][0] > opened[0]):  # not one around another box
                boxes.append((*opened, match.start()))
        else:
            open_braces.append((match.start(), match.end()) if "boxed" in token else None)
    if not boxes:
        return ""
    values = [text[boxes[-1][1] : boxes[-1][2]].strip()]
    for before, after in zip(boxes[-2::-1], boxes[:0:-1], strict=True):
        if len(values) == MAX_BOXES or not _BETWEEN_BOXES.fullmatch(text, before[2] + 1, after[0]):
            break
        values.append(text[before[1] : before[2]].strip())
    return ", ".join(dict.fromkeys(filter(None, reversed(values)))) if values[0] else ""
