"""Exact values of the numbers and the arithmetic that answers are written with.

Every value is a ``Fraction``: ``1/2118761`` and ``1/2118760`` differ, however close they are. A decimal also has a
precision, so that it can equal an exact value that rounds to it.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from ssrctl.text.quantities import ONES, PARTS, TEENS, TENS

MAX_NUMBER_CHARS = 300  # no answer needs longer ones, and their arithmetic is slow
MAX_BITS = 50_000  # of an intermediate result: 2006! has 19,000
MIN_ROUNDED_DIGITS = 3  # significant digits of a decimal that may stand for an exact value: 0.333 for 1/3, not 0.3

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"


@dataclass(frozen=True)
class Number:
    """An exact value and the precision it is written with.

    Attributes:
        value: the value.
        unit: value of the last decimal place (0.001 for 0.333); None for an exact number such as 1/3 or 7.
        digits: significant digits of a decimal.
    """

    value: Fraction
    unit: Fraction | None = None
    digits: int = 0

    def equals(self, other: Number) -> bool:
        """Return True if the numbers are equal, or one is a decimal that the other, exact one rounds to."""
        if self.value == other.value:
            return True
        if (self.unit is None) == (other.unit is None):
            return False
        decimal, exact = (self, other) if other.unit is None else (other, self)
        return decimal.rounds(exact.value)

    def rounds(self, exact: Fraction) -> bool:
        """Return True if this decimal has enough digits and ``exact`` rounds to it."""
        if self.unit is None or self.digits < MIN_ROUNDED_DIGITS:
            return False
        return abs(exact - self.value) * 2 <= self.unit

    def times(self, factor: Fraction) -> Number:
        """Return the number multiplied by ``factor``, with the same significant digits."""
        return Number(self.value * factor, None if self.unit is None else self.unit * abs(factor), self.digits)


# --------------------------------------------------------------------------------------------------
# literals

_POWER = r"(?:e|\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*)\{?\(?(?P<power>[-+]?\d{1,3})\)?\}?"
_PLAIN = re.compile(rf"(?P<sign>[-+]?)\s*(?P<size>{NUMBER}|\d+\.)(?:{_POWER})?")
_ONLY_POWER = re.compile(r"(?P<sign>[-+]?)10\s*(?:\^|\*\*)\s*\{?(?P<power>[-+]?\d{1,3})\}?")
_RATIO = re.compile(r"(?P<sign>[-+]?)\s*(?:(?P<whole>\d+)\s+(?:and\s+)?)?(?P<top>-?\d+)\s*/\s*\(?(?P<bottom>-?\d+)\)?")
_REPEATING = re.compile(
    r"(?P<sign>[-+]?)(?P<whole>\d*)\.(?P<fixed>\d*?)"
    r"(?:\\(?:overline|bar|dot)\s*\{?(?P<bar>\d+)\}?|\((?P<paren>\d+)\)|(?P<dots>\d+)\s*(?:\\[lc]?dots|\.\.\.|…))"
)
_ORDINAL = re.compile(r"(\d+)(?:\^?\{?(?:st|nd|rd|th)\}?)")


def read_number(text: str) -> Number | None:
    """Read a number literal: integer, decimal, fraction, mixed or repeating number, power of ten, ordinal or words.

    Args:
        text: in lower case, LaTeX fractions of integers as ``a/b``, a mixed number as ``a b/c``.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if ratio := _RATIO.fullmatch(text):
        if not (bottom := int(ratio["bottom"])) or (ratio["whole"] and "-" in ratio["top"] + ratio["bottom"]):
            return None
        value = Fraction(int(ratio["top"]), bottom) + int(ratio["whole"] or 0)
        return Number(-value if ratio["sign"] == "-" else value)
    if plain := _PLAIN.fullmatch(text):
        return _decimal(plain["sign"], plain["size"].replace(",", "").rstrip("."), int(plain["power"] or 0))
    if power := _ONLY_POWER.fullmatch(text):
        return _decimal(power["sign"], "1", int(power["power"]))
    if repeating := _REPEATING.fullmatch(text):
        return _repeating(repeating)
    if ordinal := _ORDINAL.fullmatch(text):
        return Number(Fraction(int(ordinal[1])))
    number = number_of_words(text.removeprefix("-"))
    return number.times(Fraction(-1)) if number is not None and text.startswith("-") else number


def _decimal(sign: str, size: str, power: int) -> Number:
    value = Fraction(size) * Fraction(10) ** power
    _, point, places = size.partition(".")
    unit = Fraction(10) ** (power - len(places)) if point else None
    return Number(-value if sign == "-" else value, unit, len(size.replace(".", "").lstrip("0")))


def _repeating(match: re.Match[str]) -> Number | None:
    r"""Read ``0.1\overline{6}`` or ``0.333...``; the digits before dots must be three repetitions or more."""
    fixed, period = match["fixed"], match["bar"] or match["paren"]
    if match["dots"]:
        shown = re.fullmatch(r"(?P<fixed>\d*?)(?P<period>\d{1,6}?)(?P=period){2,}", fixed + match["dots"])
        if shown is None:
            return None
        fixed, period = shown["fixed"], shown["period"]
    size = Fraction(int(match["whole"] or 0))
    size += Fraction(int(fixed or 0), 10 ** len(fixed)) + Fraction(
        int(period), (10 ** len(period) - 1) * 10 ** len(fixed)
    )
    return Number(-size if match["sign"] == "-" else size)


_SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
_SMALL = {"zero": 0} | ONES | TEENS | TENS
_ORDINAL_WORDS = (
    {"first": 1, "second": 2, "twelfth": 12}
    | {
        f"{stem}th": value
        for stem, value in (TEENS | {"eigh": 8, "nin": 9, "fif": 5, "four": 4, "six": 6, "seven": 7}).items()
    }
    | {word[:-1] + "ieth": value for word, value in TENS.items()}
)
_ORDINAL_WORDS["third"] = 3


def number_of_words(text: str) -> Number | None:
    """Read ``twenty-one``, ``two hundred and five``, ``twenty-first``, ``two thirds``, ``a half`` or ``one and a half``.

    A bare ``third`` is the ordinal 3; a fraction needs its count: ``one third``, ``a third``.
    """
    words = text.replace("-", " ").split()
    if not words or len(words) > 12 or not all(map(str.isalpha, words)):
        return None
    if words in (["half"], ["one", "half"], ["a", "half"], ["one", "quarter"], ["a", "quarter"]):
        return Number(Fraction(1, PARTS[words[-1]]))
    if words[-3:-1] == ["and", "a"] and words[-1] in PARTS:
        whole = _cardinal(words[:-3])
        return None if whole is None else Number(whole + Fraction(1, PARTS[words[-1]]))
    part = PARTS.get(words[-1]) or PARTS.get(words[-1].removesuffix("s"))
    if part is not None and len(words) > 1:
        count = 1 if words[:-1] in (["a"], ["an"]) else _cardinal(words[:-1])
        if count is not None and not (words[-2] in TENS and not words[-1].endswith("s")):  # twenty-first, -third
            return Number(Fraction(count) / part)
    if words[-1] in _ORDINAL_WORDS:
        before = _cardinal(words[:-1]) if len(words) > 1 else 0
        return None if before is None else Number(Fraction(before + _ORDINAL_WORDS[words[-1]]))
    value = _cardinal(words)
    return None if value is None else Number(Fraction(value))


def _cardinal(words: list[str]) -> int | None:
    total = group = 0
    previous = ""
    for word in words:
        if word in _SMALL:
            fits = previous in ("", "and", "hundred", *_SCALES) or (previous in TENS and word in ONES)
            if not fits:
                return None
            group += _SMALL[word]
        elif word == "hundred" and 0 < group < 10:
            group *= 100
        elif word in _SCALES and group:
            total, group = total + group * _SCALES[word], 0
        elif word != "and" or previous not in ("hundred", *_SCALES):
            return None
        previous = word
    return total + group if words and previous != "and" else None


# --------------------------------------------------------------------------------------------------
# arithmetic

_TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?|\.\d+)|(?P<command>\\(?:frac|binom|sqrt|cdot|times|div)(?![a-zA-Z]))"
    r"|(?P<sign>\*\*|[-+*/^!(){}]))"
)
_SAME = {r"\cdot": "*", r"\times": "*", r"\div": "/", "**": "^"}


class _NotExact(Exception):
    """The text is not arithmetic of rational numbers, or its value is too large."""


def evaluate_arithmetic(text: str) -> Number | None:
    r"""Return the exact value of arithmetic on numbers, or None.

    It may hold ``+ - * / ^ !``, parentheses, ``\frac``, ``\binom``, ``\sqrt`` of squares and LaTeX's operators.
    ``2\frac{1}{2}`` is a mixed number.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    tokens: list[str] = []
    place = 0
    while place < len(text):
        match = _TOKEN.match(text, place)
        if match is None:
            return None
        token = match.group().strip()
        tokens.append(_SAME.get(token, token))
        place = match.end()
    try:
        parser = _Arithmetic(tokens)
        value = parser.sum()
        return Number(value) if parser.place == len(tokens) else None
    except (_NotExact, ZeroDivisionError, RecursionError):
        return None


class _Arithmetic:
    """Recursive descent over the tokens of an arithmetic expression."""

    def __init__(self, tokens: list[str]) -> None:
        self.tokens, self.place = tokens, 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def take(self, expected: str = "") -> str:
        token = self.peek()
        if not token or (expected and token != expected):
            raise _NotExact
        self.place += 1
        return token

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            value = _bounded(value + self.product()) if self.take() == "+" else _bounded(value - self.product())
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while (token := self.peek()) in ("*", "/", "(", "{", "\\frac", "\\sqrt", "\\binom"):
            if token in ("*", "/"):
                self.take()
            before = self.tokens[self.place - 1]
            factor = self.signed()
            mixed = token == "\\frac" and before.isdecimal() and 0 < factor < 1
            value = _bounded(value / factor if token == "/" else value + factor if mixed else value * factor)
        return value

    def signed(self) -> Fraction:
        if self.peek() in ("+", "-"):
            return -self.signed() if self.take() == "-" else self.signed()
        return self.power()

    def power(self) -> Fraction:
        base = self.atom()
        if self.peek() == "!":
            self.take()
            if self.peek() == "!" or base.denominator != 1 or not 0 <= base <= 5000:
                raise _NotExact
            base = Fraction(math.factorial(int(base)))
        if self.peek() != "^":
            return base
        self.take()
        exponent = self.signed()
        size = max(abs(base.numerator), base.denominator).bit_length()
        if exponent.denominator != 1 or abs(exponent) * size > MAX_BITS:
            raise _NotExact
        return base ** int(exponent)

    def atom(self) -> Fraction:
        token = self.take()
        if token in ("(", "{"):
            value = self.sum()
            self.take({"(": ")", "{": "}"}[token])
            return value
        if token == "\\frac":
            return self.argument() / self.argument()
        if token == "\\sqrt":
            value = self.argument()
            root = Fraction(math.isqrt(max(value.numerator, 0)), math.isqrt(value.denominator))
            if root**2 != value:
                raise _NotExact
            return root
        if token == "\\binom":
            n, k = self.argument(), self.argument()
            if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= 5000:
                raise _NotExact
            return Fraction(math.comb(int(n), int(k)))
        if not (token[0].isdecimal() or token[0] == "."):
            raise _NotExact
        return Fraction(token)

    def argument(self) -> Fraction:
        """Take a group, or one digit as LaTeX does: ``\\frac34``, ``\\frac12``."""
        token = self.peek()
        if len(token) > 1 and token.isdecimal():
            self.tokens[self.place : self.place + 1] = [token[0], token[1:]]
        return self.atom()


def _bounded(value: Fraction) -> Fraction:
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _NotExact
    return value
