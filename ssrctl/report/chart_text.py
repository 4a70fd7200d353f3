"""A description of a figure in a sentence or two, for readers who do not see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ssrctl.report.chart_style import cell_text, finite, label_text
from ssrctl.report.document import Dots, Figure, Heatmap, Reference
from ssrctl.report.formats import number, percent, times

_MOST_SERIES = 8


def describe(figure: Figure) -> str:
    """Return a description: the axes, and where each series is lowest and highest."""
    if isinstance(figure, Heatmap):
        return _heatmap(figure)
    write = percent if figure.shares else _plain
    if isinstance(figure, Dots):
        kind = f"Dots of {figure.axis}"
    else:
        kind = f"Lines of {figure.y_label} over {figure.x_label}"
    places = [one if isinstance(one, str) else f"{one:g}" for one in figure.places]
    sentences = [f"{kind}."]
    for order, (name, values) in enumerate(figure.series.items()):
        if order == _MOST_SERIES:
            sentences.append(f"And {len(figure.series) - order} more series.")
            break
        sentences.append(f"{label_text(name)}: {_extremes(values, places, write)}.")
    if figure.references:
        sentences.append(f"For comparison: {_reference_words(figure.references)}.")
    return " ".join(sentences)


def _plain(value: float) -> str:
    return f"{int(value):,}" if float(value).is_integer() and abs(value) < 1e15 else number(value)


def _extremes(values: Sequence[float | None], places: Sequence[str], write: Callable[[float], str]) -> str:
    found = [(value, place) for value, place in zip(map(finite, values), places, strict=True) if value is not None]
    if not found:
        return "no values"
    low, high = min(found, key=lambda one: one[0]), max(found, key=lambda one: one[0])
    if low[0] == high[0]:
        return f"{write(low[0])} throughout"
    return f"from {write(low[0])} ({label_text(low[1])}) to {write(high[0])} ({label_text(high[1])})"


def _heatmap(figure: Heatmap) -> str:
    rows, columns = len(figure.row_labels), len(figure.column_labels)
    cells = [value for row in figure.values for value in row]
    places = [f"{row}, {column}" for row in figure.row_labels for column in figure.column_labels]
    axes = (
        f"Matrix of {times(rows, 'row')} ({label_text(figure.row_axis)}) and {times(columns, 'column')} "
        f"({label_text(figure.column_axis)})"
    )
    return f"{axes}: {_extremes(cells, places, lambda value: cell_text(figure, value))}."


def _reference_words(references: Sequence[Reference]) -> str:
    return "; ".join(label_text(one.label, 120) for one in references)
