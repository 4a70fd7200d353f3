"""Equalities in a step of reasoning, such as ``48/2 = 24``, and whether they hold. Nothing is executed.

A side of an equality is a sum of products of decimal numbers with ``+ - * / x × ÷ −`` and parentheses. ``$``
before a number is passed over, as are commas in thousands; LaTeX's ``\\times``, ``\\cdot`` and ``\\div`` are
operators, ``1 1/2`` is a mixed number, ``2(3+4)`` a product. GSM8K's marks ``<<48/2=24>>`` count like text. An
expression of which a part is nothing of this (``3 eggs * 2 + 1 = 7``, ``100 - x + 5 = 60``, ``9 + 16 = 5^2``) is
not judged.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

MAX_DIGITS = 30  # a longer number is no arithmetic step, and exact fractions of it would be slow
MAX_TOKENS = 64  # per side
_TOKEN = re.compile(
    r"(?P<mixed>(?<![\d.,])\d{1,4}(?: and)? \d{1,3}/\d{1,3}(?![\d.]))"
    r"|(?P<number>(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+)|(?P<operator>[-+*/×÷−·]|\\(?:times|cdot|div)(?![A-Za-z])|(?<=[\s\d)])x(?=[\s\d($]))|(?P<equals>=)"
    r"|(?P<paren>[()])|(?P<space>[\s$]+)|(?P<scale>%|¢|\b(?:cents?|hundred|thousand|million|billion|dozen)\b)"
    # A letter that stands for a number: 5A / 5, 9 - x.
    r"|(?P<variable>(?:(?<=\d)[A-Za-z](?=[ ]?[-+*/])|(?<=[-−])[A-Za-z]|(?<=[-−][ ])[A-Za-z])(?![A-Za-z]))"
    r"|(?P<suffix>[\^!²³]|\\?[pb]?mod\b)|(?P<other>.)",
    re.DOTALL,
)
_UNKNOWN = "?"
_SCALES = {"%": Fraction(1, 100), "¢": Fraction(1, 100), "cent": Fraction(1, 100), "cents": Fraction(1, 100)} | {
    word: Fraction(size)
    for word, size in {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}.items()
}
_MARK = re.compile(r"<<([^<>]*)>>")
_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+", re.MULTILINE)  # its dash is no minus
_SAME = {"x": "*", "×": "*", "·": "*", "÷": "/", "−": "-"} | {r"\times": "*", r"\cdot": "*", r"\div": "/"}
# What makes the number or parenthesis right after it something else: an exponent, an index, an argument.
_PREFIX = re.compile(r"[A-Za-z^_√]")


@dataclass(frozen=True)
class Equality:
    """``left = right`` as written.

    Attributes:
        operands: the numbers of the left side, in order.
        operators: the operators of the left side, in order, each one of ``+ - * /``.
        left: its exact value; None when it divides by zero.
        right: the exact value of the right side; None when it divides by zero.
        decimals: digits after the point in a right side that is one decimal number; 0 otherwise.
        scale: what the unit after the right side may multiply it by (1/100 for %, 1000 for thousand); 1
            without such a unit.
    """

    operands: tuple[Fraction, ...]
    operators: tuple[str, ...]
    left: Fraction | None
    right: Fraction | None
    decimals: int = 0
    scale: Fraction = Fraction(1)

    def holds(self, modulus: int | None = None) -> bool:
        """Whether it is true: exactly, modulo ``modulus``, or to the decimals that the right side gives.

        A decimal right side may be rounded or cut off. A unit of scale is read both ways, since ``1/4 = 25%``
        and ``1/4 * 100 = 25%`` both occur; with it, a right side without decimals may be rounded too.
        """
        if self.left is None or self.right is None:
            return False
        if modulus is not None:
            gap = self.left - self.right
            return gap.denominator == 1 and gap % modulus == 0 and 0 <= self.right < modulus
        if self.scale != 1 and _near(self.left / self.scale, self.right, self.decimals):
            return True
        if self.decimals:
            return _near(self.left, self.right, self.decimals)
        return self.left == self.right


def _near(exact: Fraction, written: Fraction, decimals: int) -> bool:
    """Whether ``written`` is ``exact`` rounded (either way at the half) or cut off after ``decimals`` digits."""
    shifted = exact * 10**decimals
    return abs(shifted - written * 10**decimals) <= Fraction(1, 2) or int(shifted) == written * 10**decimals


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
    found: list[Fraction] = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "number" and len(match.group()) <= MAX_DIGITS:
            found.append(_value(match.group()))
        elif match.lastgroup == "mixed" and (value := _mixed(match.group())) is not None:
            found += [value, *(Fraction(part) for part in re.findall(r"\d+", match.group()))]
        elif match.lastgroup == "mixed":
            found += [Fraction(part) for part in re.findall(r"\d+", match.group())]
    return found


def _in_plain(text: str) -> list[Equality]:
    found = []
    for run in _runs(text):
        sides = _split(run, "=")
        for place in range(len(sides) - 1):
            # Words end a run, so the left side may carry what belongs to the sentence before it.
            left = _tail(sides[place])
            if left is None or not any(token in "+-*/" for token in left[1:]):
                continue
            right, after = _head(sides[place + 1])
            if right is not None:
                found.append(_equality(left, right, _SCALES.get(after, Fraction(1))))
    return found


def _equality(left: Sequence[str], right: Sequence[str], scale: Fraction) -> Equality:
    operands = tuple(_value(token) for token in left if _is_number(token))
    operators = tuple(token for token in left if token in ("+", "-", "*", "/"))
    decimals = len(right[0].partition(".")[2]) if len(right) == 1 else 0
    return Equality(operands, operators, _evaluate(left), _evaluate(right), decimals, scale)


def _runs(text: str) -> Iterator[list[str]]:
    """Maximal stretches of numbers, operators, parentheses and equals signs; one unit or variable may end it."""
    run: list[str] = []
    end = -1  # of the token before
    for match in _TOKEN.finditer(text):
        kind, token = match.lastgroup, match.group()
        if kind == "space":
            if "\n" in token and run and run[-1] != "=":
                yield run
                run = []
        elif kind in ("scale", "variable", "suffix"):
            yield [*run, token if kind == "scale" else _UNKNOWN]
            run = []
        elif kind == "other" or len(token) > MAX_DIGITS:
            yield run
            run = []
        elif kind == "mixed":
            run += _mixed_tokens(token)
        else:
            token = _SAME.get(token, token)
            if not run and (_subtracts(text, match.start()) if token == "-" else _is_prefixed(text, match.start())):
                run.append(_UNKNOWN)
            if token == "(" and run and match.start() == end and (_is_number(run[-1]) or run[-1] == ")"):
                run.append("*")
            run.append(token)
        end = match.end()
    yield run


def _subtracts(text: str, place: int) -> bool:
    """Whether the dash at ``place``, the first of its run, stands between operands and is no sign."""
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    return before.isalnum() or before == "%" or (before in (" ", "\t") and after.isspace())


def _is_prefixed(text: str, place: int) -> bool:
    """Whether the token at ``place`` is the 3 of ``2^3``, the 1 of ``x_1`` or the parenthesis of ``sqrt(9)``."""
    return place > 0 and _PREFIX.match(text, place - 1) is not None


def _mixed_tokens(token: str) -> list[str]:
    """``1 1/2`` as the one number ``1+1/2``; as four tokens when the fraction is not below 1."""
    whole, top, bottom = re.findall(r"\d+", token)
    if _mixed(token) is None:
        return [whole, top, "/", bottom]
    return [f"{whole}+{top}/{bottom}"]


def _mixed(token: str) -> Fraction | None:
    whole, top, bottom = (int(part) for part in re.findall(r"\d+", token))
    return whole + Fraction(top, bottom) if 0 < top < bottom else None


def _is_number(token: str) -> bool:
    return token[0] in "0123456789."


def _split(tokens: Sequence[str], at: str) -> list[list[str]]:
    sides: list[list[str]] = [[]]
    for token in tokens:
        if token == at:
            sides.append([])
        else:
            sides[-1].append(token)
    return sides


def _tail(tokens: Sequence[str]) -> list[str] | None:
    """The longest end of ``tokens`` that is an expression; None when there is none or it is only a part of one."""
    start, depth = len(tokens), 0
    for place in range(len(tokens) - 1, max(-1, len(tokens) - 1 - MAX_TOKENS), -1):
        token = tokens[place]
        after = tokens[place + 1] if place + 1 < len(tokens) else ""
        depth += (token == ")") - (token == "(")
        if depth < 0 or not _may_follow(token, after):
            break
        if depth == 0 and _may_follow("", token):
            start = place
    if start == len(tokens):
        return None
    before = tokens[start - 1] if start else ""
    if before == "(" and start > 1 and tokens[start - 2] in _OPERATORS:
        return None
    return None if before in (*_OPERATORS, ")", _UNKNOWN) else list(tokens[start:])


def _head(tokens: Sequence[str]) -> tuple[list[str] | None, str]:
    """The longest beginning of ``tokens`` that is an expression, and the token after it.

    None when there is none or it is only a part of one. A dash after it is taken for punctuation.
    """
    end, depth, before = 0, 0, ""
    for place, token in enumerate(tokens[:MAX_TOKENS]):
        depth += (token == "(") - (token == ")")
        if depth < 0 or not _may_follow(before, token):
            break
        before = token
        if depth == 0 and _may_follow(token, ""):
            end = place + 1
    after = tokens[end] if end < len(tokens) else ""
    partial = after in ("+", "*", "/", _UNKNOWN) or list(tokens[end : end + 2]) == ["-", _UNKNOWN]
    return (None if end == 0 or partial else list(tokens[:end])), after


_OPERATORS = ("+", "-", "*", "/")


def _may_follow(before: str, token: str) -> bool:
    """Whether an expression may hold ``token`` right after ``before``; "" is its start and its end.

    With balanced parentheses, this decides what is an expression: numbers and closing parentheses end an
    operand, anything else calls for one, to which a minus sign may belong.
    """
    if before and (_is_number(before) or before == ")"):
        return token == "" or token in (*_OPERATORS, ")")
    if before and before not in (*_OPERATORS, "("):
        return False
    return token != "" and (_is_number(token) or token in ("(", "-"))


def _evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The exact value of an expression; None when it divides by zero."""
    try:
        return _Parser(tokens).sum()
    except ZeroDivisionError:
        return None


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
            self.place += 1  # the closing parenthesis, which _tail and _head have seen
            return value
        return _value(token)


def _value(token: str) -> Fraction:
    if token.isdecimal():
        return Fraction(int(token))  # several times faster than from text
    whole, plus, fraction = token.replace(",", "").partition("+")
    return Fraction(whole) + Fraction(fraction) if plus else Fraction(whole)
