"""Where a response states its final answer, what that answer is, and whether it is right."""

from __future__ import annotations

import functools
import logging
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

from ssrctl.errors import UserError
from ssrctl.io.records import FinalAnswer

# Longer digit strings are compared as text: no answer needs them, and their arithmetic is slow.
MAX_NUMBER_CHARS = 300
# What is handed to math-verify, which has no usable timeout outside the main thread, stays this short
# and free of exponents that could be towers.
MAX_EXPRESSION_CHARS = 300

_NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_SIGNED = rf"[-+−]?\s{{0,2}}\\?\$?\s{{0,2}}[-−]?(?:{_NUMBER})"
_WORD = r"(?:yes|no|true|false|\(?[A-J]\)?)"

# A marker followed by an enumeration ("#### 1. Setup") or by prose is a markdown heading. Every repetition
# in these patterns is bounded or cannot overlap with its neighbour: responses are hostile input.
_HASHES = re.compile(
    r"(?<!#)####(?!#)[ \t]*+(?!\d+[.)][ \t])"
    rf"(?=[^\w\n]{{0,8}}(?:\d|\\[a-zA-Z(\[{{])|{_WORD}[ \t.]*$|(?<=#)[^\W\d]+[ \t.]*$|[ \t]*$)(?P<value>[^\n]*)",
    re.MULTILINE | re.IGNORECASE,
)
_MARKER = re.compile(
    r"^[ \t>#*_]*+(?:(?-i:A)|(?:the[ \t]++)?(?:final[ \t]++)?answer)[ \t]*+[*_]*+[ \t]*+:[*_]*+[ \t]*+(?P<value>[^\n]*)",
    re.MULTILINE | re.IGNORECASE,
)
# "The answer is": only with a value beside it, so that "the answer is found by adding" is none.
_PHRASE = re.compile(
    r"\banswer\b(?:[ \t]+(?:to|for|of)\b[^.\n=]{0,80}?)?[ \t]++(?:is|are|must be|will be|should be|equals)\b[ \t]*+:?\s{0,3}"
    rf"(?P<value>[*_]{{0,2}}(?:\$[^$\n]{{1,{MAX_EXPRESSION_CHARS}}}\$|\\[(\[][^\n]{{1,{MAX_EXPRESSION_CHARS}}}?\\[)\]]"
    rf"|{_SIGNED}[^\s*,;]*|\\boxed|{_WORD}(?=[*_]{{0,2}}(?:[.,;\n]|$))))",
    re.IGNORECASE,
)
_BRACES = re.compile(r"\\[{}]|\\f?boxed[ \t]*\{|[{}]")
# A minus after a digit, letter or bracket subtracts; elsewhere it is the number's sign.
_ANY_NUMBER = re.compile(rf"(?:(?<![\w)\]}}])[-−])?\$?(?:{_NUMBER})")


@dataclass(frozen=True, kw_only=True)
class Extracted:
    """A final answer and the way it was found: boxed, hashes, marker, phrase or last-number."""

    value: str
    way: str


def find_marker(text: str) -> tuple[int, bool] | None:
    """Where the last final-answer marker of ``text`` starts, and whether it is a decisive one.

    Decisive: ``\\boxed{``, ``####``, a line that starts with ``A:`` or ``Answer:``. "The answer is 42" is not:
    reasoning that goes on after it may take it back.

    Returns:
        (offset, decisive) or None.
    """
    starts = [match.start() for match in _HASHES.finditer(text)]
    starts += [match.start() for match in _MARKER.finditer(text)]
    starts += [match.start() for match in _BRACES.finditer(text) if "boxed" in match.group()]
    if starts:
        return max(starts), True
    phrases = [match.start() for match in _PHRASE.finditer(text)]
    return (phrases[-1], False) if phrases else None


def extract_answer(text: str, *, allow_last_number: bool = True) -> Extracted | None:
    """The final answer that ``text`` states, or None.

    The ways are tried in order of how explicit they are, and within a way the last occurrence counts:
    ``boxed`` (balanced braces), ``hashes`` (``#### 42``), ``marker`` (``A: 42``, ``Answer: 42``), ``phrase``
    ("the answer is 42"), and, if allowed, ``last-number``. A marker with nothing after it gives nothing.
    Takes time linear in the length of ``text``.
    """
    for way, find in _WAYS.items():
        value = find(text)
        if value:
            return Extracted(value=value, way=way)
    if allow_last_number:
        numbers = [match.group().strip() for match in _ANY_NUMBER.finditer(text)]
        if numbers:
            return Extracted(value=numbers[-1], way="last-number")
    return None


def same_answer(extracted: str, reference: str) -> bool:
    """Whether two answers mean the same.

    Compared as text after normalisation (spaces, letter case, ``$``, ``%``, trailing period), then exactly
    as numbers (``073`` = ``73``, ``1,000.0`` = ``1000``, ``3/4`` = ``0.75``; next to a number a unit in words
    or an ``x =`` in front is passed over). What is not a plain number goes to math-verify: always when the
    reference is an expression, and for LaTeX when it is a number; ``70+3`` for 73 is no final answer. Inputs
    over 300 characters, or with towers of powers and the like on which symbolic algebra may not end, are
    unequal unless their text is the same.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    mine, theirs = _normal(extracted), _normal(reference)
    if mine == theirs:
        return mine != ""
    expected = _number(theirs)
    if expected is not None:
        found = _number(mine)
        if found is None:
            found = _number_with_company(mine)
        if found is not None:
            return found == expected
        return "\\" in mine and _verified(extracted, reference)
    return _is_maths(mine) and _is_maths(theirs) and _verified(extracted, reference)


def check_answer(response: str, reference: str | None, *, allow_last_number: bool = True) -> FinalAnswer:
    """Extract the final answer of ``response`` and compare it with ``reference``.

    Args:
        response: the model's text.
        reference: the right answer, or a worked solution that ends in ``#### answer`` or ``\\boxed{answer}``;
            None when unknown.
        allow_last_number: accept the last number of the response when it marks no answer.

    Returns:
        ``correct`` is None without a reference, and False when there is one but no answer was found.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    found = extract_answer(response, allow_last_number=allow_last_number)
    extracted = found.value if found else None
    way = found.way if found else None
    if reference is None:
        return FinalAnswer(extracted=extracted, correct=None, way=way)
    right = extracted is not None and same_answer(extracted, _reference_value(reference))
    return FinalAnswer(extracted=extracted, correct=right, way=way)


# --------------------------------------------------------------------------------------------------
# the ways


def _boxed(text: str) -> str:
    """Content of the last ``\\boxed{...}`` that is closed (the inner one of nested ones)."""
    last: tuple[int, int] | None = None
    open_braces: list[int | None] = []
    for match in _BRACES.finditer(text):
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


def _hashes(text: str) -> str:
    values = [match.group("value") for match in _HASHES.finditer(text)]
    return _bare(values[-1]) if values else ""


def _marker(text: str) -> str:
    matches = list(_MARKER.finditer(text))
    if not matches:
        return ""
    value = _bare(matches[-1].group("value"))
    if value:
        return value
    following = text[matches[-1].end() :].strip()
    return _bare(following.split("\n", 1)[0]) if following else ""


def _phrase(text: str) -> str:
    values = [match.group("value") for match in _PHRASE.finditer(text)]
    return _bare(values[-1]) if values else ""


_WAYS: dict[str, Callable[[str], str]] = {"boxed": _boxed, "hashes": _hashes, "marker": _marker, "phrase": _phrase}


def _bare(value: str) -> str:
    """Without emphasis marks, math delimiters, surrounding space and the period that ends a sentence."""
    value = value.strip().strip("*_ \t")
    value = value[:-1].rstrip("*_ \t") if value.endswith(".") else value
    for opening, closing in (("$", "$"), (r"\(", r"\)"), (r"\[", r"\]")):
        inner = value[len(opening) : -len(closing)]
        if value.startswith(opening) and value.endswith(closing) and inner and opening not in inner:
            return inner.strip()
    return value


def _reference_value(reference: str) -> str:
    return _hashes(reference) or _boxed(reference) or reference


# --------------------------------------------------------------------------------------------------
# equality

_WRAPPED = re.compile(r"\$\$?|\\\(|\\\)|\\\[|\\\]|\\%|%|\\!|\\,|\\;|\\ |\\left|\\right|\{,\}(?=\d)|€|£")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*\{\s*(-?\d+)\s*\}\s*\{\s*(\d+)\s*\}")
_LATEX_TEXT = re.compile(r"\\(?:text|mathrm|mbox|textbf|mathbf)\s*\{([^{}]*)\}")
_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s*(?P<size>{_NUMBER}|\d+\.)(?:e(?P<power>[-+]?\d{{1,3}}))?")
_RATIO = re.compile(r"(?P<sign>[-+]?)\s*(?P<top>\d+)\s*/\s*(?P<bottom>\d+)")
_WITH_UNIT = re.compile(rf"(?P<number>[-+]?\s*(?:{_NUMBER}))\s*(?P<unit>[^\W\d][^\d=+*/^\\]*)")
_MAGNITUDES = re.compile(r"\b(?:hundred|thousand|million|billion|trillion|dozen|k|m|bn)s?\b|[-]")
# Towers, long exponents, high powers of sums, factorials of large numbers, sums and limits: each can keep
# symbolic algebra busy for longer than anybody waits.
_MAY_NOT_END = re.compile(
    r"(?:\^|\*\*)\s*(?:\{[^{}]*(?:\^|\*\*)|[\w.]+\s*(?:\^|\*\*)|\W{0,3}\d{5,})"
    r"|\)\s*(?:\^|\*\*)(?:\W{0,3}\d{3,}|[^()]*\)\s*(?:\^|\*\*))"
    r"|\d{5,}\s*!|!\W*!|\\(?:sum|prod|int|lim|uparrow)|\\[dt]?binom\W{0,3}\d{5,}"
)


def _normal(answer: str) -> str:
    text = answer.replace("−", "-").replace("{,}", ",")
    text = _LATEX_TEXT.sub(r" \1", _WRAPPED.sub("", text))
    text = _LATEX_FRACTION.sub(r"\1/\2", text)
    return " ".join(text.split()).rstrip(". ").casefold()


def _number(text: str) -> Fraction | None:
    """The exact value of a plain number (``text`` normalised), or None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if ratio := _RATIO.fullmatch(text):
        bottom = int(ratio["bottom"])
        value = Fraction(int(ratio["top"]), bottom) if bottom else None
        return -value if value is not None and ratio["sign"] == "-" else value
    if plain := _PLAIN.fullmatch(text):
        value = Fraction(plain["size"].replace(",", "").rstrip("."))
        if plain["power"]:
            value *= Fraction(10) ** int(plain["power"])
        return -value if plain["sign"] == "-" else value
    return None


def _number_with_company(text: str) -> Fraction | None:
    """A number with a unit after it ("42 apples") or an equation before it ("x = 42")."""
    text = text.rsplit("=", 1)[-1].strip()
    if (alone := _number(text)) is not None:
        return alone
    match = _WITH_UNIT.fullmatch(text) if len(text) <= MAX_NUMBER_CHARS else None
    if match is None or _MAGNITUDES.search(match["unit"]):
        return None
    return _number("".join(match["number"].split()))


def _is_maths(text: str) -> bool:
    """Whether there is anything in it that algebra could decide (two plain words that differ, differ)."""
    return bool(re.search(r"[\d\\^_=+*/<>(\[{]|^-", text))


def _verified(extracted: str, reference: str) -> bool:
    parse, verify = _math_verify()
    if max(len(extracted), len(reference)) > MAX_EXPRESSION_CHARS:
        return False
    if _MAY_NOT_END.search(extracted) or _MAY_NOT_END.search(reference):
        return False
    with _VERIFY_LOCK:
        # Its timeouts are signals, which only the main thread may use; the limits above stand in for them.
        gold, answer = (parse(f"${text.strip().strip('$')}$", parsing_timeout=None) for text in (reference, extracted))
        return bool(verify(gold, answer, timeout_seconds=None))


_VERIFY_LOCK = threading.Lock()  # the parser behind math-verify keeps shared tables


@functools.cache
def _math_verify() -> tuple[Callable[..., list], Callable[..., bool]]:
    try:
        import math_verify
    except ImportError:
        raise UserError(
            "comparing answers that are not plain numbers needs math-verify", "pip install 'ssrctl[math]'"
        ) from None
    # It warns about the disabled timeouts, once per process, on every first use.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify.parse, math_verify.verify
