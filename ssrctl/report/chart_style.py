"""Parts of all figures: colours that follow the page's scheme, keys of series, and inline SVG.

Colours are drawn as placeholders and then replaced by css variables, so that one figure suits light and dark pages.
"""

from __future__ import annotations

import itertools
import math
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

from ssrctl.report.document import Dots, Figure, Heatmap, Lines, Reference, SeriesFigure
from ssrctl.report.formats import number, percent, text_safe

# Placeholders that stand for css variables; values without meaning, chosen to be unlike any other colour.
TEXT, GRID, MUTED = "#010203", "#020304", "#050607"
SERIES = ("#030405", "#040506", "#060708", "#070809", "#08090a", "#090a0b")
_VARIABLES = {TEXT: "var(--text)", GRID: "var(--rule)", MUTED: "var(--muted)"} | {
    colour: f"var(--series-{order})" for order, colour in enumerate(SERIES, 1)
}
MARKERS = ("o", "s", "^", "D", "v", "P")
# The same markers around the origin, for the keys.
_MARKER_PATHS = {
    "o": "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0 -6 0z",
    "s": "M-2.6 -2.6h5.2v5.2h-5.2z",
    "^": "M0 -3.2L3.2 2.6H-3.2z",
    "D": "M0 -3.6L3.6 0L0 3.6L-3.6 0z",
    "v": "M0 3.2L3.2 -2.6H-3.2z",
    "P": "M-1.1 -3.2h2.2v2.1h2.1v2.2h-2.1v2.1h-2.2v-2.1h-2.1v-2.2h2.1z",
}
_HOLLOW = '<circle cx="11" cy="6" r="3.5" fill="none" stroke="var(--text)"/>'
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ssrctl",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": GRID,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
}
_LONGEST = 26
_RAMP_STEPS = 9
# Opacity of the least positive value of a logarithmic map, to tell it from 0.
_FAINTEST = 0.1


@dataclass(frozen=True, kw_only=True)
class Style:
    """The look of one series; a yardstick, as against a measurement, is grey and dashed."""

    colour: str
    marker: str
    yardstick: bool


@dataclass(frozen=True, kw_only=True)
class Key:
    """One entry of a figure's legend: a small drawing (SVG, ours) and its meaning (text, not escaped)."""

    swatch: str
    label: str


def series_styles(names: Sequence[str]) -> dict[str, Style]:
    """Return a colour and a marker for each series; the seventh measured one has the first's again."""
    looks = itertools.cycle(zip(SERIES, MARKERS, strict=True))
    markers = itertools.cycle(MARKERS)
    styles = {}
    for name in names:
        yardstick = is_expected(name)
        colour, marker = (MUTED, next(markers)) if yardstick else next(looks)
        styles[name] = Style(colour=colour, marker=marker, yardstick=yardstick)
    return styles


def is_expected(name: str) -> bool:
    """Return True if a series is expected by chance, not measured."""
    return name.startswith("expected")


def finite(value: float | None) -> float | None:
    """Return the value, or None where it is missing or not finite."""
    return None if value is None or not math.isfinite(value) else float(value)


def label_text(text: str, longest: int = _LONGEST) -> str:
    """Return text for an axis: one line, without control characters, long names shortened in the middle."""
    plain = " ".join("".join(" " if ord(one) < 32 or ord(one) == 127 else one for one in text_safe(text)).split())
    if len(plain) <= longest:
        return plain
    tail = (longest - 1) // 2 + 2
    return f"{plain[: longest - 1 - tail]}…{plain[-tail:]}"


def label_lines(text: str, width: int = 22) -> str:
    """Return text for an axis in up to three lines of ``width`` characters."""
    return textwrap.fill(label_text(text, 3 * width), width, max_lines=3, placeholder="…")


def reference_letters(figure: SeriesFigure) -> dict[Reference, str]:
    """Return the letters A, B, C, ... that name the references of a figure in its legend and its drawing."""
    return {one: _letter(order) for order, one in enumerate(dict.fromkeys(figure.references))}


def _letter(order: int) -> str:
    return chr(ord("A") + order) if order < 26 else f"{_letter(order // 26 - 1)}{_letter(order % 26)}"


# --------------------------------------------------------------------------------------------------
# keys


def keys(figure: Figure) -> list[Key]:
    """Return the legend of a figure, which the page shows as text; empty where the figure needs none."""
    if isinstance(figure, Heatmap):
        return _heat_keys(figure)
    styles = series_styles(list(figure.series))
    references = _reference_keys(figure)
    if len(styles) < 2 and not references and not _has_zeros(figure):
        return []
    draw = _line if isinstance(figure, Lines) else _dot
    zero = (
        [Key(swatch=_svg(_HOLLOW), label="0, which a logarithmic axis has no place for")] if _has_zeros(figure) else []
    )
    return [Key(swatch=draw(style), label=name) for name, style in styles.items()] + zero + references


def _has_zeros(figure: SeriesFigure) -> bool:
    """Return True if a logarithmic axis lacks zeros, which are drawn as hollow marks."""
    log = figure.log if isinstance(figure, Dots) else isinstance(figure, Lines) and figure.log_y
    return log and any(value == 0 for values in figure.series.values() for value in values)


def heat_limits(figure: Heatmap) -> tuple[float, float, float]:
    """Return (value in full second hue, value without colour, value in full first hue).

    A side on which no value lies ends at the centre, but where all values are the centre the upper side is kept.
    """
    shown = finite_values(figure)
    reach = figure.scale
    if reach is None:
        reach = max((abs(value - figure.centre) for value in shown), default=0.0)
    below = any(value < figure.centre for value in shown)
    above = any(value > figure.centre for value in shown) or not below
    return figure.centre - reach * below, figure.centre, figure.centre + reach * above


def finite_values(figure: Heatmap) -> list[float]:
    """Return the values that are drawn, row by row."""
    return [value for row in figure.values for value in map(finite, row) if value is not None]


def least_positive(figure: Heatmap) -> float:
    """Return the lower end of a logarithmic scale; 1 where no value is positive."""
    return min((value for value in finite_values(figure) if value > 0), default=1.0)


def strength(figure: Heatmap, value: float) -> float:
    """Return the opacity of a cell in [0, 1]: 0 at the centre, 1 at the limits; in a logarithmic map 0 for 0 only."""
    low, centre, high = heat_limits(figure)
    if figure.log:
        if value <= 0:
            return 0.0
        least = least_positive(figure)
        along = math.log(value / least) / math.log(high / least) if high > least else 1.0
        return min(1.0, _FAINTEST + (1 - _FAINTEST) * along)
    reach = (high - centre) if value > centre else (centre - low)
    return min(1.0, abs(value - centre) / reach) if reach else 0.0


def cell_text(figure: Heatmap, value: float) -> str:
    """Return a cell's number as the figure writes it: no negative zero, and a zero that is exact as ``0``."""
    if not value:
        return "0%" if figure.shares else "0"
    scaled = value * 100 if figure.shares else value
    # "+ 0.0" turns a negative zero, left by rounding, into a plain one.
    text = f"{round(scaled, figure.decimals) + 0.0:.{figure.decimals}f}"
    return text + "%" if figure.shares else text


def _heat_keys(figure: Heatmap) -> list[Key]:
    low, centre, high = heat_limits(figure)
    found = []
    if figure.log and low < high:
        zero = f", no colour at {cell_text(figure, 0)}" if 0 in finite_values(figure) else ""
        label = f"{_limit(figure, least_positive(figure))} to {_limit(figure, high)}, logarithmic{zero}"
        found.append(Key(swatch=_ramp(False, True), label=label))
    elif low < high:
        ends = [_limit(figure, value) for value in (low, centre, high)]
        middle = f", no colour at {ends[1]}" if low < centre < high else ""
        found.append(Key(swatch=_ramp(low < centre, centre < high), label=f"{ends[0]} to {ends[2]}{middle}"))
    if any(finite(value) is None for row in figure.values for value in row):
        found.append(Key(swatch=_svg('<path d="M7 2L15 10" class="blank"/>'), label="no value"))
    return found


def _limit(figure: Heatmap, value: float) -> str:
    if figure.shares:
        return percent(value) if 0 <= value <= 1 else f"{value:.2%}"
    return number(value)


def _reference_keys(figure: SeriesFigure) -> list[Key]:
    return [
        Key(swatch=_reference(letter, one.high is not None), label=one.label)
        for one, letter in reference_letters(figure).items()
    ]


def _svg(inside: str, width: int = 22) -> str:
    return f'<svg viewBox="0 0 {width} 12" width="{width}" height="12" aria-hidden="true">{inside}</svg>'


def _dot(style: Style) -> str:
    return _svg(_mark(style.colour, style.marker))


def _mark(colour: str, marker: str) -> str:
    return f'<path d="{_MARKER_PATHS[marker]}" transform="translate(11 6)" fill="{_VARIABLES[colour]}"/>'


def _line(style: Style) -> str:
    dashes = ' stroke-dasharray="4 3"' if style.yardstick else ""
    line = f'<path d="M0 6H22" stroke="{_VARIABLES[style.colour]}" stroke-width="2"{dashes}/>'
    return _svg(line + _mark(style.colour, style.marker))


def _reference(letter: str, is_range: bool) -> str:
    # The letter is one of ours and needs no escaping.
    drawn = (
        '<rect x="0" y="0.5" width="12" height="11" fill="var(--muted)" fill-opacity="0.3"/>'
        if is_range
        else '<path d="M0 6H12" stroke="var(--muted)" stroke-width="2" stroke-dasharray="1.5 2"/>'
    )
    return _svg(
        f'{drawn}<text x="18" y="10" font-size="11" text-anchor="middle" fill="var(--text)">{letter}</text>', 24
    )


def _ramp(below: bool, above: bool) -> str:
    steps = [step / (_RAMP_STEPS - 1) for step in range(_RAMP_STEPS)]
    values = ([-one for one in reversed(steps)] if below else []) + (steps[below:] if above else [])
    drawn = "".join(
        f'<rect x="{6 * place}" width="6" height="12" fill="{heat_colour(value)}" fill-opacity="{abs(value):.3g}"/>'
        for place, value in enumerate(values)
    )
    return _svg(f'<g class="heat">{drawn}</g>', 6 * len(values))


def heat_colour(signed: float) -> str:
    """Return the hue of a value by its side of a heat map's centre."""
    return _VARIABLES[SERIES[1] if signed < 0 else SERIES[0]]


# --------------------------------------------------------------------------------------------------
# SVG


def tip(text: str) -> str:
    """Return the title that a browser shows while the pointer rests on an element."""
    return f"<title>{escape(label_text(text, 120))}</title>"


def inline(svg: str, name: str) -> str:
    """Return an element for use inside a page: no prolog, no metadata, no fixed size, colours by css variable.

    Ids of groups are dropped and those that are referred to (clip paths, markers) begin with ``name``, since several
    figures share a page. Only tags are touched: text stays what it was.
    """
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # A rule for every element, which would apply to the whole page; the page has its own for figures.
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.DOTALL)
    # matplotlib escapes < and > in text and in attributes.
    svg = re.sub(r"<[^>]+>", lambda tag: _tag(tag[0], name), svg)
    svg = re.sub(r"\n\s*", "\n", svg)
    return svg.strip()


def _tag(tag: str, name: str) -> str:
    if tag.startswith("<g "):
        tag = re.sub(r' id="[^"]*"', "", tag)
    if tag.startswith("<svg"):
        tag = re.sub(r' (width|height)="[^"]*"', "", tag)
    tag = re.sub(r'( id="|"#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font-family: [^;]*; ?", "", tag)
    for placeholder, variable in _VARIABLES.items():
        tag = tag.replace(placeholder, variable)
    return tag


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Return positions at least ``gap`` apart, in their order, each moved upwards as little as possible."""
    moved: dict[int, float] = {}
    last = -math.inf
    for order in sorted(range(len(places)), key=lambda one: places[one]):
        last = max(places[order], last + gap)
        moved[order] = last
    return [moved[order] for order in range(len(places))]


def draw_references(axes: Any, references: dict[Reference, str], along: Literal["x", "y"]) -> None:
    """Draw bands and lines at values of one axis, with their letters just outside of the plot.

    Call it when the axis has its final limits and scale, within which the references lie.
    """
    is_x = along == "x"
    span, line = (axes.axvspan, axes.axvline) if is_x else (axes.axhspan, axes.axhline)
    to_axes = axes.transData + axes.transAxes.inverted()
    middles = []
    for one in references:
        ends = (one.low,) if one.high is None else (one.low, one.high)
        if len(ends) == 2:
            span(*ends, color=MUTED, alpha=0.2, linewidth=0, zorder=0.5)
        for end in ends:
            line(end, color=MUTED, linewidth=1, linestyle=(0, (1.5, 2)), zorder=2.5)
        # In axes units, where the middle of a range is in the middle on a logarithmic axis too.
        places = [float(to_axes.transform((end, end))[0 if is_x else 1]) for end in ends]
        middles.append(min(max(sum(places) / len(places), 0.0), 1.0))
    for letter, place in zip(references.values(), spread(middles, 0.07), strict=True):
        axes.text(
            *((place, 1.02) if is_x else (1.02, place)),
            letter,
            transform=axes.transAxes,
            ha="center" if is_x else "left",
            va="bottom" if is_x else "center",
            fontsize=8,
            clip_on=False,
        )
