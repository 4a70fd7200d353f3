"""A ``Document`` as one self-contained html page."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

from ssrctl.io.visible import visible
from ssrctl.report.document import Document, Figure, Section, Table
from ssrctl.report.formats import text_safe
from ssrctl.report.tables import FOLDER, table_names, unique_slugs

if TYPE_CHECKING:
    from markupsafe import Markup

_TEMPLATE = "report.html"
REPORT_LIBRARIES = ("jinja2", "matplotlib")
# Rows of a table on the page; more make it slow, and the csv and json files have all.
MOST_PAGE_ROWS = 500
# Longer tables are folded.
_MOST_OPEN_ROWS = 12
# Pages with at most this many sections get no table of contents.
_FEW_SECTIONS = 4
# Characters: cells of words up to the first are never broken, and beyond the second they take a wider column.
_SHORT, _NAME = 16, 64
# After a dot or an underscore of a name, but not inside of a number; browsers break after a slash by themselves.
_BREAKS = re.compile(r"(?<=[._])(?=[A-Za-z])|(?<=[A-Za-z][._])(?=\w)")


def missing_libraries() -> list[str]:
    """Return the libraries that ``html_page`` needs and that are not installed."""
    return [name for name in REPORT_LIBRARIES if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was blocked by putting None into sys.modules
        return False


def html_page(document: Document, version: str, *, name: str | None = None, refresh_seconds: int | None = None) -> str:
    """Return the page: styles, figures (inline SVG) and text in one file; everything from files is escaped.

    Args:
        version: of ssrctl, for the footer.
        name: of the json file and the tables' folder (``tables.write_tables``) that lie next to the page, which links
            to them; None = there are none.
        refresh_seconds: the open page loads itself again; None is never.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssrctl.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    files = {id(table): stem for stem, _, table in table_names(document)} if name else {}
    anchors = unique_slugs([section.title for section in document.sections], taken=["contents"])
    sections = [
        _section_view(section, anchor, files) for section, anchor in zip(document.sections, anchors, strict=True)
    ]
    lead = next(
        (view["figures"].pop(0) for view in sections if view["figures"] and not view["section"].collapsed), None
    )
    page = environment.get_template(_TEMPLATE).render(
        document=document,
        lead=lead,
        sections=sections,
        contents=len(sections) > _FEW_SECTIONS,
        name=name,
        tables_folder=f"{name}-{FOLDER}" if name else None,
        refresh_seconds=refresh_seconds,
        version=version,
    )
    return visible(text_safe(page))


def _section_view(section: Section, anchor: str, files: dict[int, str]) -> dict[str, Any]:
    """Return the template's variables for a section."""
    return {
        "section": section,
        "anchor": anchor,
        "figures": [_figure_view(figure, f"{anchor}-{order}") for order, figure in enumerate(section.figures, 1)],
        "tables": [_table_view(table, files.get(id(table))) for table in section.tables if table.rows],
    }


def _figure_view(figure: Figure, name: str) -> dict[str, Any]:
    from markupsafe import Markup

    from ssrctl.report.chart_style import keys
    from ssrctl.report.chart_text import describe
    from ssrctl.report.charts import draw, is_wide

    # The SVG is ours; matplotlib and ``charts`` have escaped the text in it. Keys have no text in their drawings.
    return {
        "figure": figure,
        "id": name,
        "wide": is_wide(figure),
        "words": describe(figure),
        "keys": [(Markup(key.swatch), key.label) for key in keys(figure)],
        "svg": Markup(draw(figure, name)),
    }


def _table_view(table: Table, file: str | None) -> dict[str, Any]:
    rows = table.formatted(MOST_PAGE_ROWS)
    return {
        "table": table,
        "file": file,
        "classes": _column_classes(table, rows),
        "rows": rows,
        "folded": len(table.rows) > _MOST_OPEN_ROWS,
        "more": max(0, len(table.rows) - MOST_PAGE_ROWS),
    }


def _column_classes(table: Table, rows: list[list[str]]) -> list[str]:
    """Return each column's css class: none for numbers; of words, those that are long may be broken."""
    found = []
    for position, words in enumerate(table.words):
        longest = max((len(row[position]) for row in rows), default=0)
        found.append(("words" + " broken" * (longest > _SHORT) + " prose" * (longest > _NAME)) if words else "")
    return found


def _breakable(text: str) -> Markup:
    """Return escaped text in which a long name may be broken after a dot or an underscore."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(text_safe(text)))
