"""Equalities in a step of reasoning, such as ``48/2 = 24``, and their truth. Nothing is executed.

A side of an equality is a sum of products of decimal numbers with ``+ - * / x × ÷ −`` and parentheses. ``$``
before a number is ignored, as are commas in thousands; LaTeX's ``\\times``, ``\\cdot`` and ``\\div`` are
operators, ``1 1/2`` is a mixed number, ``2(3+4)`` a product. GSM8K's marks ``<<48/2=24>>`` count like text, and
the number copied out of one, ``<<48/2=24>>24``, is an equality too.

Units (``12 eggs/day * 3 days = 36 eggs``) are ignored where they fit together: terms of one kind in a sum, and
a result in words that occur on the left. Where they do not, as in ``30 minutes + 30 minutes = 1 hour``, only an
equality that holds as written counts. An expression with any other part (``100 - x + 5 = 60``, ``9 + 16 = 5^2``)
is not judged, nor is ``17 500``, which may be one number or two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from ssrctl.text.expressions import (
    OPERATORS,
    evaluate,
    head,
    is_number,
    is_unit,
    may_be_one_number,
    runs,
    split_sides,
    tail,
    value_of,
)

MAX_COPY_CHARS = 40  # after a mark
# A decimal number with this many digits was written by a machine, 5.120000000000001 for 5.12. The tolerance, relative
# to the largest number of the equality, is far above the rounding of a few float64 operations and below any slip.
MACHINE_DIGITS = 12
MACHINE_TOLERANCE = Fraction(1, 10**12)
_HUNDREDTH = "'%"
_SCALES = {"%": Fraction(1, 100), "¢": Fraction(1, 100), "cent": Fraction(1, 100), "cents": Fraction(1, 100)} | {
    word: Fraction(size)
    for word, size in {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}.items()
}
_MARK = re.compile(r"<<([^<>]*)>>")
_BULLET = re.compile(r"^[ \t]*[-*+•][ \t]+", re.MULTILINE)  # its dash is not a minus


@dataclass(frozen=True)
class Equality:
    """``left = right`` as written.

    Attributes:
        operands: the numbers of the left side, in order.
        operators: the operators of the left side, in order, each one of ``+ - * /``; none for a copied number.
        left: its exact value; None when it divides by zero.
        right: the exact value of the right side; None when it divides by zero.
        decimals: digits after the point in a right side that is one decimal number; 0 otherwise.
        scale: factor that units may give the right side (1/100 for % after it, 1000 for thousand, 100 for % only
            on the left); 1 without such a unit.
        largest: the largest absolute number, if one of them shows a machine's rounding; else 0.
    """

    operands: tuple[Fraction, ...]
    operators: tuple[str, ...]
    left: Fraction | None
    right: Fraction | None
    decimals: int = 0
    scale: Fraction = Fraction(1)
    largest: Fraction = Fraction(0)

    def holds(self, modulus: int | None = None) -> bool:
        """Return True if it is true: exactly, modulo ``modulus``, or to the decimals that the right side gives.

        A decimal right side may be rounded or cut off, and ``50-49.4 = 0.6000000000000014`` is a machine's
        rounding. A unit of scale is read both ways, since ``1/4 = 25%`` and ``1/4 * 100 = 25%`` both occur; with
        it, a right side without decimals may be rounded too.
        """
        if self.left is None or self.right is None:
            return False
        if modulus is not None:
            gap = self.left - self.right
            return gap.denominator == 1 and gap % modulus == 0 and 0 <= self.right < modulus
        if abs(self.left - self.right) <= MACHINE_TOLERANCE * self.largest:
            return True
        if self.scale != 1 and _near(self.left / self.scale, self.right, self.decimals):
            return True
        if self.decimals:
            return _near(self.left, self.right, self.decimals)
        return self.left == self.right


def _near(exact: Fraction, written: Fraction, decimals: int) -> bool:
    """Return True if ``written`` is ``exact`` rounded (either way at the half) or cut off after ``decimals`` digits."""
    scale = Fraction(10) ** decimals
    return abs(exact - written) * scale <= Fraction(1, 2) or int(exact * scale) == written * scale


def find_equalities(text: str) -> list[Equality]:
    """Return every ``expression = expression`` of ``text`` in which the left side has an operator.

    A chain ``a*b = c+d = e`` gives one equality per equals sign whose left side is an expression. The number
    copied out of a mark gives one without operators. Takes time linear in the length of the text.
    """
    found: list[Equality] = []
    for mark in _MARK.finditer(text):
        found += _in_plain(mark.group(1)) + _copied(mark.group(1), text[mark.end() : mark.end() + MAX_COPY_CHARS])
    return found + _in_plain(_BULLET.sub("", _MARK.sub(" ", text)))


def _in_plain(text: str) -> list[Equality]:
    found = []
    for run in runs(text):
        sides = split_sides(run)
        for place in range(len(sides) - 1):
            # Words end a run, so the left side may begin with numbers of the sentence before it.
            left = tail(sides[place])
            if left is None or not any(token in OPERATORS for token in left[1:]):
                continue
            right, after = head(sides[place + 1])
            if right is None:
                continue
            equality = _equality(left, right, after)
            if _units_fit(left, right) or equality.holds():
                found.append(equality)
    return found


def _copied(mark: str, after: str) -> list[Equality]:
    """Return the equality of a mark's result and the number right after the mark, which should be the same."""
    if "=" not in mark or after[:1].isspace():
        return []
    left = split_sides(next(runs(mark.rpartition("=")[2])))[-1]
    run = next(runs(after.partition("\n")[0]))
    digits = 1 if run[:1] == ["-"] else 0
    right, following = run[: digits + 1], run[digits + 1 : digits + 2]
    if len(right) <= digits or not is_number(right[-1]) or head(left)[0] != left:
        return []
    unit = following[0] if following else ""
    if unit in OPERATORS or may_be_one_number(right[-1], unit):
        return []
    return [_equality(left, right, "%" if unit == _HUNDREDTH else unit)]


def _equality(left: Sequence[str], right: Sequence[str], after: str) -> Equality:
    operands = tuple(value_of(token) for token in left if is_number(token))
    operators = tuple(token for token in left if token in OPERATORS)
    bare = [token for token in right if not is_unit(token)]
    # With a minus sign or without, but one number.
    decimals = len(bare[-1].partition(".")[2]) if len(bare) == 1 + (bare[0] == "-") else 0
    values = evaluate(left), evaluate(right)
    largest = Fraction(0)
    if any(_is_machine_made(token) for token in (*left, *right)):
        largest = max(abs(value) for value in (*operands, *values) if value is not None)
    scale = _SCALES.get(after, Fraction(1)) * Fraction(100) ** (_hundredths(left) - _hundredths(right))
    return Equality(operands, operators, *values, decimals, scale, largest)


def _is_machine_made(token: str) -> bool:
    return "." in token and sum(character.isdecimal() for character in token.lstrip("0.")) >= MACHINE_DIGITS


def _hundredths(side: Sequence[str]) -> int:
    """Return the power of 1/100 that the percent signs of a side may mean: at most one for a sum."""
    bare = [token for token in side if token not in ("-", "(", ")")]
    signs = [
        -1 if bare[place - 2 : place - 1] == ["/"] else 1 for place, token in enumerate(bare) if token == _HUNDREDTH
    ]
    return min(len(signs), 1) if _is_sum(side) else sum(signs)


def _is_sum(side: Sequence[str]) -> bool:
    return any(token in ("+", "-") for token in side[1:])


def _units_fit(left: Sequence[str], right: Sequence[str]) -> bool:
    """Return True if the units on the left, if any, leave no doubt that the equality means its numbers."""
    mine = [set(token[1:].split()) for token in left if is_unit(token)]
    theirs = [set(token[1:].split()) for token in right if is_unit(token)]
    if not mine:
        return True
    if _is_sum(left):
        numbers = sum(is_number(token) for token in left)
        if any(not unit & mine[0] for unit in mine) or (_HUNDREDTH in left and len(mine) < numbers):
            return False
    return all(unit & set().union(*mine) for unit in theirs)
