"""Equality of two final answers: as text, as exact numbers, part by part, else by symbolic algebra.

Most answers are numbers, tuples of numbers and the like, which are compared here exactly. Only what needs symbolic
algebra goes to the processes of ``answer_pool``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from fractions import Fraction

from ssrctl.text.answer_forms import Parts, parts_of, tidy, unwrap
from ssrctl.text.answer_numbers import NUMBER, Number, evaluate_arithmetic, read_number
from ssrctl.text.answer_pool import ANSWER_TIMEOUT, Undecided, same_by_algebra

MAX_EXPRESSION_CHARS = 2000  # no answer needs more, and two of them fit into a pipe at once
MAX_PARTS = 64  # of a list or matrix
MAX_DEPTH = 6  # of parts within parts

Algebra = Callable[[str, str], bool]


def compare_answers(extracted: str, reference: str, *, timeout: float = ANSWER_TIMEOUT) -> bool | None:
    r"""Compare two answers; return None when algebra gave no verdict within ``timeout`` seconds.

    Spacing, delimiters, units, currency, degree signs, letter case and a name in front (``x =``) are ignored. Then:

    - exact numbers must be equal, however close they are: ``073`` = ``73``, ``1,000.0`` = ``10^3``, ``3/4`` = ``0.75``,
      ``2 1/2`` = ``2.5``, ``0.\overline{3}`` = ``1/3``, ``3:2`` = ``3/2``, ``twenty-one`` = ``21st`` = ``21``;
    - a decimal of three significant digits or more equals an exact value that rounds to it: ``0.333`` = ``1/3`` and
      ``1.414`` = ``\sqrt{2}``, but not ``0.3``, ``0.334`` or two different decimals;
    - ``0.5`` is ``50%``, and so is ``50`` when only one side has the percent sign;
    - lists (``1, 2``, ``1 \pm 2``) and sets match in any order; tuples, intervals and matrices in theirs. A tuple
      without its parentheses is compared in order;
    - choices: ``(B) 42 apples`` for ``B``, ``Yes, because ...`` for ``yes``;
    - ``70+3`` is not a final answer for 73, ``2^{10}`` is one for 1024;
    - other expressions are compared by algebra. Over 2000 characters only the same text is equal.

    Raises:
        UserError: math-verify is needed and not installed.
    """
    decided = decide(extracted, reference)
    if decided is not None:
        return decided
    try:
        return same_by_algebra(extracted, reference, timeout)
    except Undecided:
        return None


def decide(extracted: str, reference: str, algebra: Algebra | None = None) -> bool | None:
    """Compare two answers; without ``algebra``, return None when only it can decide."""
    if max(len(extracted), len(reference)) > MAX_EXPRESSION_CHARS:
        return extracted.split() == reference.split()
    if _folded(extracted) == _folded(reference):
        return _folded(extracted) != ""
    return _same(tidy(extracted), tidy(reference), algebra)


def _same(mine: str, theirs: str, algebra: Algebra | None, depth: int = 0) -> bool | None:
    """Compare two tidied answers."""
    folded, expected = _folded(mine), _folded(theirs)
    if folded == expected:
        return folded != ""
    if not folded or not expected or depth > MAX_DEPTH:
        return False
    if _CHOICE.fullmatch(expected) or expected in _VERDICTS:
        return _same_choice(folded, expected)
    mine, theirs = _unwrapped(_stated_value(mine)), _unwrapped(_stated_value(theirs))
    values = _without_names(mine, theirs)
    if values is None:
        return False
    if values != (mine, theirs):
        return _same(*values, algebra, depth + 1)
    ours, their = parts_of(mine), parts_of(theirs)
    if "ratio" in {part.kind for part in (ours, their) if part}:
        return _same_ratio(mine, theirs)
    if ours is not None or their is not None:
        return _same_parts(ours, their, mine, theirs, algebra, depth)
    return _same_value(mine, theirs, algebra)


# --------------------------------------------------------------------------------------------------
# text and choices

_AROUND_SIGN = re.compile(r" ?([-+*/^=()\[\]{}<>|,:]) ?")
_FRACTION = re.compile(r"\\frac\{\s*(-?\d+)\s*\}\{\s*(\d+)\s*\}")
_CHOICE = re.compile(r"\(?([a-z])\)?")
_CHOSEN = re.compile(r"\(?(?P<letter>[a-z])(?:\)|[.:](?=\s|$)|$)")
_VERDICTS = ("yes", "no", "true", "false")


def _folded(text: str) -> str:
    """Return the text that equal answers often share: without case, percent sign and most spaces."""
    text = _FRACTION.sub(lambda m: f" {m[1]}/{m[2]} ", text.replace("%", "").replace("$", ""))
    # A space next to a sign means nothing, but 12, 345 is not 12,345 and 1 2/3 not 12/3.
    text = " ".join(text.split())
    return _AROUND_SIGN.sub(lambda m: ", " if m.group() == ", " else m[1], text).rstrip(". ").casefold()


def _same_choice(mine: str, theirs: str) -> bool:
    if theirs in _VERDICTS:
        first = re.match(r"\w+", mine)
        return first is not None and first.group() == theirs
    chosen = _CHOSEN.match(mine.removeprefix("option ").removeprefix("choice "))
    return chosen is not None and chosen["letter"] == theirs.strip("()")


# --------------------------------------------------------------------------------------------------
# equations

_NAME = re.compile(
    r"(?:m\s?)?\\?(?:angle|triangle|overline)\s*\{?\s*[A-Z]{1,3}\s*\}?"
    r"|\\?[a-zA-Z]+'?(?:_\{?\w+\}?)?(?:\s*\(\s*[a-zA-Z0-9]+(?:,\s*[a-zA-Z0-9]+)*\s*\))?"
    r"|\(\s*[a-zA-Z](?:_?\w)?(?:,\s*[a-zA-Z](?:_?\w)?)+\s*\)|\|[A-Z]{1,3}\|"
)


def _stated_value(text: str) -> str:
    """Return the exact left side of ``1/3 \\approx 0.333``, or the right side where the left is only a name."""
    left, approximately, right = text.partition("\\approx")
    if not approximately:
        return text
    left = left.strip()
    return right.strip() if not left or _NAME.fullmatch(left) else left


def _unwrapped(text: str) -> str:
    """Remove brackets around a single value: ``(27)``, ``{27}``."""
    while parts_of(text) is None and (inner := unwrap(text)) is not None:
        text = inner[1]
    return text


def _without_names(mine: str, theirs: str) -> tuple[str, str] | None:
    """Remove ``name =`` from both sides; return None when the names contradict each other."""
    (name, value), (other, expected) = _name_and_value(mine), _name_and_value(theirs)
    if name and other and name.replace(" ", "") != other.replace(" ", ""):
        return (value, expected) if len(name) > 1 and len(other) > 1 else None
    if (not name and "=" in mine) or (not other and "=" in theirs):
        return mine, theirs  # an equation on one side
    return value, expected


def _name_and_value(text: str) -> tuple[str, str]:
    left, equals, right = text.partition("=")
    if equals and "=" not in right and right.strip() and _NAME.fullmatch(left.strip()):
        return left.strip(), right.strip()
    return "", text


# --------------------------------------------------------------------------------------------------
# parts


def _same_parts(
    ours: Parts | None, their: Parts | None, mine: str, theirs: str, algebra: Algebra | None, depth: int
) -> bool | None:
    if ours is not None and their is not None and len(ours.kind) == len(their.kind) == 2 and ours.kind != their.kind:
        return False  # (5,9] is not [5,9]
    if ours is None or their is None or not _kinds_fit(ours.kind, their.kind):
        return _by_algebra(mine, theirs, algebra) if _SETS.search(mine + theirs) else False
    if max(len(ours.items), len(their.items)) > MAX_PARTS:
        return False
    if {ours.kind, their.kind} <= {"set", "list"} or ours.kind == "union":
        verdict = _match_unordered(ours, their, algebra, depth)
    else:
        verdict = _match_ordered(ours, their, algebra, depth)
    if verdict is False and "union" in (ours.kind, their.kind):
        return _by_algebra(mine, theirs, algebra)
    return verdict


_SETS = re.compile(r"\\(?:cup|cap|setminus|backslash|in|pm|mp|le|ge|mathbb|ne)(?![a-zA-Z])|[<>]")


def _kinds_fit(ours: str, theirs: str) -> bool:
    return ours == theirs or {ours, theirs} in ({"list", "set"}, {"list", "()"}) or (ours, theirs) == ("[]", "list")


def _match_ordered(ours: Parts, their: Parts, algebra: Algebra | None, depth: int) -> bool | None:
    if len(ours.items) != len(their.items):
        return False
    undecided = False
    for mine, theirs in zip(ours.items, their.items, strict=True):
        verdict = _same(mine, theirs, algebra, depth + 1)
        if verdict is False:
            return False
        undecided = undecided or verdict is None
    return None if undecided else True


def _match_unordered(ours: Parts, their: Parts, algebra: Algebra | None, depth: int) -> bool | None:
    """Match each part with one of the other side; in a set, repeated parts count once."""
    if len(ours.items) != len(their.items) and "set" not in (ours.kind, their.kind):
        return False
    verdicts = [[_same(mine, theirs, algebra, depth + 1) for theirs in their.items] for mine in ours.items]
    if any(all(verdict is False for verdict in line) for line in (*verdicts, *zip(*verdicts, strict=True))):
        return False
    if "set" in (ours.kind, their.kind):
        complete = all(True in line for line in (*verdicts, *zip(*verdicts, strict=True)))
    else:  # equality is transitive, so taking the first free equal part finds a complete match if there is one
        free = set(range(len(their.items)))
        for row in verdicts:
            free.discard(next((place for place in sorted(free) if row[place]), -1))
        complete = not free
    return True if complete else None if any(None in row for row in verdicts) else False


def _same_ratio(mine: str, theirs: str) -> bool:
    """Compare ``3:2`` with ``6:4``, ``3/2`` or ``1.5``; of three terms and more, only with such a ratio."""
    sides = []
    for text in (mine, theirs):
        parts = parts_of(text)
        if parts is not None and parts.kind == "ratio":
            terms = [Fraction(item) for item in parts.items]
            if not all(terms):
                return False
            sides.append([term / terms[-1] for term in terms])
        else:
            number = _number(text)
            if number is None:
                return False
            sides.append([number.value, Fraction(1)])
    return sides[0] == sides[1]


# --------------------------------------------------------------------------------------------------
# single values

# 2516_8; a letter with an index, as x_1, is not a based number
_BASED = re.compile(r"(?P<digits>(?=[a-z]*\d)[0-9a-z]+)_\{?\(?(?:base )?(?P<base>\d{1,2})\)?\}?")
_LITERAL = rf"[-+]?\s*(?:(?:\d+\s+)?\d+\s*/\s*\d+|{NUMBER})"
_WITH_UNIT = re.compile(
    rf"(?P<number>{_LITERAL})"
    r"(?P<unit>\s*[^\W\d_]{4}[^\d=+*^\\_]*|\s+[^\W\d_]{2}[^\d=+*^\\_]*|\s+[gshlcfm](?:\s*/[^\d=+*^\\_]*)?)"
    r"(?:\^\s*\{?\s*[23]\s*\}?)?"
)
_SCALED = re.compile(rf"(?P<number>{_LITERAL})\s+(?P<scale>hundred|thousand|million|billion|dozen)")
_SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "dozen": 12}
_NO_UNIT = re.compile(
    r"\b(?:hundred|thousand|million|billion|trillion|dozen|k|bn|pi|sqrt|log|ln|sin|cos|tan|or|and|to|times|over)s?\b|-"
)
_LEAD = re.compile(
    r"[^\W\d_][^\W\d_ ',]*(?:[ ',]+[^\W\d_]+)*?[ ,]+(?:is|are|was|were|has|have|had|equals?|costs?)[ :]+"
)
_COEFFICIENT = re.compile(r"\d[a-zA-Z]\b|^-[a-zA-Z]")  # 2x = 10 and -x = 5 are unsolved equations
_UNFINISHED = re.compile(r"[\d\s.,+*/()-]*\d\)?\s*[-+*/]\s*\(?[\d\s.,+*/()-]*")
_MATHS = re.compile(r"[\d\\^_=+*/<>(\[{!]|^-|\b\w-\w\b")


def _same_value(mine: str, theirs: str, algebra: Algebra | None) -> bool | None:
    folded, expected = _folded(mine), _folded(theirs)
    if based := _BASED.fullmatch(expected):
        other = _BASED.fullmatch(folded)
        return based["digits"] == (other["digits"] if other else folded) and (
            not other or other["base"] == based["base"]
        )
    right = _reference_number(expected)
    found = _number(folded) if _UNFINISHED.fullmatch(folded) is None or _literal(folded) else None
    if right is not None:
        if found is None and _UNFINISHED.fullmatch(folded) is None:
            found = _number_in_context(folded)
        if found is not None:
            return _same_number(found, right, percent=("%" in mine) - ("%" in theirs))
        if _UNFINISHED.fullmatch(folded) or not _ALGEBRAIC.search(folded):
            return False
    return _by_algebra(mine, theirs, algebra)


_ALGEBRAIC = re.compile(r"[\\^!]|\*\*|\bsqrt\b|\bpi\b")  # an answer with one of these is more than arithmetic


def _by_algebra(mine: str, theirs: str, algebra: Algebra | None) -> bool | None:
    """Ask algebra about two expressions with balanced brackets; words that differ, differ."""
    if not (_is_maths(mine) and _is_maths(theirs)):
        return False
    return None if algebra is None else algebra(mine.replace("%", ""), theirs.replace("%", ""))


def _is_maths(text: str) -> bool:
    brackets = sum(text.count(c) for c in "([{") == sum(text.count(c) for c in ")]}")  # (3,4] is balanced too
    return brackets and (_MATHS.search(text) is not None or len(text) == 1)


def _literal(folded: str) -> Number | None:
    scaled = _SCALED.fullmatch(folded)
    if scaled and (number := read_number(scaled["number"])):
        return number.times(Fraction(_SCALES[scaled["scale"]]))
    return read_number(folded)


def _number(folded: str) -> Number | None:
    """Read a number, or exact arithmetic such as ``2^{10}``."""
    return _literal(folded) or evaluate_arithmetic(folded)


def _number_in_context(text: str) -> Number | None:
    """Read a number after words or an equation ("she has 42", "6*7 = 42") or before a unit ("42 apples")."""
    left, equals, text = text.rpartition("=")
    if equals and _COEFFICIENT.search(left):
        return None
    text = text.strip()
    if lead := _LEAD.match(text):
        text = text[lead.end() :]
    if (plain := _literal(text)) is not None:
        return plain
    match = _WITH_UNIT.fullmatch(text)
    if match is None or _NO_UNIT.search(match["unit"]):
        return None
    return _literal(match["number"].strip())


def _reference_number(theirs: str) -> Number | None:
    """Read a reference that is one number, perhaps with a unit of four letters or more: ``2 ab`` is a product."""
    if (number := _number(theirs)) is not None:
        return number
    match = _WITH_UNIT.fullmatch(theirs)
    if match is not None and re.search(r"[^\W\d_]{4}", match["unit"]):
        return _number_in_context(theirs)
    return None


def _same_number(found: Number, expected: Number, percent: int) -> bool:
    """Compare numbers; ``percent`` is 1 when only the answer has ``%``, -1 when only the reference has it."""
    if found.equals(expected):
        return True
    if not percent:
        return False
    return found.times(Fraction(1, 100) if percent > 0 else Fraction(100)).equals(expected)
