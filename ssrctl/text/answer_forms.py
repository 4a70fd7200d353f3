"""Forms of written answers: their tidied text, and their parts where they are lists, sets, intervals or matrices."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from ssrctl.text.answer_numbers import NUMBER, evaluate_arithmetic, number_of_words

_CHARACTERS = str.maketrans({
    "−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ",
    "∅": r"\emptyset ", "∪": r"\cup ", "∩": r"\cap ", "≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "±": r"\pm ",
    "∈": r"\in ", "²": "^2", "³": "^3", "½": " 1/2", "⅓": " 1/3", "⅔": " 2/3", "¼": " 1/4", "¾": " 3/4", "⅛": " 1/8",
    "，": ",", "（": "(", "）": ")", "\u00a0": " ", "\u2009": " ", "\u202f": " ", "⁄": "/",
})  # fmt: skip
_GAP = r"(?:\{,\}|,(?:\\!\s*)+|\\[,;:! ]|~|\\!)\s*"  # between groups of three digits
_SPACED = re.compile(r"(?<![\d.,/])\d{1,3}(?: \d{3})+(?![\d/]| *\\frac| \d)")
_THOUSANDS = re.compile(rf"(?<=\d){_GAP}(?=\d{{3}}(?!\d))")
_DOTS = re.compile(r"\.\.\.|…|\\(?:c?dots)(?![a-zA-Z])")
_BOX = re.compile(r"\\f?boxed\s*(\{.*\})")
_CURRENCY = re.compile(r"\\?\$|€|£|¥|\\(?:dollar|euro)(?![a-zA-Z])|\bUSD\b")
_DEGREES = re.compile(r"\^\s*(?:\\circ(?![a-zA-Z])|\{\s*\\circ\s*\})|\\degree(?![a-zA-Z])|°")
_SIZES = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|quad|qquad|hspace\{[^{}]*\})(?![a-zA-Z])\.?"
)
_SPACING = re.compile(r"(?<!\\)\\[,;:! ]|~|\\\(|\\\)|\\\[|\\\]")
_TEXT = re.compile(
    r"\\(?:text(?:rm|bf|it|sf)?|mathrm|mathbf|mathit|mathsf|mbox|boldsymbol|bm|operatorname\*?)\s*\{([^{}]*)\}"
)
_ROOT = re.compile(r"(?:√|(?<![\\a-zA-Z])sqrt)\s*(?:\(([^()]*)\)|(\d+|[a-z]))|\\sqrt\s*(\d|[a-zA-Z])(?![a-zA-Z])")
_FRACTION_ARGUMENTS = re.compile(r"\\frac\s*(?:\{([^{}]*)\}|\s([0-9a-zA-Z])|(\d))\s*(?:\{([^{}]*)\}|([0-9a-zA-Z]))")
_SYNONYMS = (
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant|leqq)(?![a-zA-Z])|<="), r"\\le "),
    (re.compile(r"\\(?:geq|geqslant|geqq)(?![a-zA-Z])|>="), r"\\ge "),
    (re.compile(r"\\(?:lt)(?![a-zA-Z])"), "<"),
    (re.compile(r"\\(?:gt)(?![a-zA-Z])"), ">"),
    (re.compile(r"\\(?:simeq|thickapprox)(?![a-zA-Z])"), r"\\approx "),
    (re.compile(r"\\lbrace(?![a-zA-Z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![a-zA-Z])"), r"\\}"),
    (
        re.compile(r"\\varnothing(?![a-zA-Z])|\\\{\s*\\\}|\b(?:the )?empty set\b|\bno (?:real )?solutions?\b"),
        r"\\emptyset",
    ),
    (re.compile(r"(?<![\\a-zA-Z])pi(?![a-zA-Z])"), r"\\pi "),
    (re.compile(r"(?<![\\a-zA-Z])infinity(?![a-zA-Z])"), r"\\infty "),
    (re.compile(r"\\%|\bper ?cent\b|\bpercent\b"), "%"),
    (re.compile(r"^\s*(?:minus|negative)\s+"), "-"),
)
# A unit at the end: LaTeX text, a known word, or a word in parentheses; with a square or cube.
_UNIT_AT_END = re.compile(
    r"\s*(?:\\(?:text|textrm|mbox)\s*\{(?!\s*\()(?![^{}]*\b(?:hundred|thousand|[mb]illion|or|and|base)\b)[^{}]*\}"
    r"|\\mathrm\s*\{\s*[a-zA-Z]{2}[^{}]*\}"
    r"|\s\(\s*[a-zA-Z]{1,12}\.?(?:\s*(?:/|\^|per)\s*\w+)?\s*\)|\(\s*(?:[a-z]{2}|inches|units|feet|meters|dollars)\s*\)"
    r"|(?<=[\s}\d])(?:(?:sq(?:uare|\.)?|cu(?:bic|\.)?)\s+)?(?:units?|[cmk]m|kg|feet|foot|ft|inch(?:es)?|miles?|met(?:er|re)s?"
    r"|degrees?|radians?|hours?|minutes?|seconds?|days?|years?|dollars?|cents?)(?![a-zA-Z]))"
    r"\s*(?:\^\s*(?:\d|\{\s*\d\s*\}))?\s*\.?$"
)


def tidy(answer: str) -> str:
    """Remove what carries no value (delimiters, sizes, units, currency) and spell the rest in one way.

    Spaces between commands stay, letter case too; thousands lose their separators unless these are commas.
    """
    text = _DOTS.sub(r"\\ldots ", " ".join(answer.split()))
    text = _ROOT.sub(lambda m: rf"\sqrt{{{m[1] or m[2] or m[3]}}}", text).translate(_CHARACTERS)
    if (box := _BOX.fullmatch(text)) and (inner := unwrap(box[1])) is not None:
        text = inner[1]
    text = _DEGREES.sub("", _CURRENCY.sub("", text)).strip()
    unit = _UNIT_AT_END.search(text)
    if unit and re.search(r"[\d}]|\\pi", text[: unit.start()]):
        text = re.sub(r"(?:\\[,;:! ]?|~)\s*$", "", text[: unit.start()])
    text = _THOUSANDS.sub("", text)
    while (unwrapped := _TEXT.sub(r" \1 ", text)) != text:
        text = unwrapped
    text = _SPACING.sub(" ", _SIZES.sub(" ", text))
    for pattern, replacement in _SYNONYMS:
        text = pattern.sub(replacement, text)
    text = _SPACED.sub(lambda m: m.group().replace(" ", ""), " ".join(text.split()))
    # 2\frac 12 and 2\frac{1}{2} have the same arguments.
    text = _FRACTION_ARGUMENTS.sub(lambda m: rf"\frac{{{m[1] or m[2] or m[3]}}}{{{m[4] or m[5]}}}", text)
    return text.strip(" ").rstrip(". ")


@dataclass(frozen=True)
class Parts:
    """A list, set, tuple, interval, union or matrix.

    Attributes:
        kind: ``list``, ``set``, the pair of brackets such as ``(]``, ``union``, ``ratio``, or ``matrix`` with its shape.
        items: the parts as text.
    """

    kind: str
    items: tuple[str, ...]


_MATRIX = re.compile(
    r"\\begin\{(?P<name>[pbB]?(?:small)?matrix|array)\}(?:\{[lcr| ]*\})?(?P<cells>.*)\\end\{(?P=name)\}", re.DOTALL
)
_AND = re.compile(r",?\s+(?:and|or)\s+|\s*\\(?:land|lor|vee)\s")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+)+|\d+ to \d+")
_VARIABLE = r"[a-zA-Z]|\\[a-zA-Z]+"
_CHAIN = re.compile(rf"(?P<low>[^<>=]+?)(?P<first><|\\le )\s*(?:{_VARIABLE})\s*(?P<second><|\\le )(?P<high>[^<>=]+)")
_BOUND = re.compile(rf"(?:{_VARIABLE})\s*(?P<sign><|>|\\le |\\ge )(?P<bound>[^<>=,]+)")
_BOUND_BEFORE = re.compile(rf"(?P<bound>[^<>=,]+?)(?P<sign><|>|\\le |\\ge )\s*(?:{_VARIABLE})")
_MIRROR = {"<": ">", ">": "<", r"\le ": r"\ge ", r"\ge ": r"\le "}
_MEMBER = re.compile(rf"(?:{_VARIABLE})\s*\\in(?![a-zA-Z])\s*")
_PAIRS = {"(": ")", "[": "]", "\\{": "\\}", "{": "}"}


def parts_of(text: str) -> Parts | None:
    """Return the parts of a tidied answer, or None for a single value."""
    text = text.strip()
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?", matrix["cells"]) if row.strip()]
        cells = [[cell.strip() for cell in row.split("&")] for row in rows]
        return Parts(f"matrix {[len(row) for row in cells]}", tuple(cell for row in cells for cell in row))
    pieces = _split(text, re.compile(r"\\cup(?![a-zA-Z])"))
    if len(pieces) > 1:
        return Parts("union", tuple(pieces))
    if member := _MEMBER.match(text):
        return parts_of(text[member.end() :])
    if interval := _interval(text):
        return interval
    if _RATIO.fullmatch(text):
        return Parts("ratio", tuple(re.findall(r"\d+", text)))
    if (inner := unwrap(text)) is not None:
        brackets, content = inner
        items = _items(content)
        if brackets in ("\\{\\}", "{}") and (brackets[0] == "\\" or len(items) > 1):
            return Parts("set", tuple(_expanded(items)))
        return Parts(brackets, tuple(items)) if len(items) > 1 else None
    if number_of_words(text.casefold()) is not None:  # two hundred and six
        return None
    items = _items(text)
    expanded = list(_expanded(items))
    return Parts("list", tuple(expanded)) if len(expanded) > 1 else None


def unwrap(text: str) -> tuple[str, str] | None:
    """Return the brackets around the whole of ``text`` and its content, or None."""
    opening = next((one for one in ("\\{", "(", "[", "{") if text.startswith(one)), None)
    if opening is None:
        return None
    depth = 0
    for match in re.finditer(r"\\?[(\[{)\]}]", text):
        depth += 1 if match.group()[-1] in "([{" else -1
        if depth == 0:
            closing = match.group()
            fits = closing == _PAIRS[opening] or (opening in "([" and closing in (")", "]"))
            whole = match.end() == len(text) and fits
            return (opening + closing, text[len(opening) : match.start()].strip()) if whole else None
    return None


def _interval(text: str) -> Parts | None:
    if chain := _CHAIN.fullmatch(text):
        brackets = ("(" if chain["first"] == "<" else "[") + (")" if chain["second"] == "<" else "]")
        return Parts(brackets, (chain["low"].strip(), chain["high"].strip()))
    if bound := _BOUND.fullmatch(text) or _BOUND_BEFORE.fullmatch(text):
        sign = bound["sign"] if bound.re is _BOUND else _MIRROR[bound["sign"]]
        end = bound["bound"].strip()
        if sign in ("<", r"\le "):
            return Parts("()" if sign == "<" else "(]", (r"-\infty", end))
        return Parts("()" if sign == ">" else "[)", (end, r"\infty"))
    return None


def _items(text: str) -> list[str]:
    """Split at commas, semicolons, "and" and "or" outside brackets; ``1,234`` is one number."""
    pieces = _split(text, re.compile(rf"{_AND.pattern}|;|,"))
    if len(pieces) == 1 or re.fullmatch(NUMBER, text.strip().lstrip("+-")):
        return [text.strip()]
    if re.search(r"[,;]\s|\s(?:and|or)\s", text):
        # With spaces after the commas that separate, 1,234 is a number inside the list too.
        spaced = _split(text, re.compile(rf"{_AND.pattern}|;|,(?=\s)"))
        if all("," not in piece or re.fullmatch(rf"[-+]?(?:{NUMBER})", piece) or unwrap(piece) for piece in spaced):
            return spaced
    return pieces


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Split ``text`` at matches of ``separator`` outside of all brackets; empty pieces are left out."""
    pieces, start, depth, counted = [], 0, 0, 0
    for match in separator.finditer(text):
        between = text[counted : match.start()]
        depth += sum(between.count(c) for c in "([{") - sum(between.count(c) for c in ")]}")
        counted = match.start()
        if depth == 0:
            pieces.append(text[start : match.start()].strip())
            start = match.end()
    return [piece for piece in (*pieces, text[start:].strip()) if piece]


def _expanded(items: Iterable[str]) -> Iterable[str]:
    """Yield both values of each ``a \\pm b``."""
    for item in items:
        before, sign, after = item.partition("\\pm")
        if (
            not sign
            or "\\pm" in after
            or before.count("(") + before.count("{") != before.count(")") + before.count("}")
        ):
            yield item
            continue
        name, equals, before = before.rpartition("=")
        for operator in "+-":
            value = f"{before.strip()}{operator}{after.strip()}".removeprefix("+")
            exact = evaluate_arithmetic(value)
            yield f"{name}{equals}{value if exact is None else exact.value}"
