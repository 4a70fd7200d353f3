"""`ssrctl report`: one page of training runs and evaluations next to one another."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.run_dir import newest_run
from ssrctl.configs import ReportConfig
from ssrctl.errors import UserError
from ssrctl.evaluation.eval_page import EvalLog, eval_document, is_evaluation, read_evaluation
from ssrctl.evaluation.run_log import RunLog, read_run
from ssrctl.evaluation.run_page import PAGE, run_document
from ssrctl.io.console import note
from ssrctl.report.document import Document
from ssrctl.report.render import missing_libraries
from ssrctl.report.terminal import show_document
from ssrctl.report.write import write_page

WATCH_SECONDS = 10


def run(config: ReportConfig) -> dict[str, Any]:
    """Write the page, with ``--watch`` again and again until the runs have ended, and show its numbers on stdout.

    Raises:
        UserError: a folder that is neither a run nor a finished evaluation, or a log that cannot be read.
    """
    folders = config.paths or [newest_run("ssrctl report RUN")]
    page = config.output or (folders[0] / PAGE if len(folders) == 1 else Path(PAGE))
    if config.dry_run:
        note(f"would read {', '.join(map(str, folders))} and write {page}")
        return {"reads": [str(one) for one in folders], "writes": str(page)}
    if missing := missing_libraries():
        raise UserError(f"the page needs {' and '.join(missing)}", "pip install 'ssrctl[report]'")
    if page.is_dir():
        raise UserError(f"{page} is a folder", f"name the file: -o {page / PAGE}")
    while True:
        logs = _read(folders)
        waiting = [one.label for one in logs if isinstance(one, RunLog) and not one.has_ended]
        again = WATCH_SECONDS if config.watch and waiting else None
        document = _document(logs)
        write_page(document, page, refresh_seconds=again)
        if again is None:
            break
        note(f"wrote {page}; in progress: {', '.join(waiting)}")
        time.sleep(again)
    if not config.json:
        show_document(document, page.name)
    note(f"wrote {page}")
    return {"page": str(page), "headlines": document.headlines, "notes": document.notes}


def _read(folders: Sequence[Path]) -> list[RunLog | EvalLog]:
    logs: list[RunLog | EvalLog] = []
    for folder in folders:
        label = _unused(folder.resolve().name, [one.label for one in logs])
        logs.append(read_evaluation(folder, label) if is_evaluation(folder) else read_run(folder, label))
    return logs


def _unused(label: str, taken: Sequence[str]) -> str:
    numbered = (f"{label} #{number}" for number in itertools.count(2))
    return next(one for one in itertools.chain([label], numbered) if one not in taken)


def _document(logs: Sequence[RunLog | EvalLog]) -> Document:
    """Return the page of runs, of evaluations, or of the former followed by the latter."""
    runs = [one for one in logs if isinstance(one, RunLog)]
    evaluations = [one for one in logs if isinstance(one, EvalLog)]
    if not runs:
        return eval_document(evaluations)
    document = run_document(runs)
    if evaluations:
        more = eval_document(evaluations)
        document.facts += more.facts
        document.headlines += more.headlines
        document.sections += more.sections
    return document
