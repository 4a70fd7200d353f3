"""Tables and figures that several measures show: rows by kind of matrix, by layer, by tensor; pictures of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.maths.grouping import Grouped
from ssrctl.report.document import Bars, Column, Heatmap, Lines, Numbers, Table

if TYPE_CHECKING:  # it loads torch, which is not needed to refuse a folder
    from ssrctl.measures.maths.row_column_counts import CoarseMap

Row = TypeVar("Row")

# (heading, attribute of the row as in ``value_of``, how its value is written)
RowColumn = tuple[str, str, Callable[[Any], str]]


def value_of(row: Any, path: str) -> Any:
    """Return an attribute of a row, for ``a.b`` that of its attribute; None where one on the way is None."""
    for name in path.split("."):
        row = None if row is None else getattr(row, name)
    return row


def row_table(
    title: str,
    what: str | Column,
    rows: Mapping[Any, Any],
    columns: Sequence[RowColumn],
    note: str = "",
    detail: bool = False,
    **settings: Any,
) -> Table:
    """Return a table with a line for each row.

    Args:
        what: the first column or its heading; it holds the rows' keys.
        rows: objects that have the columns' attributes, by label.
        detail: True = a long table that the page shows when asked to, and the terminal does not.
        settings: further fields of ``Table``.
    """
    return Table(
        title=title,
        columns=[what, *(Column(heading, show) for heading, _, show in columns)],
        rows=[[label, *(value_of(row, path) for _, path, _ in columns)] for label, row in rows.items()],
        note=note,
        **({"terminal_rows": 0 if detail else 48, "collapsed": detail} | settings),
    )


def group_tables(
    what: str,
    found: Grouped[Any, Any],
    groups: tuple[Sequence[RowColumn], str],
    tensors: tuple[Sequence[RowColumn], str],
    unmeasured: Mapping[str, str],
) -> list[Table]:
    """Return the tables of a measure by kind of matrix, by layer and by matrix, and of the matrices that lack it.

    Args:
        what: the measure, as titles begin.
        groups: columns and note of the tables of groups.
        tensors: columns and note of the table of matrices.
        unmeasured: reason by name. Empty tables are left out.
    """
    tables = (
        row_table(f"{what} by kind of matrix", "kind", found.kinds, *groups),
        row_table(f"{what} by layer", "layer", found.labelled_layers, *groups, detail=True),
        row_table(f"{what}, matrix by matrix", "matrix", found.tensors, *tensors, detail=True),
        reasons_table(f"Matrices without a {what.lower()}", unmeasured),
    )
    return [table for table in tables if table.rows]


def reasons_table(title: str, reasons: Mapping[str, str]) -> Table:
    """Return a collapsed table of names and reasons."""
    return Table(title=title, columns=["tensor", "reason"], rows=list(reasons.items()), terminal_rows=0, collapsed=True)


def cell_map(
    title: str, cells: Mapping[tuple[int | None, str], Row], value: Callable[[Row], float | None], **settings: Any
) -> Heatmap | None:
    """Return a heat map of kinds (rows) by layers (columns); None without layers.

    Args:
        cells: from ``Grouped.cells``; what lies outside of the layers is left out.
        value: of a cell; None leaves it blank.
        settings: further fields of ``Heatmap``.
    """
    layers = sorted({layer for layer, _ in cells if layer is not None})
    kinds = [kind for kind in KINDS if any((layer, kind) in cells for layer in layers)]
    if not layers:
        return None
    values = [[value(cells[layer, kind]) if (layer, kind) in cells else None for layer in layers] for kind in kinds]
    return Heatmap(
        title=title,
        values=values,
        row_labels=kinds,
        column_labels=[str(layer) for layer in layers],
        row_axis="kind",
        column_axis="layer",
        **settings,
    )


def _series(rows: Mapping[Any, Any], series: Mapping[str, str]) -> dict[str, Numbers]:
    return {name: [value_of(row, path) for row in rows.values()] for name, path in series.items()}


def row_bars(title: str, rows: Mapping[Any, Any], series: Mapping[str, str], axis: str, **settings: Any) -> Bars:
    """Return bars for each row.

    Args:
        series: the attribute shown, by the name of the series.
        axis: meaning of the bars' lengths.
        settings: further fields of ``Bars``.
    """
    return Bars(title=title, labels=list(map(str, rows)), series=_series(rows, series), axis=axis, **settings)


def row_lines(title: str, rows: Mapping[Any, Any], series: Mapping[str, str], **settings: Any) -> Lines:
    """Return lines over the rows' keys, which are numbers; arguments as of ``row_bars``."""
    return Lines(title=title, x=list(rows), series=_series(rows, series), **settings)


def layer_lines(
    title: str, found: Grouped[Any, Any], series: Mapping[str, str], y_label: str, **settings: Any
) -> list[Lines]:
    """Return lines over the layers; none for fewer than two."""
    layers = found.numbered_layers
    return [row_lines(title, layers, series, x_label="layer", y_label=y_label, **settings)] if len(layers) > 1 else []


def off_diagonal(matrix: Sequence[Numbers]) -> list[Numbers]:
    """Return the matrix with None on its diagonal."""
    return [[None if i == j else value for j, value in enumerate(row)] for i, row in enumerate(matrix)]


def picture(title: str, blocks: CoarseMap, caption: str) -> Heatmap:
    """Return a picture of a matrix in colours around the mean over its blocks: bands of rows and columns stand out."""
    values = [value for row in blocks.shares for value in row]
    centre = math.fsum(values) / len(values)
    return Heatmap(
        title=title,
        values=blocks.shares,
        row_labels=[str(start) for start in blocks.rows],
        column_labels=[str(start) for start in blocks.columns],
        row_axis="row",
        column_axis="column",
        centre=centre,
        scale=min(centre, 1 - centre) or None,  # so that the scale's ends are shares, too
        shares=True,
        decimals=0,
        caption=caption,
    )
