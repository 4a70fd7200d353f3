"""Tables and figures that several measures show: rows by kind of matrix, by layer, by tensor; pictures of matrices."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.maths.grouping import Grouped
from ssrctl.report.document import Column, Dots, Heatmap, Lines, Numbers, Table, spans_decades

if TYPE_CHECKING:  # it loads torch, which is not needed to refuse a folder
    from ssrctl.measures.maths.row_column_counts import CoarseMap

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
    **settings: Any,
) -> Table:
    """Return a table with a line for each row.

    Args:
        what: the first column or its heading; it holds the rows' keys.
        rows: objects that have the columns' attributes, by label.
        settings: further fields of ``Table``.
    """
    return Table(
        title=title,
        columns=[what, *(Column(heading, show) for heading, _, show in columns)],
        rows=[[label, *(value_of(row, path) for _, path, _ in columns)] for label, row in rows.items()],
        note=note,
        **settings,
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
        row_table(f"{what} by layer", "layer", found.labelled_layers, *groups, terminal_rows=0),
        row_table(f"{what}, matrix by matrix", "matrix", found.tensors, *tensors, terminal_rows=0),
        reasons_table(f"Matrices without a {what.lower()}", unmeasured),
    )
    return [table for table in tables if table.rows]


def reasons_table(title: str, reasons: Mapping[str, str]) -> Table:
    """Return a table of names and reasons for the page."""
    return Table(title=title, columns=["tensor", "reason"], rows=list(reasons.items()), terminal_rows=0)


def cell_map(title: str, cells: Mapping[tuple[int | None, str], Any], path: str, **settings: Any) -> Heatmap | None:
    """Return a heat map of kinds (rows) by layers (columns); None without layers.

    Values that span decades get a logarithmic scale, unless they have a centre.

    Args:
        cells: from ``Grouped.cells``; tensors outside of the layers have a last column.
        path: the attribute shown, as in ``value_of``; None leaves a cell blank.
        settings: further fields of ``Heatmap``.
    """
    layers: list[int | None] = [*sorted({layer for layer, _ in cells if layer is not None})]
    if not layers:
        return None
    if any(layer is None for layer, _ in cells):
        layers.append(None)
    kinds = [kind for kind in KINDS if any((layer, kind) in cells for layer in layers)]
    values = [[value_of(cells.get((layer, kind)), path) for layer in layers] for kind in kinds]
    log = "centre" not in settings and spans_decades(itertools.chain(*values))
    return Heatmap(
        title=title,
        values=values,
        row_labels=kinds,
        column_labels=["out" if layer is None else str(layer) for layer in layers],
        row_axis="kind",
        column_axis="layer" + (" (out: outside of the layers)" if layers[-1] is None else ""),
        log=log,
        **settings,
    )


def _series(
    rows: Mapping[Any, Any], series: Mapping[str, str], settings: Mapping[str, Any]
) -> tuple[dict[str, Numbers], bool]:
    """Return the values by series, and True if they and the figure's references span decades."""
    found: dict[str, Numbers] = {name: [value_of(row, path) for row in rows.values()] for name, path in series.items()}
    ends = [end for one in settings.get("references", ()) for end in (one.low, one.high)]
    return found, spans_decades(itertools.chain(ends, *found.values()))


def row_dots(title: str, rows: Mapping[Any, Any], series: Mapping[str, str], axis: str, **settings: Any) -> Dots:
    """Return a figure with a line of dots for each row; values that span decades get a logarithmic axis.

    Args:
        series: the attribute shown, by the name of the series.
        axis: meaning of the dots' places.
        settings: further fields of ``Dots``.
    """
    found, log = _series(rows, series, settings)
    return Dots(title=title, labels=list(map(str, rows)), series=found, axis=axis, **({"log": log} | settings))


def row_lines(title: str, rows: Mapping[Any, Any], series: Mapping[str, str], **settings: Any) -> Lines:
    """Return lines over the rows' keys, which are numbers; arguments as of ``row_dots``."""
    found, log = _series(rows, series, settings)
    return Lines(title=title, x=list(rows), series=found, **({"log_y": log} | settings))


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
    """Return a picture of a matrix from its least share to its largest, with the means of rows and columns."""
    return Heatmap(
        title=title,
        values=blocks.shares,
        row_labels=[str(start) for start in blocks.rows],
        column_labels=[str(start) for start in blocks.columns],
        row_axis="row",
        column_axis="column",
        centre=min(itertools.chain(*blocks.shares)),
        shares=True,
        decimals=1,
        marginals=True,
        caption=caption,
    )
