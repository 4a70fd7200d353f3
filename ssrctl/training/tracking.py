"""Experiment trackers of ``--report-to``, through accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io import manifest


def check_tracker(name: str) -> None:
    """Raise a UserError, before any work is done, if the tracker is not installed."""
    from accelerate.tracking import get_available_trackers

    if name != "none" and name not in [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]:
        raise UserError(f"--report-to {name}: {name} is not installed", f"pip install {name}")


@contextlib.contextmanager
def tracking(config: TrainConfig, run_dir: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the tracker of ``--report-to``; yield a function that sends it a row of metrics, or nothing for ``none``."""
    if config.report_to == "none":
        yield lambda row: None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[config.report_to]
    folder = {"logging_dir": str(run_dir.path / "tracker")} if kind.requires_logging_directory else {}
    tracker = kind("ssrctl", **folder)
    tracker.start()
    tracker.store_init_configuration(
        {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in manifest.settings_of(config).items()}
    )
    try:
        yield lambda row: tracker.log(
            {k: v for k, v in row.items() if v is not None and not isinstance(v, list)}, step=row["step"]
        )
    finally:
        tracker.finish()
