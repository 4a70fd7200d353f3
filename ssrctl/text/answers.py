"""Extraction of the final answer from a response, and its comparison with the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

from ssrctl.io.boxed import BRACES, last_boxed
from ssrctl.io.records import FinalAnswer
from ssrctl.io.row_fields import Reference
from ssrctl.text.answer_equality import compare_answers, decide
from ssrctl.text.answer_numbers import NUMBER
from ssrctl.text.answer_pool import ANSWER_TIMEOUT, MAX_WORKERS
from ssrctl.text.segment_shield import Shield

# Longest formula that is searched for in running text.
MAX_PHRASE_CHARS = 300
Extraction = Literal["strict", "lenient"]


_SIGNED = rf"[-+−]?\s{{0,2}}\\?\$?\s{{0,2}}[-−]?(?:{NUMBER})"
_WORD = r"(?:yes|no|true|false|\(?[A-J]\)?)"
# A letter that begins a formula, as in x^2 or p - q, and not a sentence.
_TERM = r"(?-i:[a-zA-Z])[ \t]{0,2}(?:[\^=+*/\\]|-[ \t]{0,2}\w{1,2}[ \t]*$)"

# A marker followed by an enumeration ("#### 1. Setup") or by prose is a markdown heading. Every repetition
# in these patterns is bounded or cannot overlap with its neighbour: responses are hostile input.
_HASHES = re.compile(
    r"(?<!#)####(?!#)[ \t]*+(?!\d+[.)][ \t])"
    rf"(?=[^\w\n]{{0,8}}(?:\d|\\[a-zA-Z(\[{{]|{_TERM})|{_WORD}[ \t.]*$|(?<=#)[^\W\d]+[ \t.]*$|[ \t]*$)(?P<value>[^\n]*)",
    re.MULTILINE | re.IGNORECASE,
)
_MARKER = re.compile(
    r"^[ \t>#*_]*+(?:(?-i:A)|(?:the[ \t]++)?(?:final[ \t]++)?answer|(?:最终|最終|正确)?答案(?:为|為|是)?)"
    r"[ \t]*+[*_]*+[ \t]*+[:：][*_]*+[ \t]*+(?P<value>[^\n]*)",
    re.MULTILINE | re.IGNORECASE,
)
_STATED = (
    rf"[*_]{{0,2}}(?:\$\$[^$]{{1,{MAX_PHRASE_CHARS}}}\$\$|\$(?:\\.|[^$\\\n]){{1,{MAX_PHRASE_CHARS}}}\$"
    rf"|\\[(\[](?:[^\\]|\\[^)\]]){{1,{MAX_PHRASE_CHARS}}}\\[)\]]"
    rf"|(?:[a-zA-Z][ \t]?=[ \t]?)?{_SIGNED}[^\s*,;<。，；]*|\\boxed|\([A-J]\)|{_WORD}(?=[*_]{{0,2}}(?:[.,;。，；\n]|$)))"
)
# "The answer is" counts only with a value next to it: "the answer is found by adding" does not.
_PHRASE = re.compile(
    r"(?:\banswer\b(?:[ \t]+(?:to|for|of)\b[^.\n=]{0,80}?)?[ \t]++(?:is|are|must be|will be|should be|equals)\b"
    rf"|答案(?:应该?)?[是为為])[ \t]*+[:：]?\s{{0,4}}(?P<value>{_STATED})",
    re.IGNORECASE,
)
_OPTION = re.compile(
    r"\b(?i:option|choice|alternative)\b(?:[^.\n]{0,40}?\b(?i:is|be)[ \t]*:?[ \t]*[*_]{0,2}(?P<value>\([A-J]\)|[A-J])"
    r"(?=[*_]{0,2}(?:[.,;:\n]|$))|[ \t]+(?P<named>\([A-J]\)|[A-J])[ \t]+is[ \t]+(?:the[ \t]+)?(?:correct|right|answer)\b)"
)
# A line with only a heading: "## Final Answer", "**Final Answer:**", "Final answer".
_HEADING = re.compile(
    r"^[ \t>]*+(?:#{1,6}[ \t]*+(?:\d{1,2}[.)][ \t]*+)?[*_]{0,2}(?:the[ \t]+)?(?:final[ \t]+)?answer"
    r"|[*_]{1,3}(?:the[ \t]+)?(?:final[ \t]+)?answer|(?:the[ \t]+)?final[ \t]+answer)"
    r"[ \t]*+[:：]?[*_]*+[ \t]*+[:：]?[ \t]*+$",
    re.MULTILINE | re.IGNORECASE,
)
_ANSWER_TAG = re.compile(r"<(/?)(?:final_)?answer>", re.IGNORECASE)
# A minus after a digit, letter or bracket subtracts; elsewhere it is the number's sign.
_ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-−])?\$?(?:{NUMBER})")
# Tags and LaTeX commands with their arguments, whose numbers are parts of something else.
_MARKUP = re.compile(r"</?[a-zA-Z][^<>\n]{0,80}>|\\[a-zA-Z]+(?:\{[^{}\n]{0,200}\}){0,3}|[_^]\{?-?\w+\}?")
_ONLY_NUMBER = re.compile(rf"[-−]?\\?\$?(?:{NUMBER})")
THINKING_TAGS = "think|thinking|thought|thoughts|reasoning|reflection|scratchpad"
_THINKING = re.compile(
    rf"<(?P<close>/?)(?P<name>{THINKING_TAGS})>|\[(?P<slash>/?)THINK\]",
    re.IGNORECASE,
)
# Harmony's header of a message, around the channel's name, and of the final one without special tokens.
HEADER_START, HEADER_END = r"<\|channel\|>\s*", r"[^<]{0,80}<\|message\|>"
BARE_FINAL = r"assistantfinal(?=\W|[A-Z\d])"
_CHANNEL = re.compile(rf"{HEADER_START}(?P<name>\w+){HEADER_END}|^analysis(?=[A-Z\s])|{BARE_FINAL}")
_SPECIAL_TOKEN = re.compile(r"<\|(?:end|return|start|call|im_end|eot_id)\|>")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """A final answer and the way it was found, a key of ``_WAYS``, ``answer-tag`` or ``last-number``."""

    value: str
    way: str


def find_marker(text: str) -> tuple[int, bool] | None:
    """Return ``(offset, decisive)`` of the last final-answer marker of ``text``, or None.

    Decisive: ``\\boxed{``, ``####``, ``<answer>``, a line that starts with ``A:`` or ``Answer:``, a heading "Final
    Answer". "The answer is 42" is not: later reasoning may withdraw it.
    """
    starts = [match.start() for match in _MARKER.finditer(text)]
    # Searching for a fixed word first takes a tenth of the time of a pattern that does not occur.
    if "####" in text:
        starts += [match.start() for match in _HASHES.finditer(text)]
    if "boxed" in text:
        starts += [match.start() for match in BRACES.finditer(text) if "boxed" in match.group()]
    folded = text.lower()
    if "answer" in folded:
        starts += [match.start() for match in _HEADING.finditer(text)]
        starts += [match.start() for match in _ANSWER_TAG.finditer(text) if not match[1]]
    if starts:
        return max(starts), True
    phrases: list[int] = []
    if "答案" in text or "answer" in folded:
        phrases += [match.start() for match in _PHRASE.finditer(text)]
    if "option" in folded or "choice" in folded or "alternative" in folded:
        phrases += [match.start() for match in _OPTION.finditer(text)]
    return (max(phrases), False) if phrases else None


def extract_answer(text: str, *, extraction: Extraction = "lenient") -> Extracted | None:
    """Return the final answer that ``text`` states, or None.

    Only the text outside of ``<think>``, ``[THINK]`` and analysis channels counts, unless nothing follows them.
    An ``<answer>`` section, the last one with content, replaces the text around it. Then the ways are tried from the
    most to the least explicit, and within a way the last occurrence counts: ``boxed`` (balanced braces), ``hashes``
    (``#### 42``), ``marker`` (``A: 42``, ``Answer: 42``), ``heading`` (the line after ``## Final Answer``), ``phrase``
    ("the answer is 42", "option (B) is correct"). An ``<answer>`` section without any of these is the answer itself
    (``answer-tag``) if it is a single line. The last resort, only if ``extraction`` is ``lenient``, is ``last-number``,
    which is never taken from inside a formula or tag. A marker with nothing after it gives nothing.

    Several boxes that are joined by commas, "and" or "or" are one list: ``\\boxed{2}`` and ``\\boxed{3}`` give ``2, 3``.
    Takes time linear in the length of ``text``.
    """
    text = _without_thoughts(text)
    section = _answer_section(text) if "<" in text else ""
    text = section or text
    for way, find in _WAYS.items():
        if value := find(text):
            return Extracted(value=value, way=way)
    if section and "\n" not in section and len(section) <= MAX_PHRASE_CHARS:
        return Extracted(value=_bare(section), way="answer-tag")
    if extraction == "lenient" and (number := _last_number(text)):
        return Extracted(value=number, way="last-number")
    return None


def _without_thoughts(text: str) -> str:
    """Return the text outside of thinking sections and analysis channels, or all of it if that is empty."""
    channels = list(_CHANNEL.finditer(text)) if "<|channel|>" in text or text.startswith("analysis") else []
    if channels:
        last = channels[-1]
        if last["name"] == "final" or last.group().startswith("assistantfinal"):
            conclusion = _SPECIAL_TOKEN.split(text[last.end() :], maxsplit=1)[0]
            if conclusion.strip():
                text = conclusion
    kept: list[str] = []
    position = depth = 0
    for tag in _THINKING.finditer(text):
        if tag["close"] or tag["slash"]:
            if depth == 0:  # the chat template opened the section
                kept.clear()
            depth = 0
            position = tag.end()
        else:
            if depth == 0:
                kept.append(text[position : tag.start()])
            depth = 1
    if depth == 0:
        kept.append(text[position:])
    conclusion = " ".join(kept)
    return conclusion if conclusion.strip() else text


def _answer_section(text: str) -> str:
    """Return the content of the last ``<answer>`` section that has any; the end of the text closes it too."""
    tags = list(_ANSWER_TAG.finditer(text))
    if not tags:
        return ""
    ends = [*(tag.start() for tag in tags[1:]), len(text)]
    sections = [text[tag.end() : end].strip() for tag, end in zip(tags, ends, strict=True) if not tag[1]]
    return next((section for section in reversed(sections) if section), "")


def _last_number(text: str) -> str:
    """Return the last number that is not part of a formula, a tag or a LaTeX command; a formula may be one number."""
    hidden: list[tuple[int, int]] = []
    for stretch in Shield(text).stretches:
        if stretch.kind in ("inline", "display") and not _ONLY_NUMBER.fullmatch(
            text[stretch.start : stretch.end].strip("$\\()[] \n.")
        ):
            hidden.append((stretch.start, stretch.end))
    hidden += [match.span() for match in _MARKUP.finditer(text)]
    hidden.sort()
    last, place = "", 0
    furthest = 0
    for match in _ANY_NUMBER.finditer(text):
        while place < len(hidden) and hidden[place][0] < match.end():
            furthest = max(furthest, hidden[place][1])
            place += 1
        if match.start() >= furthest:
            in_formula = text.startswith("$", match.end()) or text.startswith("\\", match.end())
            last = match.group().lstrip("$") if in_formula else match.group()
    return last


def check_answer(
    response: str, reference: Reference | None, *, extraction: Extraction = "lenient", timeout: float = ANSWER_TIMEOUT
) -> FinalAnswer:
    """Extract the final answer of ``response`` and compare it with ``reference``. Safe to call from any thread.

    Args:
        response: the model's text.
        reference: the right answer, or a worked solution that ends in ``#### answer`` or ``\\boxed{answer}``;
            several of them if any is right; None when unknown.
        extraction: ``lenient`` accepts the last number of a response that marks no answer, ``strict`` does not.
        timeout: seconds for the comparison, where it needs algebra.

    Returns:
        ``outcome`` correct, wrong, unparsed (no answer found) or timed_out; None without a reference.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    found = extract_answer(response, extraction=extraction)
    if reference is None or found is None:
        return _final(found, reference, None)
    return _final(found, reference, _compare(found.value, _reference_values(reference), timeout))


def check_answers(
    pairs: Sequence[tuple[str, Reference | None]],
    *,
    extraction: Extraction = "lenient",
    timeout: float = ANSWER_TIMEOUT,
    on_done: Callable[[int], None] | None = None,
) -> list[FinalAnswer]:
    """``check_answer`` for many (response, reference) pairs; comparisons that need algebra run in parallel.

    Args:
        pairs: (response, reference); results keep this order.
        extraction, timeout: as of ``check_answer``; the time is for each comparison with one answer.
        on_done: called in the calling thread with 1 after each pair.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    finals: list[FinalAnswer | None] = []
    pending: list[tuple[int, Extracted, Reference, Future[bool | None]]] = []
    done = on_done or (lambda count: None)
    with ThreadPoolExecutor(MAX_WORKERS, thread_name_prefix="answers") as threads:
        try:
            for place, (response, reference) in enumerate(pairs):
                found = extract_answer(response, extraction=extraction)
                finals.append(None)
                if found is not None and reference is not None:
                    accepted = _reference_values(reference)
                    verdict = _any_right(decide(found.value, right) for right in accepted)
                    if verdict is None:
                        asked = threads.submit(_compare, found.value, accepted, timeout)
                        pending.append((place, found, reference, asked))
                        continue
                    finals[place] = _final(found, reference, verdict)
                else:
                    finals[place] = _final(found, reference, None)
                done(1)
            for place, found, reference, asked in pending:
                finals[place] = _final(found, reference, asked.result())
                done(1)
        except BaseException:
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return [final for final in finals if final is not None]


def _final(found: Extracted | None, reference: Reference | None, verdict: bool | None) -> FinalAnswer:
    """Build the record of an extracted answer; ``verdict`` None is a comparison without a result, if there was one."""
    extracted, way = (found.value, found.way) if found else (None, None)
    if reference is None:
        return FinalAnswer(extracted=extracted, correct=None, way=way)
    if found is None:
        return FinalAnswer(extracted=None, correct=False, outcome="unparsed")
    if verdict is None:
        return FinalAnswer(extracted=extracted, correct=None, way=way, outcome="timed_out")
    return FinalAnswer(extracted=extracted, correct=verdict, way=way, outcome="correct" if verdict else "wrong")


# --------------------------------------------------------------------------------------------------
# the ways


def _hashes(text: str) -> str:
    values = [match.group("value") for match in _HASHES.finditer(text)]
    return _bare(values[-1]) if values else ""


def _marker(text: str) -> str:
    matches = list(_MARKER.finditer(text))
    if not matches:
        return ""
    value = _bare(matches[-1].group("value"))
    if not value:
        value = _bare(_first_of(text[matches[-1].end() :].strip()))
    # "Answer: The answer is 42."
    return _phrase(value) or value


def _first_of(text: str) -> str:
    """Return the first line, or the display formula that begins there."""
    for opening, closing in (("$$", "$$"), (r"\[", r"\]")):
        end = text.find(closing, len(opening), len(opening) + MAX_PHRASE_CHARS)
        if text.startswith(opening) and end > 0:
            return text[len(opening) : end]
    return text.split("\n", 1)[0]


def _heading(text: str) -> str:
    matches = list(_HEADING.finditer(text))
    if not matches:
        return ""
    value = _bare(_first_of(text[matches[-1].end() :].strip()))
    return _phrase(value) or value


def _phrase(text: str) -> str:
    found = [(match.start(), match["value"]) for match in _PHRASE.finditer(text)]
    found += [(match.start(), match["value"] or match["named"]) for match in _OPTION.finditer(text)]
    return _bare(max(found)[1]) if found else ""


_WAYS: dict[str, Callable[[str], str]] = {
    "boxed": last_boxed,
    "hashes": _hashes,
    "marker": _marker,
    "heading": _heading,
    "phrase": _phrase,
}


def _bare(value: str) -> str:
    """Strip emphasis marks, math delimiters, surrounding space and the period that ends a sentence."""
    value = value.strip().strip("*_ \t")
    value = value[:-1].rstrip("*_ \t") if value.endswith((".", "。")) else value
    for opening, closing in (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = value[len(opening) : -len(closing)]
        if value.startswith(opening) and value.endswith(closing) and inner and opening not in inner.replace(r"\$", ""):
            return inner.strip()
    return value


def _reference_values(reference: Reference) -> list[str]:
    """Return the accepted answers, each without the solution around it."""
    accepted = (reference,) if isinstance(reference, str) else reference
    return [_hashes(text) or last_boxed(text) or text for text in accepted]


def _compare(extracted: str, accepted: Sequence[str], timeout: float) -> bool | None:
    return _any_right(compare_answers(extracted, right, timeout=timeout) for right in accepted)


def _any_right(verdicts: Iterable[bool | None]) -> bool | None:
    """Return True at the first True; else None if a verdict is None, else False."""
    undecided = False
    for verdict in verdicts:
        if verdict:
            return True
        undecided = undecided or verdict is None
    return None if undecided else False
