"""Opening the run directory of a new run, or of a run to resume."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from ssrctl.checkpoints.run_dir import Checkpoint, RunDir, load_checkpoint, newest_checkpoint
from ssrctl.configs import TrainConfig
from ssrctl.errors import UserError
from ssrctl.io import manifest

# Settings that may differ when a run is resumed: they do not change its numbers.
FREE_ON_RESUME = {
    "json", "dry_run", "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "critic_max_concurrency", "critic_timeout", "critic_retries", "critic_requests_per_minute",
    "critic_input_price", "critic_output_price", "critic_budget_usd", "critic_cache", "critic_cache_dir",
}  # fmt: skip


def open_run(config: TrainConfig) -> tuple[RunDir, Checkpoint | None]:
    """Return the run directory to write to, and the checkpoint to resume from (None for a new run).

    Raises:
        UserError: the folder already holds a run, or the checkpoint cannot be resumed with these settings.
    """
    if config.resume_from_checkpoint is None:
        return _new_run(config), None
    if config.resume_from_checkpoint == "latest":
        if config.output_dir is None:
            raise UserError("--resume-from-checkpoint latest needs the run", "give --output-dir RUN")
        folder = newest_checkpoint(config.output_dir)
    else:
        folder = Path(config.resume_from_checkpoint)
    checkpoint = load_checkpoint(folder)
    run_path = folder.resolve().parent.parent
    if config.output_dir is not None and config.output_dir.resolve() != run_path:
        raise UserError(
            f"checkpoint {folder} belongs to the run {run_path}, not to {config.output_dir}",
            "leave out --output-dir, or name that run",
        )
    run_dir = RunDir(config.output_dir or run_path)
    _check_same_settings(config, run_dir)
    return run_dir, checkpoint


def _new_run(config: TrainConfig) -> RunDir:
    if config.output_dir is None:
        stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        return RunDir(Path("runs") / f"{stamp}-{Path(config.model).name}")
    run_dir = RunDir(config.output_dir)
    if run_dir.path.exists() and not run_dir.path.is_dir():
        raise UserError(f"--output-dir {run_dir.path} is a file", "name a folder")
    if run_dir.config.exists():
        raise UserError(
            f"{run_dir.path} already holds a run",
            "continue it with --resume-from-checkpoint latest, or name another folder",
        )
    return run_dir


def _check_same_settings(config: TrainConfig, run_dir: RunDir) -> None:
    """Raise a UserError if resuming would not compute the same as the uninterrupted run."""
    # a run of an earlier version had the default of a setting that its config does not name
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)}
    if config.optimizer == "kronos" and config.credit == "step":
        defaults["budget_rule"] = "paper"  # the only rule before there was a choice
    before, now = defaults | run_dir.read_config(), manifest.settings_of(config)
    free = FREE_ON_RESUME | ({"max_steps"} if config.lr_scheduler_type.startswith("constant") else set())
    odd = [key for key in now if key not in free and before.get(key) != now[key]]
    if odd:
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in odd)
        raise UserError(
            f"the run was started with other settings: {listed}", f"continue with --config {run_dir.config}"
        )
