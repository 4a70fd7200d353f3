"""Opening the run directory of a new run, or of a run to resume."""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path

from ssrctl.checkpoints.run_dir import Checkpoint, RunDir, load_checkpoint, newest_checkpoint
from ssrctl.configs import TrainConfig
from ssrctl.configs.building import default_of
from ssrctl.errors import UserError
from ssrctl.io import manifest

# Settings that may differ when a run is resumed: they do not change its numbers.
FREE_ON_RESUME = {
    "json", "dry_run", "output_dir", "resume_from_checkpoint", "force", "save_steps", "save_total_limit", "logging_steps",
    "push_to_hub", "hub_private_repo", "report", "report_to", "critic_max_concurrency", "critic_timeout", "critic_retries", "critic_requests_per_minute",
    "critic_input_price", "critic_output_price", "critic_budget_usd", "critic_cache", "critic_cache_dir",
    "critic_thinking_tokens", "critic_max_tokens",
    "num_processes", "accelerate_config", "sharding", "sampling_weights",
    "rollout_server_url", "rollout_server_timeout", "rollout_server_return", "rollout_push", "verify_engine_every",
}  # fmt: skip


def run_folder(config: TrainConfig) -> RunDir:
    """Return the run directory to write to: that of the checkpoint to resume from, or ``--output-dir``, or a new one."""
    if config.resume_from_checkpoint not in (None, "latest"):
        run_path = Path(config.resume_from_checkpoint).resolve().parent.parent
        if config.output_dir is not None and config.output_dir.resolve() != run_path:
            raise UserError(
                f"checkpoint {config.resume_from_checkpoint} belongs to the run {run_path}, not to {config.output_dir}",
                "leave out --output-dir, or name that run",
            )
        return RunDir(config.output_dir or run_path)
    if config.output_dir is not None:
        if config.output_dir.exists() and not config.output_dir.is_dir():
            raise UserError(f"--output-dir {config.output_dir} is a file", "name a folder")
        return RunDir(config.output_dir)
    if config.resume_from_checkpoint is not None:
        raise UserError("--resume-from-checkpoint latest needs the run", "give --output-dir RUN")
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return RunDir(Path("runs") / f"{stamp}-{Path(config.model).name}")


def open_run(config: TrainConfig, run_dir: RunDir) -> Checkpoint | None:
    """Return the checkpoint to resume from; None for a new run, or for one that stopped before its first checkpoint.

    Raises:
        UserError: the folder already holds a run, or the checkpoint cannot be resumed with these settings.
    """
    if config.resume_from_checkpoint is None:
        _check_new(config, run_dir)
        return None
    if config.resume_from_checkpoint == "latest":
        folder = newest_checkpoint(run_dir.path)
    else:
        folder = Path(config.resume_from_checkpoint)
    checkpoint = _load(folder, run_dir)
    _check_same_settings(config, run_dir)
    step = checkpoint.state["step"]
    later = [path for path in run_dir.checkpoints() if int(path.name) > step]
    if later and not config.force:
        raise UserError(
            f"resuming from {folder} drops what the run did after step {step}: {run_dir.logged_after(step)}",
            f"give --force to drop it, or continue after step {int(later[-1].name)} with --resume-from-checkpoint latest",
        )
    return checkpoint


def _check_new(config: TrainConfig, run_dir: RunDir) -> None:
    """Refuse a folder with a run, unless it stopped before its first checkpoint and had the same settings."""
    if not run_dir.config.exists():
        return
    if run_dir.checkpoints():
        raise UserError(
            f"{run_dir.path} already holds a run",
            "continue it with --resume-from-checkpoint latest, or name another folder",
        )
    if odd := _other_settings(config, run_dir):
        raise UserError(
            f"{run_dir.path} holds a run that stopped before its first checkpoint, and had other settings: {odd}",
            "name another folder, or remove that one",
        )


def _load(folder: Path, run_dir: RunDir) -> Checkpoint:
    """Read a checkpoint; when it is damaged, the error names the newest whole one."""
    try:
        return load_checkpoint(folder)
    except UserError as error:
        complete = run_dir.checkpoints()
        whole = next((other for other in reversed(complete) if _loads(other)), None)
        if whole is None:
            raise
        force = "" if whole == complete[-1] else " --force"
        raise UserError(
            f"{error.message}; the newest whole checkpoint is {whole}",
            f"resume with --resume-from-checkpoint {whole}{force}",
        ) from error


def _loads(folder: Path) -> bool:
    try:
        load_checkpoint(folder)
    except UserError:
        return False
    return True


def _check_same_settings(config: TrainConfig, run_dir: RunDir) -> None:
    """Raise a UserError if resuming would not compute the same as the uninterrupted run."""
    if odd := _other_settings(config, run_dir):
        raise UserError(f"the run was started with other settings: {odd}", f"continue with --config {run_dir.config}")


def _other_settings(config: TrainConfig, run_dir: RunDir) -> str:
    """List the settings that differ from the run's and change its numbers."""
    # a run that was made before a setting existed had its default
    defaults = {spec.name: default_of(spec) for spec in dataclasses.fields(config)}
    before, now = defaults | run_dir.read_config(), manifest.settings_of(config)
    free = FREE_ON_RESUME | ({"max_steps"} if config.lr_scheduler_type.startswith("constant") else set())
    odd = [key for key in now if key not in free and before.get(key) != now[key]]
    return ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in odd)
