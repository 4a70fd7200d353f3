"""Settings of `ssrctl report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ssrctl.configs.building import output, positional
from ssrctl.configs.common import CommonConfig


@dataclass(kw_only=True)
class ReportConfig(CommonConfig):
    """Write one page of training runs and evaluations: reward, accuracy, length, entropy, claims, costs, rollouts.

    Several are drawn over one another. A run may be in progress.

    Example: ssrctl report runs/kronos runs/adamw -o compared.html
    """

    paths: list[Path] = positional(metavar="RUN...", default_factory=list)
    """Run directories, or folders of `ssrctl eval`; the newest run under runs/ when omitted."""

    output: Path | None = output(None)
    """File of the page; by default report.html in the run's folder, or in the current one for several."""

    watch: bool = False
    """Write the page again every 10 seconds until the runs have ended; an open page reloads itself."""
