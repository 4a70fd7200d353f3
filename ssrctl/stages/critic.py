"""`ssrctl critic`: score segmented responses, or measure a critic on labelled solutions."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.configs import CriticConfig, PromptOptions
from ssrctl.configs.building import default_of
from ssrctl.critics.base import PERMANENT_ERRORS, SETTINGS_ERRORS, Critic, CriticResources, should_retry
from ssrctl.critics.calibration.calibrate import calibrate
from ssrctl.critics.calibration.judgements import Judgements
from ssrctl.critics.calibration.table import show_calibration
from ssrctl.critics.llm.estimate import Estimate
from ssrctl.critics.registry import make_critic
from ssrctl.critics.score_summary import ScoreSummary
from ssrctl.errors import CheckFailed, Stopped, UserError
from ssrctl.io import console
from ssrctl.io.formats.ours import OURS
from ssrctl.io.formats.registry import Writer, read_formatted
from ssrctl.io.jsonl import STDIO, write_jsonl
from ssrctl.io.labelled import Labelled, read_labelled
from ssrctl.io.locks import locked_file
from ssrctl.io.records import Rollout, StepScore, read_rollouts
from ssrctl.io.resumable import ResumableOutput
from ssrctl.process_rank import rank
from ssrctl.text.answers import Extraction, check_answer
from ssrctl.text.prompts import load_prompt_format, use_chat_template

if TYPE_CHECKING:
    from ssrctl.distributed.world import World
    from ssrctl.models.loading import LoadedModel
    from ssrctl.sampling.engines.base import Engine

IDENTITY_FIELD = "critic"
MADE_FIELDS = ("scores", "final", "advantages")


def run(config: CriticConfig) -> dict[str, Any]:
    """Score every step, or with ``--calibrate`` measure the critic, and return the summary.

    Raises:
        UserError: unusable settings or input.
        Stopped: the budget is reached; the scores so far are kept and the same command continues from there.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    if config.calibrate is None and config.json and config.output == STDIO and not config.dry_run:
        raise UserError("--json and the records cannot both go to stdout", "give -o FILE")
    if config.dry_run:
        return _plan(config) if config.calibrate is None else _plan_calibration(config)
    if config.critic != "rollout":
        return _run(config) if rank() == 0 else {}  # the other processes of a job have nothing to do
    from ssrctl.distributed.world import joined_world

    with joined_world(config.device) as world:
        return _run(config, world)


def _run(config: CriticConfig, world: World | None = None) -> dict[str, Any]:
    do = _score if config.calibrate is None else functools.partial(_calibrate, _labelled(config))
    is_main = world is None or world.is_main
    locked = locked_file(Path(config.output)) if is_main and config.output != STDIO else contextlib.nullcontext()
    with locked, contextlib.closing(_make(config, world)) as critic:
        if world is None or world.size == 1:
            return do(config, critic)
        from ssrctl.critics.rollout import EstimateJob, Estimates, RolloutCritic
        from ssrctl.distributed.dividing import Spread, divide
        from ssrctl.sampling.agreement import agree

        assert isinstance(critic, RolloutCritic)
        agree(world, config, critic.loaded, (), {})

        def lead(spread: Spread[EstimateJob, Estimates]) -> dict[str, Any]:
            critic.spread = spread
            return do(config, critic)

        return divide(world, critic.estimate, lead) or {}


def _score(config: CriticConfig, critic: Critic) -> dict[str, Any]:
    torn: list[str] = []
    with _progress(config, critic) as advance:
        rows = _ScoredRows(ScoreSummary(), advance, config.answer_extraction)
        writer = Writer(config.output_format, config.wrong_below)
        if critic.identity is None or config.output == STDIO:
            scored = itertools.starmap(rows.make, _in_order(critic, _read(config, torn)))
            _write(config, writer, scored)
        else:
            _resumable(config, critic, critic.identity, rows, torn)
            if config.output_format != OURS.name:
                _write(config, writer, read_rollouts(_records_path(config)))
        summary = rows.summary.to_dict() | {"torn_lines": len(torn)} | critic.summary() | writer.summary()
    for message in torn:
        console.warn(message)
    console.show_plan(f"scored {config.input} -> {config.output}", summary)
    if critic.identity is None:
        return summary
    missing = summary["missing_by_class"]
    transient = sum(count for error, count in missing.items() if error not in PERMANENT_ERRORS | SETTINGS_ERRORS)
    settings = {error: count for error, count in missing.items() if error in SETTINGS_ERRORS}
    if missing and summary["missing"] == summary["steps"] and not summary["kept_from_before"]:
        classes = ", ".join(f"{error} {count}" for error, count in missing.items())
        again = "run the same command again" if transient else "change the settings of the critic"
        raise Stopped(f"no step was scored: {classes}", again)
    if transient:
        console.note(f"{transient} scores are missing because of transient failures: run the same command again")
    if settings:
        classes = ", ".join(f"{error} {count}" for error, count in settings.items())
        console.note(f"{classes}: these scores stay missing until the settings of the critic change")
    return summary


def _write(config: CriticConfig, writer: Writer, scored: Iterable[Rollout]) -> None:
    """Write scored rollouts in the format of ``--output-format``, whole or not at all."""

    def rows() -> Iterator[dict[str, Any]]:
        for rollout in scored:
            yield from writer.rows(rollout)
        writer.check()

    write_jsonl(config.output, rows())


def _records_path(config: CriticConfig) -> str:
    """Return the file that scored records are kept in: the output, or one next to it if that has another format."""
    return config.output if config.output_format == OURS.name else f"{config.output}.records.jsonl"


def _make(config: CriticConfig, world: World | None = None) -> Critic:
    def policy() -> Any:
        from ssrctl.models.loading import describe_model, load_model

        console.note(describe_model(config))
        loaded = load_model(config)
        use_chat_template(loaded.tokenizer, prompt_format)
        return loaded

    def engine(loaded: LoadedModel) -> Engine | None:
        from ssrctl.distributed.world import ALONE
        from ssrctl.sampling.engines.vllm_engine import connected_engine

        return connected_engine(config, loaded, world or ALONE)

    prompt_format = load_prompt_format(config)
    resources = CriticResources(
        policy=policy,
        sampling=config,
        prompt_format=prompt_format if _says_prompts(config) else None,
        seed=config.seed,
        device=config.device,
        ledger=_ledger_path(config),
        engine=engine,
    )
    return make_critic(config, resources)


def _says_prompts(config: CriticConfig) -> bool:
    """Return True if any setting of prompts is given; without one, no prompt is made up for a record that has none."""
    return any(getattr(config, spec.name) != default_of(spec) for spec in fields(PromptOptions))


def _ledger_path(config: CriticConfig) -> Path | None:
    if config.critic != "llm":
        return None
    if config.ledger is None and config.output != STDIO:
        return Path(config.output + ".ledger.jsonl")
    return config.ledger


def _read(config: CriticConfig, torn: list[str]) -> Iterator[Rollout]:
    assert config.input is not None
    needs = ("question", "response", "steps")
    rollouts = read_formatted(config.input, config.format, needs=needs, on_torn=torn.append)
    return itertools.islice(rollouts, config.limit)


@dataclass
class _ScoredRows:
    """Turns scored rollouts into rows, counts them and advances the progress bar."""

    summary: ScoreSummary
    advance: Callable[[], None]
    answer_extraction: Extraction

    def make(self, rollout: Rollout, scores: list[StepScore]) -> Rollout:
        """Return the rollout with its scores and its checked final answer."""
        rollout.scores = scores
        rollout.advantages = None  # old advantages belong to other scores
        assert rollout.response is not None
        rollout.final = check_answer(rollout.response, rollout.answer, extraction=self.answer_extraction)
        self.summary.add(rollout)
        self.advance()
        return rollout


@contextlib.contextmanager
def _progress(config: CriticConfig, critic: Critic) -> Iterator[Callable[[], None]]:
    """Show a progress bar with the cost so far; yield a function that advances it by one response."""
    with console.progress(unit="responses") as bar:
        task = bar.add_task(config.critic, total=_num_lines(config), status="")

        def advance() -> None:
            cost = critic.summary().get("cost_usd")
            bar.update(task, advance=1, status="" if cost is None else f"${cost:.4f}")

        yield advance


def _num_lines(config: CriticConfig) -> int | None:
    """Return the number of input records; without a limit it is None for stdin."""
    assert config.input is not None
    path = Path(config.input)
    if config.input == STDIO or not path.is_file():
        return config.limit
    with path.open("rb") as stream:
        count = sum(1 for line in stream if line.strip())
    return count if config.limit is None else min(count, config.limit)


def _in_order(critic: Critic, rollouts: Iterator[Rollout]) -> Iterator[tuple[Rollout, list[StepScore]]]:
    """Yield scored rollouts in the order of the input."""
    finished: dict[int, tuple[Rollout, list[StepScore]]] = {}
    positions: dict[int, int] = {}

    def counted() -> Iterator[Rollout]:
        for position, rollout in enumerate(rollouts):
            positions[id(rollout)] = position
            yield rollout

    due = 0
    for rollout, scores in critic.stream(counted()):
        finished[positions.pop(id(rollout))] = (rollout, scores)
        while due in finished:
            yield finished.pop(due)
            due += 1


def _resumable(config: CriticConfig, critic: Critic, identity: str, rows: _ScoredRows, torn: list[str]) -> None:
    """Store each row as soon as it is scored; responses that earlier runs scored are skipped."""
    positions: dict[int, int] = {}
    with contextlib.closing(_output(config, identity)) as output:
        if output.num_others:
            console.warn(
                f"{output.path} holds {output.num_others} responses scored with other settings; "
                "they are replaced when this run is done"
            )

        def unscored() -> Iterator[Rollout]:
            for rollout in _read(config, torn):
                position = output.reserve(rollout.to_dict())
                if position is None:
                    rows.summary.kept += 1
                    rows.advance()
                else:
                    positions[id(rollout)] = position
                    yield rollout

        try:
            for rollout, scores in critic.stream(unscored()):
                output.add(positions.pop(id(rollout)), rows.make(rollout, scores).to_dict())
            for row in output.earlier_rows():
                rows.summary.add(Rollout.from_dict(row, where=str(output.path)))
            unused = output.num_unused
            output.finish()
        except BaseException:
            if output.partial.is_file():
                console.note(f"{output.num_done} responses are scored and kept in {output.partial}")
            raise
        if unused:
            console.warn(f"{unused} scored responses that {output.path} held are not in this input and were left out")


def _output(config: CriticConfig, identity: str) -> ResumableOutput:
    return ResumableOutput(
        _records_path(config),
        identity=identity,
        identity_field=IDENTITY_FIELD,
        made_fields=MADE_FIELDS,
        is_done=_is_scored,
    )


def _is_scored(row: dict[str, Any]) -> bool:
    try:
        rollout = Rollout.from_dict(row, where="")
    except UserError:
        return False
    return rollout.scores is not None and not should_retry(rollout.scores)


def _plan(config: CriticConfig) -> dict[str, Any]:
    """Print and return the plan of `--dry-run`: sizes and, for the llm critic, the cost of what is not scored yet."""
    plan: dict[str, Any] = {"critic": config.critic, "responses": 0, "steps": 0, "output": config.output}
    torn: list[str] = []
    kept = None
    estimate = None
    if config.critic == "llm":
        estimate = Estimate(config)
        kept = None if config.output == STDIO else _output(config, estimate.requests.identity)

    def to_score() -> Iterator[Rollout]:
        for rollout in _read(config, torn):
            plan["responses"] += 1
            plan["steps"] += len(rollout.steps or ())
            if kept is None or kept.reserve(rollout.to_dict()) is not None:
                yield rollout

    if estimate is None:
        for _ in to_score():
            pass
    else:
        estimate.add_all(to_score())
        plan |= {"scored_before": 0 if kept is None else kept.num_done} | estimate.plan()
    if config.critic == "rollout":
        plan["continuations"] = (plan["steps"] + plan["responses"]) * config.critic_rollouts
    for message in torn:
        console.warn(message)
    console.show_plan("plan", plan)
    if estimate is not None and estimate.prices is None:
        console.warn(f"no price is known for {config.critic_model}: give --input-price and --output-price")
    return plan


def _judgements(config: CriticConfig, identity: str | None) -> Judgements | None:
    """Return the file that keeps the judgements of a calibration; None without ``--output``.

    Those of a critic without an identity are made again, since they cost nothing.
    """
    if config.output == STDIO:
        return None
    return Judgements(
        config.output,
        identity=identity or config.critic,
        reuse=identity is not None,
        extraction=config.answer_extraction,
    )


def _labelled(config: CriticConfig) -> list[Labelled]:
    assert config.calibrate is not None
    return list(itertools.islice(read_labelled(config.calibrate, config.format), config.limit))


def _plan_calibration(config: CriticConfig) -> dict[str, Any]:
    """Print and return the plan of `--dry-run` with ``--calibrate``."""
    labelled = _labelled(config)
    estimate = Estimate(config) if config.critic == "llm" else None
    plan: dict[str, Any] = {"critic": config.critic, "traces": len(labelled), "repeats": config.repeats}
    if estimate is not None:
        kept = _judgements(config, estimate.requests.identity)
        for estimate.requests.repeat in range(config.repeats):
            estimate.add_all(
                given.rollout
                for given in labelled
                if kept is None or kept.earlier(given, estimate.requests.repeat) is None
            )
        plan |= {"judged_before": 0 if kept is None else kept.num_done} | estimate.plan()
    console.show_plan("plan", plan)
    return plan


def _calibrate(labelled: Sequence[Labelled], config: CriticConfig, critic: Critic) -> dict[str, Any]:
    """Measure how well the critic finds the first error, and its cost (``--calibrate``)."""
    with contextlib.ExitStack() as stack:
        kept = _judgements(config, critic.identity)
        if kept is not None:
            stack.enter_context(kept)
        bar = stack.enter_context(console.progress(unit="judgements"))
        task = bar.add_task(config.critic, total=len(labelled) * config.repeats, status="")
        result = calibrate(
            critic,
            labelled,
            repeats=config.repeats,
            wrong_below=config.wrong_below,
            seed=config.seed,
            kept=kept,
            on_done=lambda count: bar.update(task, advance=count),
        )
        if kept is not None and result["stopped"] is None:
            kept.finish()
    result = {"critic": critic.identity or config.critic} | result
    if not config.json:
        show_calibration(result)
    if result["stopped"] is not None:
        raise Stopped(**result["stopped"])
    _check_f1(config, result)
    return result


def _check_f1(config: CriticConfig, result: dict[str, Any]) -> None:
    """Raise CheckFailed if the first-error F1 is below ``--min-f1`` or not defined."""
    if config.min_f1 is None:
        return
    f1 = result["first_error"]["f1"]
    if f1 is not None and f1["value"] >= config.min_f1:
        return
    if f1 is None:
        raise CheckFailed(
            "the first-error F1 is not defined: it needs solutions with and without an error", result=result
        )
    raise CheckFailed(f"the first-error F1 {f1['value']:.3f} is below --min-f1 {config.min_f1:g}", result=result)
