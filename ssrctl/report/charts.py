"""Figures as inline SVG whose colours follow the page's light or dark scheme.

Legends are not part of the drawing: the page shows them as text (``chart_style.keys``), where long names wrap. The
global state of matplotlib is left unchanged, and the same data give the same bytes.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, Literal

from ssrctl.report.chart_style import (
    GRID,
    SETTINGS,
    Style,
    draw_references,
    finite,
    inline,
    label_lines,
    label_text,
    reference_letters,
    series_styles,
)
from ssrctl.report.document import (
    Dots,
    Figure,
    Heatmap,
    Interval,
    Lines,
    Numbers,
    SeriesFigure,
)
from ssrctl.report.heatmap import draw_heatmap, heatmap_cells, heatmap_height, heatmap_is_wide

# Inches. A phone shows the narrow width at more than 72 pixels to the inch, so that 9-point text stays readable
# there; a wide figure scrolls in its box.
_NARROW, _WIDE = 3.9, 8.6
_MOST_MARKERS = 30
_ROW = 0.24  # of dots
_LINE = 0.14  # of text
_AXIS_CHARACTERS = 34
# Line widths of the first series, the second, and the others: where they coincide, those beneath still show.
_WIDTHS = (2.4, 1.6, 1.3)
_DOTS = (7.0, 5.5, 4.5)


def is_wide(figure: Figure) -> bool:
    """Return True if the figure takes the page's whole width."""
    return isinstance(figure, Heatmap) and heatmap_is_wide(figure)


def load_matplotlib() -> Any:
    """Import matplotlib, whatever backend MPLBACKEND names: a notebook sets one that may be absent here.

    Raises:
        ImportError: matplotlib is not installed.
    """
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    return matplotlib


def draw(figure: Figure, name: str = "figure") -> str:
    """Draw a figure as an ``<svg>`` element for a page that defines the css variables.

    Args:
        name: prefix of the ids in it, unique in a page.

    Raises:
        ImportError: matplotlib is not installed.
    """
    mpl = load_matplotlib()
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    size = (_WIDE if is_wide(figure) else _NARROW, _height(figure))
    # The page's own fonts draw the text; a character that matplotlib's fonts lack only gets a guessed width.
    with mpl.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        warnings.filterwarnings("ignore", message="constrained_layout not applied")
        canvas = Canvas(figsize=size, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.subplots()
        _draw_on(axes, figure)
        stream = io.StringIO()
        canvas.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        box = axes.get_position()
    svg = inline(stream.getvalue(), name)
    if not isinstance(figure, Heatmap):
        return svg
    width, height = (72 * one for one in size)
    place = (box.x0 * width, (1 - box.y1) * height, box.width * width, box.height * height)
    return svg.removesuffix("</svg>") + heatmap_cells(figure, *place) + "</svg>"


def _height(figure: Figure) -> float:
    """Return inches."""
    if isinstance(figure, Heatmap):
        return heatmap_height(figure)
    if isinstance(figure, Dots):
        beneath = 0.56 + _LINE * len(label_lines(figure.axis, _AXIS_CHARACTERS).splitlines())
        return beneath + (_LINE if figure.references else 0.0) + _ROW * len(figure.labels)
    return 2.4


def _draw_on(axes: Any, figure: Figure) -> None:
    if isinstance(figure, Heatmap):
        draw_heatmap(axes, figure)
    elif isinstance(figure, Dots):
        _dots(axes, figure)
    else:
        _lines(axes, figure)
    axes.set_axisbelow(True)


def _dots(axes: Any, figure: Dots) -> None:
    _fit(axes, "x", _numbers(figure), figure.log, figure.shares)
    if not figure.log:
        axes.locator_params(axis="x", nbins=6)  # room for labels such as 0.002%
    for order, (style, values, intervals) in enumerate(_series(figure)):
        for place, interval in enumerate(intervals):
            if interval is not None:
                axes.plot(interval, (place, place), color=style.colour, linewidth=4, alpha=0.35, zorder=1.5)
        kept = [(value, place) for place, value in enumerate(values) if _shown(value, figure.log)]
        if kept:
            axes.plot(*zip(*kept, strict=True), **_dot(style, order), markersize=_DOTS[min(order, len(_DOTS) - 1)])
        for place, value in enumerate(values):
            if figure.log and value == 0:
                _draw_zero(axes, place, style, "x")
    axes.set_yticks(range(len(figure.labels)), [label_text(label) for label in figure.labels])
    axes.set_ylim(len(figure.labels) - 0.4, -0.6)
    axes.hlines(range(len(figure.labels)), 0, 1, transform=axes.get_yaxis_transform(), color=GRID, linewidth=0.6)
    axes.set_xlabel(label_lines(figure.axis, _AXIS_CHARACTERS))
    axes.tick_params(axis="y", length=0, pad=7)  # room for a dot at the end of the axis
    _finish(axes, figure, "x")


def _dot(style: Style, order: int) -> dict[str, Any]:
    return {"color": style.colour, "marker": style.marker, "linestyle": "none", "clip_on": False, "zorder": 3 + order}


def _draw_zero(axes: Any, place: float, style: Style, values: Literal["x", "y"]) -> None:
    """Draw a hollow mark at the lower end of a logarithmic axis, which has no place for 0."""
    is_x = values == "x"
    transform = axes.get_yaxis_transform() if is_x else axes.get_xaxis_transform()
    point = ([0.0], [place]) if is_x else ([place], [0.0])
    look = _dot(style, 0) | {"markerfacecolor": "none", "markersize": 4.5}
    axes.plot(*point, transform=transform, **look)


def _lines(axes: Any, figure: Lines) -> None:
    for order, (style, values, intervals) in enumerate(_series(figure)):
        kept = [
            # Lines lead over what is missing, but not over a zero that the axis has no place for.
            (x, math.nan if figure.log_y and value == 0 else value)
            for x, value in zip(figure.x, values, strict=True)
            if (_shown(value, figure.log_y) or (figure.log_y and value == 0)) and _shown(x, figure.log_x)
        ]
        if not kept:
            continue
        axes.plot(
            *zip(*kept, strict=True),
            color=style.colour,
            linestyle="--" if style.yardstick else "-",
            linewidth=_WIDTHS[min(order, len(_WIDTHS) - 1)],
            marker=style.marker if len(figure.x) <= _MOST_MARKERS else None,
            markersize=3.5,
            clip_on=False,
        )
        for x, value in kept:
            if value is not None and math.isnan(value):
                _draw_zero(axes, x, style, "y")
        ribbon = [(x, *one) for x, one in zip(figure.x, intervals, strict=True) if one is not None]
        if ribbon:
            axes.fill_between(*zip(*ribbon, strict=True), color=style.colour, alpha=0.18, linewidth=0)
    positive = [x for x in figure.x if _shown(x, True)]
    if figure.log_x and positive:
        _log_scale(axes, "x", max(positive) / min(positive))
    else:
        _whole_ticks(axes, figure.x)
    _fit(axes, "y", _numbers(figure), figure.log_y, figure.shares)
    axes.set(xlabel=label_lines(figure.x_label, _AXIS_CHARACTERS), ylabel=label_lines(figure.y_label, 26))
    _finish(axes, figure, "y")


# --------------------------------------------------------------------------------------------------
# shared by several kinds


def _series(figure: SeriesFigure) -> Iterator[tuple[Style, Numbers, list[Interval | None]]]:
    """Yield each series' look, values and intervals; an interval without a finite end is left out."""
    for name, style in series_styles(list(figure.series)).items():
        found = figure.intervals.get(name, [None] * len(figure.series[name]))
        kept = [one if one is not None and None not in map(finite, one) else None for one in found]
        yield style, figure.series[name], kept


def _shown(value: float | None, log: bool) -> bool:
    return finite(value) is not None and (not log or value > 0)  # type: ignore[operator]


def _numbers(figure: SeriesFigure) -> list[float]:
    """Return all numbers that an axis of values has to hold."""
    found: list[float | None] = [value for values in figure.series.values() for value in values]
    found += [end for ends in figure.intervals.values() for interval in ends if interval for end in interval]
    found += [end for one in figure.references for end in (one.low, one.high)]
    return [value for value in map(finite, found) if value is not None]


def _finish(axes: Any, figure: Dots | Lines, values: Literal["x", "y"]) -> None:
    """Draw the grid and the references of the axis of values, in per cent for shares."""
    if figure.shares:
        _in_per_cent(axes.xaxis if values == "x" else axes.yaxis)
    axes.grid(axis=values)
    draw_references(axes, reference_letters(figure), values)


def _fit(axes: Any, which: str, numbers: list[float], log: bool, shares: bool = False) -> None:
    """Set scale and limits: from 0 where nothing is negative, except for lines of large shares."""
    set_limits = axes.set_xlim if which == "x" else axes.set_ylim
    if log:
        positive = [value for value in numbers if value > 0]
        if positive:
            set_limits(min(positive) / 1.6, max(positive) * 1.6)
            _log_scale(axes, which, max(positive) / min(positive))
        return
    low, high = min(numbers, default=0.0), max(numbers, default=0.0)
    if low < 0:
        (axes.axvline if which == "x" else axes.axhline)(0, color=GRID, linewidth=1)
        margin = 0.06 * (max(high, 0.0) - low)
        set_limits(low - margin, max(high, 0.0) + margin)
    elif shares and low > 0.5:
        margin = 0.06 * (high - low) or 0.01
        set_limits(low - margin, high + margin)
    else:
        set_limits(0, 1.08 * high or 1)


def _log_scale(axes: Any, which: str, ratio: float) -> None:
    """Make an axis logarithmic, with plain numbers as ticks; between powers of ten too where there are few of these."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if ratio < 30 else (1.0,), numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: _power_text(value)))


def _power_text(value: float) -> str:
    """Return a short form: ``0.02``, ``500``, ``1e-6``."""
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.10g}"
    digits, power = f"{value:.0e}".split("e")
    return f"{digits}e{int(power)}"


def _in_per_cent(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{_power_text(value * 100) if value else 0}%"))


def _whole_ticks(axes: Any, x: Sequence[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=all(float(one).is_integer() for one in x)))
