"""Heat maps: axes from matplotlib, cells as compact rectangles whose opacity is the value.

Opacity of one hue suits light and dark pages; a rectangle that matplotlib draws would take four times the bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ssrctl.report.chart_style import (
    cell_text,
    finite,
    finite_values,
    heat_colour,
    label_lines,
    label_text,
    strength,
    tip,
)
from ssrctl.report.document import Heatmap

# Inches, of figures as ``charts.draw`` makes them.
_NARROW_ROOM, _WIDE_ROOM = 3.0, 7.7
_CHARACTER = 0.072
# Characters of a row's name: at most, and those that the rooms above leave out already.
_ROW_NAME, _SHORT_NAME = 22, 6
_MOST_NARROW_COLUMNS, _MOST_COLUMNS_OF_NUMBERS = 16, 48
# Of the cells' width and height, on top of them.
_MARGIN = 0.16
_MOST_NUMBERS = 100
_NUMBER_SIZE = 7.5  # points


def heatmap_is_wide(figure: Heatmap) -> bool:
    """Return True if there are more columns than half a page's width can show: many, or with long names."""
    names = max(map(len, figure.column_labels), default=0) > 4 and not _is_square(figure)
    return len(figure.column_labels) > (_MOST_NARROW_COLUMNS if names else _MOST_COLUMNS_OF_NUMBERS)


def heatmap_height(figure: Heatmap) -> float:
    """Return inches."""
    rows, labels = len(figure.row_labels), _column_labels(figure)
    beneath = 0.45 + (_CHARACTER * max(map(len, labels), default=0) if _rotated(figure, labels) else 0.15)
    if _is_square(figure):
        return _room(figure) + beneath
    return beneath + rows * (0.25 if rows <= 12 else max(0.12, 3.0 / rows))


def _is_square(figure: Heatmap) -> bool:
    same = list(figure.row_labels) == list(figure.column_labels) and len(figure.row_labels) > 1
    return same or figure.marginals


def _room(figure: Heatmap) -> float:
    """Return the width of all cells: the figure's without the rows' names."""
    names = max((len(label_text(one, _ROW_NAME)) for one in figure.row_labels), default=0)
    whole = _WIDE_ROOM if heatmap_is_wide(figure) else _NARROW_ROOM
    return whole - _CHARACTER * max(0, names - _SHORT_NAME)


def _cell_width(figure: Heatmap) -> float:
    return _room(figure) / max(1, len(figure.column_labels))


def _column_labels(figure: Heatmap) -> list[str]:
    return [label_text(one, 18) for one in figure.column_labels]


def _rotated(figure: Heatmap, labels: Sequence[str]) -> bool:
    """Return True if labels stand upright. Short ones (layer numbers) never do: they are thinned out."""
    longest = max(map(len, labels), default=0)
    return longest > 3 and (longest + 1) * _CHARACTER > _cell_width(figure)


def draw_heatmap(axes: Any, figure: Heatmap) -> None:
    """Draw axes, ticks and frame; ``heatmap_cells`` adds the cells to the finished SVG."""
    rows, columns = [label_text(one, _ROW_NAME) for one in figure.row_labels], _column_labels(figure)
    margin = _MARGIN if figure.marginals else 0.0
    axes.set(
        xlim=(-0.5, max(1, len(columns)) * (1 + margin) - 0.5),
        ylim=(max(1, len(rows)) - 0.5, -0.5 - margin * max(1, len(rows))),
        xlabel=label_lines(figure.column_axis, 36),
        ylabel=label_lines(figure.row_axis, 30),
    )
    if _is_square(figure) and not figure.marginals:
        axes.set_aspect("equal")
    rotated = _rotated(figure, columns)
    needed = 0.13 if rotated else (max(map(len, columns), default=0) + 1) * _CHARACTER
    stride = _stride(needed, _cell_width(figure))
    axes.set_xticks(range(0, len(columns), stride), columns[::stride], rotation=90 if rotated else 0)
    stride = _stride(0.13, max(0.01, heatmap_height(figure) - 0.6) / max(1, len(rows)))
    axes.set_yticks(range(0, len(rows), stride), rows[::stride])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)


def _stride(needed: float, available: float) -> int:
    """Return n such that every n-th label is shown and labels do not touch."""
    return max(1, -int(-needed // available))


def heatmap_cells(figure: Heatmap, left: float, top: float, width: float, height: float) -> str:
    """Return the cells as SVG, with their values as tips, and their numbers where these are few and fit.

    Args:
        left, top, width, height: of its axes in the SVG's own units (points).
    """
    shape = len(figure.row_labels), len(figure.column_labels)
    if 0 in shape:
        return ""
    margins = ""
    if figure.marginals:
        margins = _marginals(figure, left, top, width, height)
        top, width, height = top + height * _MARGIN / (1 + _MARGIN), width / (1 + _MARGIN), height / (1 + _MARGIN)
    wide, tall = width / shape[1], height / shape[0]
    numbered = _are_numbered(figure, wide, tall)
    cells, numbers = [], []
    for row, values in enumerate(figure.values):
        for column, value in enumerate(map(finite, values)):
            x, y = left + column * wide, top + row * tall
            name = f"{figure.row_labels[row]}, {figure.column_labels[column]}"
            if value is None:
                half = min(wide, tall, 12.0) / 3
                cells.append(
                    f'<path d="M{x + wide / 2 - half:.2f} {y + tall / 2 - half:.2f}l{2 * half:.2f} {2 * half:.2f}" '
                    'class="blank"/>'
                )
                continue
            place = f'x="{x:.2f}" y="{y:.2f}" width="{wide:.2f}" height="{tall:.2f}"'
            fill = f'fill="{heat_colour(value - figure.centre)}" fill-opacity="{strength(figure, value):.3g}"'
            cells.append(f"<rect {place} {fill}>{tip(f'{name}: {cell_text(figure, value)}')}</rect>")
            if numbered:
                at = f'x="{x + wide / 2:.2f}" y="{y + tall / 2 + 0.35 * _NUMBER_SIZE:.2f}"'
                numbers.append(f"<text {at}>{cell_text(figure, value)}</text>")
    style = f'font-size="{_NUMBER_SIZE}" text-anchor="middle" fill="var(--text)" pointer-events="none"'
    return margins + f'<g class="heat">{"".join(cells)}</g>' + (f"<g {style}>{''.join(numbers)}</g>" if numbers else "")


def _marginals(figure: Heatmap, left: float, top: float, width: float, height: float) -> str:
    """Return bars of the columns' means above the cells and of the rows' means to their right, each side to its scale."""
    across, down = width / (1 + _MARGIN), height / (1 + _MARGIN)
    above, right = height - down, width - across
    sides = []
    for names, lines in (
        (figure.column_labels, list(zip(*figure.values, strict=True))),
        (figure.row_labels, figure.values),
    ):
        kept = [[value for value in map(finite, line) if value is not None] for line in lines]
        means = [sum(line) / len(line) if line else 0.0 for line in kept]
        sides.append((names, means, max(map(abs, means), default=0.0) or 1.0))
    bars = []
    (names, means, largest), step = sides[0], across / len(figure.column_labels)
    for order, (name, mean) in enumerate(zip(names, means, strict=True)):
        size = 0.9 * above * abs(mean) / largest
        place = f'x="{left + order * step:.2f}" y="{top + above - size:.2f}" width="{step:.2f}" height="{size:.2f}"'
        bars.append(f"<rect {place}>{tip(f'{figure.column_axis} {name}: mean {cell_text(figure, mean)}')}</rect>")
    (names, means, largest), step = sides[1], down / len(figure.row_labels)
    for order, (name, mean) in enumerate(zip(names, means, strict=True)):
        size = 0.9 * right * abs(mean) / largest
        place = f'x="{left + across:.2f}" y="{top + above + order * step:.2f}" width="{size:.2f}" height="{step:.2f}"'
        bars.append(f"<rect {place}>{tip(f'{figure.row_axis} {name}: mean {cell_text(figure, mean)}')}</rect>")
    return f'<g fill="var(--muted)">{"".join(bars)}</g>'


def _are_numbered(figure: Heatmap, wide: float, tall: float) -> bool:
    """Return True if the numbers fit into their cells (points) and are few enough to be read."""
    shown = finite_values(figure)
    if not shown or len(figure.row_labels) * len(figure.column_labels) > _MOST_NUMBERS or tall < 1.3 * _NUMBER_SIZE:
        return False
    longest = max(len(cell_text(figure, value)) for value in shown)
    return longest * 0.6 * _NUMBER_SIZE < wide
