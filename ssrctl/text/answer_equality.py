"""Equality of two final answers: as text, as exact numbers, else by symbolic algebra.

Most answers are plain numbers, which are compared here exactly. Only expressions go to the processes of
``answer_pool``.
"""

from __future__ import annotations

import re
from fractions import Fraction

from ssrctl.text.answer_pool import ANSWER_TIMEOUT, Undecided, same_by_algebra

# Longer digit strings are compared as text: no answer needs them, and their arithmetic is slow.
MAX_NUMBER_CHARS = 300
# No answer needs more, and two of them fit into a pipe at once.
MAX_EXPRESSION_CHARS = 2000
# A decimal equals the fraction that it rounds to this many places: 0.333333 = 1/3. math-verify's default.
DECIMAL_PLACES = 6

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"


def compare_answers(extracted: str, reference: str, *, timeout: float = ANSWER_TIMEOUT) -> bool | None:
    """Compare two answers; return None when algebra gave no verdict within ``timeout`` seconds.

    Tried in this order:

    - as text, after normalisation: spaces, letter case, ``$``, ``%``, degree signs, ``\\text{}``, trailing period;
    - exactly, as numbers: ``073`` = ``73``, ``1,000.0`` = ``1000``, ``3/4`` = ``0.75``, ``2 1/2`` = ``2.5``. Next
      to a number a unit, an ``x =`` or "she has" in front is ignored; a decimal equals a fraction that it
      matches to six places; ``0.5`` is ``50%``;
    - as a choice: ``(B) 42 apples`` for ``B``, ``Yes, because ...`` for ``yes``;
    - by math-verify, when the reference is an expression, or when it is a number and the answer is more than
      unfinished arithmetic: ``2^{10}`` is 1024, but ``70+3`` is not a final answer for 73. Expressions over 2000
      characters are unequal unless their text is the same.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    decided = decide(extracted, reference)
    if decided is not None:
        return decided
    try:
        return same_by_algebra(_without_unit(extracted), _without_unit(reference), timeout)
    except Undecided:
        return None


def decide(extracted: str, reference: str) -> bool | None:
    """Compare two answers without algebra; return None when only algebra can decide."""
    if max(len(extracted), len(reference)) > MAX_EXPRESSION_CHARS:
        return extracted.split() == reference.split()
    mine, theirs = _normal(extracted), _normal(reference)
    if mine == theirs or mine.replace(", ", ",") == theirs.replace(", ", ","):
        return mine != ""
    if _CHOICE.fullmatch(theirs) or theirs in _VERDICTS:
        return _same_choice(mine, theirs)
    if (expected := _expected_number(theirs, reference)) is not None:
        found = _number(mine)
        if found is None:
            found = _number_in_context(mine)
        if found is None:
            return None if _ALGEBRAIC.search(mine) and _balanced(mine) else False
        if (ours := _symbol(mine)) and (their := _symbol(theirs)) and ours != their:
            return False
        return _same_number(found, expected, percent=("%" in extracted) - ("%" in reference))
    if based := _BASED.fullmatch(theirs):
        other = _BASED.fullmatch(mine)
        return based["digits"] == (other["digits"] if other else mine) and (not other or other["base"] == based["base"])
    return None if _is_maths(mine) and _is_maths(theirs) and _balanced(mine) else False


# --------------------------------------------------------------------------------------------------
# text

_CURRENCY = re.compile(r"\\?\$|€|£|¥")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|°")
# Spacing, delimiters of maths, and percent signs; \{ and \} are braces of sets and stay.
_WRAPPED = re.compile(r"\\[()\[\]!,;: ]|\\?%|\\(?:left|right|displaystyle)(?![a-zA-Z])|~")
_THOUSANDS = re.compile(r"(?<=\d),(?:\\!)+\s*(?=\d{3})|(?<=\d)\{,\}\s*(?=\d{3})|(?<=\d)\\[,;]\s*(?=\d{3})")
_LATEX_TEXT = re.compile(r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}")
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(?<=\s)(\d)|(?<=c)(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_AROUND_SIGN = re.compile(r" ?([-+*/^=()\[\]{}<>|]) ?| (?=,)")


def _normal(answer: str) -> str:
    text = _THOUSANDS.sub(",", answer.replace("−", "-"))
    text = _DEGREES.sub("", _CURRENCY.sub("", text))
    text = _LATEX_TEXT.sub(r" \1 ", _WRAPPED.sub("", text))
    # With spaces around it: 2\frac{1}{2} is two and a half, not 21/2.
    text = _LATEX_FRACTION.sub(lambda m: f" {m[1] or m[2] or m[3]}/{m[4] or m[5]} ", text)
    # A space before or after a sign means nothing, but 12, 345 is not 12,345 and 1 2/3 not 12/3.
    return _AROUND_SIGN.sub(r"\1", " ".join(text.split())).rstrip(". ").casefold()


def _is_maths(text: str) -> bool:
    """Return True if algebra could decide about ``text``; two different plain words are simply different."""
    return bool(re.search(r"[\d\\^_=+*/<>(\[{]|^-|\b\w-\w\b", text))


def _balanced(text: str) -> bool:
    """Return True if as many brackets are closed as opened, of any kind: ``(3,4]`` is an interval."""
    return sum(text.count(c) for c in "([{") == sum(text.count(c) for c in ")]}")


# --------------------------------------------------------------------------------------------------
# choices and numerals

_CHOICE = re.compile(r"\(?([a-z])\)?")
_CHOSEN = re.compile(r"\(?(?P<letter>[a-z])(?:\)|[.:](?=\s|$)|$)")
_VERDICTS = ("yes", "no", "true", "false")
# 2516_8, but not a letter with an index such as x_1
_BASED = re.compile(r"(?P<digits>(?=[a-z]*\d)[0-9a-z]+)_\{?\(?(?P<base>\d{1,2})\)?\}?")


def _same_choice(mine: str, theirs: str) -> bool:
    if theirs in _VERDICTS:
        first = re.match(r"\w+", mine)
        return first is not None and first.group() == theirs
    chosen = _CHOSEN.match(mine)
    return chosen is not None and chosen["letter"] == theirs.strip("()")


# --------------------------------------------------------------------------------------------------
# numbers

_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s*(?P<size>{NUMBER}|\d+\.)(?:e(?P<power>[-+]?\d{{1,3}}))?")
_RATIO = re.compile(r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+)?(?P<top>\d+)\s*/\s*(?P<bottom>\d+)")
# A unit: words, or one of a few letters after a space; with a square or cube. 5x and 5 \pi have no unit.
_WITH_UNIT = re.compile(
    rf"(?P<number>[-+]?\s*(?:(?:\d+\s+)?\d+\s*/\s*\d+|{NUMBER}))"
    r"(?P<unit>\s*[^\W\d_]{2}[^\d=+*^\\_]*|\s+[gshlcfm](?:\s*/[^\d=+*^\\_]*)?)(?:\^\s*\{?\s*[23]\s*\}?|[²³])?"
)
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|k|bn|pi|sqrt|log|ln|sin|cos|tan|or|and|to|times|over)s?\b|-"
)
_LEAD = re.compile(
    r"[^\W\d_][^\W\d_ ',]*(?:[ ',]+[^\W\d_]+)*?[ ,]+(?:is|are|was|were|has|have|had|equals?|costs?)[ :]+"
)
# 2x = 10 and -x = 5 are unsolved equations
_COEFFICIENT = re.compile(r"\d[a-z]\b|^-[a-z]")
_SYMBOL = re.compile(r"([a-z])\s*=[^=]*")
# An answer with one of these is more than unfinished arithmetic.
_ALGEBRAIC = re.compile(r"[\\^!√π]|\*\*|\bsqrt\b|\bpi\b")


_UNIT_AT_END = re.compile(
    r"\s*(?:\\(?:text|textrm|mbox)\s*\{[^{}]*\}|\\mathrm\s*\{\s*[a-zA-Z]{2}[^{}]*\}"
    r"|(?<=[\s}])(?:(?:sq(?:uare|\.)?|cu(?:bic|\.)?)\s+)?(?:units?|[cmk]m|kg|feet|foot|ft|inch(?:es)?|miles?|met(?:er|re)s?"
    r"|degrees?|radians?|hours?|minutes?|seconds?|days?|years?|dollars?|cents?)(?![a-zA-Z]))"
    r"\s*(?:\^\s*(?:\d|\{\s*\d\s*\}))?\s*\.?$"
)


def _without_unit(answer: str) -> str:
    """Remove a unit at the end, unless nothing would be left."""
    match = _UNIT_AT_END.search(answer)
    rest = answer[: match.start()].strip() if match else ""
    return rest or answer


def _number(text: str) -> Fraction | None:
    """Return the exact value of a plain number (``text`` normalised), or None."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if ratio := _RATIO.fullmatch(text):
        if not (bottom := int(ratio["bottom"])):
            return None
        value = Fraction(int(ratio["top"]), bottom) + int(ratio["whole"] or 0)
        return -value if ratio["sign"] == "-" else value
    if plain := _PLAIN.fullmatch(text):
        value = Fraction(plain["size"].replace(",", "").rstrip("."))
        if plain["power"]:
            value *= Fraction(10) ** int(plain["power"])
        return -value if plain["sign"] == "-" else value
    return None


def _number_in_context(text: str) -> Fraction | None:
    """Read a number after words or an equation ("she has 42", "x = 42") or before a unit ("42 apples")."""
    if len(text) > MAX_NUMBER_CHARS:
        return None
    left, equals, text = text.rpartition("=")
    if equals and _COEFFICIENT.search(left):
        return None
    text = text.strip()
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    if (plain := _number(text)) is not None:
        return plain
    match = _WITH_UNIT.fullmatch(text)
    if match is None or _NO_UNIT.search(match["unit"]):
        return None
    return _number(match["number"])


def _expected_number(theirs: str, reference: str) -> Fraction | None:
    """Read a reference that is one number, perhaps with a unit.

    The unit must be marked as text (``15\\mbox{ cm}^2``) or be a longer word: in references ``2 ab`` is a product.
    """
    if (plain := _number(theirs)) is not None:
        return plain
    if "=" in theirs and not _SYMBOL.fullmatch(theirs):
        return None
    match = _WITH_UNIT.fullmatch(theirs)
    if match is not None and not _LATEX_TEXT.search(reference) and not re.search(r"[^\W\d_]{4}", match["unit"]):
        return None
    return _number_in_context(theirs)


def _same_number(found: Fraction, expected: Fraction, percent: int) -> bool:
    """Compare exactly, or to six places if one has infinitely many decimals.

    ``percent`` is 1 when only the answer has ``%``, -1 when only the reference has it.
    """
    readings = [found] if percent == 0 else [found, found / 100 if percent > 0 else found * 100]
    if expected in readings:
        return True
    if _is_decimal(found) and _is_decimal(expected):
        return False
    return any(round(reading, DECIMAL_PLACES) == round(expected, DECIMAL_PLACES) for reading in readings)


def _is_decimal(value: Fraction) -> bool:
    """Return True if ``value`` has finitely many decimals: its denominator divides a power of ten."""
    return pow(10, value.denominator.bit_length(), value.denominator) == 0


def _symbol(text: str) -> str | None:
    match = _SYMBOL.fullmatch(text)
    return match[1] if match else None
