"""Every table of a report as a csv and a json file."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ssrctl.io.files import write_text
from ssrctl.report.document import Cell, Document, Section, Table
from ssrctl.report.formats import json_safe, text_safe

FOLDER = "tables"
INDEX = "index.json"

_LONGEST_NAME = 60
_OURS = re.compile(r"[a-z0-9][a-z0-9-]*")
# A spreadsheet runs a cell that begins with one of these as a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def slug(text: str) -> str:
    """Return text for a file name or an address: lower-case ASCII letters, digits and single hyphens.

    Text without any of them gives ``table``.
    """
    words = re.findall(r"[a-z0-9]+", text.lower())
    return "-".join(words)[:_LONGEST_NAME].strip("-") or "table"


def unique_slugs(titles: Sequence[str], taken: Sequence[str] = ()) -> list[str]:
    """Return a slug for each title; those that are taken get a number: ``by-layer``, ``by-layer-2``."""
    found: list[str] = []
    for title in titles:
        found.append(_unused(slug(title), "{}-{}", [*taken, *found]))
    return found


def _unused(name: str, numbered: str, used: Sequence[str]) -> str:
    """Return the name, with the first number from 2 on that makes it unlike those in use."""
    names = (numbered.format(name, number) for number in itertools.count(2))
    return name if name not in used else next(one for one in names if one not in used)


def table_names(document: Document) -> list[tuple[str, Section, Table]]:
    """Return (stem of the files, section, table) for each table that has rows, in order."""
    found = [(section, table) for section in document.sections for table in section.tables if table.rows]
    names = unique_slugs([table.title for _, table in found], taken=[Path(INDEX).stem])
    return [(name, section, table) for name, (section, table) in zip(names, found, strict=True)]


def distinct_columns(table: Table) -> list[str]:
    """Return the headings; one that occurs again names the column that it belongs to: ``Jaccard: chance``."""
    found: list[str] = []
    names = table.headings
    for position, name in enumerate(names):
        if names.count(name) > 1 and position:
            before = next((one for one in reversed(names[:position]) if one != name), name)
            name = f"{before}: {name}"
        found.append(_unused(name, "{} ({})", found))
    return found


def plain_rows(table: Table) -> list[list[Cell]]:
    """Return the table's values; NaN and infinity, which json does not have, become None."""
    return [[json_safe(cell) for cell in row] for row in table.rows]


def csv_text(table: Table) -> str:
    """Return the table as csv (UTF-8) with a header row; cells without a value are empty, shares are in [0, 1]."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([_harmless(column) for column in distinct_columns(table)])
    writer.writerows([_harmless(cell) for cell in row] for row in plain_rows(table))
    return text_safe(stream.getvalue())


def _harmless(cell: Cell) -> Cell:
    """Return the cell; text that a spreadsheet would run as a formula gets an apostrophe in front."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(_FORMULA) else cell


def json_text(section: Section, table: Table) -> str:
    """Return the table as json: ``{"section", "title", "note", "columns", "rows"}``; cells without a value are null."""
    held = {
        "section": section.title,
        "title": table.title,
        "note": table.note,
        "columns": distinct_columns(table),
        "rows": plain_rows(table),
    }
    return json.dumps(json_safe(held), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_tables(document: Document, folder: Path) -> list[Path]:
    """Write ``folder/NAME.csv`` and ``NAME.json`` for every table with rows, and an index of them.

    Each file is written whole or not at all, the index last. Tables that only an earlier index names are removed, so
    that no old numbers are read; other files are left as they are.

    Returns:
        The files written, the index last.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    earlier = _earlier_names(folder / INDEX)
    written, index = [], []
    for name, section, table in table_names(document):
        for ending, text in (("csv", csv_text(table)), ("json", json_text(section, table))):
            write_text(folder / f"{name}.{ending}", text)
            written.append(folder / f"{name}.{ending}")
        index.append({"name": name, "section": section.title, "title": table.title, "rows": len(table.rows)})
    for stale in sorted(earlier - {path.stem for path in written}):
        for ending in ("csv", "json"):
            (folder / f"{stale}.{ending}").unlink(missing_ok=True)
    write_text(folder / INDEX, json.dumps(json_safe(index), indent=1, ensure_ascii=False) + "\n")
    return [*written, folder / INDEX]


def _earlier_names(index: Path) -> set[str]:
    """Return the tables that an index names; none when it is not one of ours, whose files are then not removed."""
    try:
        held = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return set()
    names = [entry.get("name") for entry in held if isinstance(entry, dict)] if isinstance(held, list) else []
    # Only plain names, since an index may have been changed to point elsewhere.
    return {name for name in names if isinstance(name, str) and _OURS.fullmatch(name)} - {Path(INDEX).stem}
