"""Equalities in a step of reasoning, such as ``48/2 = 24``, and whether they hold. Nothing is executed.

A side of an equality is a sum of products of decimal numbers with ``+ - * / x × ÷ −`` and parentheses. ``$``
before a number is passed over, as are commas in thousands. GSM8K's marks ``<<48/2=24>>`` count like text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 30  # a longer number is no arithmetic step, and exact fractions of it would be slow
MAX_TOKENS = 64  # per side
_TOKEN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)|(?P<operator>[-+*/×÷−]|(?<=[\s\d)])x(?=[\s\d($]))|(?P<equals>=)"
    r"|(?P<paren>[()])|(?P<space>[\s$]+)|(?P<other>.)",
    re.DOTALL,
)
_MARK = re.compile(r"<<([^<>]*)>>")
_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+", re.MULTILINE)  # its dash is no minus
_SAME = {"x": "*", "×": "*", "÷": "/", "−": "-"}


@dataclass(frozen=True)
class Equality:
    """``left = right`` as written.

    Attributes:
        operands: the numbers of the left side, in order.
        operators: the operators of the left side, in order, each one of ``+ - * /``.
        left: its exact value; None when it divides by zero.
        right: the exact value of the right side; None when it divides by zero.
        decimals: digits after the point in a right side that is one decimal number; 0 otherwise.
    """

    operands: tuple[Fraction, ...]
    operators: tuple[str, ...]
    left: Fraction | None
    right: Fraction | None
    decimals: int = 0

    def holds(self, modulus: int | None = None) -> bool:
        """Whether it is true: exactly, modulo ``modulus``, or to the decimals that the right side gives."""
        if self.left is None or self.right is None:
            return False
        gap = self.left - self.right
        if modulus is not None:
            return gap.denominator == 1 and gap % modulus == 0 and 0 <= self.right < modulus
        if self.decimals:
            return abs(gap) <= Fraction(1, 2 * 10**self.decimals)
        return gap == 0


def find_equalities(text: str) -> list[Equality]:
    """Every ``expression = expression`` of ``text`` in which the left side has an operator.

    A chain ``a*b = c+d = e`` gives one equality per equals sign whose left side is an expression. Takes time
    linear in the length of the text.
    """
    found: list[Equality] = []
    for mark in _MARK.finditer(text):
        found += _in_plain(mark.group(1))
    return found + _in_plain(_BULLET.sub("", _MARK.sub(" ", text)))


def numbers_in(text: str) -> list[Fraction]:
    """Every number of ``text``, in order; overlong ones are left out."""
    return [
        _value(match.group())
        for match in _TOKEN.finditer(text)
        if match.lastgroup == "number" and len(match.group()) <= MAX_DIGITS
    ]


def _in_plain(text: str) -> list[Equality]:
    found = []
    for run in _runs(text):
        sides = _split(run, "=")
        for place in range(len(sides) - 1):
            # Words end a run, so the left side may carry what belongs to the sentence before it.
            left = _longest(sides[place], from_end=True)
            right = _longest(sides[place + 1], from_end=False)
            if left is None or right is None or not any(token in "+-*/" for token in left[1:]):
                continue
            found.append(_equality(left, right))
    return found


def _equality(left: Sequence[str], right: Sequence[str]) -> Equality:
    operands = tuple(_value(token) for token in left if token[0] in "0123456789.")
    operators = tuple(token for token in left if token in ("+", "-", "*", "/"))
    decimals = len(right[0].partition(".")[2]) if len(right) == 1 else 0
    return Equality(operands, operators, _evaluate(left), _evaluate(right), decimals)


def _runs(text: str) -> Iterator[list[str]]:
    """Maximal stretches of numbers, operators, parentheses and equals signs."""
    run: list[str] = []
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "space":
            if "\n" in token and run and run[-1] != "=":
                yield run
                run = []
        elif kind == "other" or len(token) > MAX_DIGITS:
            yield run
            run = []
        else:
            run.append(_SAME.get(token, token))
    yield run


def _split(tokens: Sequence[str], at: str) -> list[list[str]]:
    sides: list[list[str]] = [[]]
    for token in tokens:
        if token == at:
            sides.append([])
        else:
            sides[-1].append(token)
    return sides


def _longest(tokens: list[str], *, from_end: bool) -> list[str] | None:
    """The longest end (or beginning) of ``tokens`` that is an expression; None when there is none."""
    near = tokens[-MAX_TOKENS:] if from_end else tokens[:MAX_TOKENS]
    for length in range(len(near), 0, -1):
        part = near[len(near) - length :] if from_end else near[:length]
        if _parse(part) is not None:
            return part
    return None


def _evaluate(tokens: Sequence[str]) -> Fraction | None:
    parsed = _parse(tokens)
    assert parsed is not None
    return parsed[0]


def _parse(tokens: Sequence[str]) -> tuple[Fraction | None] | None:
    """(value,) of a whole expression, the value None for a division by zero; None when it is no expression."""
    parser = _Parser(tokens)
    try:
        value = parser.sum()
    except _NoExpression:
        return None
    except ZeroDivisionError:
        return (None,)
    return (value,) if parser.place == len(tokens) else None


class _NoExpression(Exception):
    """The tokens are no expression."""


class _Parser:
    """Recursive descent: sum -> product -> unary -> number or parenthesis. Depth is bounded by MAX_TOKENS."""

    def __init__(self, tokens: Sequence[str]) -> None:
        self.tokens, self.place = tokens, 0

    def peek(self) -> str:
        return self.tokens[self.place] if self.place < len(self.tokens) else ""

    def sum(self) -> Fraction:
        value = self.product()
        while self.peek() in ("+", "-"):
            operator = self.tokens[self.place]
            self.place += 1
            value = value + self.product() if operator == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.unary()
        while self.peek() in ("*", "/"):
            operator = self.tokens[self.place]
            self.place += 1
            value = value * self.unary() if operator == "*" else value / self.unary()
        return value

    def unary(self) -> Fraction:
        token = self.peek()
        self.place += 1
        if token == "-":
            return -self.unary()
        if token == "(":
            value = self.sum()
            if self.peek() != ")":
                raise _NoExpression
            self.place += 1
            return value
        if not token or token[0] not in "0123456789.":
            raise _NoExpression
        return _value(token)


def _value(token: str) -> Fraction:
    return Fraction(token.replace(",", ""))
