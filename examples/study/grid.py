"""The study's grid as data (grid.yaml), the runs that it asks for, and the rows of those that are done."""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .tasks import CONSTANTS, MORE_CONSTANTS

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Run:
    """One training run and its evaluation.

    Attributes:
        split: problems of the evaluation, ``valid`` or ``test``.
        settings: those of ``ssrctl train`` by name, with ``max_steps`` 0 for no training; masks by the names of
            ``inputs.py``, and ``measure`` for what is measured of the run besides its accuracy.
    """

    task: str
    method: str
    split: str
    settings: dict[str, Any]

    @property
    def key(self) -> str:
        """The run's identity: all that decides its result, but not the names of its method and block."""
        constants = [*CONSTANTS, *MORE_CONSTANTS.get(self.task, ())]
        decisive = {"task": self.task, "split": self.split, "constants": constants, **self.settings}
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:16]

    def but(self, **changed: Any) -> Run:
        """Return the run with other settings; None drops one."""
        merged = {**self.settings, **changed}
        kept = {name: value for name, value in merged.items() if value is not None}
        return Run(self.task, self.method, self.split, kept)


def arguments(about: str | None) -> argparse.ArgumentParser:
    """Return a parser for a grid and the folder of its rows."""
    parser = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))
    parser.add_argument("grid", nargs="?", default="full", choices=names, help="by default full")
    parser.add_argument("--results", type=Path, help="folder of the rows; by default results next to this file")
    return parser


def load(name: str) -> dict[str, Any]:
    """Read a grid's file; what it leaves out is that of the grid that it names as ``base``."""
    data: dict[str, Any] = yaml.safe_load(Path(__file__).with_name(f"{name}.yaml").read_text(encoding="utf-8"))
    return {**(load(data.pop("base")) if "base" in data else {}), **data}


class Grid:
    """A grid, and the rows (by key) of the runs that are done.

    Args:
        name: of the grid's file next to this one, and of the rows' file in ``results``.
        results: another folder of the rows' file.
        blocks: those that are planned; by default all.
    """

    def __init__(self, name: str, results: Path | None = None, blocks: Sequence[str] | None = None) -> None:
        self.data, self.blocks = load(name), blocks
        self.file = (results or RESULTS) / f"{name}.jsonl"
        self.rows: dict[str, dict[str, Any]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines() if self.file.exists() else ():
            try:
                row = json.loads(line)
            except ValueError:  # torn by an interruption: the run is done again
                continue
            self.rows[row["key"]] = row

    def add(self, row: dict[str, Any]) -> None:
        """Append a row to the file."""
        self.rows[row["key"]] = row
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def settings(self, task: str, method: str) -> dict[str, Any]:
        """Return a method's settings: those of all runs, of the task, of the method that it is like, and its own."""
        own = {name: value for name, value in self.data["methods"][method].items() if name not in ("like", "rates")}
        parent = self.data["methods"][method].get("like")
        base = self.settings(task, parent) if parent else {**self.data["common"], **(self.data["tasks"][task] or {})}
        return {**base, **own}

    def tuned(self, method: str) -> str:
        """Return the method whose rates are tried for this one: itself, or the one that it is like."""
        own = self.data["methods"][method]
        return method if "rates" in own else self.tuned(own["like"])

    def tuning(self, task: str, method: str) -> list[Run]:
        """Return the runs that choose a method's rate: each of its rates, on the validation problems, with other seeds."""
        method = self.tuned(method)
        return [
            Run(task, method, "valid", {**self.settings(task, method), "learning_rate": rate, "seed": seed})
            for seed in self.data["tuning_seeds"]
            for rate in self.data["methods"][method]["rates"]
        ]

    def rate(self, task: str, method: str) -> float | None:
        """Return the rate with the best mean accuracy on the validation problems; None while a run is missing."""
        found: dict[float, list[float]] = {}
        for run in self.tuning(task, method):
            if run.key not in self.rows:
                return None
            found.setdefault(run.settings["learning_rate"], []).append(self.rows[run.key]["accuracy"])
        return max(found, key=lambda rate: statistics.fmean(found[rate]))

    def runs(self, block: str, task: str, method: str) -> list[Run]:
        """Return a block's runs of a method on the test problems, one per seed; none while its rate is not chosen."""
        about, rate = self.data["blocks"][block], self.rate(task, method)
        if rate is None:
            return []
        settings = {**self.settings(task, method), **about.get("settings", {})}
        settings["learning_rate"] = rate * about.get("rate_factor", 1)
        return [Run(task, method, "test", {**settings, "seed": seed}) for seed in range(about["seeds"])]

    def done(self, block: str, task: str, method: str) -> dict[int, dict[str, Any]]:
        """Return the rows of ``runs`` that are there, by seed."""
        runs = self.runs(block, task, method)
        return {run.settings["seed"]: self.rows[run.key] for run in runs if run.key in self.rows}

    def planned(self) -> Iterator[Run]:
        """Yield all runs in their order; what follows a method's tuning depends on the rows added in between."""
        for block, task, *only in self.data["order"]:
            if self.blocks is not None and block not in self.blocks:
                continue
            for method in only[0] if only else self.data["blocks"][block]["methods"]:
                yield from self.tuning(task, method)
                yield from self.runs(block, task, method)
