"""Protected stretches of a response, which are never cut inside: code, mathematics and tables."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable
from typing import Literal, NamedTuple

Kind = Literal["code", "display", "inline", "table"]

_ENVIRONMENTS = (
    "align|aligned|alignat|alignedat|flalign|gather|gathered|multline|equation|eqnarray|split|displaymath|math|array"
    "|d?cases|[pbvBV]?matrix|smallmatrix|tabular|tabularx|verbatim|lstlisting|asy|tikzpicture"
)
# Every branch begins with a character that is rare in prose. A dollar sign or bracket behind a backslash is text.
# As Pandoc has it: no white space inside the dollar signs and no digit after them, so that "$5 and $10" is money.
# An operator before the closing sign ("$3 + $4"), or an amount and a word after the opening one, is money too.
_OPENING = re.compile(
    r"`++|~~~++|\[asy\]"
    r"|\$(?<!\\\$)(?:\$|(?P<inline>(?!\d[\d.,]*+\s[a-z]{2})(?=[^\s$])(?:[^$\n\\]|\\[^\n])++(?<![\s=+*/×<(-])\$(?!\d)))"
    rf"|\\(?<!\\\\)(?:[(\[]|begin\{{(?P<name>(?:{_ENVIRONMENTS})\*?)\}})"
)
_CODE_SPAN = re.compile(r"(`{1,2})(?!`)[^`\n]++\1(?!`)")
_FENCE_END = {mark: re.compile(rf"\n[ \t>]*+{mark}{{3,}}[ \t]*+(?=\n|\Z)") for mark in "`~"}
_BLANK_LINE = re.compile(r"\n[ \t\r]*+\n")
# A row, a row of dashes, more rows; each begins with a bar.
_TABLE = re.compile(
    r"^[ \t]*+\|[^\n]*+\n[ \t]*+\|(?=[: \t]*+-)[|:\- \t\r]*+(?=\n|\Z)(?:\n[ \t]*+\|[^\n]*+)*+", re.MULTILINE
)


class Stretch(NamedTuple):
    """``text[start:end]``, delimiters included."""

    start: int
    end: int
    kind: Kind


class Shield:
    """Protected stretches in the order of the text.

    Code between fences (one that names its language and is never closed runs to the end) and between
    backticks, Asymptote figures; display mathematics (``\\[ \\]``, ``$$``, environments such as ``aligned``); inline mathematics
    (``\\( \\)``, and ``$ $`` within a line, told apart from amounts of money); markdown tables. An opening
    without its end protects nothing. Built in linear time.
    """

    def __init__(self, text: str) -> None:
        marked = "$" in text or "\\" in text or "`" in text or "~~~" in text or "[asy]" in text
        found = _Scanner(text).stretches() if marked else []
        if "|" in text:
            found = _united([*found, *(Stretch(m.start(), m.end(), "table") for m in _TABLE.finditer(text))])
        self.stretches = found
        self._starts = [stretch.start for stretch in found]
        self._ends = [stretch.end for stretch in found]
        self._at = {stretch.start: stretch for stretch in found}

    def at(self, position: int) -> Stretch | None:
        """Return the stretch that starts at ``position``."""
        return self._at.get(position)

    def outside(self, cuts: Iterable[int]) -> list[int]:
        """Return the cuts outside all stretches."""
        starts, ends = self._starts, self._ends
        return [cut for cut in cuts if not (after := bisect_left(starts, cut)) or cut >= ends[after - 1]]


def _united(stretches: list[Stretch]) -> list[Stretch]:
    """Sort the stretches and join those that overlap; a table stays a table, whatever its cells hold."""
    made: list[Stretch] = []
    for stretch in sorted(stretches, key=lambda s: (s.start, -s.end)):
        if made and stretch.start < made[-1].end:
            last = made[-1]
            kind = "table" if stretch.kind == "table" else last.kind
            made[-1] = Stretch(last.start, max(last.end, stretch.end), kind)
        else:
            made.append(stretch)
    return made


class _Scanner:
    """One pass over the openings of a text; matches found ahead are cached, so that nothing is searched twice."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._ahead: dict[str, tuple[int, int]] = {}

    def stretches(self) -> list[Stretch]:
        found: list[Stretch] = []
        search, position = _OPENING.search, 0
        while (match := search(self.text, position)) is not None:
            position = match.end()
            stretch = Stretch(*match.span(), "inline") if match["inline"] else self._stretch(match)
            if stretch is not None:
                found.append(stretch)
                position = stretch.end
        return found

    def _stretch(self, match: re.Match[str]) -> Stretch | None:
        opening, start = match.group(), match.start()
        if opening[0] in "`~" and len(opening) >= 3:
            return self._fence(start, match.end(), opening[0])
        if opening[0] == "`":
            span = _CODE_SPAN.match(self.text, start)
            return Stretch(start, span.end(), "code") if span else None
        if opening == "[asy]":
            end = self._next("[/asy]", match.end())
            return Stretch(start, end[1], "code") if end else None
        closing = {"$$": "$$", r"\[": r"\]", r"\(": r"\)"}.get(opening) or rf"\end{{{match['name']}}}"
        end = self._next(closing, match.end())
        if end is None:
            return None
        if opening in ("$$", r"\(") and self._blank_line_before(end[0], match.end()):
            # An unclosed delimiter, not mathematics of two paragraphs.
            return None
        return Stretch(start, end[1], "inline" if opening == r"\(" else "display")

    def _fence(self, start: int, after: int, mark: str) -> Stretch | None:
        """Match from a fence's opening line to its closing line, or to the next fence mark without a line of its own."""
        before = self.text[max(0, start - 12) : start].rstrip(" \t>")
        opens_line = before[-1:] in ("\n", "") or (before[-1] in "-*+.)" and len(before.rsplit("\n", 1)[-1]) < 6)
        if not opens_line:
            return None
        end = self._next_match(mark, _FENCE_END[mark], after) or self._next(mark * 3, after)
        if end is not None:
            return Stretch(start, end[1], "code")
        language = self.text[after : after + 1]
        return Stretch(start, len(self.text), "code") if language.isalpha() else None

    def _next(self, needle: str, position: int) -> tuple[int, int] | None:
        known = self._ahead.get(needle)
        if known is None or 0 <= known[0] < position:
            found = self.text.find(needle, position)
            known = self._ahead[needle] = (found, found + len(needle))
        return known if known[0] >= 0 else None

    def _next_match(self, name: str, pattern: re.Pattern[str], position: int) -> tuple[int, int] | None:
        known = self._ahead.get(name)
        if known is None or 0 <= known[0] < position:
            match = pattern.search(self.text, position)
            known = self._ahead[name] = match.span() if match else (-1, -1)
        return known if known[0] >= 0 else None

    def _blank_line_before(self, end: int, position: int) -> bool:
        blank = self._next_match("blank line", _BLANK_LINE, position)
        return blank is not None and blank[0] < end
