"""Splitting a response into reasoning steps (SSR section 1: explicit delimiters, else a rule-based fallback)."""

from __future__ import annotations

import bisect
import heapq
import re
from dataclasses import dataclass
from itertools import pairwise

from ssrctl.io.records import StepSpan
from ssrctl.text.answers import find_marker

# What is never cut inside: (opening, closing) pairs. Only these environments, so that the scan stays linear.
_ENVIRONMENTS = ("equation", "align", "gather", "multline", "array", "cases", "matrix", "pmatrix", "bmatrix", "tabular")
_PROTECTED = {"```": "```", "$$": "$$", r"\[": r"\]", r"\(": r"\)"} | {
    rf"\begin{{{name}{star}}}": rf"\end{{{name}{star}}}" for name in _ENVIRONMENTS for star in ("", "*")
}
_OPENING = re.compile("|".join(re.escape(opening) for opening in _PROTECTED))

_LINE_BREAK = re.compile(r"\n\s*")
# Inside a line: "... Step 2: ..." and an answer behind four number signs.
_INLINE_LABEL = re.compile(r"(?<=\s)(?:Step[ \t]{1,3}\d{1,3}[ \t]?[:.)]|####(?!#)(?=[ \t]?[-\d$\\]))")
_ENUMERATOR = re.compile(r"(?<!\S)(?:(?P<dot>\d{1,3})[.)]|\((?P<digit>\d{1,3})\)|\((?P<letter>[a-z])\))(?=\s)")

# White space is taken from its first character and in one piece: trying each of its ends is quadratic.
_SENTENCE_END = re.compile(
    r"""(?P<stop>[.!?])["'”’)\]*_]{0,3}\s++(?=["'“‘(\[*_$\\]{0,3}[A-Z0-9$\\])"""
    r"|(?<=[。！？])(?=\S)"
    r"|;\s++(?=\S)"
    r"|,\s++(?=(?:therefore|thus|hence|consequently)\b)"
    r"|(?<!\s)\s++(?=(?:Therefore|Thus|Hence|So|Then|Next|Finally|Consequently|Now),\s)"
)
_ABBREVIATION = re.compile(
    r"""(?:^|[("'\[])(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|vs|cf|e\.?g|i\.?e|[Ff]igs?|[Ee]qs?|[Nn]os?|approx|ca|[Ss]ec|resp|Jr|Sr|p+)\.$"""
)
_LONGEST_ABBREVIATION = 20
_BARE_ENUMERATOR = re.compile(r"(?:\d{1,3}|\(?[a-z])\.$")
# A piece that only names what follows: a heading, "Step 3:", "2.", a bullet.
_LABEL = re.compile(
    r"#{1,6}[ \t][^\n]*|\*\*Step[^*\n]*\*\*:?|Step[ \t]+\d+[ \t]?[:.)]?|\(?(?:\d{1,3}|[a-z])[.)]|[-*+•]"
)


def segment(text: str, *, max_steps: int = 64, min_chars: int = 2) -> list[StepSpan]:
    """Split ``text`` into step spans that are ordered, non-empty and cover it exactly.

    Cuts are made at line breaks, enumerations (``1.``, ``(a)``, ``Step 3:``) and before ``####``; white space
    between two steps belongs to the earlier one. Where that leaves one paragraph of reasoning, it is cut at
    sentence ends and discourse markers instead. Code fences and display math are never cut inside. Headings
    and bare labels go with what follows them; a step without any letter or digit, or with fewer than
    ``min_chars`` characters, is merged into its neighbour (the earlier one where there is a choice).

    The last span has kind ``final`` if it holds a final-answer marker (``####``, ``\\boxed{``, ``A:``,
    ``Answer:``, "the answer is 42"); text after the step with the last marker is merged into it, except that
    "the answer is" loses its standing when what follows still calculates (holds an ``=``). Without a marker
    no span is final.

    Args:
        text: the response. Empty gives no span, white space alone gives a single one.
        max_steps: at most so many spans; the shortest neighbouring pairs are merged, the earliest of
            equals first, and never into the final span unless ``max_steps`` is 1.
        min_chars: smallest length of a step, its surrounding white space not counted.

    Raises:
        ValueError: ``max_steps`` or ``min_chars`` below 1.
    """
    if max_steps < 1 or min_chars < 1:
        raise ValueError(f"max_steps and min_chars must be at least 1, got {max_steps} and {min_chars}")
    if not text:
        return []
    shield = _Shield(text)
    starts = _explicit_cuts(text, shield)
    steps, has_final = _steps(text, starts, min_chars)
    if len(steps) - has_final <= 1:
        # The paragraph may hold the answer too: "... So 5 are left. The answer is 5."
        marker = find_marker(text) if has_final else None
        reasoning_end = len(text) if marker is None else marker[0]
        starts = sorted({*starts, *_sentence_cuts(text, reasoning_end, shield)})
        steps, has_final = _steps(text, starts, min_chars)
    if has_final:
        steps = [*_merge_shortest(steps[:-1], steps[-1], max_steps - 1), steps[-1]] if max_steps > 1 else [0]
    else:
        steps = _merge_shortest(steps, len(text), max_steps)
    spans = [StepSpan(start=start, end=end) for start, end in pairwise([*steps, len(text)])]
    if has_final:
        spans[-1].kind = "final"
    return spans


class _Shield:
    """The stretches of a text that are not cut inside."""

    def __init__(self, text: str) -> None:
        self.starts: list[int] = []
        self.ends: list[int] = []
        position = 0
        without_end: set[str] = set()  # a closing that is not found once is not looked for again
        while (match := _OPENING.search(text, position)) is not None:
            position = match.end()
            closing = _PROTECTED[match.group()]
            if closing in without_end:
                continue
            end = text.find(closing, position)
            if end < 0:
                without_end.add(closing)
                continue
            self.starts.append(match.start())
            self.ends.append(end + len(closing))
            position = self.ends[-1]

    def covers(self, cut: int) -> bool:
        """Whether ``cut`` lies strictly inside a stretch."""
        before = bisect.bisect_left(self.starts, cut) - 1
        return before >= 0 and cut < self.ends[before]


# --------------------------------------------------------------------------------------------------
# where to cut; a cut is the start of a step, the first is always 0


def _explicit_cuts(text: str, shield: _Shield) -> list[int]:
    cuts = {match.end() for match in _LINE_BREAK.finditer(text)}
    cuts |= {match.start() for match in _INLINE_LABEL.finditer(text)}
    cuts |= _enumeration_cuts(text)
    # White space before the first word is no step, and neither is what follows the last character.
    first = len(text) - len(text.lstrip())
    return [0, *sorted(cut for cut in cuts if first < cut < len(text) and not shield.covers(cut))]


def _enumeration_cuts(text: str) -> set[int]:
    """Starts of the items of enumerations inside a line: 1, 2, ... in order, at least two of them.

    The first item starts its line or follows a colon or a sentence end, so that "cases (a) and (b)" and
    "the answer is 1. Then" are left alone.
    """
    cuts: set[int] = set()
    runs: dict[str, list[int]] = {}
    for match in _ENUMERATOR.finditer(text):
        style = match.lastgroup
        assert style is not None
        number = ord(match[style]) - ord("a") + 1 if style == "letter" else int(match[style])
        run = runs.get(style, [])
        if number == 1:
            runs[style] = [match.start()] if _opens_item(text, match.start()) else []
        elif run and number == len(run) + 1:
            run.append(match.start())
            cuts.update(run[-2:])
        else:
            runs[style] = []
    return cuts


def _opens_item(text: str, start: int) -> bool:
    before = text[max(0, start - 20) : start].rstrip(" \t")
    return before == "" or before[-1] in "\n:;.!?"


def _sentence_cuts(text: str, end: int, shield: _Shield) -> list[int]:
    """Cuts before ``end`` after sentences, semicolons and before discourse markers."""
    cuts = []
    for match in _SENTENCE_END.finditer(text, 0, end):
        cut = match.end()
        if match["stop"] and _is_no_end(text, match.start()):
            continue
        if 0 < cut < end and not shield.covers(cut):
            cuts.append(cut)
    return cuts


def _is_no_end(text: str, stop: int) -> bool:
    """Whether the period at ``stop`` belongs to an abbreviation or to an enumerator at the start of its item."""
    window = text[max(0, stop - _LONGEST_ABBREVIATION) : stop + 1]
    word = window.split()[-1]
    if len(word) > _LONGEST_ABBREVIATION:
        return False
    start = stop + 1 - len(word)
    return bool(_ABBREVIATION.search(word) or (_BARE_ENUMERATOR.fullmatch(word) and _opens_item(text, start)))


def _final_start(text: str, starts: list[int]) -> int | None:
    """Start of the step that holds the last answer marker, or None."""
    found = find_marker(text)
    if found is None:
        return None
    offset, decisive = found
    index = bisect.bisect_right(starts, offset) - 1
    # The marker of a line may begin with the emphasis before it, but never before its step.
    if not decisive and index + 1 < len(starts) and "=" in text[starts[index + 1] :]:
        return None
    return starts[index]


# --------------------------------------------------------------------------------------------------
# merging


@dataclass(slots=True)
class _Piece:
    start: int
    length: int
    before: int
    after: int
    alive: bool = True


def _steps(text: str, starts: list[int], min_chars: int) -> tuple[list[int], bool]:
    """Starts of the steps, labels and crumbs merged, and whether the last one is the final answer."""
    final = _final_start(text, starts)
    kept: list[int] = []
    join_next = True  # the first piece always opens a step
    for start, stop in pairwise([*starts, len(text)]):
        if final is not None and start >= final:
            # A label or a lone crumb before the final answer goes with it.
            return [*(kept[:-1] if kept and join_next else kept), kept[-1] if kept and join_next else final], True
        piece = text[start:stop].strip()
        small = len(piece) < min_chars or not any(map(str.isalnum, piece))
        label = _LABEL.fullmatch(piece) is not None
        if not kept or not (join_next or (small and not label)):
            kept.append(start)
        # A crumb at the very start has only what follows to go with, as a label always has.
        join_next = label or (join_next and small)
    return kept, False


def _merge_shortest(starts: list[int], end: int, limit: int) -> list[int]:
    """Merge the neighbouring pair of least total length until ``limit`` pieces remain; earliest first on ties."""
    if len(starts) <= limit:
        return starts
    pieces = [_Piece(a, b - a, i - 1, i + 1) for i, (a, b) in enumerate(pairwise([*starts, end]))]
    pairs = [(pieces[i].length + pieces[i + 1].length, i, i + 1) for i in range(len(pieces) - 1)]
    heapq.heapify(pairs)
    remaining = len(pieces)
    while remaining > limit:
        length, left, right = heapq.heappop(pairs)
        first, second = pieces[left], pieces[right]
        if not (first.alive and second.alive) or first.length + second.length != length or first.after != right:
            continue  # one of the two has been merged since
        first.length, first.after, second.alive = length, second.after, False
        remaining -= 1
        if second.after < len(pieces):
            pieces[second.after].before = left
            heapq.heappush(pairs, (length + pieces[second.after].length, left, second.after))
        if first.before >= 0:
            heapq.heappush(pairs, (pieces[first.before].length + length, first.before, left))
    return [piece.start for piece in pieces if piece.alive]
