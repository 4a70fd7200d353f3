"""Splitting a response into reasoning steps (SSR section 1: explicit delimiters, else a rule-based fallback)."""

from __future__ import annotations

import functools
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from typing import Literal

from ssrctl.io.records import StepSpan
from ssrctl.text.answers import find_marker
from ssrctl.text.segment_merge import LINE_BREAK, TAG, join_pieces, merge_shortest, split_long
from ssrctl.text.segment_sentences import opens_item, sentence_starts
from ssrctl.text.segment_shield import Shield

Style = Literal["auto", "newline", "paragraph"]

_BLANK_LINE = re.compile(r"\n[^\S\n]*+\n\s*+")
# Inside a line: "... Step 2: ...", and an answer after "A:" or four number signs. The look-behind comes after the first
# character, so that the search can skip to it.
_STEP_LABEL = re.compile(r"S(?<=[^#*>•-]\sS)tep[ \t]{1,3}\d{1,3}[ \t]?[:.)]")
_ANSWER_LABEL = re.compile(r"A(?<=\sA):[ \t]?(?=[-\d$\\])|#(?<=\s#)###(?!#)(?=[ \t]?[-\d$\\])")
_CHINESE_LABEL = re.compile(
    r"(?<![^\s。；;:：！？])(?:第[一二三四五六七八九十\d]{1,3}步(?=[:：，,])|步骤[ \t]?\d{1,3}[:：])"
)
# The end of a possible enumerator, and the whole enumerator.
_ENUMERATOR_END = re.compile(r"\.(?<=\d\.)(?=\s)|\)(?<=[\da-z]\))(?=\s)")
_ENUMERATOR = re.compile(r"(?<!\S)(?:(?P<dot>\d{1,3})[.)]|\((?:(?P<digit>\d{1,3})|(?P<letter>[a-z]))\))$")
_LONGEST_ENUMERATOR = 5
_SECOND_ITEM = re.compile(r"2[.)]\s|\(b\)\s|（2）|②")  # every enumeration has one
_CHINESE_ENUMERATOR = re.compile(r"（(?P<wide>\d{1,2})）|(?P<circled>[①-⑳])")


def segment(
    text: str, *, style: Style = "auto", max_steps: int = 64, min_chars: int = 2, max_chars: int = 2000
) -> list[StepSpan]:
    """Split ``text`` into step spans that are ordered, non-empty and cover it exactly.

    ``auto`` cuts at line breaks, enumerations (``1.``, ``(a)``, ``Step 3:``) and before ``####``; white space
    between two steps belongs to the earlier one. Where that leaves one paragraph of reasoning (of the text or
    of a ``<think>`` section), it is cut at sentence ends and discourse markers instead, see
    ``sentence_starts``. ``newline`` cuts only at line breaks, ``paragraph`` only at blank lines, both also at
    ``<think>`` and similar tags and at the channels of harmony (``analysis``, ``final``). Code, mathematics and tables
    are never cut inside, see ``Shield``.

    A piece that is not a step joins a neighbour, see ``join_pieces``: headings, bare labels and opening tags the
    next piece; closing tags, pieces under ``min_chars`` or without a letter or digit, and a formula that completes
    a sentence the previous one.

    The last span has kind ``final`` if it holds a final-answer marker (``####``, ``\\boxed{``, ``A:``,
    ``Answer:``, "the answer is 42"); text after the step with the last marker is merged into it, except that
    "the answer is" loses its standing when what follows still calculates (holds an ``=``), and a marker inside
    ``<think>`` when anything follows its step. Without a marker no span is final.

    Args:
        text: the response. An empty one gives no span, one of white space a single span.
        style: where to cut.
        max_steps: largest number of spans; the shortest neighbouring pairs are merged, rather within a paragraph
            and the earliest of equals first, never across ``</think>`` while other pairs remain, and never into the
            final span unless ``max_steps`` is 1.
        min_chars: smallest length of a step without its surrounding white space.
        max_chars: a step longer than this is cut at line ends, else at sentence ends, where it has any; 0 is
            off. ``max_steps`` is applied after it and wins.

    Raises:
        ValueError: unknown style, ``max_steps`` or ``min_chars`` below 1, ``max_chars`` below 0.
    """
    _check(style, max_steps, min_chars, max_chars)
    if not text:
        return []
    shield = Shield(text)
    tags = list(TAG.finditer(text)) if "<" in text or "[" in text or "assistantfinal" in text else []
    marker = _Marker(text, tags)
    cuts = _explicit_cuts(text, shield, tags, style)
    join = functools.partial(
        join_pieces, text, shield=shield, min_chars=min_chars, tagged=bool(tags), lines_alone=style == "newline"
    )
    final = marker.start(text, cuts)
    starts = join(cuts, final=final)
    if style == "auto" and (more := _fallback_cuts(text, starts, shield, tags, marker, final is not None)):
        cuts = sorted({*cuts, *more})
        final = marker.start(text, cuts)
        starts = join(cuts, final=final)
    if max_chars and len(text) > max_chars:
        last_cut = len(text) if final is None or marker.offset is None else marker.offset
        starts = split_long(text, starts, shield, max_chars=max_chars, min_chars=min_chars, last_cut=last_cut)
    sections = {_next_word(text, tag.end()) for tag in tags if _is_closing(tag) and _is_thinking(tag)}
    merge = functools.partial(merge_shortest, text, sections=sections)
    if final is not None and max_steps > 1:
        starts = [*merge(starts[:-1], starts[-1], max_steps - 1), starts[-1]]
    else:
        starts = merge(starts, len(text), max_steps)
    spans = [StepSpan(start=start, end=end) for start, end in pairwise([*starts, len(text)])]
    if final is not None:
        spans[-1].kind = "final"
    return spans


def _check(style: str, max_steps: int, min_chars: int, max_chars: int) -> None:
    if max_steps < 1 or min_chars < 1:
        raise ValueError(f"max_steps and min_chars must be at least 1, got {max_steps} and {min_chars}")
    if max_chars < 0:
        raise ValueError(f"max_chars must be at least 1, or 0 for no limit, got {max_chars}")
    if style not in ("auto", "newline", "paragraph"):
        raise ValueError(f"style must be auto, newline or paragraph, got {style!r}")


class _Marker:
    """The last final-answer marker of a text.

    A marker inside a ``<think>`` section is ignored when text follows the section or follows it in there.

    Attributes:
        offset: its start; None without one.
        decisive: True if it holds although calculations follow.
    """

    def __init__(self, text: str, tags: list[re.Match[str]]) -> None:
        self.offset: int | None = None
        self.decisive = False
        thinking = [tag for tag in tags if _is_thinking(tag)]
        closed = max((tag.end() for tag in thinking if _is_closing(tag)), default=0)
        opened = max((tag.end() for tag in thinking if not _is_closing(tag)), default=0)
        answer_from = closed if closed and text[closed:].strip() else 0
        found = find_marker(text[answer_from:] if answer_from else text)
        if found is None:
            return
        offset, self.decisive = found[0] + answer_from, found[1]
        thought = offset >= opened if opened > closed else offset < closed
        if not (thought and _continues(text, offset)):
            self.offset = offset

    def start(self, text: str, starts: list[int]) -> int | None:
        """Return the start of the piece that holds the marker, if that is a final answer."""
        if self.offset is None:
            return None
        # A marker may begin with the emphasis before it, but never before its step.
        after = bisect_right(starts, self.offset)
        if not self.decisive and after < len(starts) and text.find("=", starts[after]) >= 0:
            return None
        return starts[after - 1]


def _is_closing(tag: re.Match[str]) -> bool:
    return tag["close"] is not None


def _is_thinking(tag: re.Match[str]) -> bool:
    return tag.group().strip("</>[]").lower() not in ("answer", "solution")


def _continues(text: str, offset: int) -> bool:
    """Return True if anything but tags follows the sentence or line around ``offset``."""
    line_break = LINE_BREAK.search(text, offset)
    end = line_break.end() if line_break else len(text)
    end = next(iter(sentence_starts(text, offset, end)), end)
    return bool(TAG.sub("", text[end:]).strip())


# --------------------------------------------------------------------------------------------------
# where to cut; a cut is the start of a piece, the first is always 0


def _explicit_cuts(text: str, shield: Shield, tags: list[re.Match[str]], style: Style) -> list[int]:
    line_break = _BLANK_LINE if style == "paragraph" else LINE_BREAK
    cuts = {match.end() for match in line_break.finditer(text)}
    if style == "auto":
        if "Step" in text:
            cuts |= {match.start() for match in _STEP_LABEL.finditer(text)}
        cuts.update(_answer_labels(text))
        if not text.isascii():
            cuts |= {match.start() for match in _CHINESE_LABEL.finditer(text)}
        cuts |= _enumeration_cuts(text)
    for tag in tags:
        # A closing tag ends its step: with no word of its own it joins the piece before it.
        cuts.add(_next_word(text, tag.end()) if _is_closing(tag) else tag.start())
    # White space before the first word is not a step.
    first = _next_word(text, 0)
    return [0, *shield.outside(sorted(cut for cut in cuts if first < cut < len(text)))]


def _answer_labels(text: str) -> list[int]:
    if "A:" not in text and "####" not in text:
        return []
    return [match.start() for match in _ANSWER_LABEL.finditer(text)]


_SPACE = re.compile(r"\s*+")


def _next_word(text: str, position: int) -> int:
    match = _SPACE.match(text, position)
    assert match is not None
    return match.end()


def _enumeration_cuts(text: str) -> set[int]:
    """Return starts of the items of enumerations inside a line: 1, 2, ... in order, at least two of them.

    The first item starts its line or follows a colon or a sentence end, so that "cases (a) and (b)" and
    "the answer is 1. Then" are not cut.
    """
    cuts: set[int] = set()
    if _SECOND_ITEM.search(text) is None:
        return cuts
    runs: dict[str, list[int]] = {}
    for style, number, start in _enumerators(text):
        run = runs.get(style, [])
        if number == 1:
            runs[style] = [start] if opens_item(text, start) else []
        elif run and number == len(run) + 1:
            run.append(start)
            cuts.update(run[-2:])
        else:
            runs[style] = []
    return cuts


def _enumerators(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield style, number and start of every enumerator such as ``1.``, ``2)``, ``(3)``, ``(d)``, ``（5）`` or ``⑥``."""
    for end in _ENUMERATOR_END.finditer(text):
        window = max(0, end.end() - _LONGEST_ENUMERATOR - 1)
        match = _ENUMERATOR.search(text[window : end.end()])
        if match is not None:
            style = match.lastgroup
            assert style is not None
            number = ord(match[style]) - ord("a") + 1 if style == "letter" else int(match[style])
            yield style, number, window + match.start()
    if not text.isascii():
        for match in _CHINESE_ENUMERATOR.finditer(text):
            if circled := match["circled"]:
                yield "circled", ord(circled) - ord("①") + 1, match.start()
            else:
                yield "wide", int(match["wide"]), match.start()


def _fallback_cuts(
    text: str, starts: list[int], shield: Shield, tags: list[re.Match[str]], marker: _Marker, final: bool
) -> list[int]:
    """Return sentence starts of the sections (between tags and answer labels) whose reasoning is one step so far."""
    # The paragraph may hold the answer too: "... So 5 are left. The answer is 5."
    end = marker.offset if final and marker.offset is not None else len(text)
    reasoning = starts[:-1] if final else starts
    # An opening tag belongs to its section, as it does to that section's first step.
    edges = [0, *(tag.end() if _is_closing(tag) else tag.start() for tag in tags)]
    if len(starts) > 1:
        edges = sorted({*edges, *_answer_labels(text)})
    cuts: list[int] = []
    for start, stop in pairwise([*edges, len(text)]):
        inside = bisect_left(reasoning, stop) - bisect_left(reasoning, start)
        if inside <= 1 and start < min(stop, end):
            cuts += sentence_starts(text, start, min(stop, end))
    return shield.outside(cuts)
