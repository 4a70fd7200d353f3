"""The plan of `ssrctl diagnose --dry-run`: the files to read and to write."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssrctl.configs import DiagnoseConfig
from ssrctl.report.write import report_files


def show_plan(config: DiagnoseConfig, reads: Sequence[Path], output: Path) -> dict[str, Any]:
    """Return the files that would be read and written; show them on stdout unless ``--json``."""
    writes = report_files(output)
    if not config.json:
        lines = [f"would read {path} ({path.stat().st_size:,} bytes)" for path in reads]
        lines += [f"would write {path}" + (" (replacing it)" if path.exists() else "") for path in writes]
        sys.stdout.write("".join(f"{line}\n" for line in lines))
    return {
        "reads": [{"path": str(path), "bytes": path.stat().st_size} for path in reads],
        "writes": [str(path) for path in writes],
    }
