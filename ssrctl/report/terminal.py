"""Showing a ``Document`` on a terminal: the answer, what needs care, and the short tables.

A table that is wider than the terminal is cut into blocks of columns, each with the rows' names: no number is broken.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from ssrctl.io.visible import visible
from ssrctl.report.document import Document, Table
from ssrctl.report.formats import times

if TYPE_CHECKING:
    from rich.console import Console

PLAIN_WIDTH = 100
# Characters: columns of words may be folded down to the first; rich leaves the others at the edges and between columns.
_LEAST_WORDS, _EDGES, _BETWEEN = 16, 4, 3


def show_document(document: Document, where: str) -> None:
    """Print the document on stdout; without a terminal, at a fixed width in which few cells are folded."""
    from ssrctl.io.terminal import SafeConsole

    print_document(document, SafeConsole(width=None if sys.stdout.isatty() else PLAIN_WIDTH, highlight=False), where)


def print_document(document: Document, console: Console, where: str) -> None:
    """Print facts, headlines, unusual values, notes and short tables; nothing in them is taken as markup.

    Args:
        where: the file that holds the longer tables; named at the end.
    """
    from rich.text import Text

    console.print(Text(document.title, style="bold"))
    for name, value in document.facts:
        console.print(Text.assemble((f"{name}: ", "dim"), value))
    console.print()
    for headline in document.headlines:
        console.print(Text(f"• {headline}"))
    for sentence in document.unusual:
        console.print(Text(f"unusual: {sentence}", style="bold"))
    for note in document.notes:
        console.print(Text(f"note: {note}", style="yellow"))
    tables = [table for section in document.sections for table in section.tables if table.rows]
    left_out = [table for table in tables if len(table.rows) > table.terminal_rows]
    for table in tables:
        if table not in left_out:
            console.print()
            _print_table(table, console)
    if left_out:
        named = "; ".join(f"{table.title} ({times(len(table.rows), 'row')})" for table in left_out)
        console.print()
        console.print(Text(f"In {where}: {named}.", style="dim"))


def _print_table(table: Table, console: Console) -> None:
    from rich import box
    from rich.cells import cell_len
    from rich.table import Table as Shown
    from rich.text import Text

    rows = [[visible(cell) for cell in row] for row in table.formatted()]  # before widths are measured
    for order, columns in enumerate(_blocks(table, rows, console.width)):
        title = None if order else Text(table.title)
        shown = Shown(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")
        widest = {place: max(cell_len(one) for one in _column(table, rows, place)) for place in columns}
        narrow = sum(widest.values()) + _EDGES + _BETWEEN * (len(columns) - 1) > console.width
        for place in columns:
            words = table.words[place]
            shown.add_column(
                Text(table.headings[place]),
                justify="left" if words else "right",
                overflow="fold",
                width=_least_width(table, rows, place) if narrow and not words else None,
            )
        for row in rows:
            shown.add_row(*(Text(row[place]) for place in columns))
        console.print(shown)


def _blocks(table: Table, rows: Sequence[Sequence[str]], width: int) -> Iterator[list[int]]:
    """Yield the columns of each block: all where they fit, otherwise as many as do, after the first."""
    first = _least_width(table, rows, 0) + _EDGES
    block, used = [0], first
    for place in range(1, len(table.headings)):
        needed = _least_width(table, rows, place) + _BETWEEN
        if used + needed > width and len(block) > 1:
            yield block
            block, used = [0], first
        block.append(place)
        used += needed
    yield block


def _least_width(table: Table, rows: Sequence[Sequence[str]], place: int) -> int:
    """Return the width below which a number, or a word of the heading, would be broken."""
    from rich.cells import cell_len

    heading, *cells = _column(table, rows, place)
    longest = max(map(cell_len, cells), default=0)
    word = max(map(cell_len, heading.split()), default=0)
    return max(word, min(longest, _LEAST_WORDS) if table.words[place] else longest)


def _column(table: Table, rows: Sequence[Sequence[str]], place: int) -> list[str]:
    """Return a column's heading and its cells."""
    return [table.headings[place], *(row[place] for row in rows)]
