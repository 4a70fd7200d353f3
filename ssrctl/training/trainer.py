"""The training loop of a run: a batch of questions per step, logs, progress, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssrctl.checkpoints.delta import Delta, apply_delta
from ssrctl.checkpoints.run_dir import Checkpoint, RunDir, prune_checkpoints, save_checkpoint
from ssrctl.configs import TrainConfig
from ssrctl.configs.names import flag
from ssrctl.configs.own_code import imported_names
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import Interrupted, Stopped, UserError
from ssrctl.io import console, manifest
from ssrctl.io.artifacts import mask_at
from ssrctl.io.budget_file import budget_at
from ssrctl.io.files import CannotWrite, write_text
from ssrctl.io.gradient_log import GradientHeader, gradient_log_path, save_gradient_log
from ssrctl.io.interrupts import deferred_interrupt
from ssrctl.io.jsonl import JsonlLog
from ssrctl.io.mask_log import StepMaskLog, save_mask_log
from ssrctl.io.records import write_rollouts
from ssrctl.models.loading import LoadedModel
from ssrctl.models.precision import precision_of
from ssrctl.report.formats import duration, number, sparkline
from ssrctl.sampling.engines.transformers_engine import NonFiniteLogits
from ssrctl.sampling.groups import Prompted
from ssrctl.training.exact_changes import exact_changes
from ssrctl.training.gap_warning import GapWarning
from ssrctl.training.lora import AdaptedModel
from ssrctl.training.obstacles import Obstacles
from ssrctl.training.tracking import tracking
from ssrctl.training.training_step import NonFiniteBatch, StepResult, TrainingStep


class Trainer:
    """The training loop.

    Args:
        config: the run's settings.
        loaded: the model in training.
        run_dir: the run directory to write to.
        prompts: the questions to draw from.
        training_step: samples, scores and learns from one batch; of its processes the main one writes the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        loaded: LoadedModel,
        run_dir: RunDir,
        prompts: Sequence[Prompted],
        training_step: TrainingStep,
    ) -> None:
        from transformers import get_scheduler

        self.config, self.loaded, self.run_dir, self.prompts = config, loaded, run_dir, prompts
        self.training_step, self.updater = training_step, training_step.updater
        self.world = training_step.world
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.updater.optimizer, config.warmup_steps, config.max_steps
        )
        self.step = self.last_saved = self.num_changed = 0
        self.recent: list[dict[str, Any]] = []
        self.rewards: list[float | None] = []
        self.obstacles = Obstacles(config)
        self.gap_warning = GapWarning(loaded.model.dtype, corrected=config.engine_correction != "none")

    def start(self, profile_name: str) -> None:
        """Write the config and the manifest of a new run; one that stopped before its first checkpoint is dropped."""
        if not self.world.is_main:
            return
        self.run_dir.path.mkdir(parents=True, exist_ok=True)
        if self.run_dir.config.exists():
            dropped = self.run_dir.logged_after(0)
            console.note(
                f"{self.run_dir.path} stopped before its first checkpoint: starting from the model's weights"
                + (f"; dropped: {dropped}" if dropped else "")
            )
        self.run_dir.rewind(0)
        self.run_dir.write_config(manifest.settings_of(self.config))
        if self.config.chat_template is not None:
            write_text(self.run_dir.chat_template, self.loaded.tokenizer.chat_template)
        self.run_dir.write_manifest(
            {
                "model": dataclasses.asdict(self.loaded.identity),
                "precision": precision_of(self.loaded.model),
                "budget_profile": profile_name,
                "versions": manifest.versions(),
                "inputs": input_hashes(self.config),
                "num_coordinates": self.training_step.num_coordinates,
                "num_protected": self.updater.num_protected,
                "num_processes": self.world.size,
                "sharding": self.config.sharding,
            }
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restore weights, optimizer, schedule and logs to the state of a checkpoint."""
        sharded = self.training_step.sharded
        if isinstance(self.loaded, AdaptedModel):
            self.loaded.restore(checkpoint)
        else:
            apply_delta(
                checkpoint.delta,
                dict(self.loaded.model.named_parameters() if sharded is None else sharded.local_parameters()),
                self.loaded.identity.fingerprint,
                None if sharded is None else {name: rows.start for name, rows in sharded.rows.items()},
            )
        self.num_changed = checkpoint.delta.count
        self.updater.load_state(checkpoint.optimizer)
        self.step = self.last_saved = checkpoint.state["step"]
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        for group, rate in zip(self.updater.optimizer.param_groups, checkpoint.state["learning_rates"], strict=True):
            group["lr"] = rate
        if not self.world.is_main:
            return
        dropped = self.run_dir.logged_after(self.step)
        self.run_dir.rewind(self.step)
        self.run_dir.write_config(manifest.settings_of(self.config))
        console.note(
            f"continuing {self.run_dir.path} after step {self.step}" + (f"; dropped: {dropped}" if dropped else "")
        )

    def train(self) -> dict[str, Any]:
        """Train up to ``max_steps`` and return a summary.

        Raises:
            Interrupted: after Ctrl-C or SIGTERM, once the step in progress is done and a checkpoint is written.
            NonFiniteBatch, Stopped: after a checkpoint of the last whole step is written.
            NonFiniteLogits: the weights diverged; no checkpoint of them is written.
            CannotWrite: a full disk; the last checkpoint is whole.
        """
        try:
            self._loop()
        except CannotWrite as full:
            raise CannotWrite(full.message, f"make room; to continue: {self._how_to_continue()}") from full
        if self.step < self.config.max_steps:
            reached, fix = (
                f"after step {self.step} of {self.config.max_steps}",
                f"to continue: {self._how_to_continue()}",
            )
            if self.world.size > 1:  # the signal may have reached only another process
                raise Stopped(f"a signal: {reached}", fix)
            raise Interrupted(reached, fix)
        return self._summary()

    def _loop(self) -> None:
        config = self.config
        bar = console.progress(unit="steps", lines=False)  # it prints its own
        with self._logs() as (log, track), bar:
            task = bar.add_task("train", total=config.max_steps, completed=self.step, status="")
            with deferred_interrupt() as interrupted:
                while self.step < config.max_steps and not self.world.any(interrupted()):
                    try:
                        row = self._train_step()
                    except NonFiniteBatch as broken:
                        if broken.weights_changed:
                            part = f"{broken.message}; step {self.step + 1} is applied in part and not stored"
                            raise NonFiniteBatch(part, self._last_good(broken)) from broken
                        self._save_checkpoint()
                        raise NonFiniteBatch(broken.message, self._last_good(broken)) from broken
                    except NonFiniteLogits as error:  # the weights of the last step are not worth keeping
                        raise NonFiniteLogits(error.message, self._last_good(error, self.step)) from error
                    except Stopped as stop:
                        self._save_checkpoint()
                        fix = f"to continue after step {self.step}: {self._how_to_continue()}"
                        raise Stopped(stop.message, fix) from None
                    if log is not None:
                        log.append(row)
                    track(row)
                    self.obstacles.add(row)
                    self.gap_warning.add(row)
                    status = _status(row, self.rewards)
                    bar.update(task, completed=self.step, status=status)
                    if not console.console().is_terminal and self.step % config.logging_steps == 0:
                        left = bar.tasks[0].time_remaining
                        said = "" if left is None else f"  {duration(left)} left"
                        console.note(f"step {self.step}/{config.max_steps}  {status}{said}")
                    if self.step % config.save_steps == 0:
                        self._save_checkpoint(log)
                self._save_checkpoint(log)

    @contextlib.contextmanager
    def _logs(self) -> Iterator[tuple[JsonlLog | None, Callable[[dict[str, Any]], None]]]:
        """Open the log of metrics and the tracker, in the main process."""
        if not self.world.is_main:
            yield None, lambda row: None
            return
        with JsonlLog(self.run_dir.metrics) as log, tracking(self.config, self.run_dir) as track:
            yield log, track

    def _train_step(self) -> dict[str, Any]:
        """Train on the next batch, write its logs, and return its row of metrics."""
        config = self.config
        step = self.step + 1
        rate = self.updater.optimizer.param_groups[0]["lr"]
        result = self.training_step.run(
            questions_of_step(step, self.prompts, config),
            seed=derive_seed(config.seed, "rollout", step),
            log_masks=config.log_masks_every > 0 and step % config.log_masks_every == 0,
            log_gradient=config.log_gradients > 0 and step % config.log_gradients == 0,
            log_base_kl=config.log_base_kl_every > 0 and step % config.log_base_kl_every == 0,
            log_signs=config.log_signs_every > 0 and step % config.log_signs_every == 0,
        )
        self.scheduler.step()
        self.step = step
        if self.world.is_main:
            self._write_logs(result)
        epoch = step * config.questions_per_step / len(self.prompts)
        row = {"step": step, "epoch": round(epoch, 4), "learning_rate": rate, **result.metrics}
        self.recent = [*self.recent[-9:], row]
        self.rewards.append(row["reward"])
        return row

    def _write_logs(self, result: StepResult) -> None:
        rollouts = (rollout for group in result.groups for rollout in group.rollouts)
        write_rollouts(self.run_dir.rollouts(self.step), rollouts)
        if result.mask_log:
            log = StepMaskLog(
                step=self.step,
                num_coordinates=self.training_step.num_coordinates,
                num_protected=self.updater.num_protected,
                questions=result.mask_log,
            )
            save_mask_log(self.run_dir.masks(self.step), log)
        if result.gradient is not None:
            self._log_gradient(result.gradient)

    def _log_gradient(self, gradient: torch.Tensor) -> None:
        assert self.training_step.observer is not None
        sketch = self.training_step.observer.sketch
        header = GradientHeader(
            step=self.step,
            sketch="exact" if sketch.exact else "count-sketch",
            size=sketch.size,
            seed=sketch.seed,
            num_coordinates=sketch.num_coordinates,
        )
        try:
            save_gradient_log(gradient_log_path(self.run_dir.path, self.step), header, gradient)
        except ValueError as error:  # a NaN in a protected coordinate does not stop training
            console.warn(f"the gradient of step {self.step} is not stored: {error}")

    def _save_checkpoint(self, log: JsonlLog | None = None) -> None:
        """Write a checkpoint of the last whole step, unless there is one; ``log`` goes to disk before it.

        The other processes wait for the main one: a launcher that sees one of them end would end that one.
        """
        if log is not None:
            log.sync()
        if self.step == self.last_saved:
            return
        if self.world.is_main or self.training_step.sharded is not None:
            self._write_checkpoint()
        self.last_saved = self.step
        self.world.wait()

    def _write_checkpoint(self) -> None:
        """Write what the updater has; of a sharded model the main process has it all, once every process was asked."""
        adapted = self.loaded if isinstance(self.loaded, AdaptedModel) else None
        touched, updater_state = (adapted or self.updater).changes(), self.updater.state()
        if not self.world.is_main:
            return
        changes, before = exact_changes(touched, self.config)
        delta = Delta(self.loaded.identity, self.loaded.shapes(), dict(changes), before)
        state = {
            "step": self.step,
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.updater.optimizer.param_groups],
        }
        # A resumed run writes the same bytes as an uninterrupted one.
        settings = manifest.published_settings(
            dataclasses.replace(
                self.config,
                resume_from_checkpoint=None,
                force=False,
                report=True,
                sharding="none",
                sampling_weights="whole",
            )
        )
        adapter = None if adapted is None else adapted.adapter()
        save_checkpoint(self.run_dir.checkpoint(self.step), delta, updater_state, state, settings, adapter)
        prune_checkpoints(self.run_dir, self.config.save_total_limit)
        self.num_changed = delta.count

    def _last_good(self, error: UserError, before: float = math.inf) -> str:
        """Return the error's remedy with the newest checkpoint of a step below ``before``."""
        good = [one for one in self.run_dir.checkpoints() if int(one.name) < before]
        if not good:
            return f"{error.remedy}; lower --learning-rate (there is no checkpoint from before)"
        return f"{error.remedy}; the last good checkpoint is {good[-1]}"

    def _how_to_continue(self) -> str:
        if not self.last_saved:
            return "run the same command again, it starts from the model's weights"
        run = shlex.quote(str(self.run_dir.path))
        config = shlex.quote(str(self.run_dir.config))
        # Code is not imported because a file names it.
        named = imported_names(self.config).items()
        code = "".join(f" {flag(TrainConfig, name)} {shlex.quote(value)}" for name, values in named for value in values)
        code += " --trust-remote-code" * self.config.trust_remote_code
        return f"ssrctl train --config {config} --output-dir {run} --resume-from-checkpoint latest{code}"

    def _summary(self) -> dict[str, Any]:
        changed_frac = self.num_changed / self.training_step.num_coordinates
        self.obstacles.warn()
        self.gap_warning.summarize()
        console.note(
            f"done: {self.step} steps, {changed_frac:.1%} of the weights changed; run directory: {self.run_dir.path}"
        )
        return {
            "run": str(self.run_dir.path),
            "steps": self.step,
            "accuracy_last_10": statistics.fmean(row["accuracy"] for row in self.recent) if self.recent else None,
            "changed_frac": changed_frac,
        }


def input_hashes(config: TrainConfig) -> dict[str, str]:
    """Return the hashes of the files that a run reads, by the setting that names them."""
    found = {key: manifest.file_hash(mask_at(path)) for key in ("protect", "mask") if (path := getattr(config, key))}
    for key, path in (("dataset", Path(config.dataset)), ("budget_profile", budget_at(config.budget_profile))):
        if path.is_file():
            found[key] = manifest.file_hash(path)
    return found


def questions_of_step(step: int, prompts: Sequence[Prompted], config: TrainConfig) -> list[Prompted]:
    """Return the questions of a step, counted from 1; each epoch is a seeded permutation, so there is no state."""
    size, count = config.questions_per_step, len(prompts)
    chosen = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", epoch))
        chosen.append(prompts[int(torch.randperm(count, generator=generator)[place])])
    return chosen


def _status(row: dict[str, Any], rewards: Sequence[float | None]) -> str:
    """Return the numbers that the run's page begins with, and the course of the reward since the command began."""
    reward = "   -  " if row["reward"] is None else f"{row['reward']:+.3f}"
    length, entropy = number(row.get("response_tokens_mean")), number(row.get("entropy"))
    return (
        f"reward {reward} {sparkline(rewards)}  accuracy {row['accuracy']:.3f}  length {length}  entropy {entropy}  "
        f"{row['tokens_per_second']:.0f} tok/s"
    )
