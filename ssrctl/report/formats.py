"""Numbers and text as a reader sees them: counts, shares, plurals, and values that json and UTF-8 can hold."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

_BLOCKS = "▁▂▃▄▅▆▇█"


def json_safe(value: Any) -> Any:
    """Return the same data with NaN and infinity, which json does not have, as None, and every key as text."""
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
    """Return the text with question marks for lone surrogates, which have no UTF-8 form."""
    return text.encode("utf-8", "replace").decode("utf-8")


def text(value: object) -> str:
    """Return a value as it is, a dash for None."""
    return "–" if value is None else str(value)


def count(value: float | None) -> str:
    """Return a count with thousands separators; means of counts keep one decimal."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.1f}"


def percent(value: float | None) -> str:
    """Return a share as a percentage, never rounded to 0% or 100% unless it is exactly that."""
    if value is None:
        return "–"
    for digits in range(2, 8):
        text = f"{value * 100:.{digits}f}"
        if (float(text) == 0) == (value == 0) and (float(text) == 100) == (value == 1):
            return text + "%"
    return "<0.0000001%" if value < 0.5 else ">99.9999999%"


def times(value: int, what: str) -> str:
    """Return a count and its noun: ``1 pair``, ``12 pairs``."""
    return f"{value:,} {what}" + ("" if value == 1 else "s")


def duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds (``1:02:03``), below a minute seconds; a dash for None."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def sparkline(values: Sequence[float | None], width: int = 12) -> str:
    """Return a line of blocks, each as high as the mean of its part of the values; missing ones are left out."""
    known = [value for value in values if value is not None]
    parts = [known[len(known) * place // width : len(known) * (place + 1) // width] for place in range(width)]
    means = [sum(part) / len(part) for part in parts if part]
    if not means:
        return ""
    low, high = min(means), max(means)
    return "".join(_BLOCKS[round((mean - low) / (high - low) * 7) if high > low else 3] for mean in means)


def number(value: float | None) -> str:
    """Return three significant digits, a dash for None."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:#.3g}".removesuffix(".")


def signed(value: float | None) -> str:
    """Return three decimals with the sign always shown, a dash for None."""
    return "–" if value is None else f"{value:+.3f}"
