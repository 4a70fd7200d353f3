"""Experiment trackers of ``--report-to``, through accelerate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io import console, manifest


def check_trackers(names: Sequence[str]) -> None:
    """Raise a UserError, before any work is done, if a tracker is not installed."""
    from accelerate.tracking import get_available_trackers

    installed = {str(getattr(kind, "value", kind)) for kind in get_available_trackers()}
    if missing := [name for name in names if name not in installed]:
        raise UserError(
            f"--report-to: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            f"pip install {' '.join(missing)}",
        )


@contextlib.contextmanager
def tracking(config: TrainConfig, run_dir: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open the trackers of ``--report-to``; yield a function that sends them a row of metrics.

    A tracker that fails later does not end the run: it is warned about once, and gets the next rows nevertheless.

    Raises:
        UserError: a tracker that cannot be started.
    """
    with contextlib.ExitStack() as stack:
        trackers = [stack.enter_context(_tracker(name, config, run_dir)) for name in config.report_to]

        def track(row: dict[str, Any]) -> None:
            for send in trackers:
                send(row)

        yield track


@contextlib.contextmanager
def _tracker(name: str, config: TrainConfig, run_dir: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Open a tracker; yield a function that sends it a row, without lists and missing values."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[name]
    folder = {"logging_dir": str(run_dir.path / "tracker")} if kind.requires_logging_directory else {}
    settings = manifest.settings_of(config).items()
    try:
        tracker = kind("ssrctl", **folder)
        tracker.start()
        tracker.store_init_configuration(
            {key: value if isinstance(value, int | float | str | bool) else str(value) for key, value in settings}
        )
    except Exception as error:  # trackers raise anything: no login, no network, another version of their package
        raise UserError(
            f"--report-to {name} cannot be started: {_words(error)}",
            "log in there or install what it needs, or leave it out",
        ) from error
    failed = False

    def attempt(action: Callable[[], None]) -> None:
        nonlocal failed
        try:
            action()
        except Exception as error:
            if not failed:
                console.warn(f"--report-to {name} failed: {_words(error)}; {run_dir.metrics} has every row")
            failed = True

    def send(row: dict[str, Any]) -> None:
        values = {key: value for key, value in row.items() if value is not None and not isinstance(value, list)}
        step = values.pop("step")
        attempt(lambda: tracker.log(values, step=step))

    try:
        yield send
    finally:
        attempt(tracker.finish)


def _words(error: Exception) -> str:
    """Return the name and the first words of a tracker's error, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}".removesuffix(": ")
