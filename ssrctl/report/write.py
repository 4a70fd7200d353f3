"""Write a report: a page, its numbers as json, every table as csv and json, and the short tables on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.io.console import note, warn
from ssrctl.io.files import write_text
from ssrctl.report.document import Document
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page, missing_libraries
from ssrctl.report.tables import FOLDER, write_tables
from ssrctl.report.terminal import show_document
from ssrctl.version import __version__


def report_files(output: Path, name: str) -> list[Path]:
    """Return the files and the folder that ``write_report`` writes."""
    page = [] if missing_libraries() else [output / f"{name}.html"]
    return [output / f"{name}.json", *page, output / f"{name}-{FOLDER}"]


def show_plan(reads: Sequence[Path], output: Path, name: str, *, show: bool) -> dict[str, Any]:
    """Return the files that would be read, and written into ``output``; ``show`` prints them on stdout."""
    writes = report_files(output, name)
    if show:
        lines = [f"would read {path} ({path.stat().st_size:,} bytes)" for path in reads]
        lines += [f"would write {path}" + (" (replacing it)" if path.exists() else "") for path in writes]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return {
        "reads": [{"path": str(path), "bytes": path.stat().st_size} for path in reads],
        "writes": [str(path) for path in writes],
    }


def write_page(document: Document, page: Path, *, refresh_seconds: int | None = None) -> None:
    """Write a page without tables beside it, whole or not at all.

    Args:
        refresh_seconds: the open page loads itself again; None is never.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(page, html_page(document, __version__, refresh_seconds=refresh_seconds))


def write_last_page(make: Callable[[], Document], page: Path) -> None:
    """Write the page at the end of a command whose results are safe: what stands in the way is only a warning."""
    if missing := missing_libraries():
        note(f"no {page.name}: {' and '.join(missing)} not installed; pip install 'ssrctl[report]'")
        return
    try:
        write_page(make(), page)
        note(f"wrote {page}")
    except UserError as error:
        warn(f"no {page.name}: {error.message}")


def write_report(
    numbers: Mapping[str, Any], document: Document, output: Path, name: str, *, show: bool
) -> dict[str, Any]:
    """Write the report into a folder, and say where it is.

    Args:
        output: the folder, made where it is missing.
        name: of the page, the json file and the tables' folder, without an ending.
        show: print headlines and short tables on stdout.

    Returns:
        ``numbers`` as the json file holds them.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    safe: dict[str, Any] = json_safe(numbers)
    files = report_files(output, name)
    write_text(files[0], json.dumps(safe, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    missing = missing_libraries()
    if not missing:
        write_text(files[1], html_page(document, __version__, name=name))
    if show:
        show_document(document, files[-2].name)
    write_tables(document, files[-1])
    note("wrote " + " and ".join(str(path) for path in files))
    if missing:
        old = output / f"{name}.html"
        note(
            f"no {old.name}: {' and '.join(missing)} not installed; pip install 'ssrctl[report]'"
            + (f" ({old} is from an earlier report)" if old.exists() else "")
        )
    return safe
