"""`ssrctl train`: load the inputs, plan, train, report."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.checkpoints.run_dir import RunDir
from ssrctl.configs import TINY, TrainConfig
from ssrctl.core.budget import SHOWN_STEPS, Grant, grant
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.base import Critic, CriticResources
from ssrctl.critics.own_code import OwnCritic
from ssrctl.critics.registry import CRITICS, find_critic, make_critic
from ssrctl.critics.rewards import RewardFunction, Rewards, load_rewards, make_rewards
from ssrctl.distributed.dealing import teams
from ssrctl.distributed.sharding import ShardedModel
from ssrctl.distributed.traffic import dense_bytes_sent, kept_bytes_sent, scattered_bytes_sent, sharded_bytes_sent
from ssrctl.distributed.world import World, joined_world
from ssrctl.errors import UserError
from ssrctl.evaluation.run_log import CRITIC_CALLS, read_run
from ssrctl.evaluation.run_page import PAGE, run_document
from ssrctl.io import console
from ssrctl.io.artifacts import ModelIdentity, load_mask_for, mask_at
from ssrctl.io.budget_file import MIN_PROBLEMS, budget_at, load_budget_profile, shipped_budget_profile
from ssrctl.io.locks import locked_folder
from ssrctl.io.problems import load_problems
from ssrctl.models.loading import (
    UNREAD,
    LoadedModel,
    describe_model,
    folder_of,
    free_bytes,
    load_model,
    load_skeleton,
)
from ssrctl.models.precision import describe_precision, itemsize_of, repeat_sums, resolve_device, settle_dtype
from ssrctl.models.stored_parameters import check_exportable
from ssrctl.process_rank import local_rank
from ssrctl.report.write import write_last_page
from ssrctl.sampling.agreement import agree
from ssrctl.sampling.engines.base import Engine
from ssrctl.sampling.engines.vllm_engine import served_engine
from ssrctl.sampling.groups import Prompted, prepare_prompts
from ssrctl.text.prompts import load_prompt_format
from ssrctl.training.checkpointing import enable_checkpointing, outer_layers
from ssrctl.training.lora import AdaptedModel, add_adapters, check_peft
from ssrctl.training.lr_sweep import find_lr, sweep
from ssrctl.training.memory_plan import memory_facts, settle_step_gradient
from ssrctl.training.resuming import open_run, run_folder
from ssrctl.training.time_plan import num_units, time_shares
from ssrctl.training.tracking import check_trackers
from ssrctl.training.trainer import Trainer, input_hashes, questions_of_step
from ssrctl.training.training_step import TrainingStep
from ssrctl.training.unit_gradients import trainable
from ssrctl.training.unit_observer import UnitObserver
from ssrctl.training.updaters import frozen_coordinates, make_updater, updater_kind
from ssrctl.training.weight_pushes import WeightPushes

ASSUMED_PROMPT_TOKENS = 256  # in plans for a model without a tokenizer


def run(config: TrainConfig) -> dict[str, Any] | None:
    """Train, and return a summary; with ``--dry-run`` the plan, with ``--find-lr`` the rates that were tried.

    Raises:
        UserError: settings or inputs that cannot be used.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint of the last whole step written.
    """
    if config.critic not in CRITICS:
        find_critic(config.critic)  # an error of a user's module is to be known now
    return _start(config, _Judges(load_rewards(config.reward)))


def train(
    config: TrainConfig, *, critic: Critic | None = None, rewards: Sequence[RewardFunction] = ()
) -> dict[str, Any] | None:
    """Train as ``ssrctl train`` does, with a critic and rewards that may be objects of the caller.

    Args:
        config: the run's settings. With ``critic`` or ``rewards`` its settings of that name become the names of these.
        critic: scores the steps, in place of ``config.critic``; it is closed at the end.
        rewards: their sum is the reward of a response, in place of ``config.reward``.

    Returns:
        ``run`` (the run directory), ``steps``, ``accuracy_last_10``, ``changed_frac``; with ``dry_run`` the plan, with
        ``find_lr`` the rates that were tried; None in the processes of a job that are not the main one.

    Raises:
        UserError: settings or inputs that cannot be used.
        Stopped: the critic or a reward failed, or a limit was reached; a checkpoint of the last whole step is written.
        Interrupted: after Ctrl-C or SIGTERM, with a checkpoint of the last whole step written.
    """
    if critic is not None:
        config = dataclasses.replace(config, critic=_name_of(type(critic)))
    if rewards:
        config = dataclasses.replace(config, reward=[_name_of(function) for function in rewards])
        own = make_rewards(list(zip(config.reward, rewards, strict=True)))
    else:
        own = load_rewards(config.reward)
    return _start(config, _Judges(own, None if critic is None else OwnCritic(config.critic, critic)))


def _name_of(part: Any) -> str:
    """Return ``module:name`` of a class or function; of another object, the name of its class."""
    name = getattr(part, "__name__", type(part).__name__)
    return f"{getattr(part, '__module__', '') or type(part).__module__}:{name if name.isidentifier() else 'function'}"


@dataclass(frozen=True)
class _Judges:
    """Objects that judge the responses: the rewards, and the caller's critic in place of the one of the settings."""

    rewards: Rewards | None
    critic: Critic | None = None

    def make_critic(
        self, config: TrainConfig, loaded: LoadedModel, ledger: Path | None = None, engine: Engine | None = None
    ) -> Critic:
        """Return the caller's critic, or make the one of ``--critic``."""
        if self.critic is not None:
            return self.critic
        seed = derive_seed(config.seed, "critic")
        resources = CriticResources(
            policy=lambda: loaded,
            sampling=config,
            seed=seed,
            device=str(loaded.device),
            ledger=ledger,
            engine=lambda _: engine,
        )
        return make_critic(config, resources)


def _start(config: TrainConfig, judges: _Judges) -> dict[str, Any] | None:
    console.note(describe_model(config))
    _check_masks_exist(config)
    check_trackers(config.report_to)
    if config.lora_r is not None:
        check_peft()
    with joined_world(config.device) as world:
        config = settle_dtype(config)
        _check_processes(config, world)
        run_dir = world.on_main(lambda: run_folder(config))
        if config.dry_run or config.find_lr or not world.is_main:
            return _run(config, run_dir, world, judges)
        with locked_folder(run_dir.path):
            return _run(config, run_dir, world, judges)


def _check_masks_exist(config: TrainConfig) -> None:
    """Raise a UserError for a mask that is not there, before a model or a data set is fetched."""
    for name in ("protect", "mask"):
        path = getattr(config, name)
        if path is not None and not os.path.exists(mask_at(path)):  # noqa: PTH110 (Path.exists raises for names that are too long)
            raise UserError(
                f"--{name} {path} not found",
                "make it with `ssrctl superweights` or `ssrctl mask`; `ssrctl recipes NAME` prints the commands of a recipe",
            )


def _check_processes(config: TrainConfig, world: World) -> None:
    """Raise a UserError for what several processes cannot divide."""
    processes = max(world.size, config.num_processes or 1)
    questions, responses = config.questions_per_step, config.questions_per_step * config.num_generations
    if config.rollout_engine != "transformers" and config.find_lr:
        raise UserError(
            f"--find-lr samples in this process, not with --rollout-engine {config.rollout_engine}",
            "leave out --rollout-engine, and give the rate to the run with it",
        )
    if config.sharding != "none":
        if processes > config.num_generations:
            console.warn(
                f"{processes} processes for {config.num_generations} responses to a question: "
                f"{processes - config.num_generations} hold a shard and have no response to learn from "
                f"(--num-generations {processes} would give each one)"
            )
        return
    if processes > responses:
        raise UserError(
            f"{processes} processes for {responses} responses in a step ({questions} questions of "
            f"{config.num_generations}): some would have none",
            f"use {responses} processes or fewer, or more --questions-per-step or --num-generations",
        )
    if processes <= questions:
        return
    split = f"{processes} processes for {questions} questions in a step share the responses of a question"
    if config.scope == "tensor":
        raise UserError(
            f"{split}, whose gradients are summed first, and --scope tensor selects before that",
            f"use --scope global, or --questions-per-step {processes} or more",
        )
    if config.step_gradient == "local":
        raise UserError(
            f"{split}, and --step-gradient local depends on all of them",
            f"use an exact way, or --questions-per-step {processes} or more",
        )


def _run(config: TrainConfig, run_dir: RunDir, world: World, judges: _Judges) -> dict[str, Any] | None:
    checkpoint = open_run(config, run_dir)
    prompt_format = load_prompt_format(config)
    problems = load_problems(config, "train", derive_seed(config.seed, "problems"))
    loaded, sharded = _load(config, world)
    if config.lora_r is not None:
        loaded = add_adapters(loaded, config)
    protected = _mask_at(config.protect, config, loaded)
    mask = _mask_at(config.mask, config, loaded)
    _check_trainable(config, loaded, protected, mask)
    curve, profile_name = _budget_curve(config, loaded.identity)
    grants = _grants(config, curve, loaded, frozen_coordinates(protected, mask))
    prompts: list[Prompted] = []
    first_prompt = None
    if loaded.tokenizer is not None:
        prompts, first_prompt = prepare_prompts(loaded, problems, prompt_format, config.max_new_tokens)
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
        processes = max(world.size, config.num_processes or 1)
        plan |= memory_facts(config, loaded, longest, trained_frac, 1 if config.sharding == "none" else processes)
        plan |= _step_plan(config, loaded, longest, processes)
        plan["first_prompt"] = first_prompt
        console.show_plan("plan", plan)
        return plan
    settled = config if sharded is not None else settle_step_gradient(config, loaded, longest, trained_frac)
    more = {
        **{f"contents of {name}": found for name, found in input_hashes(config).items()},
        "budget curve": list(curve),
        # from the free memory without --memory-limit, which may differ
        "step gradients": [settled.step_gradient, settled.units_at_once, settled.gradient_chunk_tokens],
        "checkpoint": None if checkpoint is None else [checkpoint.state["step"], checkpoint.delta.count],
    }
    agree(world, config, loaded, prompts, more)
    scores_here = world.is_main or config.critic == "rollout"
    ledger = run_dir.path / CRITIC_CALLS if config.critic == "llm" and not config.find_lr else None
    engine = served_engine(config, loaded, world, sharded)
    made: Any = contextlib.nullcontext()
    if scores_here:
        made = contextlib.closing(judges.make_critic(config, loaded, ledger, engine))
    with made as critic:
        if config.find_lr:
            questions = functools.partial(questions_of_step, prompts=prompts, config=config)
            tried = sweep(
                loaded, critic, settled, questions, curve, protected, mask, rewards=judges.rewards, world=world
            )
            return find_lr(tried)
        parameters = trainable(loaded.model)
        observer = None
        if sharded is None:
            observer = UnitObserver(parameters, config, frozen_coordinates(protected, mask))
        updater = make_updater(parameters, config, protected, mask, world, sharded)
        pushes = None
        if engine is not None:
            named = dict(parameters if sharded is None else sharded.local_parameters())
            every = config.verify_engine_every
            pushes = WeightPushes(engine, updater, named, verify_every=every, world=world, sharded=sharded)
        step = TrainingStep(
            loaded,
            critic,
            updater,
            settled,
            curve,
            observer,
            pushes,
            world=world,
            sharded=sharded,
            rewards=judges.rewards,
        )
        trainer = Trainer(config, loaded, run_dir, prompts, step)
        if checkpoint is None:
            trainer.start(profile_name)
        else:
            trainer.resume(checkpoint)
        if engine is not None:
            engine.connect()
        summary = trainer.train()
    if config.report and world.is_main:
        folder = run_dir.path
        write_last_page(lambda: run_document([read_run(folder, folder.resolve().name)]), folder / PAGE)
    return summary


def _load(config: TrainConfig, world: World) -> tuple[LoadedModel, ShardedModel | None]:
    """Load the model; for a plan read its config only, unless it is the one that comes with the package."""
    if config.dry_run and config.model != TINY:
        return load_skeleton(config), None
    # activations are planned when the lengths are known, adapters are small
    beside = 0.0 if config.lora_r is not None else _update_bytes(config, itemsize_of(config))
    if config.sharding == "none" or world.size == 1:
        loaded = load_model(config, bytes_per_parameter=beside)
        return _prepared(config, loaded), None
    sharded = None
    for turn in range(1 + max(world.gather(local_rank()))):  # a machine holds one whole model at a time
        if turn == local_rank():
            on_cpu = dataclasses.replace(config, device="cpu")
            loaded = _prepared(config, load_model(on_cpu, bytes_per_parameter=beside / world.size))
            sharded = ShardedModel(loaded.model, outer_layers(loaded.model), world)
        world.wait()
    assert sharded is not None
    if config.repeatable_sums:
        repeat_sums(world.device)
    sharded.begin()
    console.note(f"weights, gradients and state are sharded over {world.size} processes (FSDP2)")
    _check_whole_weights(config, loaded, world)
    return loaded, sharded


def _check_whole_weights(config: TrainConfig, loaded: LoadedModel, world: World) -> None:
    """Refuse to gather the whole weights for sampling where they do not fit beside the shards."""
    found = free_bytes(world.device)
    sharing = (
        1 if world.device.type == "cuda" else 1 + max(world.gather(local_rank()))
    )  # the machine's memory is shared
    free = min(world.gather(math.inf if found is None else found / sharing))
    needed = loaded.num_parameters * itemsize_of(config, loaded.model)
    if config.gathers_whole and needed > free:
        raise UserError(
            f"sampling would gather {needed / 2**30:.3g} GiB of weights in each process, {max(free, 0) / 2**30:.3g} GiB are "
            "free",
            "use --sampling-weights shards, or --dtype bfloat16",
        )


def _prepared(config: TrainConfig, loaded: LoadedModel) -> LoadedModel:
    console.note(describe_precision(loaded.model))
    if config.gradient_checkpointing:
        enable_checkpointing(loaded.model)
    check_exportable(folder_of(config), loaded.shapes(), loaded.identity.fingerprint)
    return loaded


def _update_bytes(config: TrainConfig, itemsize: int) -> float:
    """Return the bytes per weight of the update's gradient and state, and of the start weights, if they are kept."""
    own = updater_kind(config).bytes_per_parameter(config, itemsize)
    return own + (itemsize if config.keeps_start_weights else 0)


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
        profile = load_budget_profile(budget_at(name))
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
    trained, itemsize, frozen = _trained(config, loaded)
    return {
        "parameters": loaded.num_parameters,
        "protected": 0 if protected is None else protected.count(),
        "optimizer": config.optimizer,
        "trained": trained if mask is None else mask.count(),
        "problems": num_problems,
        "epochs": round(config.max_steps * config.questions_per_step / num_problems, 3),
        "responses": responses,
        "most_response_tokens": responses * config.max_new_tokens,
        "critic": config.critic,
        "critic_calls": responses if config.critic == "llm" else 0,
        "reward": config.reward or "of the final answer",
        "learning_rate": config.resolved_learning_rate,
        "budget_profile": profile_name,
        "budget_rule": config.budget_rule,
        **{
            f"budgets_at_{found.num_steps}_steps": f"{found.granted_frac:.0%} of B granted, smallest step "
            f"{found.smallest} coordinates ({found.equal} in an equal share)"
            for found in grants
        },
        "gib_for_weights_and_updates": round(
            (trained * (itemsize + _update_bytes(config, itemsize)) + frozen) / 2**30, 3
        ),
        "checkpoints": math.ceil(config.max_steps / config.save_steps),
        "output_dir": str(run_dir.path),
    }


def _trained(config: TrainConfig, loaded: LoadedModel) -> tuple[int, int, int]:
    """Return the number of parameters that an updater holds, the bytes of each, and those of weights outside of it."""
    stored = itemsize_of(config, loaded.model)
    if isinstance(loaded, AdaptedModel):
        return loaded.num_trained, 4, loaded.num_parameters * stored
    return loaded.num_parameters, stored, 0


def _step_plan(config: TrainConfig, loaded: LoadedModel, prompt_tokens: int, processes: int) -> dict[str, Any]:
    """Return the part of the plan about several processes, and where the time of a step goes; one process sends nothing."""
    count, itemsize, frozen = _trained(config, loaded)
    plan: dict[str, Any] = {"num_processes": processes}
    sent = 0.0
    if processes > 1:
        exchange = _exchange_of_replicas if config.sharding == "none" else _exchange_of_shards
        sent, held, more = exchange(config, count, itemsize, processes)
        plan |= {
            **more,
            "gib_per_process": round((held + frozen) / 2**30, 3),
            "mib_sent_per_step_and_process": round(sent / 2**20, 3),
        }
    shares = time_shares(
        config,
        loaded.model,
        prompt_tokens,
        device=resolve_device(config.device).type,
        itemsize=itemsize,
        processes=processes,
        sent=sent,
    )
    return plan | {"shares_of_a_step": {name: round(share, 3) for name, share in shares.items()}}


def _exchange_of_shards(
    config: TrainConfig, count: int, itemsize: int, processes: int
) -> tuple[float, float, dict[str, Any]]:
    """Return the bytes that a process sends per step, those that it holds, and further facts, with ``--sharding``."""
    whole = config.gathers_whole
    passes = 1 if whole else math.ceil(config.questions_per_step / processes) * config.max_new_tokens
    if config.rollout_engine != "transformers":
        passes = 0
    sent = sharded_bytes_sent(
        count,
        itemsize=itemsize,
        questions=config.questions_per_step,
        units=num_units(config),
        sampling_passes=passes,
        processes=processes,
    )
    facts = {"gib_of_whole_weights_in_sampling": round(count * itemsize / 2**30, 3) if whole else 0.0}
    return (
        sent,
        count * (itemsize + _update_bytes(config, itemsize)) / processes,
        {"sharding": config.sharding, **facts},
    )


def _exchange_of_replicas(
    config: TrainConfig, count: int, itemsize: int, processes: int
) -> tuple[float, float, dict[str, Any]]:
    """As ``_exchange_of_shards``, of processes that each hold the whole model."""
    questions = config.questions_per_step
    held = count * (itemsize + _update_bytes(config, itemsize))
    dense = dense_bytes_sent(count, itemsize=itemsize, processes=processes)
    facts: dict[str, Any] = {"mib_of_a_dense_all_reduce": round(dense / 2**20, 3)}
    if config.optimizer == "adamw":
        return dense, held, facts
    sent = kept_bytes_sent(
        count,
        itemsize=itemsize,
        questions=questions,
        budget=config.budget,
        unit_share=min(config.max_step_budget, config.budget),
        processes=processes,
    )
    # its own questions wait for the others', packed and not, and one that is received is unpacked
    held += (2 * math.ceil(questions / processes) + 2) * config.budget * count * (2 + itemsize)
    if processes > questions:  # a unit's gradient is summed over those who share the question
        facts["processes_per_question"] = team = len(teams(questions, processes)[0])
        sent += num_units(config) * scattered_bytes_sent(count, itemsize=itemsize, processes=team)
        held += count * itemsize
    return sent, held, facts
