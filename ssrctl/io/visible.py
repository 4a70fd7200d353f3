"""Text from files and servers, made safe to show."""

from __future__ import annotations

import re

# Control characters except tab and newline, which include the escape that begins a terminal's commands and its 8-bit
# form; marks that reverse the direction of the text after them; lone surrogates, which have no UTF-8 form.
_HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return the text with characters that would command a terminal or reorder a line written as escapes (``\\x1b``)."""
    return _HIDDEN.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"
