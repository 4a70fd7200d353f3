"""Figures as inline SVG whose colours follow the page's light or dark scheme.

Colours are drawn as placeholders and then replaced by css variables; heat maps express their values as
opacity of one hue, so they too suit either background. No global state of matplotlib is left changed, and the same
data give the same bytes.
"""

from __future__ import annotations

import io
import re
from typing import Any

from ssrctl.analysis.document import Bars, Figure, Heatmap, Lines

# Placeholders that stand for css variables; values without meaning, chosen to be unlike any other colour.
_TEXT, _GRID, _ONE, _TWO, _MUTED = "#010203", "#020304", "#030405", "#040506", "#050607"
_VARIABLES = {
    _TEXT: "var(--text)",
    _GRID: "var(--rule)",
    _ONE: "var(--series-1)",
    _TWO: "var(--series-2)",
    _MUTED: "var(--muted)",
}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ssrctl",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _TEXT,
    "axes.labelcolor": _TEXT,
    "axes.edgecolor": _GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _TEXT,
    "ytick.color": _TEXT,
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
# Inches. A phone shows this many at more than 72 pixels to the inch, so that 9-point text stays readable there.
_WIDTH = 3.9
# Full colour is not opaque, so that the numbers on it can be read.
_OPACITY = 0.72
_CELL_NUMBERS = 8


def draw(figure: Figure) -> str:
    """One figure as an ``<svg>`` element, to be put into a page that defines the css variables.

    Raises:
        ImportError: matplotlib is not installed.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    with mpl.rc_context(_SETTINGS):
        canvas = Canvas(figsize=(_WIDTH, _height(figure)), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        if isinstance(figure, Heatmap):
            _heatmap(axes, figure)
        elif isinstance(figure, Bars):
            _bars(axes, figure)
        else:
            _lines(axes, figure)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(stream.getvalue())


def _height(figure: Figure) -> float:
    if isinstance(figure, Heatmap):
        return 3.5
    if isinstance(figure, Bars):
        return 0.9 + 0.17 * len(figure.labels) * (len(figure.series) + 0.6)
    return 2.4


def _heatmap(axes: Any, figure: Heatmap) -> None:
    from matplotlib.patches import Rectangle

    size = len(figure.labels)
    axes.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5), xlabel=figure.axis, ylabel=figure.axis)
    axes.set_aspect("equal")
    for row, values in enumerate(figure.values):
        for column, value in enumerate(values):
            if value is None:
                continue
            strength = min(1.0, abs(value) / figure.scale) if figure.scale else 0.0
            axes.add_patch(
                Rectangle(
                    (column - 0.5, row - 0.5),
                    1,
                    1,
                    facecolor=_TWO if value < 0 else _ONE,
                    alpha=_OPACITY * strength,
                    linewidth=0,
                )
            )
            if size <= _CELL_NUMBERS:
                # "+ 0.0" turns a negative zero, left by rounding, into a plain one.
                text = f"{round(value, figure.decimals) + 0.0:.{figure.decimals}f}" if value else "0"
                axes.text(column, row, text, ha="center", va="center", fontsize=8 if size <= 6 else 6.5)
    stride = max(1, -(-size // 12))
    axes.set_xticks(range(0, size, stride), figure.labels[::stride])
    axes.set_yticks(range(0, size, stride), figure.labels[::stride])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(True)


def _bars(axes: Any, figure: Bars) -> None:
    from matplotlib.ticker import PercentFormatter

    thickness = 0.8 / len(figure.series)
    colours = iter((_ONE, _TWO) * len(figure.series))
    for order, (name, values) in enumerate(figure.series.items()):
        places = [position + (order + 0.5) * thickness - 0.4 for position in range(len(figure.labels))]
        shown = [value or 0.0 for value in values]
        axes.barh(
            places, shown, height=thickness * 0.9, color=_MUTED if _is_expected(name) else next(colours), label=name
        )
    axes.set_yticks(range(len(figure.labels)), figure.labels)
    axes.set_ylim(len(figure.labels) - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.set_xlabel(figure.axis)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x")
    axes.set_axisbelow(True)
    if len(figure.series) > 1:
        axes.figure.legend(loc="outside upper left", ncols=2)


def _is_expected(name: str) -> bool:
    """Is a series what chance would give, rather than what was measured?"""
    return name.startswith("expected")


def _lines(axes: Any, figure: Lines) -> None:
    from matplotlib.ticker import MaxNLocator

    colours = iter((_ONE, _TWO) * len(figure.series))
    floor = ceiling = 0.0
    for name, values in figure.series.items():
        kept = [(x, value) for x, value in zip(figure.x, values, strict=True) if value is not None]
        if not kept:
            continue
        floor = min(floor, *(value for _, value in kept))
        ceiling = max(ceiling, *(value for _, value in kept))
        expected = _is_expected(name)
        axes.plot(
            *zip(*kept, strict=True),
            color=_MUTED if expected else next(colours),
            linestyle="--" if expected else "-",
            linewidth=1.6,
            marker="o" if len(figure.x) <= 30 else None,
            markersize=3.5,
            label=name,
        )
    if floor == 0.0:
        axes.set_ylim(0, 1.08 * ceiling or 1)
    else:
        axes.axhline(0, color=_GRID, linewidth=1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.set(xlabel=figure.x_label, ylabel=figure.y_label)
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    if len(figure.series) > 1:
        axes.figure.legend(loc="outside upper left", ncols=2)


def _inline(svg: str) -> str:
    """An element for inside a page: no prolog, no metadata, no fixed size, colours by css variable.

    Ids of groups are dropped, since several figures share a page; the ids that are referred to (clip paths,
    markers) are hashes of what they hold.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    for placeholder, variable in _VARIABLES.items():
        svg = svg.replace(placeholder, variable)
    return svg.strip()
