"""Trackers of ``--report-to``: several at once, absent ones, and ones that fail."""

import json
from pathlib import Path
from typing import Any

import accelerate.tracking
import pytest

from ssrctl import cli
from ssrctl.configs import TrainConfig, build_config
from ssrctl.errors import UserError

SMALL = (
    "--max-steps",
    "3",
    "--questions-per-step",
    "1",
    "--num-generations",
    "2",
    "--max-new-tokens",
    "8",
    "-o",
    "run",
)


class Tracker:
    """A tracker of accelerate's interface that keeps what it gets."""

    requires_logging_directory = False
    made: dict[str, "Tracker"]
    name: str

    def __init__(self, project: str) -> None:
        self.rows: list[dict[str, Any]] = []
        self.finished = False
        self.made[self.name] = self

    def start(self) -> None: ...

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        assert values["max_steps"] == 3

    def log(self, values: dict[str, Any], step: int) -> None:
        self.rows.append(values)

    def finish(self) -> None:
        self.finished = True


class Failing(Tracker):
    """A tracker whose server is gone after the first row."""

    def log(self, values: dict[str, Any], step: int) -> None:
        super().log(values, step)
        if step > 1:
            raise ConnectionError("no\nroute")

    def finish(self) -> None:
        raise ConnectionError("no route")


@pytest.fixture
def trackers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Tracker]:
    monkeypatch.chdir(tmp_path)
    made: dict[str, Tracker] = {}
    for name, kind in (("trackio", Tracker), ("wandb", Failing)):
        monkeypatch.setitem(
            accelerate.tracking.LOGGER_TYPE_TO_CLASS, name, type(name, (kind,), {"name": name, "made": made})
        )
    monkeypatch.setattr(accelerate.tracking, "_available_trackers", ["trackio", "wandb"])
    return made


def test_one_that_fails_is_warned_about_once_and_the_run_goes_on(
    trackers: dict[str, Tracker], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", *SMALL, "--report-to", "trackio", "--report-to", "wandb"]) == 0
    logged = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    for tracker in trackers.values():
        assert [row["reward"] for row in tracker.rows] == [row["reward"] for row in logged]
        assert all(isinstance(value, int | float | str) for row in tracker.rows for value in row.values())
    assert trackers["trackio"].finished
    err = capsys.readouterr().err
    assert err.count("--report-to wandb failed: ConnectionError: no route") == 1


def test_absent_and_unknown_ones_are_one_line_before_the_run(
    trackers: dict[str, Tracker], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(["train", *SMALL, "--report-to", "trackio", "--report-to", "tensorboard"]) == 2
    assert "tensorboard is not installed" in capsys.readouterr().err and not trackers
    monkeypatch.setattr(Tracker, "start", lambda self: 1 / 0)
    assert cli.main(["train", *SMALL, "--report-to", "trackio"]) == 2
    assert "--report-to trackio cannot be started: ZeroDivisionError" in capsys.readouterr().err
    assert not Path("run/metrics.jsonl").read_text()


def test_names(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("report_to: wandb\n")
    assert build_config(TrainConfig, {}, path).report_to == ["wandb"]
    assert TrainConfig(report_to=["none"]).report_to == []
    with pytest.raises(UserError, match="'wandbb' is not known"):
        TrainConfig(report_to=["wandbb"])
    with pytest.raises(UserError, match="none excludes wandb"):
        TrainConfig(report_to=["none", "wandb"])
