"""`ssrctl profile-budget`: measure how gradient magnitude decays over steps (SSR section 2.3.3)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ssrctl.configs import CriticOptions, ProfileBudgetConfig
from ssrctl.core.advantages import two_level_advantages
from ssrctl.core.bits import bits_from_mask
from ssrctl.core.budget import RULES, SHOWN_STEPS, coordinates, grant
from ssrctl.core.mask import BlockMask
from ssrctl.core.seeds import derive_seed
from ssrctl.critics.registry import make_critic
from ssrctl.critics.scoring import score_groups
from ssrctl.distributed.dividing import Spread, divide
from ssrctl.distributed.world import World, joined_world
from ssrctl.errors import UserError
from ssrctl.io.artifacts import load_mask_for, mask_at
from ssrctl.io.budget_file import MIN_PROBLEMS, BudgetProfile, save_budget_profile
from ssrctl.io.console import console, note, progress, show_plan, warn
from ssrctl.io.files import whole_file
from ssrctl.io.interrupts import deferred_interrupt
from ssrctl.io.manifest import file_hash, published_settings, versions
from ssrctl.io.problems import load_problems
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.masks.budget_profile import StepMass, mean_curves, problem_masses, traces_batch
from ssrctl.models.loading import LoadedModel, describe_model, load_model
from ssrctl.models.precision import settle_dtype
from ssrctl.report.charts import load_matplotlib
from ssrctl.sampling.agreement import agree
from ssrctl.sampling.groups import Prompted, prepare_prompts, sample_groups
from ssrctl.text.prompts import build_prompt, load_prompt_format, use_chat_template
from ssrctl.training.step_gradients.batch import group_batch
from ssrctl.training.unit_gradients import GroupBatch

GRADIENT_BYTES = 4.0
BITS_BYTES = 2 / 8  # protected and claimed coordinates, one bit each
ACTIVATION_BYTES = 2.0  # a rough allowance for the graph of one problem's responses

Rewards = list[list[float | None]]


@dataclass(frozen=True)
class _Source:
    """A source of ``num_groups`` groups of scored responses, each made by its number; sampled ones have ``prompts``."""

    num_groups: int
    make: Callable[[int], tuple[GroupBatch, Rewards]]
    plan: dict[str, Any]
    prompts: Sequence[Prompted] = ()


def run(config: ProfileBudgetConfig) -> dict[str, Any]:
    """Measure the profile, write it (json, and an svg next to it where matplotlib is installed) and return it.

    With ``--dry-run`` the model is loaded, the plan printed and returned, and nothing is written.

    Raises:
        UserError: settings or inputs that cannot be used; no problem has a gradient at its first step.
        KeyboardInterrupt: after Ctrl-C, with a profile of the problems done so far written.
    """
    note(describe_model(config))
    with joined_world(config.device) as world:
        return _run(settle_dtype(config), world)


def _run(config: ProfileBudgetConfig, world: World) -> dict[str, Any]:
    if config.output.is_dir():
        raise UserError(f"cannot write {config.output}: it is a folder", "name a file")
    traces = None if config.traces is None else _read_traces(config)
    problems = None if traces is not None else _problems(config)
    loaded = load_model(config, bytes_per_parameter=GRADIENT_BYTES + BITS_BYTES + ACTIVATION_BYTES)
    mask = _protected(config, loaded)
    claim = coordinates(config.claim_fraction, mask.numel - mask.count())
    if claim == 0:
        raise UserError(
            f"{config.claim_fraction:.4%} of {mask.numel - mask.count()} unprotected weights is less than one weight",
            "raise --claim-fraction",
        )
    if traces is not None:
        source = _from_traces(config, loaded, traces)
    else:
        assert problems is not None
        source = _from_sampling(config, loaded, problems)
    plan = {"parameters": loaded.num_parameters, "protected": mask.count(), "claimed_per_step": claim, **source.plan}
    plan |= {"backward_passes": f"at most {source.num_groups * config.max_steps}", "output": str(config.output)}
    if config.dry_run:
        show_plan("profile-budget", plan)
        return plan
    files = {} if config.traces is None else {"contents of traces": file_hash(config.traces)}
    if config.protect is not None:
        files["contents of protect"] = file_hash(mask_at(config.protect))
    agree(world, config, loaded, source.prompts, files)
    bits = {name: packed.to(loaded.device) for name, packed in bits_from_mask(mask).items()}

    def lead(spread: Spread[int, list[StepMass]]) -> dict[str, Any]:
        measured, interrupted = _measure(spread, source.num_groups)
        result = _write(config, loaded, measured, mask.numel - mask.count())
        if interrupted:
            warn(f"interrupted: the profile is of {len(measured)} of {source.num_groups} problems")
            raise KeyboardInterrupt
        return result

    return divide(world, functools.partial(_masses, config, loaded, source, claim, bits), lead) or {}


# --------------------------------------------------------------------------------------------------
# inputs


def _protected(config: ProfileBudgetConfig, loaded: LoadedModel) -> BlockMask:
    if config.protect is None:
        return BlockMask.empty(loaded.shapes())
    return load_mask_for(
        config.protect, loaded.shapes(), loaded.identity.fingerprint, ignore_fingerprint=config.ignore_fingerprint
    )


def _read_traces(config: ProfileBudgetConfig) -> list[list[Rollout]]:
    """Return the first ``--num-problems`` groups of the traces file; responses without a step are left out."""
    assert config.traces is not None
    groups: dict[str, list[Rollout]] = {}
    for rollout in read_rollouts(config.traces, needs=("response", "steps", "scores"), on_torn=warn):
        if rollout.prompt is None and rollout.question is None:
            raise UserError(f"{config.traces}: {rollout.id} has neither 'prompt' nor 'question'", "add one of them")
        if rollout.steps:
            groups.setdefault(rollout.group, []).append(rollout)
    if not groups:
        raise UserError(f"{config.traces}: no response in it has a step", "run `ssrctl segment` and `ssrctl critic`")
    return list(groups.values())[: config.num_problems]


def _from_traces(config: ProfileBudgetConfig, loaded: LoadedModel, traces: list[list[Rollout]]) -> _Source:
    prompt_format = load_prompt_format(config)
    use_chat_template(loaded.tokenizer, prompt_format)

    def make(number: int) -> tuple[GroupBatch, Rewards]:
        rollouts = traces[number]
        for rollout in rollouts:
            if rollout.prompt is None:
                assert rollout.question is not None
                rollout.prompt = build_prompt(loaded.tokenizer, prompt_format, rollout.question)
        rewards = [[score.reward for score in rollout.scores or ()] for rollout in rollouts]
        return traces_batch(loaded, rollouts, config.temperature), rewards

    plan = {"problems": len(traces), "responses": f"{sum(map(len, traces))} from {Path(str(config.traces)).name}"}
    return _Source(len(traces), make, plan)


def _problems(config: ProfileBudgetConfig) -> list[Any]:
    limit = config.num_problems if config.limit is None else min(config.limit, config.num_problems)
    return load_problems(dataclasses.replace(config, limit=limit), "train", derive_seed(config.seed, "problems"))


def _from_sampling(config: ProfileBudgetConfig, loaded: LoadedModel, problems: list[Any]) -> _Source:
    prompt_format = load_prompt_format(config)
    prompts, first_prompt = prepare_prompts(loaded, problems, prompt_format, config.max_new_tokens)
    critic = make_critic(CriticOptions())

    def make(number: int) -> tuple[GroupBatch, Rewards]:
        made = sample_groups(
            loaded,
            [prompts[number]],
            config,
            num_generations=config.num_generations,
            seed=derive_seed(config.seed, "profile-budget", prompts[number].problem.id),
        )
        score_groups(made, critic)
        return group_batch(loaded, made[0]), made[0].rewards()

    responses = len(prompts) * config.num_generations
    plan = {
        "problems": len(prompts),
        "responses": f"{responses} to sample, at most {responses * config.max_new_tokens} tokens",
        "critic": "rule (score responses with `ssrctl critic` and give --traces for another)",
        "first_prompt": first_prompt,
    }
    return _Source(len(prompts), make, plan, prompts)


# --------------------------------------------------------------------------------------------------
# measuring and writing


def _masses(
    config: ProfileBudgetConfig,
    loaded: LoadedModel,
    source: _Source,
    claim: int,
    protected: dict[str, Tensor],
    number: int,
) -> Iterator[list[StepMass]]:
    """Yield the masses of one problem."""
    batch, rewards = source.make(number)
    yield problem_masses(
        loaded.model,
        batch,
        two_level_advantages(rewards, config.advantage).values,
        claim=claim,
        protected=protected,
        max_steps=config.max_steps,
        temperature=config.temperature,
    )


def _measure(spread: Spread[int, list[StepMass]], num_groups: int) -> tuple[list[list[StepMass]], bool]:
    """Return each problem's masses, and whether Ctrl-C ended the measurement early."""
    measured: list[list[StepMass]] = []
    with progress(unit="problems") as bar, deferred_interrupt() as interrupted:
        task = bar.add_task("profiling", total=num_groups, status="")
        for masses in spread(range(num_groups)):
            measured.append(masses)
            bar.advance(task)
            if interrupted() and len(measured) < num_groups:
                return measured, True
    return measured, False


def _write(
    config: ProfileBudgetConfig, loaded: LoadedModel, measured: list[list[StepMass]], num_unprotected: int
) -> dict[str, Any]:
    try:
        curves = mean_curves(measured)
    except ValueError as error:
        raise UserError(
            f"{error}: all advantages of the first steps are 0", "profile more problems, or score with another critic"
        ) from error
    settings = published_settings(config) | {"measured_problems": len(measured), "versions": versions()}
    if config.traces is not None:
        settings["traces_hash"] = file_hash(config.traces)
    profile = BudgetProfile(
        model=loaded.identity,
        share=curves.share,
        mass=curves.mass,
        energy_available=curves.energy_available,
        energy_claimed=curves.energy_claimed,
        claim_fraction=config.claim_fraction,
        settings=settings,
    )
    save_budget_profile(config.output, profile)
    written = [str(config.output)]
    if plot := _plot(config.output.with_suffix(".svg"), profile):
        written.append(plot)
    _show(profile)
    _show_grants(profile, num_unprotected)
    if silent := sum(1 for steps in measured if not steps):
        warn(
            f"{silent} of {len(measured)} problems gave no gradient: their responses all scored the same, or not at "
            "all (raise --num-problems for a steadier curve)"
        )
    used, found = len(profile.curve("share")), len(profile.mass.mean)
    if used < found:
        warn(
            f"step {used + 1} was measured on fewer than {MIN_PROBLEMS} problems: rule share holds v_{used} from there "
            "on (raise --num-problems)"
        )
    note(f"wrote {' and '.join(written)}: {found} steps over {profile.mass.num_problems[0]} problems")
    return profile.to_dict()


def _show(profile: BudgetProfile) -> None:
    from rich.table import Table

    table = Table(title="available to each step: share of its energy; mass relative to the first", title_justify="left")
    for heading in ("step", "share", "std error", "mass", "std", "problems", "energy available", "energy claimed"):
        table.add_column(heading, justify="right")
    share, mass = profile.share, profile.mass
    for index, problems in enumerate(mass.num_problems):
        known = index < len(share.mean)
        error = share.standard_error[index] if known else None
        table.add_row(
            str(index + 1),
            f"{share.mean[index]:.3f}" if known else "-",
            "-" if error is None else f"{error:.3f}",
            f"{mass.mean[index]:.3f}",
            f"{mass.std[index]:.3f}",
            str(problems),
            f"{profile.energy_available[index]:.1%}",
            f"{profile.energy_claimed[index]:.1%}",
        )
    console().print(table)


def _show_grants(profile: BudgetProfile, num_unprotected: int) -> None:
    """Show, by rule, the budgets with B = 5% and k_max = 1%; warn where the default rule starves a step."""
    from rich.table import Table

    table = Table(title="budgets with B = 5%, k_max = 1%", title_justify="left")
    for heading in ("rule", "steps", "of B granted", "smallest step (coordinates)", "equal share"):
        table.add_column(heading, justify="right")
    for rule in RULES:
        for found in (grant(profile.curve(rule), steps, num_unprotected, rule=rule) for steps in SHOWN_STEPS):
            table.add_row(
                rule, str(found.num_steps), f"{found.granted_frac:.0%}", str(found.smallest), str(found.equal)
            )
            if found.starves and rule == "share":
                warn(
                    f"of {found.num_steps} steps one gets {found.smallest} coordinates, less than a tenth "
                    f"of an equal share ({found.equal})"
                )
    console().print(table)


def _plot(path: Path, profile: BudgetProfile) -> str | None:
    """Draw the curve next to the profile; return the file, or None where matplotlib is not installed."""
    try:
        matplotlib = load_matplotlib()
    except ImportError:
        note("no plot: matplotlib is not installed (pip install 'ssrctl[report]')")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    share, mass = profile.share, profile.mass
    errors = [error or 0.0 for error in share.standard_error]
    # Fixed ids and no date, so that equal profiles give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "ssrctl"}):
        figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
        axes.errorbar(
            _numbers(share.mean), share.mean, yerr=errors, marker="o", capsize=3, label="share of energy left"
        )
        axes.plot(_numbers(mass.mean), mass.mean, marker="s", linestyle="--", label="magnitude mass")
        for step, value, count in zip(_numbers(share.mean), share.mean, share.num_problems, strict=True):
            axes.annotate(f"n={count}", (step, value), textcoords="offset points", xytext=(4, 6), fontsize=7)
        axes.set(xlabel="step", ylabel="share; relative to step 1", title=f"{profile.model.name}: left for later steps")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.08)  # room for the last count
        axes.legend()
        with whole_file(path) as temporary:
            figure.savefig(temporary, format="svg", metadata={"Date": None})
        pyplot.close(figure)
    return str(path)


def _numbers(values: list[float]) -> list[int]:
    """Return the step numbers of a curve, from 1."""
    return list(range(1, len(values) + 1))
