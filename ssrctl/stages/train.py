"""`ssrctl train`: load the inputs, plan, train, report."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TINY, TrainConfig
from ssrctl.core.budget import SHOWN_STEPS, Grant, grant
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import Critic
from ssrctl.critics.registry import CriticResources, make_critic
from ssrctl.distributed.traffic import dense_bytes_sent, kept_bytes_sent
from ssrctl.distributed.world import World, joined_world
from ssrctl.errors import UserError
from ssrctl.io import console
from ssrctl.io.artifacts import ModelIdentity, load_mask_for
from ssrctl.io.budget_file import MIN_PROBLEMS, load_budget_profile, shipped_budget_profile
from ssrctl.io.locks import locked_folder
from ssrctl.io.package_data import profile_path
from ssrctl.io.problems import load_problems
from ssrctl.models.loading import UNREAD, LoadedModel, describe_model, folder_of, load_model, load_skeleton
from ssrctl.models.precision import describe_precision, itemsize_of, settle_dtype
from ssrctl.models.stored_parameters import check_exportable
from ssrctl.sampling.agreement import agree
from ssrctl.sampling.groups import Prompted, describe_prompt, prepare_prompts
from ssrctl.text.prompts import load_prompt_format
from ssrctl.training.checkpointing import enable_checkpointing
from ssrctl.training.lr_sweep import find_lr, sweep
from ssrctl.training.memory_plan import memory_facts, settle_step_gradient
from ssrctl.training.resuming import open_run, run_folder
from ssrctl.training.tracking import check_tracker
from ssrctl.training.trainer import Trainer, input_hashes, questions_of_step
from ssrctl.training.training_step import TrainingStep
from ssrctl.training.unit_gradients import trainable
from ssrctl.training.unit_observer import UnitObserver
from ssrctl.training.updaters import frozen_coordinates, make_updater, updater_kind

CRITIC_CALLS = "critic_calls.jsonl"
ASSUMED_PROMPT_TOKENS = 256  # in plans for a model without a tokenizer
ACTIVATION_BYTES_PER_PARAMETER = 2.0  # a rough allowance for graphs and caches in the memory check


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train, and return a summary; with ``--dry-run`` the plan, with ``--find-lr`` the rates that were tried.

    Raises:
        UserError: settings or inputs that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint of the last whole step written.
    """
    console.note(describe_model(config))
    check_tracker(config.report_to)
    with joined_world(config.device) as world:
        config = settle_dtype(config)
        _check_processes(config, world)
        run_dir = world.on_main(lambda: run_folder(config))
        if config.dry_run or config.find_lr or not world.is_main:
            return _run(config, run_dir, world)
        with locked_folder(run_dir.path):
            return _run(config, run_dir, world)


def _check_processes(config: TrainConfig, world: World) -> None:
    """Raise a UserError for what several processes cannot divide."""
    processes = max(world.size, config.num_processes or 1)
    if processes > config.questions_per_step:
        raise UserError(
            f"{processes} processes for {config.questions_per_step} questions in a step: some would have none",
            f"use --questions-per-step {processes} or more, or fewer processes",
        )
    if world.size > 1 and config.find_lr:
        raise UserError(
            f"--find-lr runs in one process, {world.size} were launched", "run it without a launcher, then train with N"
        )


def _run(config: TrainConfig, run_dir: RunDir, world: World) -> dict[str, Any] | None:
    checkpoint = open_run(config, run_dir)
    prompt_format = load_prompt_format(config)
    problems = load_problems(config, "train", derive_seed(config.seed, "problems"))
    loaded = _load(config)
    protected = _mask_at(config.protect, config, loaded)
    mask = _mask_at(config.mask, config, loaded)
    _check_trainable(config, loaded, protected, mask)
    curve, profile_name = _budget_curve(config, loaded.identity)
    grants = _grants(config, curve, loaded, frozen_coordinates(protected, mask))
    prompts: list[Prompted] = []
    first_prompt = None
    if loaded.tokenizer is not None:
        prompts, num_left_out = prepare_prompts(loaded, problems, prompt_format, config.max_new_tokens)
        if num_left_out:
            console.warn(f"{num_left_out} of {len(problems)} questions do not fit the context and are left out")
        first_prompt = describe_prompt(loaded, prompts[0])
        console.note(f"first prompt: {first_prompt}")
    trained_frac = 1.0 if mask is None else mask.density()
    longest = max((len(prompt.prompt_ids) for prompt in prompts), default=ASSUMED_PROMPT_TOKENS)
    context = loaded.context_length
    if config.model != TINY and context is not None and longest + config.max_new_tokens > context:
        console.warn(
            f"the longest prompt ({longest} tokens) and --max-new-tokens {config.max_new_tokens} exceed the model's context of "
            f"{context}: responses end there, unfinished"
        )
    _warn_about_sampling(config)
    if config.dry_run:
        plan = _plan(config, loaded, protected, mask, profile_name, grants, len(prompts) or len(problems), run_dir)
        plan |= memory_facts(config, loaded, longest, trained_frac)
        plan |= _exchange_plan(config, loaded, max(world.size, config.num_processes or 1))
        plan["first_prompt"] = first_prompt
        console.show_plan("plan", plan)
        return plan
    if config.find_lr:
        questions = functools.partial(questions_of_step, prompts=prompts, config=config)
        with contextlib.closing(_critic(config, loaded)) as critic:
            return find_lr(sweep(loaded, critic, config, questions, curve, protected, mask))
    settled = settle_step_gradient(config, loaded, longest, trained_frac)
    parameters = trainable(loaded.model)
    updater = make_updater(parameters, config, protected, mask, world)
    observer = UnitObserver(parameters, config, frozen_coordinates(protected, mask))
    ledger = run_dir.path / CRITIC_CALLS if config.critic == "llm" else None
    more = {
        **{f"contents of {name}": found for name, found in input_hashes(config).items()},
        "budget curve": list(curve),
        # from the free memory without --memory-limit, which may differ
        "step gradients": [settled.step_gradient, settled.units_at_once, settled.gradient_chunk_tokens],
        "checkpoint": None if checkpoint is None else [checkpoint.state["step"], checkpoint.delta.count],
    }
    agree(world, config, loaded, prompts, more)
    scores_here = world.is_main or config.critic == "rollout"
    with contextlib.closing(_critic(config, loaded, ledger)) if scores_here else contextlib.nullcontext() as critic:
        step = TrainingStep(loaded, critic, updater, settled, curve, observer, world=world)
        trainer = Trainer(config, loaded, run_dir, prompts, step)
        if checkpoint is None:
            trainer.start(profile_name)
        else:
            trainer.resume(checkpoint)
        return trainer.train()


def _load(config: TrainConfig) -> LoadedModel:
    """Load the model; for a plan read its config only, unless it is the one that comes with the package."""
    if config.dry_run and config.model != TINY:
        return load_skeleton(config)
    loaded = load_model(
        config, bytes_per_parameter=_update_bytes(config, itemsize_of(config)) + ACTIVATION_BYTES_PER_PARAMETER
    )
    console.note(describe_precision(loaded.model))
    if config.gradient_checkpointing:
        enable_checkpointing(loaded.model)
    check_exportable(folder_of(config), loaded.shapes(), loaded.identity.fingerprint)
    return loaded


def _update_bytes(config: TrainConfig, itemsize: int) -> float:
    """Return the bytes per weight of the update's gradient and state, and of the start weights that ``--beta`` keeps."""
    return updater_kind(config).bytes_per_parameter(config, itemsize) + (itemsize if config.beta else 0)


def _critic(config: TrainConfig, loaded: LoadedModel, ledger: Path | None = None) -> Critic:
    seed = derive_seed(config.seed, "critic")
    resources = CriticResources(
        policy=lambda: loaded, sampling=config, seed=seed, device=str(loaded.device), ledger=ledger
    )
    return make_critic(config, resources)


def _budget_curve(config: TrainConfig, model: ModelIdentity) -> tuple[Sequence[float], str]:
    """Return the curve v_1.. of the budget rule, and the profile's name.

    The profile is the given one; with ``auto`` the one that ships for the weights with this fingerprint, or a flat one.
    """
    if config.credit != "step" or config.optimizer == "adamw":
        return [1.0], "none (one update unit)"
    name = config.budget_profile
    if name == "auto" and model.fingerprint == UNREAD:
        return [1.0], "auto (found by the weights' fingerprint at the start)"
    shipped = shipped_budget_profile(model.fingerprint) if name == "auto" else None
    if name == "flat":
        return [1.0], "flat"
    if name == "auto" and shipped is None:
        console.warn(
            f"no budget profile ships for the weights of {model.name}: every step gets the same budget; "
            f"`ssrctl profile-budget --model {config.model} -o budget.json` measures one for --budget-profile"
        )
        return [1.0], "flat"
    if shipped is not None:
        name, profile = shipped
    else:
        profile = load_budget_profile(profile_path("budgets", name, ".json"))
    if model.fingerprint not in (profile.model.fingerprint, UNREAD):
        console.warn(
            f"the budget profile {name} was measured on other weights ({profile.model.name}); `ssrctl profile-budget` "
            "measures one for these"
        )
    curve = profile.curve(config.budget_rule)
    if len(curve) == 1 < len(profile.mass.mean):
        console.warn(
            f"the budget profile {name} has fewer than {MIN_PROBLEMS} problems for every step after the first: every "
            "step gets the same budget (measure again with a larger --num-problems)"
        )
    return curve, Path(name).name


def _grants(config: TrainConfig, curve: Sequence[float], loaded: LoadedModel, frozen: BlockMask | None) -> list[Grant]:
    """Return the budgets of questions of some numbers of steps in short; warn where they starve a step."""
    unknown = config.budget_profile == "auto" and loaded.identity.fingerprint == UNREAD
    if config.credit != "step" or config.optimizer == "adamw" or unknown:
        return []
    num_unprotected = loaded.num_parameters - (0 if frozen is None else frozen.count())
    limits = {"budget": config.budget, "max_step_budget": config.max_step_budget}
    grants = [grant(curve, steps, num_unprotected, **limits, rule=config.budget_rule) for steps in SHOWN_STEPS]
    if starving := next((found for found in grants if found.starves), None):
        console.warn(
            f"of {starving.num_steps} steps one gets {starving.smallest} coordinates, less than a tenth of an equal share "
            f"({starving.equal}): see --budget-rule and --budget-profile"
        )
    return grants


def _mask_at(path: Path | None, config: TrainConfig, loaded: LoadedModel) -> BlockMask | None:
    if path is None:
        return None
    ignore = config.ignore_fingerprint or loaded.identity.fingerprint == UNREAD
    return load_mask_for(path, loaded.shapes(), loaded.identity.fingerprint, ignore_fingerprint=ignore)


def _check_trainable(
    config: TrainConfig, loaded: LoadedModel, protected: BlockMask | None, mask: BlockMask | None
) -> None:
    """Raise a UserError if no coordinate is left to train."""
    if protected is not None and protected.count() >= loaded.num_parameters:
        raise UserError(f"{config.protect} protects all {protected.count()} weights", "nothing would be left to train")
    if mask is None:
        return
    left = mask if protected is None else mask - protected
    if not left.count():
        raise UserError(
            f"{config.mask} selects {mask.count()} weights, {left.count()} of them unprotected",
            "nothing would be left to train",
        )


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
    profile_name: str,
    grants: Sequence[Grant],
    num_problems: int,
    run_dir: RunDir,
) -> dict[str, Any]:
    """Return the plan that ``--dry-run`` prints."""
    responses = config.max_steps * config.questions_per_step * config.num_generations
    stored = itemsize_of(config, loaded.model)
    return {
        "parameters": loaded.num_parameters,
        "protected": 0 if protected is None else protected.count(),
        "optimizer": config.optimizer,
        "trained": loaded.num_parameters if mask is None else mask.count(),
        "problems": num_problems,
        "epochs": round(config.max_steps * config.questions_per_step / num_problems, 3),
        "responses": responses,
        "most_response_tokens": responses * config.max_new_tokens,
        "critic": config.critic,
        "critic_calls": responses if config.critic == "llm" else 0,
        "learning_rate": config.resolved_learning_rate,
        "budget_profile": profile_name,
        "budget_rule": config.budget_rule,
        **{
            f"budgets_at_{found.num_steps}_steps": f"{found.granted_frac:.0%} of B granted, smallest step "
            f"{found.smallest} coordinates ({found.equal} in an equal share)"
            for found in grants
        },
        "gib_for_weights_and_updates": round(
            loaded.num_parameters * (stored + _update_bytes(config, stored)) / 2**30, 3
        ),
        "checkpoints": math.ceil(config.max_steps / config.save_steps),
        "output_dir": str(run_dir.path),
    }


def _exchange_plan(config: TrainConfig, loaded: LoadedModel, processes: int) -> dict[str, Any]:
    """Return the part of the plan about several processes; with one, nothing is sent."""
    if processes == 1:
        return {"num_processes": 1}
    stored, count = itemsize_of(config, loaded.model), loaded.num_parameters
    dense = dense_bytes_sent(count, itemsize=stored, processes=processes)
    sent, held = dense, 0.0
    if config.optimizer == "kronos":
        sent = kept_bytes_sent(
            count,
            itemsize=stored,
            questions=config.questions_per_step,
            budget=config.budget,
            unit_share=min(config.max_step_budget, config.budget),
            processes=processes,
        )
        # its own questions wait for the others', packed and not, and one that is received is unpacked
        held = (2 * math.ceil(config.questions_per_step / processes) + 2) * config.budget * count * (2 + stored)
    return {
        "num_processes": processes,
        "gib_per_process": round((count * (stored + _update_bytes(config, stored)) + held) / 2**30, 3),
        "mib_sent_per_step_and_process": round(sent / 2**20, 3),
        "mib_of_a_dense_all_reduce": round(dense / 2**20, 3),
    }
