"""Extraction of the final answer from a response, and its comparison with the reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ssrctl.io.boxed import BRACES, last_boxed
from ssrctl.io.records import FinalAnswer
from ssrctl.io.row_fields import Reference
from ssrctl.text.answer_equality import NUMBER, compare_answers, decide
from ssrctl.text.answer_pool import ANSWER_TIMEOUT, MAX_WORKERS

# Longest formula that is searched for in running text.
MAX_PHRASE_CHARS = 300

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
    rf"[*_]{{0,2}}(?:\$(?:\\.|[^$\\\n]){{1,{MAX_PHRASE_CHARS}}}\$|\\[(\[][^\n]{{1,{MAX_PHRASE_CHARS}}}?\\[)\]]"
    rf"|(?:[a-zA-Z][ \t]?=[ \t]?)?{_SIGNED}[^\s*,;<。，；]*|\\boxed|{_WORD}(?=[*_]{{0,2}}(?:[.,;。，；\n]|$)))"
)
# "The answer is" counts only with a value next to it: "the answer is found by adding" does not.
_PHRASE = re.compile(
    r"(?:\banswer\b(?:[ \t]+(?:to|for|of)\b[^.\n=]{0,80}?)?[ \t]++(?:is|are|must be|will be|should be|equals)\b"
    rf"|答案(?:应该?)?[是为為])[ \t]*+[:：]?\s{{0,3}}(?P<value>{_STATED})",
    re.IGNORECASE,
)
# A minus after a digit, letter or bracket subtracts; elsewhere it is the number's sign.
_ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-−])?\$?(?:{NUMBER})")
_END_OF_THINKING = "</think>"


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """A final answer and the way it was found: boxed, hashes, marker, phrase or last-number."""

    value: str
    way: str


def find_marker(text: str) -> tuple[int, bool] | None:
    """Return ``(offset, decisive)`` of the last final-answer marker of ``text``, or None.

    Decisive: ``\\boxed{``, ``####``, a line that starts with ``A:`` or ``Answer:``. "The answer is 42" is not:
    later reasoning may withdraw it.
    """
    starts = [match.start() for match in _MARKER.finditer(text)]
    # Searching for a fixed word first takes a tenth of the time of a pattern that does not occur.
    if "####" in text:
        starts += [match.start() for match in _HASHES.finditer(text)]
    if "boxed" in text:
        starts += [match.start() for match in BRACES.finditer(text) if "boxed" in match.group()]
    if starts:
        return max(starts), True
    if "答案" not in text and "answer" not in text.lower():
        return None
    phrases = [match.start() for match in _PHRASE.finditer(text)]
    return (phrases[-1], False) if phrases else None


def extract_answer(text: str, *, allow_last_number: bool = True) -> Extracted | None:
    """Return the final answer that ``text`` states, or None.

    The ways are tried from the most to the least explicit, and within a way the last occurrence counts:
    ``boxed`` (balanced braces), ``hashes`` (``#### 42``), ``marker`` (``A: 42``, ``Answer: 42``), ``phrase``
    ("the answer is 42"), and, if allowed, ``last-number``. A marker with nothing after it gives nothing.
    The text after the last ``</think>`` is searched first, and the whole text only if it states nothing. Takes time
    linear in the length of ``text``.
    """
    _, thinking, conclusion = text.rpartition(_END_OF_THINKING)
    for part in (conclusion, text) if thinking else (text,):
        for way, find in _WAYS.items():
            if value := find(part):
                return Extracted(value=value, way=way)
    if allow_last_number:
        numbers = [match.group().strip() for match in _ANY_NUMBER.finditer(text)]
        if numbers:
            return Extracted(value=numbers[-1], way="last-number")
    return None


def check_answer(
    response: str, reference: Reference | None, *, allow_last_number: bool = True, timeout: float = ANSWER_TIMEOUT
) -> FinalAnswer:
    """Extract the final answer of ``response`` and compare it with ``reference``. Safe to call from any thread.

    Args:
        response: the model's text.
        reference: the right answer, or a worked solution that ends in ``#### answer`` or ``\\boxed{answer}``;
            several of them if any is right; None when unknown.
        allow_last_number: accept the last number of the response when it marks no answer.
        timeout: seconds for the comparison, where it needs algebra.

    Returns:
        ``outcome`` correct, wrong, unparsed (no answer found) or timed_out; None without a reference.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    found = extract_answer(response, allow_last_number=allow_last_number)
    if reference is None or found is None:
        return _final(found, reference, None)
    return _final(found, reference, _compare(found.value, _reference_values(reference), timeout))


def check_answers(
    pairs: Sequence[tuple[str, Reference | None]],
    *,
    allow_last_number: bool = True,
    timeout: float = ANSWER_TIMEOUT,
    on_done: Callable[[int], None] | None = None,
) -> list[FinalAnswer]:
    """``check_answer`` for many (response, reference) pairs; comparisons that need algebra run in parallel.

    Args:
        pairs: (response, reference); results keep this order.
        allow_last_number, timeout: as of ``check_answer``; the time is for each comparison with one answer.
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
                found = extract_answer(response, allow_last_number=allow_last_number)
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


def _phrase(text: str) -> str:
    values = [match.group("value") for match in _PHRASE.finditer(text)]
    return _bare(values[-1]) if values else ""


_WAYS: dict[str, Callable[[str], str]] = {"boxed": last_boxed, "hashes": _hashes, "marker": _marker, "phrase": _phrase}


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
