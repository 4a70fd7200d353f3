"""`ssrctl train`: the training loop around ``training.training_step``, its run directory, and resuming."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ssrctl.checkpoints.delta import Delta, apply_delta
from ssrctl.checkpoints.run_dir import (
    Checkpoint,
    RunDir,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from ssrctl.configs import TrainConfig
from ssrctl.core.budget import step_budgets
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import Critic
from ssrctl.critics.registry import make_critic
from ssrctl.errors import Stopped, UserError
from ssrctl.io import console, manifest
from ssrctl.io.artifacts import load_mask_for
from ssrctl.io.budget_file import load_budget_profile
from ssrctl.io.gradient_log import GradientHeader, gradient_log_path, save_gradient_log
from ssrctl.io.jsonl import JsonlLog, write_jsonl
from ssrctl.io.mask_log import StepMaskLog, save_mask_log
from ssrctl.io.package_data import profile_path, shipped_names
from ssrctl.io.problems import load_problems
from ssrctl.models.loading import LoadedModel, describe_model, load_model
from ssrctl.sampling.groups import Prompted, prepare_prompts
from ssrctl.text.prompts import load_template
from ssrctl.training.exact_changes import exact_changes
from ssrctl.training.training_step import NonFiniteBatch, StepResult, TrainingStep
from ssrctl.training.unit_gradients import trainable
from ssrctl.training.unit_observer import UnitObserver
from ssrctl.training.updaters import frozen_coordinates, make_updater, updater_kind

# Settings that may differ between a run and its continuation without changing what it computes.
FREE_ON_RESUME = {
    "json", "dry_run", "output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "logging_steps",
    "report_to", "max_concurrency", "critic_timeout", "critic_retries", "requests_per_minute", "input_price",
    "output_price", "budget_usd", "cache", "cache_dir",
}  # fmt: skip
CRITIC_CALLS = "critic_calls.jsonl"
ACTIVATION_BYTES_PER_PARAMETER = 2.0  # a rough allowance for graphs and caches in the memory check


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train, and return a summary.

    Raises:
        UserError: anything in the settings or inputs that cannot be used.
        KeyboardInterrupt: after Ctrl-C, with a checkpoint of the last whole step written.
    """
    console.note(describe_model(config))
    _check_tracker(config.report_to)
    run_dir, checkpoint = _open_run(config)
    template = load_template(config.prompt_template, config.dataset)
    problems = load_problems(config, "train", derive_seed(config.seed, "problems"))
    loaded = load_model(
        config,
        bytes_per_parameter=_update_bytes(config) + ACTIVATION_BYTES_PER_PARAMETER,
    )
    protected = _mask_at(config.protect, config, loaded)
    mask = _mask_at(config.mask, config, loaded)
    _check_trainable(config, loaded, protected, mask)
    curve, profile_name = _budget_curve(config)
    prompts, num_left_out = prepare_prompts(loaded, problems, template, config.max_new_tokens)
    if num_left_out:
        console.warn(f"{num_left_out} of {len(problems)} questions do not fit the context and are left out")
    _warn_about_sampling(config)
    if config.dry_run:
        plan = _plan(config, loaded, protected, mask, curve, profile_name, prompts, run_dir)
        console.show_plan("plan", plan)
        return plan
    if config.find_lr:
        return _find_lr(config, loaded, prompts, curve, protected, mask)
    parameters = trainable(loaded.model)
    updater = make_updater(parameters, config, protected, mask)
    observer = UnitObserver(parameters, config, frozen_coordinates(protected, mask))
    ledger = run_dir.path / CRITIC_CALLS if config.critic == "llm" else None
    with contextlib.closing(_critic(config, loaded, ledger)) as critic:
        step = TrainingStep(loaded, critic, updater, config, curve, observer)
        trainer = Trainer(config, loaded, run_dir, prompts, step)
        if checkpoint is None:
            trainer.start(profile_name)
        else:
            trainer.resume(checkpoint)
        return trainer.train()


def _critic(config: TrainConfig, loaded: LoadedModel, ledger: Path | None = None) -> Critic:
    seed = derive_seed(config.seed, "critic")
    return make_critic(config, policy=lambda: loaded, sampling=config, seed=seed, ledger=ledger)


class Trainer:
    """The loop: which questions when, logs, checkpoints, progress."""

    def __init__(
        self, config: TrainConfig, loaded: LoadedModel, run_dir: RunDir, prompts: Sequence[Prompted], step: TrainingStep
    ) -> None:
        from transformers import get_scheduler

        self.config, self.loaded, self.run_dir, self.prompts, self.training_step = (
            config,
            loaded,
            run_dir,
            prompts,
            step,
        )
        self.updater = step.updater
        self.scheduler = get_scheduler(
            config.lr_scheduler_type, self.updater.optimizer, config.warmup_steps, config.max_steps
        )
        self.step = 0
        self.recent: list[dict[str, Any]] = []
        self.last_saved = self.num_changed = 0

    def start(self, profile_name: str) -> None:
        """Write what describes the run."""
        self.run_dir.path.mkdir(parents=True, exist_ok=True)
        self.run_dir.write_config(manifest.settings_of(self.config))
        inputs = {key: manifest.file_hash(path) for key in ("protect", "mask") if (path := getattr(self.config, key))}
        for key in ("dataset", "budget_profile"):
            if Path(getattr(self.config, key)).is_file():
                inputs[key] = manifest.file_hash(getattr(self.config, key))
        self.run_dir.write_manifest(
            {
                "model": dataclasses.asdict(self.loaded.identity),
                "budget_profile": profile_name,
                "versions": manifest.versions(),
                "inputs": inputs,
                "num_coordinates": self.training_step.num_coordinates,
                "num_protected": self.updater.num_protected,
            }
        )

    def resume(self, checkpoint: Checkpoint) -> None:
        """Put everything back to where the checkpoint was written."""
        apply_delta(
            checkpoint.delta,
            dict(self.loaded.model.named_parameters()),
            self.loaded.identity.fingerprint,
            checkpoint.path,
        )
        self.num_changed = checkpoint.delta.count
        self.updater.load_state(checkpoint.optimizer)
        self.step = self.last_saved = checkpoint.state["step"]
        self.scheduler.load_state_dict(checkpoint.state["scheduler"])
        for group, rate in zip(self.updater.optimizer.param_groups, checkpoint.state["learning_rates"], strict=True):
            group["lr"] = rate
        self.run_dir.rewind(self.step)
        self.run_dir.write_config(manifest.settings_of(self.config))
        console.note(f"continuing {self.run_dir.path} after step {self.step}")

    def train(self) -> dict[str, Any]:
        """Run to ``max_steps``; Ctrl-C ends after the step at hand with a checkpoint."""
        bar = console.progress(unit="steps")
        with JsonlLog(self.run_dir.metrics) as log, _tracker(self.config, self.run_dir) as track, bar:
            task = bar.add_task("train", total=self.config.max_steps, completed=self.step, status="")
            with console.deferred_interrupt() as interrupted:
                while self.step < self.config.max_steps and not interrupted():
                    try:
                        row = self._one_step()
                    except NonFiniteBatch:
                        self._save()  # the weights are still those of the last whole step
                        raise
                    except Stopped as stop:
                        self._save()
                        raise Stopped(stop.message, f"to go on after step {self.step}: {self._again()}") from None
                    log.append(row)
                    track(row)
                    bar.update(task, completed=self.step, status=_status(row))
                    self._print_line(row)
                    if self.step % self.config.save_steps == 0 or self.step == self.config.max_steps:
                        log.sync()
                        self._save()
                if self.step < self.config.max_steps:
                    log.sync()
                    self._save()
        if self.step < self.config.max_steps:
            console.note(f"stopped after step {self.step} of {self.config.max_steps}; to continue: {self._again()}")
            raise KeyboardInterrupt
        return self._summary()

    def _again(self) -> str:
        return f"--output-dir {self.run_dir.path} --resume-from-checkpoint latest" if self.step else "start anew"

    def _one_step(self) -> dict[str, Any]:
        config = self.config
        step = self.step + 1
        log_masks = config.log_masks_every > 0 and step % config.log_masks_every == 0
        log_gradient = config.log_gradients > 0 and step % config.log_gradients == 0
        rate = self.updater.optimizer.param_groups[0]["lr"]
        result = self.training_step.run(
            questions_of(step, self.prompts, config),
            seed=derive_seed(config.seed, "rollout", step),
            log_masks=log_masks,
            log_gradient=log_gradient,
        )
        self.scheduler.step()
        self.step = step
        self._write_logs(result)
        epoch = step * config.questions_per_step / len(self.prompts)
        row = {"step": step, "epoch": round(epoch, 4), "learning_rate": rate, **result.metrics}
        self.recent = [*self.recent[-9:], row]
        return row

    def _write_logs(self, result: StepResult) -> None:
        rows = (rollout.to_dict() for group in result.groups for rollout in group.rollouts)
        write_jsonl(self.run_dir.rollouts(self.step), rows)
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
        except ValueError as error:  # NaN in coordinates that nobody may claim does not stop the training
            console.warn(f"the gradient of step {self.step} is not stored: {error}")

    def _save(self) -> None:
        if self.step == self.last_saved:
            return
        delta = Delta(self.loaded.identity, self.loaded.shapes(), exact_changes(self.updater.changes(), self.config))
        state = {
            "step": self.step,
            "scheduler": self.scheduler.state_dict(),
            "learning_rates": [group["lr"] for group in self.updater.optimizer.param_groups],
        }
        settings = manifest.published_settings(self.config)
        save_checkpoint(self.run_dir.checkpoint(self.step), delta, self.updater.state(), state, settings)
        prune_checkpoints(self.run_dir, self.config.save_total_limit)
        self.last_saved, self.num_changed = self.step, delta.count

    def _print_line(self, row: dict[str, Any]) -> None:
        if not console.console().is_terminal and self.step % self.config.logging_steps == 0:
            console.note(f"step {self.step}/{self.config.max_steps}  {_status(row)}")

    def _summary(self) -> dict[str, Any]:
        summary = {
            "run": str(self.run_dir.path),
            "steps": self.step,
            "accuracy_last_10": statistics.fmean(row["accuracy"] for row in self.recent) if self.recent else None,
            "changed_frac": self.num_changed / self.training_step.num_coordinates,
        }
        console.note(
            f"done: {self.step} steps, {summary['changed_frac']:.1%} of the weights changed; run directory: "
            f"{self.run_dir.path}"
        )
        return summary


def questions_of(step: int, prompts: Sequence[Prompted], config: TrainConfig) -> list[Prompted]:
    """The questions of a step: each epoch is its own seeded permutation, so no state has to be kept."""
    size, count = config.questions_per_step, len(prompts)
    chosen = []
    for position in range((step - 1) * size, step * size):
        epoch, place = divmod(position, count)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, "order", epoch))
        chosen.append(prompts[int(torch.randperm(count, generator=generator)[place])])
    return chosen


def _find_lr(
    config: TrainConfig,
    loaded: LoadedModel,
    prompts: Sequence[Prompted],
    curve: Sequence[float],
    protected: BlockMask | None,
    mask: BlockMask | None,
) -> dict[str, Any]:
    """``--find-lr``: print the curve, and return it; nothing is written."""
    from ssrctl.training.lr_sweep import SPREAD, sweep

    results = []
    bar = console.progress(unit="rates")
    with bar, contextlib.closing(_critic(config, loaded)) as critic:
        task = bar.add_task("find-lr", total=len(SPREAD), status="")
        for made in sweep(
            loaded,
            critic,
            config,
            lambda step: questions_of(step, prompts, config),
            curve,
            protected,
            mask,
            num_steps=config.find_lr_steps,
        ):
            results.append(made)
            bar.update(task, advance=1, status=f"{made.learning_rate:.1e}")
    late = [made.late_reward for made in results]
    known = [reward for reward in late if reward is not None]
    if not known:
        raise UserError("no learning rate gave a reward", "check the critic's scores with --max-steps 1")
    console.show_rates(results)
    best = results[late.index(max(known))]
    console.note(
        f"highest late reward at {best.learning_rate:.1e}; few steps are noisy: take it as the middle of a longer "
        "comparison, and stay below the first rate that breaks"
    )
    rows = [dataclasses.asdict(made) | {"late_reward": made.late_reward} for made in results]
    return {"rates": rows, "best": best.learning_rate}


def _status(row: dict[str, Any]) -> str:
    reward = "   -  " if row["reward"] is None else f"{row['reward']:+.3f}"
    return f"reward {reward}  accuracy {row['accuracy']:.3f}  {row['tokens_per_second']:.0f} tok/s"


def _open_run(config: TrainConfig) -> tuple[RunDir, Checkpoint | None]:
    """The run directory to write to, and the checkpoint to continue from."""
    wanted = config.resume_from_checkpoint
    if wanted is None:
        if config.output_dir is None:
            stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
            return RunDir(Path("runs") / f"{stamp}-{Path(config.model).name}"), None
        run_dir = RunDir(config.output_dir)
        if run_dir.path.exists() and not run_dir.path.is_dir():
            raise UserError(f"--output-dir {run_dir.path} is a file", "name a folder")
        if run_dir.config.exists():
            raise UserError(
                f"{run_dir.path} already holds a run",
                "continue it with --resume-from-checkpoint latest, or name another folder",
            )
        return run_dir, None
    if wanted == "latest":
        if config.output_dir is None:
            raise UserError("--resume-from-checkpoint latest needs the run", "give --output-dir RUN")
        folder = newest_checkpoint(config.output_dir)
    else:
        folder = Path(wanted)
    checkpoint = load_checkpoint(folder)
    run_dir = RunDir(folder.resolve().parent.parent)
    if config.output_dir is not None and config.output_dir.resolve() != run_dir.path:
        raise UserError(
            f"checkpoint {folder} belongs to the run {run_dir.path}, not to {config.output_dir}",
            "leave out --output-dir, or name that run",
        )
    if config.output_dir is not None:
        run_dir = RunDir(config.output_dir)
    _check_same_settings(config, run_dir)
    return run_dir, checkpoint


def _check_same_settings(config: TrainConfig, run_dir: RunDir) -> None:
    """A continuation must compute what the run would have computed."""
    # what a run of an earlier version does not name had its default
    defaults = {spec.name: spec.default for spec in dataclasses.fields(config)}
    before, now = defaults | run_dir.read_config(), manifest.settings_of(config)
    free = FREE_ON_RESUME | ({"max_steps"} if config.lr_scheduler_type.startswith("constant") else set())
    odd = [key for key in now if key not in free and before.get(key) != now[key]]
    if odd:
        listed = ", ".join(f"{key} was {before.get(key)!r}, is {now[key]!r}" for key in odd)
        raise UserError(
            f"the run was started with other settings: {listed}", f"continue with --config {run_dir.config}"
        )


def _budget_curve(config: TrainConfig) -> tuple[Sequence[float], str]:
    """The budget profile v_1.. and its name: a given one, the model's own if one ships, otherwise a flat one."""
    if config.credit != "step" or config.optimizer == "adamw":
        return [1.0], "none (one update unit)"
    name = config.budget_profile
    if name == "auto":
        own = Path(config.model).name.lower()
        if own in shipped_names("budgets", ".json"):
            return load_budget_profile(profile_path("budgets", own, ".json")).curve, own
        console.warn(
            f"no budget profile ships for {own}: every step gets the same budget; `ssrctl profile-budget --model "
            f"{config.model} -o budget.json` measures one for --budget-profile"
        )
        name = "flat"
    if name == "flat":
        return [1.0], "flat"
    return load_budget_profile(profile_path("budgets", name, ".json")).curve, Path(name).name


def _mask_at(path: Path | None, config: TrainConfig, loaded: LoadedModel) -> BlockMask | None:
    if path is None:
        return None
    return load_mask_for(
        path, loaded.shapes(), loaded.identity.fingerprint, ignore_fingerprint=config.ignore_fingerprint
    )


def _check_trainable(
    config: TrainConfig, loaded: LoadedModel, protected: BlockMask | None, mask: BlockMask | None
) -> None:
    """Something must be left to train."""
    if protected is not None and protected.count() >= loaded.num_parameters:
        raise UserError(f"{config.protect} protects all {protected.count()} weights", "nothing would be left to train")
    if mask is None:
        return
    left = mask if protected is None else mask - protected
    if not left.count():
        raise UserError(
            f"{config.mask} selects {mask.count()} weights, of which {left.count()} are not protected",
            "nothing would be left to train",
        )


def _update_bytes(config: TrainConfig) -> float:
    """Memory of an update per parameter, beside the weights."""
    itemsize = 4 if config.dtype in ("auto", "float32") else 2
    return updater_kind(config).bytes_per_parameter(config, itemsize)


def _warn_about_sampling(config: TrainConfig) -> None:
    if config.top_p < 1.0 or config.top_k:
        console.warn(
            "with --top-p or --top-k the sampling distribution is not the one whose log-probabilities the importance "
            "ratio uses; ratios are biased"
        )
    if config.advantage == "paper" and config.credit == "step":
        console.note("advantage: paper (eq. 9): advantages sum to zero within every response, good or bad")


def _plan(
    config: TrainConfig,
    loaded: LoadedModel,
    protected: BlockMask | None,
    mask: BlockMask | None,
    curve: Sequence[float],
    profile_name: str,
    prompts: Sequence[Prompted],
    run_dir: RunDir,
) -> dict[str, Any]:
    """What `--dry-run` prints."""
    responses = config.max_steps * config.questions_per_step * config.num_generations
    budgets = step_budgets(curve, 8, budget=config.budget, max_step_budget=config.max_step_budget)
    stored = next(loaded.model.parameters()).element_size()
    per_parameter = updater_kind(config).bytes_per_parameter(config, stored)
    return {
        "parameters": loaded.num_parameters,
        "protected": 0 if protected is None else protected.count(),
        "optimizer": config.optimizer,
        "trained": loaded.num_parameters if mask is None else mask.count(),
        "problems": len(prompts),
        "epochs": round(config.max_steps * config.questions_per_step / len(prompts), 3),
        "responses": responses,
        "most_response_tokens": responses * config.max_new_tokens,
        "critic": config.critic,
        "critic_calls": responses if config.critic == "llm" else 0,
        "learning_rate": config.resolved_learning_rate,
        "budget_profile": profile_name,
        "step_budgets_at_8_steps": ", ".join(f"{k:.4f}" for k in budgets),
        "gib_for_weights_and_updates": round(loaded.num_parameters * (stored + per_parameter) / 2**30, 3),
        "checkpoints": math.ceil(config.max_steps / config.save_steps),
        "output_dir": str(run_dir.path),
    }


@contextlib.contextmanager
def _tracker(config: TrainConfig, run_dir: RunDir) -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield what sends a metrics row to the tracker of ``--report-to``; with ``none`` it does nothing."""
    if config.report_to == "none":
        yield lambda row: None
        return
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    kind = LOGGER_TYPE_TO_CLASS[config.report_to]
    folder = {"logging_dir": str(run_dir.path / "tracker")} if kind.requires_logging_directory else {}
    tracker = kind("ssrctl", **folder)
    tracker.start()
    plain = {
        key: v if isinstance(v, int | float | str | bool) else str(v) for key, v in manifest.settings_of(config).items()
    }
    tracker.store_init_configuration(plain)
    try:
        yield lambda row: tracker.log({k: v for k, v in row.items() if v is not None}, step=row["step"])
    finally:
        tracker.finish()


def _check_tracker(name: str) -> None:
    """A tracker that is not installed is an error before any work is done."""
    from accelerate.tracking import get_available_trackers

    if name != "none" and name not in [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]:
        raise UserError(f"--report-to {name}: {name} is not installed", f"pip install {name}")
