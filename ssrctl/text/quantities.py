"""Numbers that a text gives to calculate with: those it names, and the common knowledge of its words."""

from __future__ import annotations

import re
from fractions import Fraction

from ssrctl.text.expressions import numbers_in

ONES = {
    "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9,
}  # fmt: skip
TEENS = {
    "ten": 10, "eleven": 11, "twelve": 12, "thirteen": 13, "fourteen": 14, "fifteen": 15, "sixteen": 16,
    "seventeen": 17, "eighteen": 18, "nineteen": 19,
}  # fmt: skip
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
PARTS = {
    "half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
    "tenth": 10,
}  # fmt: skip
# Numbers that a word may bring into a calculation; words in the singular.
_KNOWLEDGE: dict[str, tuple[int | Fraction, ...]] = {
    **{word: (value,) for word, value in (ONES | TEENS | TENS).items()},
    **{word: (value, Fraction(1, value)) for word, value in PARTS.items()},
    "halve": (Fraction(1, 2),), "quarter": (4, Fraction(1, 4), 25), "triple": (3,), "thrice": (3,),
    "quadruple": (4,), "dozen": (12,), "hundred": (100,), "thousand": (1000,), "million": (10**6,),
    "billion": (10**9,),
    "second": (60,), "minute": (60,), "hour": (60, 24, Fraction(1, 60)), "day": (24, 7, 30, 365),
    "week": (7, 4, 52, 5), "weekday": (5,), "month": (12, 30, 4, 31), "year": (12, 52, 365, 366), "annual": (12,),
    "decade": (10,), "century": (100,),
    "cent": (Fraction(1, 100),), "penny": (Fraction(1, 100),), "nickel": (5, Fraction(1, 20)),
    "dime": (10, Fraction(1, 10)), "percent": (Fraction(1, 100),),
    "inch": (12,), "foot": (12, 3), "feet": (12, 3), "yard": (3, 36), "mile": (5280, 1760), "ounce": (16,),
    "pound": (16,), "ton": (2000, 1000), "cup": (16, 8, 4), "pint": (8,), "quart": (4,), "gallon": (4, 8, 16, 128),
    "meter": (1000,), "centimeter": (10,), "kilometer": (1000,), "km": (1000,), "gram": (1000,), "kilogram": (1000,),
    "kg": (1000,), "liter": (1000,),
}  # fmt: skip
_WORD = re.compile(r"[a-z]+")
_COMPOUND = re.compile(rf"\b({'|'.join(TENS)})[- ]({'|'.join(ONES)})\b")
_SHARE = re.compile(rf"\b({'|'.join(ONES)})[- ]({'|'.join(PARTS)})s?\b")
_AND_A_HALF = re.compile(rf"\b(\d{{1,6}}|{'|'.join(ONES)})(?: [a-z]+)? and (?:a |one[- ])?half\b")
_HUNDREDTHS = re.compile(r"(?<![\d.])(\d{1,3}(?:\.\d{1,4})?)\s?(?:%|¢|percent\b|cents?\b)")


def given_numbers(text: str) -> set[Fraction]:
    """Return the numbers in ``text``, in digits and in words, and those that follow from them directly.

    Of p percent or cents: p, p/100, and the whole less or plus that part, in both forms. Of words such as
    "minute": the constants that belong to them.
    """
    found = set(numbers_in(text)) | numbers_of_words(text)
    for match in _HUNDREDTHS.finditer(text):
        share = Fraction(match.group(1)) / 100
        for part in (share, abs(1 - share), 1 + share):
            found |= {part, 100 * part}
    return found


def numbers_of_words(text: str) -> set[Fraction]:
    """Return the numbers that words of ``text`` name or imply."""
    text = text.lower()
    found = {Fraction(TENS[tens] + ONES[ones]) for tens, ones in _COMPOUND.findall(text)}
    found |= {Fraction(ONES[count], PARTS[part]) for count, part in _SHARE.findall(text)}
    found |= {Fraction(ONES.get(whole) or int(whole)) + Fraction(1, 2) for whole in _AND_A_HALF.findall(text)}
    if "%" in text:
        found.add(Fraction(1, 100))
    for word in set(_WORD.findall(text)):
        known = _KNOWLEDGE.get(word) or _KNOWLEDGE.get(word.removesuffix("s"), ())
        found |= {Fraction(value) for value in known}
    return found
