"""Arithmetic expressions in prose: their tokens, their ends and their exact values.

A run is a list of tokens: numbers as written, ``+ - * / ( ) =``, units as ``'`` and their words (``'egg``), and
``?`` for what makes its neighbourhood unreadable (a variable, an exponent). Nothing is executed.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction

MAX_DIGITS = 30  # longer numbers do not occur in arithmetic steps, and their exact fractions are slow
MAX_TOKENS = 64  # per side
UNKNOWN = "?"
OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}
# Words next to numbers that are not units, since they name an operation or join clauses.
_NO_UNITS = (
    "and|are|because|but|by|cents?|divided|dozen|equals?|from|gives|half|hundred|if|is|less|makes|million|billion|minus"
    "|mod|more|multiplied|of|or|over|plus|since|so|squared|than|that|then|thousand|times|to|was|were|which|while"
)
_WORD = rf"(?!(?:{_NO_UNITS})(?![A-Za-z]))[A-Za-z][A-Za-z'’]{{1,20}}"
# A unit inside an expression is followed by an operator; of one at its end, the first words are enough.
_INSIDE = r"(?P<inside>(?=[ $]*(?:[-+*/×÷−=)]|–[ ]|x[\s\d($]|\\(?:times|cdot|div)(?![A-Za-z]))))?"
_UNIT = re.compile(rf"{_WORD}(?:(?:[ -]|[ ]?/[ ]?)(?:a[ ]|an[ ])?{_WORD}){{0,4}}{_INSIDE}")
_HUNDREDTHS = re.compile(rf"(?:%|¢|cents?\b){_INSIDE}")
_TOKEN = re.compile(
    r"(?P<mixed>(?<![\d.,])\d{1,4}(?: and)? \d{1,3}/\d{1,3}(?![\d.]))"
    r"|(?P<number>(?:\d{1,3}(?:[,\u00a0\u2009\u202f]\d{3})+(?!\d)|\d{1,3}(?:[ ]000)+(?!\d)|\d+)(?:\.\d+)?|\.\d+)"
    r"|(?P<operator>[-+*/×÷−·]|(?<=[ ])–(?=[ ])|\\(?:times|cdot|div)(?![A-Za-z])|(?<=[\s\d)])x(?=[\s\d($]))"
    r"|(?P<equals>=)|(?P<paren>[()])|(?P<space>[\s$]+)"
    r"|(?P<scale>%|¢|\b(?:cents?|hundred|thousand|million|billion|dozen)\b)"
    # A letter that stands for a number: 5A / 5, 9 - x.
    r"|(?P<variable>(?:(?<=\d)[A-Za-z](?=[ ]?[-+*/])|(?<=[-−])[A-Za-z]|(?<=[-−][ ])[A-Za-z])(?![A-Za-z]))"
    r"|(?P<suffix>[\^!²³]|\\?[pb]?mod\b)|(?P<other>[A-Za-z]{2,}|.)",
    re.DOTALL,
)
_SAME = {"x": "*", "×": "*", "·": "*", "÷": "/", "−": "-", "–": "-"} | {r"\times": "*", r"\cdot": "*", r"\div": "/"}
# Characters that turn the number or parenthesis right after them into an exponent, an index or an argument.
_PREFIX = re.compile(r"[A-Za-z^_√]")
_INNER_MARK = re.compile(r"\d(?:,\d|:00(?!\d))")
_GROUPING = re.compile(r"[,\s]")


# --------------------------------------------------------------------------------------------------
# tokens


def numbers_in(text: str) -> list[Fraction]:
    """Return every number of ``text``, in order; overlong ones are left out."""
    found: list[Fraction] = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup == "number" and len(match.group()) <= MAX_DIGITS:
            found.append(value_of(match.group()))
        elif match.lastgroup == "mixed" and (value := _mixed(match.group())) is not None:
            found += [value, *(Fraction(part) for part in re.findall(r"\d+", match.group()))]
        elif match.lastgroup == "mixed":
            found += [Fraction(part) for part in re.findall(r"\d+", match.group())]
    return found


def runs(text: str) -> Iterator[list[str]]:
    """Yield maximal stretches of numbers with their units, operators, parentheses and equals signs, in order.

    Words end a run, except units: up to five words between a number and an operator (``12 eggs / day * 3``), and
    as many after the last number. So does a scale (``%``, ``million``), as a token of its own; but ``%`` and cents
    before an operator are the unit ``'%``.
    """
    run: list[str] = []
    end = resume = 0  # end of the token before; position at which reading continues
    for match in _TOKEN.finditer(text):
        kind, token, start = match.lastgroup, match.group(), match.start()
        if start < resume:
            continue
        if kind == "space":
            if "\n" in token and run and run[-1] != "=":
                yield run
                run = []
            continue
        unit = _unit_at(text, start, end, run) if kind in ("scale", "other", "variable") else None
        if unit is not None:
            run.append("'%" if kind == "scale" else "'" + " ".join(_stems(unit.group())))
            resume = unit.end()
            if unit.group("inside") is None:
                yield run
                run = []
        elif kind in ("scale", "variable", "suffix"):
            yield [*run, token if kind == "scale" else UNKNOWN]
            run = []
        elif kind == "other" or len(token) > MAX_DIGITS:
            yield [*run, UNKNOWN] if _is_inside_number(text, start) else run
            run = []
        elif kind == "mixed":
            whole, *fraction = _mixed_tokens(token)
            if fraction and "and" in token:
                yield [*run, whole]
                run = fraction
            else:
                run += [whole, *fraction]
        else:
            token = _SAME.get(token, token)
            if not run and (_subtracts(text, start) if token == "-" else _is_prefixed(text, start)):
                run.append(UNKNOWN)
            if token == "(" and run and start == end and (is_number(run[-1]) or run[-1] == ")"):
                run.append("*")
            run.append(token)
        end = max(match.end(), resume)
    yield run


def _unit_at(text: str, start: int, end: int, run: Sequence[str]) -> re.Match[str] | None:
    """Match a unit at ``start``, after a number or parenthesis that ends at ``end`` on the same line."""
    if not run or not (is_number(run[-1]) or run[-1] == ")") or text[end:start].strip(" "):
        return None
    if (scale := _HUNDREDTHS.match(text, start)) is not None:
        return scale if scale.group("inside") is not None else None
    # 3kg has a unit, 3/4Papillon a factor.
    return None if start == end and text[start].isupper() else _UNIT.match(text, start)


def _stems(words: str) -> list[str]:
    return [word.removesuffix("s") for word in re.findall(r"[a-z]+", words.lower())]


def _subtracts(text: str, place: int) -> bool:
    """Return True if the dash at ``place``, the first token of its run, subtracts and is not a sign."""
    before, after = text[max(0, place - 1) : place], text[place + 1 : place + 2]
    return before.isalnum() or before == "%" or (before in (" ", "\t") and after.isspace())


def _is_prefixed(text: str, place: int) -> bool:
    """Return True if the token at ``place`` is like the 3 of ``2^3``, the 1 of ``x_1`` or the ( of ``sqrt(9)``."""
    return place > 0 and (_PREFIX.match(text, place - 1) is not None or _is_inside_number(text, place - 1))


def _is_inside_number(text: str, place: int) -> bool:
    """Return True for the mark of an unreadable number such as ``3,5``, ``16,0000`` or ``6:00``."""
    return place > 0 and _INNER_MARK.match(text, place - 1) is not None


def _mixed_tokens(token: str) -> list[str]:
    """Return ``1 1/2`` as the one token ``1+1/2``, or as four tokens when the fraction is not below 1."""
    whole, top, bottom = re.findall(r"\d+", token)
    if _mixed(token) is None:
        return [whole, top, "/", bottom]
    return [f"{whole}+{top}/{bottom}"]


def _mixed(token: str) -> Fraction | None:
    whole, top, bottom = (int(part) for part in re.findall(r"\d+", token))
    return whole + Fraction(top, bottom) if 0 < top < bottom else None


def is_number(token: str) -> bool:
    return token[0] in "0123456789."


def is_unit(token: str) -> bool:
    return token[0] == "'"


def split_sides(tokens: Sequence[str]) -> list[list[str]]:
    """Split a run at its equals signs."""
    sides: list[list[str]] = [[]]
    for token in tokens:
        if token == "=":
            sides.append([])
        else:
            sides[-1].append(token)
    return sides


# --------------------------------------------------------------------------------------------------
# expressions


def tail(tokens: Sequence[str]) -> list[str] | None:
    """Return the longest end of ``tokens`` that is a whole expression; None when there is none."""
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
    if may_be_one_number(before, tokens[start]):
        return None
    if before == "(" and start > 1 and tokens[start - 2] in OPERATORS:
        return None
    if before and is_number(before) and tokens[start] == "(":  # 1/2 (68): a product whose start is cut off
        return None
    return None if before in (*OPERATORS, ")", UNKNOWN) else list(tokens[start:])


def head(tokens: Sequence[str]) -> tuple[list[str] | None, str]:
    """Return the longest start of ``tokens`` that is a whole expression (None without one) and the token after it.

    A dash after the expression counts as punctuation.
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
    partial = after in ("+", "*", "/", UNKNOWN) or list(tokens[end : end + 2]) == ["-", UNKNOWN]
    partial = partial or (end > 0 and may_be_one_number(tokens[end - 1], after))
    partial = partial or (after == "(" and is_number((*tokens[end + 1 : end + 2], UNKNOWN)[0]))
    return (None if end == 0 or partial else list(tokens[:end])), after


def may_be_one_number(first: str, second: str = "") -> bool:
    """Return True if two neighbouring tokens may be one number, as in ``17 500``."""
    return first.isdecimal() and len(first) <= 3 and second.isdecimal() and len(second) == 3


def _may_follow(before: str, token: str) -> bool:
    """Return True if an expression may hold ``token`` right after ``before``; "" is its start and its end.

    With balanced parentheses, this defines an expression: numbers and closing parentheses, with a unit or without,
    end an operand; anything else needs an operand next, which may have a minus sign.
    """
    if before and (is_number(before) or before == ")" or is_unit(before)):
        return token == "" or token in (*OPERATORS, ")") or (is_unit(token) and not is_unit(before))
    if before and before not in (*OPERATORS, "("):
        return False
    return token != "" and (is_number(token) or token in ("(", "-"))


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """Return the exact value of an expression without its units; None when it divides by zero."""
    try:
        return _take_value([token for token in reversed(tokens) if not is_unit(token)])
    except ZeroDivisionError:
        return None


def _take_value(tokens: list[str], above: int = 0) -> Fraction:
    """Evaluate operators that bind tighter than ``above``, taking tokens off the end of a reversed expression."""
    token = tokens.pop()
    if token == "-":
        value = -_take_value(tokens, above=2)
    elif token == "(":
        value = _take_value(tokens)
        tokens.pop()  # the closing parenthesis, which tail and head have checked
    else:
        value = value_of(token)
    while tokens and (binding := _BINDING.get(tokens[-1], 0)) > above:
        value = OPERATORS[tokens.pop()](value, _take_value(tokens, binding))
    return value


def value_of(token: str) -> Fraction:
    """Return the value of one number token."""
    if token.isdecimal():
        return Fraction(int(token))  # several times faster than from text
    whole, plus, fraction = _GROUPING.sub("", token).partition("+")
    return Fraction(whole) + Fraction(fraction) if plus else Fraction(whole)
