"""The logs of a training run, as its page reads them, also while the run is in progress."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.errors import UserError
from ssrctl.evaluation.transcripts import first_of_each
from ssrctl.io import console
from ssrctl.io.jsonl import parse_json, read_jsonl
from ssrctl.io.mask_log import Claims, load_claims, mask_log_paths
from ssrctl.io.records import Rollout, read_rollouts

CRITIC_CALLS = "critic_calls.jsonl"


@dataclass(frozen=True, kw_only=True)
class RunLog:
    """The logs of a run.

    Attributes:
        label: the folder's name, unique on the page.
        version: of ssrctl; None where the manifest does not say.
        rows: of metrics.jsonl, in order.
        claims: of the logged steps, in order; none for dense updates.
        cost_usd: of the critic's calls; None without calls or prices.
        rollouts: a right and a wrong one of the last step, as far as there are.
    """

    label: str
    settings: Mapping[str, Any]
    version: str | None
    rows: Sequence[Mapping[str, Any]]
    claims: Sequence[Claims]
    num_calls: int
    cost_usd: float | None
    rollouts: Sequence[Rollout]

    @property
    def steps(self) -> list[int]:
        """The training steps, ascending."""
        return [row["step"] for row in self.rows]

    @property
    def max_steps(self) -> int | None:
        """The step at which the run ends; None where its config does not say."""
        found = self.settings.get("max_steps")
        return found if isinstance(found, int) else None

    @property
    def has_ended(self) -> bool:
        """True if the run reached its last step."""
        return self.max_steps is not None and self.steps[-1] >= self.max_steps

    def values(self, metric: str) -> list[float | None]:
        """Return a metric at each step; None where it is absent or not a number."""
        return [_number(row.get(metric)) for row in self.rows]


def _number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if is_number else None


def read_run(folder: Path, label: str) -> RunLog:
    """Read the logs of a run, which may be in progress: a truncated last line is reported and left out.

    Raises:
        UserError: not a run directory, a run without steps yet, or a log that cannot be read.
    """
    run = RunDir(folder)
    if not folder.is_dir():
        raise UserError(f"run directory not found: {folder}", "name the folder that `ssrctl train` wrote")
    if not run.metrics.is_file():
        has_begun = run.config.is_file()
        raise UserError(
            f"{folder} has no {run.metrics.name}" + (" yet" if has_begun else ": it is not a run directory"),
            "wait for the first step" if has_begun else "name the folder that `ssrctl train` wrote",
        )
    rows = [row for _, row in read_jsonl(run.metrics, on_torn=console.warn, may_be_empty=True)]
    rows = [row for row in rows if isinstance(row.get("step"), int)]
    if not rows:
        raise UserError(f"{run.metrics} has no steps yet", "wait for the first step")
    num_calls, cost_usd = _critic_calls(folder / CRITIC_CALLS)
    return RunLog(
        label=label,
        settings=run.read_config() if run.config.is_file() else {},
        version=_version(run.manifest),
        rows=rows,
        claims=[_claims(path, path.stat().st_mtime_ns) for path in mask_log_paths(folder)],
        num_calls=num_calls,
        cost_usd=cost_usd,
        rollouts=_rollouts(run, rows),
    )


def _version(manifest: Path) -> str | None:
    """Return the version of ssrctl that wrote a run; None without a manifest that says it."""
    if not manifest.is_file():
        return None
    try:
        found = parse_json(manifest.read_text(encoding="utf-8"))
        return str(found["versions"]["ssrctl"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        console.warn(f"{manifest} does not say which version of ssrctl wrote the run")
        return None


def _critic_calls(ledger: Path) -> tuple[int, float | None]:
    """Return the number of requests to a paid critic and their cost; None without any price."""
    if not ledger.is_file():
        return 0, None
    calls = [row for _, row in read_jsonl(ledger, on_torn=console.warn, may_be_empty=True) if not row.get("cached")]
    costs = [cost for row in calls if (cost := _number(row.get("cost_usd"))) is not None]
    return len(calls), math.fsum(costs) if costs else None


@functools.lru_cache(maxsize=4096)
def _claims(path: Path, modified: int) -> Claims:
    """Read a mask log; ``modified``, in ns, lets a page that is written again read only what is new."""
    return load_claims(path)


def _rollouts(run: RunDir, rows: Sequence[Mapping[str, Any]]) -> list[Rollout]:
    """Return a right and a wrong rollout of the last step whose file is there; one being written is not there yet."""
    for row in reversed(rows):
        if (path := run.rollouts(row["step"])).is_file():
            return first_of_each(read_rollouts(path, needs=("response",), on_torn=console.warn))
    return []
