"""Write a report: report.json, report.html, every table as csv and json, and the short tables on a terminal."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssrctl.io.console import note
from ssrctl.io.files import write_text
from ssrctl.report.document import Document
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page, missing_libraries
from ssrctl.report.tables import FOLDER, write_tables
from ssrctl.report.terminal import show_document
from ssrctl.version import __version__


def report_files(output: Path) -> list[Path]:
    """Return the files and the folder that ``write_report`` writes."""
    page = [] if missing_libraries() else [output / "report.html"]
    return [output / "report.json", *page, output / FOLDER]


def show_plan(reads: Sequence[Path], output: Path, *, show: bool) -> dict[str, Any]:
    """Return the files that would be read, and written into ``output``; ``show`` prints them on stdout."""
    writes = report_files(output)
    if show:
        lines = [f"would read {path} ({path.stat().st_size:,} bytes)" for path in reads]
        lines += [f"would write {path}" + (" (replacing it)" if path.exists() else "") for path in writes]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return {
        "reads": [{"path": str(path), "bytes": path.stat().st_size} for path in reads],
        "writes": [str(path) for path in writes],
    }


def write_report(numbers: Mapping[str, Any], document: Document, output: Path, *, show: bool) -> dict[str, Any]:
    """Write the report into a folder, and say where it is.

    Args:
        output: the folder, made where it is missing.
        show: print headlines and short tables on stdout.

    Returns:
        ``numbers`` as report.json holds them.

    Raises:
        UserError: the folder cannot be made or written to.
    """
    safe: dict[str, Any] = json_safe(numbers)
    files = report_files(output)
    write_text(files[0], json.dumps(safe, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    missing = missing_libraries()
    if not missing:
        write_text(files[1], html_page(document, __version__, table_files=True))
    if show:
        show_document(document, files[-2].name)
    write_tables(document, output)
    note("wrote " + " and ".join(str(path) for path in files))
    if missing:
        old = output / "report.html"
        note(
            f"no report.html: {' and '.join(missing)} not installed; pip install 'ssrctl[report]'"
            + (f" ({old} is from an earlier report)" if old.exists() else "")
        )
    return safe
