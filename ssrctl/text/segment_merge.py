"""From cuts to steps: pieces that are not steps join a neighbour, long steps are cut, and surplus steps merged.

A list of starts represents the pieces between them; the last one ends at the end of the text.
"""

from __future__ import annotations

import heapq
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from dataclasses import dataclass
from itertools import pairwise

from ssrctl.text.answers import BARE_FINAL, HEADER_END, HEADER_START, THINKING_TAGS
from ssrctl.text.segment_sentences import sentence_starts
from ssrctl.text.segment_shield import Shield

_SECTION = f"(?:{THINKING_TAGS}|answer|solution)>"
_TURN = rf"(?:<\|end\|>\s*)?(?:<\|start\|>assistant)?{HEADER_START}"
# ``<think>`` and the like, and the channels of harmony, with their special tokens or without: the final one ends thinking.
TAG = re.compile(
    rf"(?P<close></{_SECTION}|\[/THINK\]|{_TURN}final{HEADER_END}|(?-i:{BARE_FINAL}))"
    rf"|<(?=[trsa]){_SECTION}|\[THINK\]|{_TURN}\w+{HEADER_END}",
    re.I,
)
LINE_BREAK = re.compile(r"\n\s*")

# A piece that only names the next one: a heading, "Step 3:", "2.", a bullet, "Solution:", an opening tag.
_LABEL = re.compile(
    r"#{1,6}[ \t][^\n]*|\*\*[^*\n=]{1,80}(?<![.!?。])\*\*:?|(?:\*\*)?Step[ \t]+\d+[ \t]?[:.)]?(?:\*\*)?:?"
    r"|\(?(?:\d{1,3}|[a-z])[.)]|[（(]\d{1,3}[)）]|[①-⑳]|[-*+•]|[A-Z][a-z]{2,15}[:：]"
    r"|第[一二三四五六七八九十\d]{1,3}步[:：]?|步骤[ \t]?\d{1,3}[:：]?"
)
# Neither a label nor a formula.
_PROSE = re.compile(r"(?!Step\b)[^\W\d_]{2,}[,']?[ ]\S")
_LONGEST_LABEL = 96
_LONGEST_GAP = 64  # white space between two steps that is searched for a blank line
ACROSS_PARAGRAPHS, ACROSS_SECTIONS = 4, 10**12  # cost of merging across a blank line or ``</think>``, per character
_STOPS = ".!?。！？"
_ITEM = re.compile(r"[-*+•]\s|\(?(?:\d{1,3}|[a-z])[.)]\s")
_WORD = re.compile(r"[^\W\d_]{2,}")
# A sentence that ends with one of these continues with a formula.
_AWAITING = re.compile(
    r"(?:[:,=：，]|(?:^|\s)(?:is|are|be|was|get|gets|have|has|gives|obtain|equals|becomes|as|to|that|where|and|or|than|of|by"
    r"|for|with|find|compute|calculate|let|if|since|so))$"
)
_RELATION = re.compile(r"(?:=(?![>=])|≈|≤|≥|\\approx|\\le|\\ge|\\leq|\\geq)\W")
_RELATION_STARTS = "=≈≤≥\\"
_NEW_CLAUSE = re.compile(r"(?:so|then|therefore|thus|hence|now|next|finally|also|but)\b")


def join_pieces(
    text: str,
    starts: list[int],
    shield: Shield,
    *,
    final: int | None,
    min_chars: int,
    tagged: bool = True,
    lines_alone: bool = False,
) -> list[int]:
    """Return starts of the steps after each piece that is not a step has joined a neighbour.

    A heading, label or opening tag joins the next piece. A piece without any letter or digit, or with fewer
    than ``min_chars`` characters, joins the piece before (the first one joins the next); and so do a
    displayed formula whose sentence has not ended, its continuation in lower case, a piece that begins
    with ``=``, and a bare formula after a colon or a word such as "is".

    Args:
        text: the response.
        starts: starts of the pieces, ascending, the first 0.
        shield: of ``text``.
        final: the start of the final answer, one of ``starts``, if there is one: it and what follows are one step.
        min_chars: smallest length of a step without its surrounding white space.
        tagged: False when there is no ``TAG`` in the text, which saves the search.
        lines_alone: undisplayed formulas keep their own steps.
    """
    if len(starts) == 1:
        return starts
    joiner = _Joiner(text, shield, min_chars, tagged, lines_alone)
    for start, stop in pairwise([*starts, len(text)]):
        if start == final:
            joiner.add(start, stop, forced=True)
            break
        joiner.add(start, stop)
    return joiner.kept


class _Joiner:
    """Collector of step starts, which is given the pieces in order."""

    def __init__(self, text: str, shield: Shield, min_chars: int, tagged: bool, lines_alone: bool) -> None:
        self.text, self.shield = text, shield
        self.min_chars, self.tagged, self.lines_alone = min_chars, tagged, lines_alone
        self.kept: list[int] = []
        self._join_next = True  # the first piece always opens a step
        self._open_display = False  # the last piece was a displayed formula in the middle of its sentence

    def add(self, start: int, stop: int, *, forced: bool = False) -> None:
        """Take one piece; a forced one opens a step unless a label or an unfinished sentence needs it."""
        piece = self.text[start:stop].strip()
        if not (self._open_display or self._join_next) and len(piece) >= self.min_chars and _PROSE.match(piece):
            self.kept.append(start)  # the common case, decided at once
            return
        label, small = self._is_label(piece), self._is_small(piece)
        waits = self._open_display
        self._open_display = False
        belongs = not label and self._belongs(start, piece, waits)
        if not self.kept or not (self._join_next or belongs or (small and not label and not forced)):
            self.kept.append(start)
        # A small piece at the very start can only join the next one, as a label always does.
        self._join_next = label or (self._join_next and small)

    def _is_label(self, piece: str) -> bool:
        if len(piece) > _LONGEST_LABEL and piece[0] != "#":
            return False
        if self.tagged and (tag := TAG.match(piece)) is not None:
            rest = TAG.sub("", piece).strip()
            return not rest and tag["close"] is None
        return _LABEL.fullmatch(piece) is not None

    def _is_small(self, piece: str) -> bool:
        content = TAG.sub("", piece) if self.tagged else piece
        return len(piece) < self.min_chars or not any(map(str.isalnum, content))

    def _belongs(self, start: int, piece: str, waits: bool) -> bool:
        """Return True if ``piece`` is a formula of the sentence before it, or continues after such a formula."""
        stretch = self.shield.at(start) if self.shield.stretches else None
        if stretch is not None and stretch.kind in ("display", "inline") and self._only_formulas(start, piece):
            if stretch.kind == "display":
                self._open_display = piece.rstrip("\\])$} ")[-1:] not in (*_STOPS, "")
                return bool(self.kept) and self._text_before(start)[-1:] not in _STOPS
            return self._awaited(start)
        if waits and (piece[:1] in ",;.)" or (piece[:1].islower() and not _NEW_CLAUSE.match(piece))):
            return True
        if self.lines_alone:
            return False
        if piece[:1] in _RELATION_STARTS and _RELATION.match(piece) is not None:
            return True
        return _WORD.search(piece) is None and _ITEM.match(piece) is None and self._awaited(start)

    def _only_formulas(self, start: int, piece: str) -> bool:
        position, end = start, start + len(piece)
        while position < end:
            stretch = self.shield.at(position)
            if stretch is not None and stretch.kind in ("display", "inline"):
                position = stretch.end
            elif self.text[position].isalnum():
                return False
            else:
                position += 1
        return True

    def _awaited(self, start: int) -> bool:
        return _AWAITING.search(self._text_before(start)) is not None

    def _text_before(self, start: int) -> str:
        return self.text[max(0, start - 24) : start].rstrip()


# --------------------------------------------------------------------------------------------------
# length and number


def split_long(
    text: str, starts: list[int], shield: Shield, *, max_chars: int, min_chars: int, last_cut: int
) -> list[int]:
    """Cut steps over ``max_chars`` at line ends, else at sentence ends, in pieces as long as the limit allows.

    A protected stretch is cut only when it is itself longer than the limit, and then only at its line ends.
    A step without any such end stays whole. No cut is made after ``last_cut`` (the final answer).
    """
    made: list[int] = []
    for start, stop in pairwise([*starts, len(text)]):
        made.append(start)
        if stop - start > max_chars:
            made.extend(_cuts_inside(text, start, stop, shield, max_chars, min_chars, last_cut))
    return made


def _cuts_inside(
    text: str, start: int, stop: int, shield: Shield, max_chars: int, min_chars: int, last_cut: int
) -> list[int]:
    first = start + len(text[start:stop]) - len(text[start:stop].lstrip())
    lines = [m.end() for m in LINE_BREAK.finditer(text, first, stop) if m.end() < stop]
    sentences = sentence_starts(text, first, stop)
    tiers = [shield.outside(lines), shield.outside(sentences), lines]
    cuts: list[int] = []
    position = start
    while stop - position > max_chars:
        cut = _best_cut(tiers, position, max_chars)
        if cut is None or cut > last_cut:
            break
        cuts.append(cut)
        position = cut
    kept = []
    for cut, end in pairwise([*cuts, stop]):
        piece = text[cut:end].strip()
        if len(piece) >= min_chars and any(map(str.isalnum, piece)):
            kept.append(cut)
    return kept


def _best_cut(tiers: list[list[int]], position: int, max_chars: int) -> int | None:
    """Return the last cut within the limit, of the first tier with one in its upper half; else the nearest cut."""
    limit = position + max_chars
    within = []
    for tier in tiers:
        index = bisect_right(tier, limit) - 1
        if index >= 0 and tier[index] > position:
            if tier[index] > position + max_chars // 2:
                return tier[index]
            within.append(tier[index])
    if within:
        return max(within)
    after = [tier[i] for tier in tiers if (i := bisect_left(tier, limit + 1)) < len(tier)]
    return min(after, default=None)


@dataclass(slots=True)
class _Piece:
    length: int
    before: int
    after: int
    weight: int  # of the boundary at its start
    alive: bool = True


def merge_shortest(text: str, starts: list[int], end: int, limit: int, sections: Collection[int] = ()) -> list[int]:
    """Merge the cheapest neighbouring pair until ``limit`` pieces remain; earliest first on ties.

    A pair costs its length, ``ACROSS_PARAGRAPHS`` times as much if a blank line separates it. Pieces of different
    sections are merged only when there are more sections than ``limit``.

    Args:
        text: the response.
        starts: starts of the pieces.
        end: end of the last piece.
        limit: largest number of pieces.
        sections: starts of sections, such as the text after ``</think>``.
    """
    if len(starts) <= limit:
        return starts

    def weight(start: int) -> int:
        if start in sections:
            return ACROSS_SECTIONS
        gap = text[max(0, start - _LONGEST_GAP) : start]
        return ACROSS_PARAGRAPHS if gap[len(gap.rstrip()) :].count("\n") > 1 else 1

    pieces = [_Piece(b - a, i - 1, i + 1, weight(a)) for i, (a, b) in enumerate(pairwise([*starts, end]))]

    def cost(left: int, right: int) -> tuple[int, int, int]:
        return (pieces[left].length + pieces[right].length) * pieces[right].weight, left, right

    pairs = [cost(i, i + 1) for i in range(len(pieces) - 1)]
    heapq.heapify(pairs)
    remaining = len(pieces)
    while remaining > limit:
        popped = heapq.heappop(pairs)
        _, left, right = popped
        first, second = pieces[left], pieces[right]
        if not (first.alive and second.alive) or first.after != right or popped != cost(left, right):
            continue  # one of the two has been merged since
        first.length, first.after, second.alive = first.length + second.length, second.after, False
        remaining -= 1
        if second.after < len(pieces):
            pieces[second.after].before = left
            heapq.heappush(pairs, cost(left, second.after))
        if first.before >= 0:
            heapq.heappush(pairs, cost(first.before, left))
    return [start for start, piece in zip(starts, pieces, strict=True) if piece.alive]
