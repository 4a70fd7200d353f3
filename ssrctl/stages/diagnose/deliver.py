"""What `ssrctl diagnose` leaves: report.json, report.html, and tables on stdout."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.io.files import write_text
from ssrctl.report.document import Document
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page, missing_libraries, show_document
from ssrctl.report.tables import FOLDER, write_tables
from ssrctl.version import __version__

if TYPE_CHECKING:
    from rich.console import Console


def show_plan(config: DiagnoseConfig, reads: Sequence[Path], output: Path) -> dict[str, Any]:
    """What would be read and written; shown on stdout unless ``--json``."""
    writes = [output / "report.json"] + ([] if missing_libraries() else [output / "report.html"]) + [output / FOLDER]
    plan = {
        "reads": [{"path": str(path), "bytes": path.stat().st_size} for path in reads],
        "writes": [str(path) for path in writes],
    }
    if not config.json:
        lines = [f"would read {path} ({path.stat().st_size:,} bytes)" for path in reads]
        lines += [f"would write {path}" + (" (replacing it)" if path.exists() else "") for path in writes]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return plan


def deliver(config: DiagnoseConfig, report: dict[str, Any], document: Document, output: Path) -> dict[str, Any]:
    """Write the report, show the tables, and say where everything is."""

    safe = json_safe(report)
    text = json.dumps(safe, indent=1, ensure_ascii=False, allow_nan=False)
    write_text(output / "report.json", text + "\n")
    written = [output / "report.json"]
    missing = missing_libraries()
    if not missing:
        write_text(output / "report.html", html_page(document, __version__, table_files=True))
        written.append(output / "report.html")
    if not config.json:
        show_document(document, written[-1].name)
    write_tables(document, output)
    written.append(output / FOLDER)
    say("wrote " + " and ".join(str(path) for path in written))
    if missing:
        old = output / "report.html"
        say(
            f"no report.html: {' and '.join(missing)} not installed; pip install 'ssrctl[report]'"
            + (f" ({old} is from an earlier report)" if old.exists() else "")
        )
    return safe


def stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, soft_wrap=True, highlight=False)


def say(line: str) -> None:
    from rich.text import Text

    stderr().print(Text(line))
