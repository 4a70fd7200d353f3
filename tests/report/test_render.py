"""A report as html page and on the terminal: complete, escaped, self-contained, the same every time."""

from __future__ import annotations

import io
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from example_document import example_document
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from ssrctl.report.document import Cell, Column, Document, Dots, Figure, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, json_safe, number, percent, signed, text, text_safe, times
from ssrctl.report.render import MOST_PAGE_ROWS, html_page, missing_libraries
from ssrctl.report.terminal import print_document

ATTACK = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;$x$[bold]"
FETCHING = {"src", "href", "xlink:href", "action", "data", "poster", "srcset", "background"}


class Page(HTMLParser):
    """What a browser would make of a page: elements, what they would fetch, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[dict[str, str]] = []
        self.links: list[str] = []
        self.handlers: list[str] = []
        self.text: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes.append({name: value or "" for name, value in attributes})
        self.links += [value or "" for name, value in attributes if name in FETCHING]
        self.handlers += [name for name, _ in attributes if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in zip(self.tags, self.attributes, strict=True) if name == tag]


def assert_self_contained(html: str) -> None:
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "embed", "img", "base", "form", "image"} & set(page.tags)
    assert page.handlers == []
    assert all(re.fullmatch(r"#.*|report-tables/[a-z0-9-]+\.(csv|json)", link) for link in page.links)
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
        Dots(title=name, labels=labels, series={name: [0.5] * size, "expected by chance": [None] * size}, axis=name),
        Lines(title=name, x=list(range(size)), series={name: [0.5] * size, "expected": [None] * size},
              x_label=name, y_label=name),
    ]  # fmt: skip


def document(text: str = "words", drawn: str = "fig") -> Document:
    table = Table(title=text, columns=[text, "n"], rows=[[text, 1]] * 13, note=text)
    hidden = Table(title=f"hidden {text}", columns=["c"], rows=[["only in the page"]], terminal_rows=0)
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


@pytest.fixture(scope="module")
def example() -> str:
    return html_page(example_document(), "1.2.3", name="report")


def test_page_is_self_contained_and_complete(html: str) -> None:
    assert_self_contained(html)
    page = Page(html)
    assert page.tags.count("figure") == 3 and page.tags.count("table") == 2 and page.tags.count("details") == 1
    text = " ".join(page.text)
    assert "only in the page" in text and "ssrctl 1.2.3" in text and "without rows" not in text
    assert not re.search(r"#0[1-9]0[2-9a-b]0[3-9a-b]", html)  # each placeholder became a css variable
    assert "prefers-color-scheme: dark" in html and "@media print" in html


def test_page_may_not_fetch_or_run_anything(html: str) -> None:
    (policy,) = (one["content"] for one in Page(html).all("meta") if one.get("http-equiv") == "Content-Security-Policy")
    allowed = dict(part.split(" ", 1) for part in policy.split("; "))
    assert allowed == {
        "default-src": "'none'", "style-src": "'unsafe-inline'", "base-uri": "'none'", "form-action": "'none'",
    }  # fmt: skip
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_what_comes_from_files_is_escaped_wherever_it_appears() -> None:
    shown = document(ATTACK, ATTACK)
    shown.unusual = [ATTACK]
    html = html_page(shown, ATTACK, name="report")
    assert_self_contained(html)
    assert "<script" not in html and "<img" not in html
    text = "".join(Page(html).text)
    # title, h1, fact (2), headline, unusual, note, section (2), table (title, column, 3 cells, note), hidden title,
    # footer; and of three figures the titles, the caption, tips of a map and the keys
    assert text.count(ATTACK) >= 17 + 3 + 1 + 2 + 1


def test_lone_surrogates_do_not_stop_a_page() -> None:
    html_page(document("name \udce4", "name \udce4"), "1").encode("utf-8")


def test_page_is_the_same_every_time(html: str, example: str) -> None:
    assert html_page(document(), "1.2.3") == html
    assert html_page(example_document(), "1.2.3", name="report") == example


def test_page_answers_before_it_details(example: str) -> None:
    order = ["In short", "Unusual", "To be read with care", "Contents", "What changed</h2>", "Where</h2>"]
    places = [example.index(f">{one}") for one in order]
    assert places == sorted(places)
    shown = document()
    assert ">Unusual<" not in html_page(shown, "1")
    shown.unusual = ["something odd"]
    page = html_page(shown, "1")
    assert page.index("In short") < page.index("something odd") < page.index("To be read with care")


def test_contents_lead_to_every_section_of_a_long_page(html: str, example: str) -> None:
    assert ">Contents<" not in html  # one section
    page = Page(example)
    ids = [one["id"] for one in page.attributes if "id" in one]
    assert len(ids) == len(set(ids))
    anchors = {one.get("id") for one in page.all("section")}
    assert [link for link in page.links if link[1:] in anchors] == [
        "#what-changed", "#where", "#next-to-published-numbers", "#over-training", "#all-tensors", "#details",
    ]  # fmt: skip


def test_sections_of_one_name_have_anchors_of_their_own() -> None:
    shown = document()
    shown.sections = [Section(title=title) for title in ("By layer", "By layer", "by: layer!", "", "☃")]
    anchors = [one["id"] for one in Page(html_page(shown, "1")).all("section") if "id" in one]
    assert anchors == ["by-layer", "by-layer-2", "by-layer-3", "table", "table-2"]


def test_headings_follow_each_other_and_tables_and_figures_have_names(example: str) -> None:
    page = Page(example)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = {one["id"] for one in page.attributes if "id" in one}
    pictures = [one for one in page.attributes if one.get("role") == "img"]
    assert len(pictures) == page.tags.count("figure") > 10
    for picture in pictures:
        assert {picture["aria-labelledby"], picture["aria-describedby"]} <= ids
    assert all(one.get("scope") in ("col", "row") for one in page.all("th"))
    assert all(one["aria-label"] for one in page.attributes if one.get("role") == "region")


def test_long_tables_are_collapsed_cut_and_linked(html: str, example: str) -> None:
    assert "520 rows" in example and f"The first {MOST_PAGE_ROWS} of 520 rows are shown." in example
    name = "model.layers.71.mlp.experts.2.down_proj_with_a_long_name.weight"
    body = example[example.index('id="all-tensors"') :]
    assert body.index("<details>") < body.index("<table>") < body.index("</table>") < body.index("</details>")
    assert body[: body.index("</table>")].count("<tr>") == MOST_PAGE_ROWS + 1
    assert name in body.replace("<wbr>", "") and "layers.<wbr>71.<wbr>mlp.<wbr>experts" in body
    links = [link for link in Page(example).links if link.startswith("report-tables/")]
    assert links[:2] == ["report-tables/largest-changes.csv", "report-tables/largest-changes.json"]
    assert len(links) == len(set(links)) == 2 * 5 and "report-tables/largest-changes-2.csv" in links
    assert "-tables/" not in html  # unless the files are written


def test_columns_of_numbers_are_told_from_columns_of_words() -> None:
    columns = ["tensor", "kind", Column("n", count), Column("share", percent), Column("note", text)]
    table = Table(title="", columns=columns, rows=[["w", "q", 1234, 0.5, None]])
    assert table.words == [True, True, False, False, True]
    assert table.formatted() == [["w", "q", "1,234", "50.00%", "–"]]
    numbered = Table(title="", columns=[Column("layer", count)], rows=[[3]])
    assert numbered.words == [True]  # the first column names the row


def luminance(colour: str) -> float:
    """Relative luminance of ``#rrggbb`` (WCAG 2.2)."""
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def over(colour: str, ground: str, opacity: float) -> str:
    """A colour seen through."""
    pairs = [(int(colour[i : i + 2], 16), int(ground[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(a * opacity + b * (1 - opacity)):02x}" for a, b in pairs)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_contrast_is_enough_in_every_scheme(html: str, scheme: str) -> None:
    roots = re.findall(r":root \{(.*?)\}", html, flags=re.DOTALL)
    found = dict(re.findall(r"--([\w-]+): ([^;]+);", roots[0]))
    found |= dict(re.findall(r"--([\w-]+): ([^;]+);", roots[("light", "dark", "print").index(scheme)]))
    colours = {name: re.sub(r"^#(.)(.)(.)$", r"#\1\1\2\2\3\3", value) for name, value in found.items()}
    for ground in ("page", "card", "note", "odd"):
        assert contrast(colours["text"], colours[ground]) >= 7
    for ground in ("page", "card"):
        assert contrast(colours["muted"], colours[ground]) >= 4.5
    for series in range(1, 7):
        assert contrast(colours[f"series-{series}"], colours["card"]) >= 3
    for hue in ("series-1", "series-2"):  # numbers in cells of full colour
        cell = over(colours[hue], colours["card"], float(colours["heat"]))
        assert contrast(colours["text"], cell) >= 4.5


@pytest.mark.slow
@pytest.mark.parametrize("width", [320, 390, 1280])
def test_a_browser_has_no_need_to_scroll_sideways(example: str, width: int, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium")
    # In a frame, since a headless window has a least width; measured by a script, which the page itself forbids.
    measured = re.sub(r"<meta http-equiv[^>]*>", "", example).replace("<details", "<details open")
    script = "parent.document.title = document.documentElement.scrollWidth <= innerWidth ? 'fits' : 'too wide'"
    measured = measured.replace("</body>", f"<script>addEventListener('load', () => {{ {script} }})</script></body>")
    escaped = measured.replace("&", "&amp;").replace('"', "&quot;")
    outside = tmp_path / "outside.html"
    frame = f'<iframe style="width:{width}px;height:900px;border:0" srcdoc="{escaped}"></iframe>'
    outside.write_text(f"<!doctype html><title>not loaded</title>{frame}", encoding="utf-8")
    command = [browser, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--virtual-time-budget=5000", "--window-size=1400,1000", "--dump-dom", outside.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    assert re.search("<title>(.*?)</title>", dom)[1] == "fits"  # type: ignore[index]


def printed(shown: Document, where: str = "report.html") -> str:
    stream = io.StringIO()
    print_document(shown, Console(file=stream, width=100), where)
    return stream.getvalue()


def test_terminal_shows_short_tables_and_says_where_the_rest_is() -> None:
    text = printed(document("words"))
    assert "• words" in text and "note: words" in text
    assert "only in the page" not in text and "In report.html: hidden words (1 row)." in text
    assert "without rows" not in text
    assert "In report.json:" in printed(document(), "report.json")


def test_terminal_shows_what_is_unusual_between_answer_and_notes() -> None:
    shown = document("words")
    shown.unusual = ["[odd] thing"]
    text = printed(shown)
    assert text.index("• words") < text.index("unusual: [odd] thing") < text.index("note: words")


def test_a_wide_table_is_cut_into_blocks_and_no_number_is_broken() -> None:
    columns = ["matrix", *(Column(f"largest principal angle {one}", "{:.7f}°".format) for one in range(12))]
    rows: list[list[Cell]] = [["model.layers.0.self_attn.q_proj.weight", *(1 / 3 + one for one in range(10, 22))]]
    shown = document()
    shown.sections = [Section(title="", tables=[Table(title="wide", columns=columns, rows=rows * 2)])]
    text = printed(shown)
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(f"{1 / 3 + one:.7f}°") == 2 for one in range(10, 22))
    assert text.count("model.layers") == 2 * text.count("matrix") > 2  # the rows are named in each block


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
    assert [signed(one) for one in (None, 0.25, -0.0625)] == ["–", "+0.250", "-0.062"]
    assert [times(0, "row"), times(1, "row"), times(1200, "row")] == ["0 rows", "1 row", "1,200 rows"]
