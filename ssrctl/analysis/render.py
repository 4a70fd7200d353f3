"""Showing a ``Document``: as tables on a terminal, or as one self-contained html page."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from ssrctl.analysis.document import Document, text_safe, times

if TYPE_CHECKING:
    from rich.console import Console

_TEMPLATE = "report.html"
REPORT_LIBRARIES = ("jinja2", "matplotlib")


def missing_libraries() -> list[str]:
    """What ``html_page`` needs and is not installed."""
    return [name for name in REPORT_LIBRARIES if not _installed(name)]


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ValueError:  # a module that was blocked by putting None into sys.modules
        return False


def html_page(document: Document, version: str) -> str:
    """The page: styles, figures (inline SVG) and text in one file; everything from files is escaped.

    Args:
        document: what to show.
        version: of ssrctl, for the footer.

    Raises:
        ImportError: jinja2 or matplotlib is not installed.
    """
    import jinja2
    from markupsafe import Markup

    from ssrctl.analysis.charts import draw

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ssrctl.analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # The SVG is ours; matplotlib has escaped the text in it.
    drawn = [[Markup(draw(figure)) for figure in section.figures] for section in document.sections]
    return text_safe(environment.get_template(_TEMPLATE).render(document=document, drawn=drawn, version=version))


def print_document(document: Document, console: Console, where: str) -> None:
    """Print facts, headlines, notes and short tables; nothing in them is taken as markup.

    Args:
        document: what to show.
        console: where to print.
        where: the file that has what is not printed; named at the end.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    console.print(Text(document.title, style="bold"))
    for name, value in document.facts:
        console.print(Text.assemble((f"{name}: ", "dim"), value))
    console.print()
    for headline in document.headlines:
        console.print(Text(f"• {headline}"))
    for note in document.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    left_out = []
    for section in document.sections:
        for table in section.tables:
            if not table.rows:
                continue
            if table.terminal_rows == 0:
                left_out.append(f"{table.title} ({times(len(table.rows), 'row')})")
                continue
            shown = Table(title=Text(table.title), title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
            for position, column in enumerate(table.columns):
                shown.add_column(Text(column), justify="left" if position == 0 else "right", overflow="fold")
            for row in table.rows[: table.terminal_rows]:
                shown.add_row(*(Text(cell) for cell in row))
            console.print()
            console.print(shown)
            if (more := len(table.rows) - table.terminal_rows) > 0:
                console.print(Text(f"  … and {times(more, 'more row')} in {where}", style="dim"))
    if left_out:
        console.print()
        console.print(Text(f"In {where}: {'; '.join(left_out)}.", style="dim"))
