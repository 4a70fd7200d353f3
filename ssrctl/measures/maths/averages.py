"""Means and ratios that are None where they are undefined: a missing number is never 0."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from typing import Any

Average = Callable[[Iterable[float | None]], float | None]


def mean(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None when there are none."""
    kept = [value for value in values if value is not None]
    return math.fsum(kept) / len(kept) if kept else None


def plain_mean(values: Iterable[float | None]) -> float | None:
    """Return ``mean``, of the sum that is rounded after each addition."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


def means(of: type[Any], items: Sequence[Any], average: Average = mean) -> dict[str, Any]:
    """Return for each field of a dataclass the mean of the items' attributes of that name, each with equal weight."""
    return {field.name: average(getattr(one, field.name) for one in items) for field in fields(of)}


def ratio(part: float | None, whole: float | None) -> float | None:
    """Return ``part / whole``; None where either is None, or the whole is 0."""
    return None if part is None or not whole else part / whole
