"""What a report is made of: plain data that the terminal and the html page both show.

A family of measures turns its numbers into a ``Document``; nothing here knows which family it is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(kw_only=True)
class Table:
    """Rows of text; the first column is aligned left, the others right.

    Attributes:
        terminal_rows: the terminal shows so many rows and says how many more there are; 0 leaves the table
            to the report, which the terminal says.
        collapsed: the page shows it only when asked to.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""
    terminal_rows: int = 16
    collapsed: bool = False


@dataclass(kw_only=True)
class Heatmap:
    """A square matrix, ``values[row][column]``; None is left blank.

    Attributes:
        labels: of rows and of columns.
        scale: the magnitude drawn in full colour; negative values take the second hue.
        decimals: of the numbers in the cells.
    """

    title: str
    labels: list[str]
    values: list[list[float | None]]
    axis: str
    scale: float
    decimals: int = 3
    caption: str = ""


@dataclass(kw_only=True)
class Bars:
    """Horizontal bars of shares in [0, 1], one group per label; a series named ``expected ...`` is drawn grey."""

    title: str
    labels: list[str]
    series: dict[str, list[float | None]]
    axis: str
    caption: str = ""


@dataclass(kw_only=True)
class Lines:
    """Series over a common x; a series named ``expected ...`` is drawn grey and dashed."""

    title: str
    x: list[int]
    series: dict[str, list[float | None]]
    x_label: str
    y_label: str
    caption: str = ""


Figure = Heatmap | Bars | Lines


@dataclass(kw_only=True)
class Section:
    """A heading, what to look for, and what to look at."""

    title: str
    text: str = ""
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)


@dataclass(kw_only=True)
class Document:
    """A report that reads from top to bottom as an answer.

    Attributes:
        title: what was measured.
        facts: what was compared, as (name, value).
        headlines: the answer, in sentences with numbers.
        notes: what a reader must know so as not to be misled.
        sections: tables and figures.
    """

    title: str
    facts: list[tuple[str, str]]
    headlines: list[str]
    notes: list[str]
    sections: list[Section]


def json_safe(value: Any) -> Any:
    """The same data with NaN and infinity, which json does not have, as None, and every key as text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return text_safe(value)
    if isinstance(value, dict):
        return {text_safe(str(key)): json_safe(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(item) for item in value]
    return value


def text_safe(text: str) -> str:
    """The same text with lone surrogates, which have no UTF-8 form, as question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


def count(value: float | None) -> str:
    """A count with thousands separators; means of counts keep one decimal."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """A share as a percentage, never rounded to 0% or 100% unless it is exactly that."""
    if value is None:
        return "–"
    for digits in range(2, 8):
        text = f"{value * 100:.{digits}f}"
        if (float(text) == 0) == (value == 0) and (float(text) == 100) == (value == 1):
            return text + "%"
    return "<0.0000001%" if value < 0.5 else ">99.9999999%"


def times(value: int, what: str) -> str:
    """A count and its noun: ``1 pair``, ``12 pairs``."""
    return f"{value:,} {what}" + ("" if value == 1 else "s")


def number(value: float | None, style: Literal["short", "signed"] = "short") -> str:
    """Three significant digits; ``signed`` has three decimals and always shows the sign."""
    if value is None:
        return "–"
    return f"{value:+.3f}" if style == "signed" else "0" if value == 0 else f"{value:#.3g}".removesuffix(".")
