"""Figures as SVG: what is drawn where, in which colour, with which key, and what is left out."""

from __future__ import annotations

import itertools
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
from example_document import bars_and_counts, example_document
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.report.chart_style import (
    cell_text,
    heat_limits,
    keys,
    label_lines,
    label_text,
    series_styles,
    spread,
)
from ssrctl.report.chart_text import describe
from ssrctl.report.charts import draw, is_wide
from ssrctl.report.document import Dots, Figure, Heatmap, Lines, Reference

FIGURES = [figure for section in example_document(rows=1).sections for figure in section.figures]
BAND, LINE = Reference("a range, table 1: 20% to 40%", 0.2, 0.4), Reference("one value: 10%", 0.1)


class Drawing(HTMLParser):
    """The elements of an SVG with their attributes, and its text."""

    def __init__(self, svg: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text: list[str] = []
        self.titles: list[str] = []
        self.feed(svg)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        if not data.strip():
            return
        (self.titles if self.found and self.found[-1][0] == "title" else self.text).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.found if name == tag]


def filled(svg: str, colour: str) -> list[tuple[float, float]]:
    """(width, height) of every shape that is filled in a colour."""
    boxes = []
    for attributes in Drawing(svg).all("path"):
        if f"fill: var(--{colour})" in attributes.get("style", "") and "clip-path" in attributes:
            numbers = [float(one) for one in re.findall(r"-?\d+\.?\d*", attributes["d"])]
            x, y = numbers[0::2], numbers[1::2]
            boxes.append((max(x) - min(x), max(y) - min(y)))
    return boxes


# --------------------------------------------------------------------------------------------------
# all kinds


@pytest.mark.parametrize("figure", FIGURES, ids=lambda one: f"{type(one).__name__}: {one.title}")
def test_every_figure_is_drawn_in_the_pages_colours(figure: Figure) -> None:
    svg = draw(figure, "one")
    assert svg.startswith("<svg") and svg.endswith("</svg>")
    tag = svg[: svg.index(">")]
    assert "viewBox" in tag and " width=" not in tag  # as large as its place on the page
    colours = set(re.findall(r"(?:fill|stroke)(?:: |=\")([^;\"]+)", svg))
    assert colours <= {
        "none",
        *(f"var(--series-{one})" for one in range(1, 7)),
        *map("var(--{})".format, ("text", "rule", "muted")),
    }
    assert "<style" not in svg and "<metadata" not in svg and "mathdefault" not in svg
    # What is referred to is there, and all ids are this figure's own.
    ids = re.findall(r' id="([^"]*)"', svg)
    assert len(ids) == len(set(ids)) and all(one.startswith("one-") for one in ids)
    assert set(re.findall(r'(?:url\(|href=")#([^)"]*)', svg)) <= set(ids)
    assert draw(figure, "one") == svg
    assert describe(figure) and "nan" not in describe(figure)


def test_two_figures_of_a_page_share_no_ids() -> None:
    figure = Lines(title="", x=[1, 2], series={"a": [1.0, 2.0]}, x_label="", y_label="")
    one, two = (set(re.findall(r' id="([^"]*)"', draw(figure, name))) for name in ("one", "two"))
    assert one and not one & two


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw(FIGURES[0])
    assert dict(mpl.rcParams) == before


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", [Dots, Heatmap, Lines])
def test_text_from_files_stays_text(kind: type[Figure]) -> None:
    texts = ["#010203", "fill: #030405", "$x^2$ _{", "漢字", "a\x00\x1bb\nc", "</text><script>", "\ud800", ""]
    values = [0.5] * len(texts)
    figure: Figure
    if kind is Dots:
        figure = Dots(title="", labels=texts, series={texts[5]: values}, axis=texts[5])
    elif kind is Heatmap:
        figure = Heatmap(title="", labels=texts, values=[values] * len(texts), axis=texts[5])
    else:
        figure = Lines(title="", x=[1], series={one: [0.5] for one in texts}, x_label=texts[5], y_label=texts[2])
    svg = draw(figure)
    svg.encode("utf-8")
    page = Drawing(svg)
    assert not {"script", "style"} & {tag for tag, _ in page.found}
    assert "\x00" not in svg and "\x1b" not in svg
    shown = [label_text(one, 12) for one in (texts[2:3] if kind is Lines else texts)]
    assert set(shown) - {""} <= set(page.text) | {label_text(one, 12) for one in page.text}


def test_numbers_that_are_none_are_left_out() -> None:
    odd: list[float | None] = [math.nan, math.inf, -math.inf, None]
    assert draw(Dots(title="", labels=list("abcd"), series={"s": odd}, axis="")).count("--series-1") == 0
    assert draw(Lines(title="", x=range(4), series={"s": odd}, x_label="", y_label="")).count("--series-1") == 0
    svg = draw(Heatmap(title="", row_labels=["r"], column_labels=list("abcd"), values=[odd]))
    assert "<rect" not in svg and svg.count('class="blank"') == 4


@pytest.mark.parametrize("size", [0, 1])
def test_hardly_any_data_is_no_error(size: int) -> None:
    names = ["a"] * size
    values: list[float | None] = [0.0] * size
    draw(Dots(title="", labels=names, series={}, axis="", references=[BAND]))
    draw(Dots(title="", labels=names, series={"s": values}, axis="", shares=False, log=True))
    draw(Lines(title="", x=[0] * size, series={"s": values}, x_label="", y_label="", log_x=True, log_y=True))
    draw(Heatmap(title="", labels=names, values=[values] * size))


def test_shapes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="do not have the shape"):
        Heatmap(title="m", row_labels=["a"], column_labels=["b", "c"], values=[[1.0]])
    with pytest.raises(ValueError, match="1 values for 2 places"):
        Dots(title="b", labels=["a", "b"], series={"s": [1.0]}, axis="")
    with pytest.raises(ValueError, match="interval of s"):
        Lines(title="l", x=[1], series={"s": [1.0]}, intervals={"s": []}, x_label="", y_label="")


# --------------------------------------------------------------------------------------------------
# heat maps


def cells(figure: Heatmap) -> dict[str, dict[str, str]]:
    """The drawn cells by their tips."""
    page = Drawing(draw(figure))
    return dict(zip(page.titles, page.all("rect"), strict=True))


def test_cells_stand_where_their_labels_say_in_the_colour_of_their_value() -> None:
    figure = Heatmap(
        title="", row_labels=["top", "bottom"], column_labels=["x", "y", "z"],
        values=[[0.5, None, -1.0], [0.0, 0.25, 2.0]], scale=1.0, decimals=2,
    )  # fmt: skip
    found = cells(figure)
    assert list(found) == ["top, x: 0.50", "top, z: -1.00", "bottom, x: 0", "bottom, y: 0.25", "bottom, z: 2.00"]
    x = {name: float(cell["x"]) for name, cell in found.items()}
    y = {name: float(cell["y"]) for name, cell in found.items()}
    assert x["top, x: 0.50"] == x["bottom, x: 0"] < x["bottom, y: 0.25"] < x["top, z: -1.00"] == x["bottom, z: 2.00"]
    assert y["top, x: 0.50"] == y["top, z: -1.00"] < y["bottom, x: 0"] == y["bottom, z: 2.00"]
    assert {name: (cell["fill"][-2], float(cell["fill-opacity"])) for name, cell in found.items()} == {
        "top, x: 0.50": ("1", 0.5), "top, z: -1.00": ("2", 1.0), "bottom, x: 0": ("1", 0.0),
        "bottom, y: 0.25": ("1", 0.25), "bottom, z: 2.00": ("1", 1.0),
    }  # fmt: skip


def test_labels_stand_beside_their_cells() -> None:
    figure = Heatmap(title="", row_labels=["up", "low"], column_labels=["one", "two"], values=[[1.0, 2.0], [3.0, 4.0]])
    svg = draw(figure)
    places = {
        text: (float(x), float(y))
        for x, y, text in re.findall(r'<text[^>]* x="([\d.]+)" y="([\d.]+)"[^>]*>([^<]+)</text>', svg)
    }
    found = cells(figure)
    for name, cell in found.items():
        row, column = name.split(":")[0].split(", ")
        assert float(cell["x"]) < places[column][0] < float(cell["x"]) + float(cell["width"])
        assert float(cell["y"]) < places[row][1] < float(cell["y"]) + float(cell["height"])


def test_scale_is_sequential_from_the_least_value_or_diverging_around_a_baseline() -> None:
    values: list[list[float | None]] = [[0.9, 0.95, 1.0]]
    columns = ["a", "b", "c"]
    rising = Heatmap(title="", row_labels=["r"], column_labels=columns, values=values, centre=0.9, shares=True)
    assert heat_limits(rising) == pytest.approx((0.9, 0.9, 1.0))
    assert [float(cell["fill-opacity"]) for cell in cells(rising).values()] == pytest.approx([0, 0.5, 1])
    assert [key.label for key in keys(rising)] == ["90.00% to 100.00%"]
    around = Heatmap(title="", row_labels=["r"], column_labels=columns, values=values, centre=0.95, shares=True)
    assert [cell["fill"][-2] for cell in cells(around).values()] == ["2", "1", "1"]
    assert [key.label for key in keys(around)] == ["90.00% to 100.00%, no colour at 95.00%"]


def test_key_of_a_heat_map_says_what_full_colour_and_blank_cells_are() -> None:
    def labels(values: list[list[float | None]], scale: float | None) -> list[str]:
        return [key.label for key in keys(Heatmap(title="", labels=["a", "b"], values=values, scale=scale))]

    assert labels([[None, 0.1], [0.2, None]], 0.5) == ["0 to 0.500", "no value"]
    assert labels([[0.0, 0.0], [0.0, 0.0]], 0.5) == ["0 to 0.500"]
    assert labels([[0.0, 0.0], [0.0, 0.0]], None) == []  # nothing has a colour
    assert labels([[0.0, -1.0], [0.5, 0.0]], None) == ["-1.00 to 1.00, no colour at 0"]


def test_a_logarithmic_map_tells_zero_from_the_least_value() -> None:
    values: list[list[float | None]] = [[0.0, 0.001, 0.01, 0.1]]
    figure = Heatmap(title="", row_labels=["r"], column_labels=list("abcd"), values=values, shares=True, log=True)
    zero, least, middle, most = (float(cell["fill-opacity"]) for cell in cells(figure).values())
    assert zero == 0 < least and most == 1 and middle - least == pytest.approx(most - middle)
    assert [key.label for key in keys(figure)] == ["0.10% to 10.00%, logarithmic, no colour at 0%"]
    with pytest.raises(ValueError, match="logarithmic scale has no centre"):
        Heatmap(title="", labels=["a"], values=[[1.0]], centre=1.0, log=True)


def test_marginal_bars_are_the_means_of_columns_and_rows() -> None:
    values: list[list[float | None]] = [[0.1, 0.3], [0.0, 0.0]]
    figure = Heatmap(title="", labels=["0", "9"], values=values, axis="place", marginals=True)
    found = cells(figure)
    bars = [found[f"place {name}: mean {mean}"] for name, mean in (("0", "0.050"), ("9", "0.150"))]
    assert float(bars[1]["height"]) == pytest.approx(3 * float(bars[0]["height"]), rel=1e-2)
    full, none = found["place 0: mean 0.200"], found["place 9: mean 0"]
    assert float(none["width"]) == 0 < float(full["width"])
    assert float(full["x"]) > float(found["0, 9: 0.300"]["x"]) and float(bars[0]["y"]) < float(
        found["0, 0: 0.100"]["y"]
    )


def test_numbers_are_written_into_few_cells_only() -> None:
    def written(rows: int, columns: int) -> bool:
        values: list[list[float | None]] = [[0.123] * columns for _ in range(rows)]
        names = [[f"{one}" for one in range(size)] for size in (rows, columns)]
        return (
            "0.123" in Drawing(draw(Heatmap(title="", row_labels=names[0], column_labels=names[1], values=values))).text
        )

    assert written(3, 3) and written(7, 7)
    assert not written(12, 12) and not written(9, 80) and not written(60, 2)


def test_cells_show_their_numbers_without_negative_zero() -> None:
    figure = Heatmap(title="", labels=["1", "2"], values=[[None, -0.0004], [0.25, 0.0]], scale=1.0, decimals=2)
    text = Drawing(draw(figure)).text
    assert "0.25" in text and "0.00" in text and "0" in text and "-0.00" not in text
    shares = Heatmap(title="", labels=["1"], values=[[0.25]], shares=True, decimals=1)
    assert [cell_text(shares, value) for value in (0.25, 0.0, -1e-9)] == ["25.0%", "0%", "0.0%"]


def test_eighty_columns_and_twelve_rows_are_compact_and_readable() -> None:
    rows, columns = [f"kind {one}" for one in range(12)], [str(one) for one in range(80)]
    values: list[list[float | None]] = [[(i * 80 + j) / 960 for j in range(80)] for i in range(12)]
    figure = Heatmap(title="", row_labels=rows, column_labels=columns, values=values, column_axis="layer")
    svg = draw(figure)
    assert is_wide(figure) and len(svg) < 200_000
    page = Drawing(svg)
    assert len(page.all("rect")) == 960
    shown = [int(one) for one in page.text if one.isdigit()]
    assert set(rows) <= set(page.text) and shown[0] == 0 and len(shown) >= 20
    assert len({b - a for a, b in itertools.pairwise(shown)}) == 1  # thinned out evenly
    assert not is_wide(Heatmap(title="", labels=columns[:12], values=[[None] * 12] * 12))


# --------------------------------------------------------------------------------------------------
# bars, lines, histograms, ranges


def dots(svg: str, colour: str) -> list[tuple[float, float, str]]:
    """(x, y, fill) of every mark in a colour."""
    return [
        (float(one["x"]), float(one["y"]), "none" if "fill-opacity: 0" in one["style"] else "full")
        for one in Drawing(svg).all("use")
        if f"stroke: var(--{colour})" in one.get("style", "")
    ]


def test_dots_stand_at_their_values_in_the_row_of_their_label() -> None:
    svg = draw(Dots(title="", labels=["a", "b"], series={"m": [0.2, 0.8], "expected": [0.4, None]}, axis=""))
    (low, first, _), (high, second, _) = dots(svg, "series-1")
    ((chance, row, _),) = [one for one in dots(svg, "muted") if one[1] == first]
    assert high - low == pytest.approx(3 * (chance - low), rel=1e-3) and row == first < second
    decades = Dots(title="", labels=list("abcd"), series={"m": [1, 10, 100, 0]}, axis="", shares=False, log=True)
    a, b, c, zero = dots(draw(decades), "series-1")
    assert c[0] - b[0] == pytest.approx(b[0] - a[0], rel=1e-3) and zero[0] < a[0]
    assert zero[2] == "none" != a[2] and "0, which" in keys(decades)[-1].label


def points(svg: str, colour: str) -> list[tuple[float, float]]:
    """The points of the first line that is stroked in a colour."""
    for attributes in Drawing(svg).all("path"):
        if f"stroke: var(--{colour})" in attributes.get("style", "") and attributes["d"].count("L") > 1:
            numbers = [float(one) for one in re.findall(r"-?\d+\.?\d*", attributes["d"])]
            return list(zip(numbers[0::2], numbers[1::2], strict=True))
    raise AssertionError(f"no line in {colour}")


def test_lines_go_through_their_values_on_plain_and_logarithmic_axes() -> None:
    x = [1, 10, 100]
    series: dict[str, list[float | None]] = {"s": [1.0, 10.0, 100.0]}
    plain = points(draw(Lines(title="", x=x, series=series, x_label="", y_label="")), "series-1")
    assert (plain[2][0] - plain[1][0]) / (plain[1][0] - plain[0][0]) == pytest.approx(10, rel=1e-3)
    assert (plain[2][1] - plain[1][1]) / (plain[1][1] - plain[0][1]) == pytest.approx(10, rel=1e-3)
    assert plain[2][1] < plain[0][1]  # upwards
    both = points(draw(Lines(title="", x=x, series=series, x_label="", y_label="", log_x=True, log_y=True)), "series-1")
    for side in (0, 1):
        assert both[2][side] - both[1][side] == pytest.approx(both[1][side] - both[0][side], rel=1e-3)


def test_logarithmic_axes_leave_out_what_has_no_logarithm() -> None:
    figure = Lines(title="", x=[1, 2, 3, 4], series={"s": [0.0, 1.0, -2.0, 4.0]}, x_label="", y_label="", log_y=True)
    svg = draw(figure)
    assert "var(--series-1)" in svg
    only_zero = Lines(title="", x=[1], series={"s": [0.0]}, x_label="", y_label="", log_y=True)
    assert [fill for _, _, fill in dots(draw(only_zero), "series-1")] == ["none"]


def test_references_are_drawn_over_the_values_they_name() -> None:
    figure = Lines(
        title="", x=[1, 2], series={"s": [0.0, 1.0]}, x_label="", y_label="", references=[BAND, LINE], shares=True
    )
    svg = draw(figure)
    page = Drawing(svg)
    assert "A" in page.text and "B" in page.text
    ((_, height),) = filled(svg, "muted")
    low, high = (y for _, y in ends(svg))
    assert height == pytest.approx(0.2 * (low - high), rel=1e-2)
    assert [key.label for key in keys(figure)] == ["s", BAND.label, LINE.label]
    assert BAND.label in describe(figure)


def ends(svg: str) -> list[tuple[float, float]]:
    """The first and the last point of the only series, whose two values are 0 and 1; drawn by its markers."""
    uses = [one for one in Drawing(svg).all("use") if "var(--series-1)" in one.get("style", "")]
    return [(float(one["x"]), float(one["y"])) for one in (uses[0], uses[-1])]


def test_axis_holds_references_beyond_the_values() -> None:
    far = Reference("far: 5", 5.0, 6.0)
    figure = Lines(title="", x=[1, 2], series={"s": [0.0, 1.0]}, x_label="", y_label="", references=[far])
    assert "6" in Drawing(draw(figure)).text
    bars = Dots(title="", labels=["a"], series={"s": [1.0]}, axis="", shares=False, references=[far])
    assert "6" in Drawing(draw(bars)).text


def test_intervals_are_drawn_and_half_open_ones_left_out() -> None:
    def bars(interval: tuple[float, float] | None) -> str:
        return draw(Dots(title="", labels=["a"], series={"s": [0.5]}, axis="", intervals={"s": [interval]}))

    assert bars((0.4, 0.6)) != bars(None) == bars((0.4, math.nan))
    ribbon = Lines(
        title="", x=[1, 2], series={"s": [0.5, 0.6]}, x_label="", y_label="", intervals={"s": [(0.4, 0.7)] * 2}
    )
    assert "fill: var(--series-1); fill-opacity: 0.18" in draw(ribbon)


def test_key_only_where_it_is_needed() -> None:
    assert keys(Lines(title="", x=[1], series={"s": [1.0]}, x_label="", y_label="")) == []
    two = Lines(title="", x=[1], series={"s": [1.0], "expected": [1.0]}, x_label="", y_label="")
    assert [key.label for key in keys(two)] == ["s", "expected"]
    assert "stroke-dasharray" in keys(two)[1].swatch and "stroke-dasharray" not in keys(two)[0].swatch


def test_series_have_colours_and_markers_of_their_own() -> None:
    names = ["a", "expected by chance", "b", "c", "d", "e", "f"]
    styles = series_styles(names)
    measured = [styles[name] for name in names if not styles[name].yardstick]
    assert len(measured) == 6 == len({one.colour for one in measured}) == len({one.marker for one in measured})
    assert styles["expected by chance"].yardstick


# --------------------------------------------------------------------------------------------------
# words


def test_figures_are_described_for_those_who_do_not_see_them() -> None:
    lines = Lines(
        title="",
        x=[5, 10],
        series={"s": [0.1, 0.25], "none": [None, None], "flat": [1.0, 1.0]},
        x_label="step",
        y_label="share",
        shares=True,
    )
    assert describe(lines) == (
        "Lines of share over step. s: from 10.00% (5) to 25.00% (10). none: no values. flat: 100.00% throughout."
    )
    matrix = Heatmap(
        title="",
        row_labels=["q"],
        column_labels=["0", "1"],
        values=[[0.5, 0.25]],
        row_axis="kind",
        column_axis="layer",
        decimals=2,
    )
    assert describe(matrix) == "Matrix of 1 row (kind) and 2 columns (layer): from 0.25 (q, 1) to 0.50 (q, 0)."
    assert describe(bars_and_counts()[0]).startswith(
        "Dots of share unchanged. within 1e-5: from 94.00% (gate) to 100.00% (norm)."
    )


@given(st.text(st.characters(codec=None), max_size=80), st.integers(6, 30))
def test_labels_are_one_short_line(text: str, longest: int) -> None:
    shown = label_text(text, longest)
    shown.encode("utf-8")
    assert len(shown) <= longest and len(shown.splitlines()) <= 1
    if len(text) <= longest and text.isalnum():
        assert shown == text


def test_long_labels_keep_both_ends() -> None:
    shown = label_text("model.layers.17.self_attn.q_proj.weight", 20)
    assert len(shown) == 20 and shown.startswith("model") and shown.endswith("proj.weight") and "…" in shown
    assert label_lines("rank of an update matrix over its maximum, mean", 22).count("\n") == 2


@given(st.lists(st.floats(0, 1), max_size=8), st.floats(0, 0.2))
def test_spread_keeps_the_order_and_the_gap(places: list[float], gap: float) -> None:
    moved = spread(places, gap)
    order = sorted(range(len(places)), key=lambda one: places[one])
    assert all(moved[b] - moved[a] >= gap - 1e-12 for a, b in itertools.pairwise(order))
    assert all(new >= old for new, old in zip(moved, places, strict=True))
    if all(places[b] - places[a] >= gap for a, b in itertools.pairwise(order)):
        assert moved == places


def test_a_notebook_of_another_environment_draws_too() -> None:
    """Its MPLBACKEND names a module that matplotlib cannot import here."""
    code = (
        "import os; from ssrctl.report.charts import load_matplotlib as load; load(); print(os.environ['MPLBACKEND'])"
    )
    variables = os.environ | {"MPLBACKEND": "module://absent_inline"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, check=False)
    assert done.stdout == "module://absent_inline\n", done.stderr
