"""Layer numbers as flags spell them."""

from __future__ import annotations

import re

from ssrctl.errors import UserError

_SPELLING = re.compile(r"[0-9]{1,6}(-[0-9]{1,6})?(,[0-9]{1,6}(-[0-9]{1,6})?)*")


def layer_ranges(text: str) -> list[range]:
    """Read ``0-3,7`` as the ranges 0..3 and 7..7; layers count from 0.

    Raises:
        UserError: another spelling, or a range that runs backwards.
    """
    compact = text.replace(" ", "")
    if not _SPELLING.fullmatch(compact):
        raise UserError(f"--layers must list layers like 0-3,7, got {text!r}")
    ranges = []
    for part in compact.split(","):
        first, _, last = part.partition("-")
        ranges.append(range(int(first), int(last or first) + 1))
        if not ranges[-1]:
            raise UserError(f"--layers: the range {part} runs backwards", f"write {last}-{first}")
    return ranges
