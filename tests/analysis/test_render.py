"""A report as html page and on the terminal: complete, escaped, self-contained, the same every time."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ssrctl.analysis.charts import draw
from ssrctl.analysis.document import (
    Bars,
    Document,
    Figure,
    Heatmap,
    Lines,
    Section,
    Table,
    count,
    json_safe,
    number,
    percent,
    text_safe,
    times,
)
from ssrctl.analysis.render import html_page, missing_libraries, print_document

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$x$[bold]"
FETCHING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}


class Page(HTMLParser):
    """What a browser would make of a page: elements, what they would fetch, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attributes if name in FETCHING]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def assert_self_contained(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form", "image"} & set(page.tags)
    assert page.handlers == []
    assert all(link.startswith("#") for link in page.links)
    assert all(target.strip("'\"").startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert "@import" not in html
    without_namespaces = re.sub(r'xmlns(:\w+)?="[^"]*"', "", html)
    assert not re.search(r"(https?:)?//[\w.]", without_namespaces)


def square(size: int) -> list[list[float | None]]:
    return [[None if i == j else (i - j) / size for j in range(size)] for i in range(size)]


def figures(size: int = 3, name: str = "fig") -> list[Figure]:
    labels = [f"{name}{i}" for i in range(size)]
    return [
        Heatmap(title=name, labels=labels, values=square(size), axis=name, scale=1.0, caption=name),
        Bars(title=name, labels=labels, series={name: [0.5] * size, "expected by chance": [None] * size}, axis=name),
        Lines(title=name, x=list(range(size)), series={name: [0.5] * size, "expected": [None] * size},
              x_label=name, y_label=name),
    ]  # fmt: skip


def document(text: str = "words", drawn: str = "fig") -> Document:
    table = Table(title=text, columns=[text, "n"], rows=[[text, "1"]] * 3, note=text, terminal_rows=2)
    hidden = Table(title=f"hidden {text}", columns=["c"], rows=[["only in the page"]], terminal_rows=0, collapsed=True)
    empty = Table(title="without rows", columns=["c"], rows=[])
    return Document(
        title=text,
        facts=[(text, text)],
        headlines=[text],
        notes=[text],
        sections=[Section(title=text, text=text, figures=figures(2, drawn), tables=[table, hidden, empty])],
    )


@pytest.fixture(scope="module")
def html() -> str:
    return html_page(document(), "1.2.3")


def test_page_is_self_contained_and_complete(html: str) -> None:
    assert_self_contained(html)
    page = Page(html)
    assert page.tags.count("svg") == 3 and page.tags.count("table") == 2 and page.tags.count("details") == 1
    text = " ".join(page.text)
    assert "only in the page" in text and "ssrctl 1.2.3" in text and "without rows" not in text
    for placeholder in ("#010203", "#020304", "#030405", "#040506", "#050607"):
        assert placeholder not in html  # each became a css variable that follows the colour scheme
    assert "prefers-color-scheme: dark" in html


def test_what_comes_from_files_is_escaped_wherever_it_appears() -> None:
    html = html_page(document(ATTACK, "<script>"), ATTACK)
    assert_self_contained(html)
    assert "<script" not in html and "<img" not in html
    text = "".join(Page(html).text)
    # title, h1, fact (2), headline, note, section (2), table (title, column, 3 cells, note), hidden title, footer
    assert text.count(ATTACK) == 16
    assert text.count("<script>") > text.count(ATTACK) + 3 * 2  # the figures' titles, labels and axes too


def test_lone_surrogates_do_not_stop_a_page() -> None:
    shown = document("name \udce4")
    shown.sections[0].figures = []  # no text from files gets into those
    html_page(shown, "1").encode("utf-8")


def test_page_is_the_same_every_time(html: str) -> None:
    assert html_page(document(), "1.2.3") == html


@pytest.mark.parametrize("size", [1, 20])
def test_figures_of_any_size(size: int) -> None:
    matrix, bars, lines = (Page(draw(figure)) for figure in figures(size))
    assert "svg" in matrix.tags and "svg" in lines.tags
    ticks = [label for label in matrix.text if label.startswith("fig")]
    # every label up to 12 of them, then every second, on both axes; and the two axis titles
    assert len(ticks) == 2 * (size if size <= 12 else size // 2) + 2
    assert sum(label.startswith("fig") for label in bars.text) == size + 2


def test_cells_show_their_numbers_without_negative_zero() -> None:
    values: list[list[float | None]] = [[None, -0.0004], [0.25, 0.0]]
    text = Page(draw(Heatmap(title="", labels=["1", "2"], values=values, axis="", scale=1.0, decimals=2))).text
    assert "0.25" in text and "0.00" in text and "0" in text and "-0.00" not in text


def test_values_of_zero_and_scale_zero_are_drawn() -> None:
    draw(Heatmap(title="", labels=["1", "2"], values=[[None, 0.0], [0.0, None]], axis="unit", scale=0.0))
    draw(Lines(title="", x=[1, 2], series={"measured": [None, None]}, x_label="", y_label=""))


def test_drawing_leaves_matplotlib_as_it_was() -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    draw(figures()[0])
    assert dict(mpl.rcParams) == before


def printed(shown: Document, where: str = "report.html") -> str:
    stream = io.StringIO()
    print_document(shown, Console(file=stream, width=100), where)
    return stream.getvalue()


def test_terminal_shows_short_tables_and_says_where_the_rest_is() -> None:
    text = printed(document("words"))
    assert "• words" in text and "note: words" in text
    assert "… and 1 more row in report.html" in text
    assert "only in the page" not in text and "In report.html: hidden words (1 row)." in text
    assert "without rows" not in text
    assert "In report.json:" in printed(document(), "report.json")


def test_nothing_on_the_terminal_is_taken_as_markup() -> None:
    assert "[bold]not bold[/bold]" in printed(document("[bold]not bold[/bold]"))


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_libraries() == []
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert missing_libraries() == ["matplotlib"]


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec=None), max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=8,
    )
)
def test_json_safe_is_valid_json_and_changes_nothing_else(value: object) -> None:
    text = json.dumps(json_safe(value), allow_nan=False, ensure_ascii=False)
    text.encode("utf-8")
    same = json.loads(text)
    if "null" not in text and "?" not in text:
        assert same == value


def test_json_safe_by_example() -> None:
    found = json_safe({"a": [math.nan, math.inf, -math.inf, 0.5], 3: ("x", True), "\ud800": "é\udfff"})
    assert found == {"a": [None, None, None, 0.5], "3": ["x", True], "?": "é?"}
    assert text_safe("naïve ☃") == "naïve ☃"


def test_numbers_are_written_for_readers() -> None:
    assert [count(None), count(1234567), count(1234.56), count(0)] == ["–", "1,234,567", "1,234.6", "0"]
    assert [percent(one) for one in (None, 0.0, 1.0, 0.1234)] == ["–", "0.00%", "100.00%", "12.34%"]
    assert percent(0.99999) == "99.999%" and percent(0.00001) == "0.001%"  # neither all nor nothing
    assert percent(1 - 1e-12) == ">99.9999999%" and percent(1e-12) == "<0.0000001%"
    assert [number(one) for one in (None, 0.0, 0.0012345, 100.0)] == ["–", "0", "0.00123", "100"]
    assert [number(one, "signed") for one in (0.25, -0.0625)] == ["+0.250", "-0.062"]
    assert [times(0, "row"), times(1, "row"), times(1200, "row")] == ["0 rows", "1 row", "1,200 rows"]
