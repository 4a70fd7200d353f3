"""Tables and figures of the units of questions, of pairs of units and of training steps, as measures of steps show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssrctl.measures.group_tables import RowColumn, row_lines, row_table, value_of
from ssrctl.report.chart_style import is_expected
from ssrctl.report.document import Figure, Heatmap, Lines, Table
from ssrctl.report.formats import number

# More pairs than four units have fill a screen; the sentences already hold their means.
MOST_TERMINAL_ROWS = 6


def by_unit(units: Iterable[Any]) -> dict[int, Any]:
    """Return the rows of units by number, from 1; they hold positions from 0."""
    return {unit.position + 1: unit for unit in units}


def pair_map(title: str, pairs: Iterable[Any], value: str, num_units: int, **settings: Any) -> Heatmap:
    """Return a square map of the pairs of units, blank on the diagonal.

    Args:
        pairs: rows with the positions ``i`` and ``j`` of two units, i < j, from 0.
        value: the attribute that is shown, as in ``value_of``.
        settings: further fields of ``Heatmap``.
    """
    values = {(pair.i, pair.j): value_of(pair, value) for pair in pairs}
    units = range(num_units)
    return Heatmap(
        title=title,
        labels=[str(unit + 1) for unit in units],
        values=[[values.get((min(i, j), max(i, j))) for j in units] for i in units],
        axis="update unit",
        **settings,
    )


def jaccard_maps(pairs: Sequence[Any], maps: Mapping[str, str], num_units: int) -> list[Figure]:
    """Return maps of Jaccard indices in colours of one scale; none without pairs.

    Args:
        pairs: as in ``pair_map``.
        maps: the attribute that is shown, by the figure's title.
    """
    scale = max((value_of(pair, value) or 0.0 for pair in pairs for value in maps.values()), default=0.0)
    decimals = 3 if scale >= 0.01 else 4
    caption = f"Full colour is {number(scale)}, the same in both maps."
    return [
        pair_map(title, pairs, value, num_units, scale=scale or None, decimals=decimals, caption=caption)
        for title, value in maps.items()
        if pairs
    ]


def pair_table(title: str, pairs: Sequence[Any], columns: Sequence[RowColumn], note: str) -> Table:
    """Return a table with a line for each pair; arguments as of ``pair_map`` and ``row_table``."""
    rows = {f"{pair.i + 1}, {pair.j + 1}": pair for pair in pairs}
    return row_table(title, "pair", rows, columns, note, terminal_rows=MOST_TERMINAL_ROWS)


def training_lines(
    points: Mapping[int, Any], figures: Sequence[tuple[str, str, Mapping[str, str], bool]]
) -> list[Figure]:
    """Return figures over training, without those that would show no measured value; none of a single step.

    Args:
        points: a row for each training step.
        figures: title, meaning of y, the attributes that are shown by the name of the series, and True for shares,
            shown in per cent.
    """
    found = [
        row_lines(title, points, series, x_label="training step", y_label=y_label, shares=shares)
        for title, y_label, series, shares in figures
        if len(points) > 1
    ]
    return [one for one in found if _is_measured(one)]


def _is_measured(figure: Lines) -> bool:
    measured = [values for name, values in figure.series.items() if not is_expected(name)]
    return any(value is not None for values in measured for value in values)
