"""The content of ``\\\\boxed{...}`` in a text."""

from __future__ import annotations

import re

BRACES = re.compile(r"\\[{}]|\\f?boxed[ \t]*\{|[{}]")


def last_boxed(text: str) -> str:
    """Return the content of the last closed ``\\boxed{...}`` (the inner one of nested boxes), empty without one."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []
    for match in BRACES.finditer(text):
        token = match.group()
        if token.startswith("\\") and "boxed" not in token:
            continue
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None and (last is None or start > last[0]):
                last = (start, match.start())
        else:
            open_braces.append(match.end() if "boxed" in token else None)
    return text[last[0] : last[1]].strip() if last else ""
