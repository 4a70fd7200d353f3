"""`ssrctl eval`: accuracy of sampled or given responses with an interval, and its paired difference to a baseline."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import DeltaFile, apply_delta
from ssrctl.checkpoints.run_dir import RunDir, find_delta
from ssrctl.configs import TINY, EvalConfig, SamplingConfig, is_bundled
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import Interrupted, Stopped, UserError
from ssrctl.evaluation.accuracy import (
    GROUP_COLUMNS,
    KL_TO_BASE,
    SIGNATURE,
    by_problem,
    compare,
    compare_all,
    summarise,
    with_reference,
)
from ssrctl.evaluation.eval_page import SAMPLES, SUMMARY, eval_document, read_evaluation
from ssrctl.evaluation.lm_eval_results import lm_eval_results
from ssrctl.evaluation.run_page import PAGE
from ssrctl.evaluation.step_patterns import signature
from ssrctl.io import console, manifest
from ssrctl.io.files import existing_file, write_text
from ssrctl.io.formats.registry import read_formatted
from ssrctl.io.jsonl import STDIO, JsonlLog, write_jsonl
from ssrctl.io.locks import locked_folder
from ssrctl.io.problems import load_problems
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.io.row_fields import Reference
from ssrctl.process_rank import num_launched
from ssrctl.report.formats import number, times
from ssrctl.report.write import write_last_page
from ssrctl.text.answers import check_answers

if TYPE_CHECKING:  # grading given responses loads no torch
    from rich.table import Table

    from ssrctl.distributed.world import World
    from ssrctl.models.loading import LoadedModel
    from ssrctl.sampling.engines.base import Engine
    from ssrctl.sampling.groups import Prompted
    from ssrctl.training.kl_to_base import KlToBase

SETTINGS, RESULTS = "settings.json", "results.json"
_COUNTED = (
    "num_tokens",
    "finished",
    KL_TO_BASE,
    *GROUP_COLUMNS,
)  # what the summary reads of a record besides its verdict
MOST_BATCHES = 8  # in a chunk, the part that one process draws at a time; a small evaluation has as many chunks
GRADING_BATCH = 256  # responses read, compared in parallel and written at once
# Settings that determine the samples; an evaluation continues only under the same ones.
DECISIVE = (
    "dataset", "dataset_config", "dataset_split", "question_column", "answer_column", "prompt_template", "limit",
    "temperature", "top_p", "top_k", "max_new_tokens", "sampling_batch_size", "num_samples", "seed", "dtype", "answer_extraction",
    "attn_implementation", "rollout_engine",
    "system_prompt", "chat_template", "chat_template_kwargs", "stop", "kl_to",
)  # fmt: skip


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate and return the summary that is also written to ``summary.json``.

    Raises:
        UserError: unusable settings or inputs, or a folder that holds another evaluation.
        Stopped: the server of ``--rollout-engine vllm-server`` is gone; likewise.
        Interrupted: Ctrl-C or SIGTERM; the samples drawn so far are kept and the next run continues from them.
    """
    if num_launched() > 1 and (config.compare or config.responses is not None):
        raise UserError(
            f"nothing is sampled, and {num_launched()} processes were launched", "start it without a launcher"
        )
    if config.compare:
        return _compare(config)
    baseline = None if config.baseline is None else _read_graded(config.baseline / SAMPLES)
    if config.responses is not None:
        if config.dry_run:
            return _run(config, _grade(config, config.responses), baseline)
        with locked_folder(config.output_dir):
            return _run(config, _grade(config, config.responses), baseline)
    from ssrctl.distributed.world import joined_world

    with joined_world(config.device) as world:
        if config.dry_run or not world.is_main:
            return _run(config, _sample(config, world), baseline, is_main=world.is_main)
        with locked_folder(config.output_dir):
            return _run(config, _sample(config, world), baseline)


def _run(config: EvalConfig, found: _Found, baseline: list[Rollout] | None, *, is_main: bool = True) -> dict[str, Any]:
    """Summarise the samples and write the summary, in the main process."""
    if config.dry_run:
        console.show_plan("plan", found.about)
        return found.about
    if not is_main:
        return {}
    summary = found.about | summarise(found.samples, config.confidence, runs=config.runs)
    if unknown := summary["without_reference"]:
        console.warn(f"{unknown} of {len(found.samples)} responses have no reference answer and are not counted")
    if baseline is not None:
        summary["paired"] = compare(baseline, found.samples, config.confidence) | {"baseline": str(config.baseline)}
        if left_out := summary["paired"]["unpaired_problems"]:
            console.warn(f"problems in only one of the two evaluations are left out of the comparison: {left_out}")
    write_text(config.output_dir / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    sampling = (
        {}
        if config.responses
        else {spec.name: getattr(config, spec.name) for spec in dataclasses.fields(SamplingConfig)}
    )
    source = config.responses if config.responses and is_bundled(config.dataset) else config.dataset
    results = lm_eval_results(summary, found.samples, dataset=source, settings=sampling)
    write_text(config.output_dir / RESULTS, json.dumps(results, indent=2, ensure_ascii=False) + "\n")
    if not config.json:
        _show(summary, config)
    if config.report:
        folder = config.output_dir
        write_last_page(lambda: eval_document([read_evaluation(folder, folder.resolve().name)]), folder / PAGE)
    return summary


def _compare(config: EvalConfig) -> dict[str, Any]:
    """Compare stored evaluations with the first of them."""
    files = [folder / SAMPLES if folder.is_dir() else folder for folder in config.folders]
    samples = [_read_graded(file) for file in files]
    found = compare_all(samples, config.confidence)
    sizes = [_sizes(one) for one in samples]
    if len({*sizes}) > 1:
        listed = ", ".join(f"{folder} {size}" for folder, size in zip(config.folders, sizes, strict=True))
        console.warn(
            f"the evaluations have different numbers of samples per problem ({listed}): p-values are approximate"
        )
    settings = [_read_settings(file.parent) for file in files]
    for folder, mine in zip(config.folders[1:], settings[1:], strict=True):
        odd = [
            key for key in DECISIVE if key not in ("seed", "dtype", "kl_to") and settings[0].get(key) != mine.get(key)
        ]
        if settings[0] and mine and odd:
            listed = ", ".join(f"{key} {settings[0].get(key)!r} and {mine.get(key)!r}" for key in odd)
            console.warn(f"{config.folders[0]} and {folder} were made under different settings: {listed}")
    if left_out := found[0]["unpaired_problems"]:
        console.warn(f"problems that are not in all of the evaluations are left out: {left_out}")
    result = {
        "baseline": str(config.folders[0]),
        "baseline_accuracy": found[0].pop("baseline_accuracy"),
        "comparisons": [
            {"evaluation": str(folder), **{key: value for key, value in one.items() if key != "baseline_accuracy"}}
            for folder, one in zip(config.folders[1:], found, strict=True)
        ],
    }
    if not config.json:
        _show_comparisons(result, config.confidence)
    return result


@dataclasses.dataclass(frozen=True)
class _Found:
    """Graded samples and facts about their source (the plan under --dry-run)."""

    about: dict[str, Any]
    samples: list[Rollout] = dataclasses.field(default_factory=list)


# --------------------------------------------------------------------------------------------------
# given responses


def _grade(config: EvalConfig, source: str) -> _Found:
    """Grade the responses of ``source`` into the output folder."""
    about = {"responses": "<stdin>" if source == STDIO else Path(source).name}
    references = _References(config)
    records = read_formatted(source, config.format, needs=("response",), on_torn=console.warn)
    if config.dry_run:
        answers = [references.of(record) for record in records]
        known = sum(answer is not None for answer in answers)
        return _Found(about | {"count": len(answers), "with_reference": known, "output_dir": str(config.output_dir)})
    _claim_for_grading(config.output_dir)
    slim: list[Rollout] = []
    with console.progress(unit="responses") as bar:
        task = bar.add_task("grading", total=None, status="")

        def graded() -> Iterator[dict[str, Any]]:
            while batch := list(islice(records, GRADING_BATCH)):
                pairs = [(record.response or "", references.of(record)) for record in batch]
                finals = check_answers(
                    pairs,
                    extraction=config.answer_extraction,
                    on_done=lambda count: bar.update(task, advance=count),
                )
                for record, (_, reference), final in zip(batch, pairs, finals, strict=True):
                    record.answer, record.final = reference, final
                    # The summary needs no texts, which may not fit into memory.
                    kept = {key: value for key, value in record.extra.items() if key in _COUNTED}
                    kept[SIGNATURE] = signature(record)
                    slim.append(Rollout(id=record.id, question=record.question, final=final, extra=kept))
                    yield record.to_dict()
            by_problem(with_reference(slim))  # raises before the file is put into place

        write_jsonl(config.output_dir / SAMPLES, graded())
    # A pipe cannot be read a second time.
    digest = manifest.file_hash(source) if source != STDIO and Path(source).is_file() else None
    made_by = {
        "sha256": digest,
        "dataset": config.dataset,
        "answer_extraction": config.answer_extraction,
        "versions": manifest.versions(),
    }
    write_text(config.output_dir / SETTINGS, json.dumps(about | made_by, indent=2) + "\n")
    return _Found(about, slim)


class _References:
    """Reference answers of records.

    A record's own answer comes first, else that of the problem in ``--dataset`` with its question or, for a record
    without a question, with its id or its id's group.
    """

    def __init__(self, config: EvalConfig) -> None:
        self.config = config

    @functools.cached_property
    def _problems(self) -> tuple[dict[str, Reference], dict[str, Reference]]:
        """Answers by question and by id; the data set is loaded when the first record asks for them."""
        problems = [] if is_bundled(self.config.dataset) else load_problems(self.config, "test")
        return {" ".join(p.question.split()): p.answer for p in problems}, {p.id: p.answer for p in problems}

    def of(self, record: Rollout) -> Reference | None:
        if record.answer is not None:
            return record.answer
        by_question, by_id = self._problems
        if record.question is not None:
            return by_question.get(" ".join(record.question.split()))
        return by_id.get(record.id, by_id.get(record.group))


def _claim_for_grading(folder: Path) -> None:
    """Refuse a folder whose samples were drawn from a model: grading must not overwrite hours of sampling."""
    if (folder / SAMPLES).exists() and "responses" not in _read_settings(folder):
        raise UserError(f"{folder} holds samples that were not graded from a file", "name another --output-dir")


# --------------------------------------------------------------------------------------------------
# sampled responses


def _sample(config: EvalConfig, world: World) -> _Found:
    """Draw the missing samples, each process its share, and read all of them back in the main one."""
    from ssrctl.models.loading import describe_model, load_model
    from ssrctl.models.precision import describe_precision, settle_dtype
    from ssrctl.sampling.agreement import agree
    from ssrctl.sampling.groups import prepare_prompts
    from ssrctl.text.prompts import load_prompt_format

    config = settle_dtype(_with_checkpoint(config))
    console.note(describe_model(config) + (f" + {config.checkpoint}" if config.checkpoint else ""))
    prompt_format = load_prompt_format(config)
    problems = load_problems(config, "test", derive_seed(config.seed, "problems"))
    loaded = load_model(config)
    console.note(describe_precision(loaded.model))
    changed = _apply_checkpoint(config, loaded)
    prompts, first_prompt = prepare_prompts(loaded, problems, prompt_format, config.max_new_tokens)
    if config.dry_run:
        plan = {
            "problems": len(prompts),
            "samples": len(prompts) * config.num_samples * config.runs,
            "most_response_tokens": len(prompts) * config.num_samples * config.runs * config.max_new_tokens,
            "changed_coordinates": changed,
            "output_dir": str(config.output_dir),
            "first_prompt": first_prompt,
        }
        return _Found(plan)
    agree(world, config, loaded, prompts, {"changed coordinates": changed})
    world.on_main(lambda: _claim_folder(config, loaded))
    try:
        _draw(config, loaded, prompts, world)
    except KeyboardInterrupt as interrupt:
        raise Interrupted(
            f"the samples drawn so far are kept in {config.output_dir / SAMPLES}",
            "run the same command again: it continues from there",
        ) from interrupt
    except Stopped as stop:
        raise Stopped(
            f"{stop.message}; the samples drawn so far are kept in {config.output_dir / SAMPLES}",
            "run the same command again: it continues from there",
        ) from stop
    if not world.is_main:
        return _Found({})
    wanted = {f"{p.problem.id}/{i}" for p in prompts for i in range(config.num_samples * config.runs)}
    about = {"model": dataclasses.asdict(loaded.identity), "checkpoint": config.checkpoint and config.checkpoint.name}
    return _Found(about, [s for s in _read_samples(config.output_dir / SAMPLES) if s.id in wanted])


def _draw(config: EvalConfig, loaded: LoadedModel, prompts: Sequence[Prompted], world: World) -> None:
    """Draw the missing samples, as many chunks at a time as there are processes; the main one writes them.

    Each sample has its own seed, so a continuation draws the same. What goes through the model together is a chunk's,
    whatever the number of processes.
    """
    from ssrctl.distributed.dividing import Spread, divide
    from ssrctl.sampling.engines.vllm_engine import connected_engine
    from ssrctl.training.kl_to_base import KlToBase

    engine = connected_engine(config, loaded, world)
    kl_to = None if config.kl_to is None else KlToBase(loaded, config, config.kl_to)
    per_run = config.num_samples
    jobs = [(p, run * per_run + number) for run in range(config.runs) for p in prompts for number in range(per_run)]
    size = config.sampling_batch_size
    width = max(size, min(MOST_BATCHES * size, len(jobs) // MOST_BATCHES))
    path = config.output_dir / SAMPLES

    def draw(spread: Spread[list[int], list[dict[str, Any]]]) -> None:
        with JsonlLog(path) as log, console.progress(unit="samples") as bar:
            done = {s.id for s in _read_samples(path)} if path.stat().st_size else set()
            if done:
                console.note(f"{len(done)} of {len(jobs)} samples are already in {path}")
            task = bar.add_task("eval", total=len(jobs), completed=len(done), status="")
            missing = [f"{p.problem.id}/{number}" not in done for p, number in jobs]
            chunks = (
                [place for place in range(start, min(start + width, len(jobs))) if missing[place]]
                for start in range(0, len(jobs), width)
            )
            for rows in spread(filter(None, chunks)):
                for row in rows:
                    log.append(row)
                bar.update(task, advance=len(rows))

    divide(world, lambda chunk: _chunk(config, loaded, engine, kl_to, [jobs[place] for place in chunk]), draw)


def _chunk(
    config: EvalConfig,
    loaded: LoadedModel,
    engine: Engine | None,
    kl_to: KlToBase | None,
    chunk: Sequence[tuple[Prompted, int]],
) -> Iterator[list[dict[str, Any]]]:
    """Yield the graded records of a chunk of samples, a batch at a time, in the order in which they are complete."""
    from ssrctl.sampling.engines.transformers_engine import TransformersEngine
    from ssrctl.sampling.groups import record_of, response_request

    requests = [
        response_request(loaded, p, config, derive_seed(config.seed, "eval", p.problem.id, number))
        for p, number in chunk
    ]
    drawn = (engine or TransformersEngine(loaded, config)).sample(requests)
    while batch := list(itertools.islice(drawn, config.sampling_batch_size)):
        pairs = [(sample.text, chunk[place][0].problem.answer) for place, sample in batch]
        finals = check_answers(pairs, extraction=config.answer_extraction)
        records = [
            record_of(*chunk[place], sample, final=final) for (place, sample), final in zip(batch, finals, strict=True)
        ]
        if kl_to is not None:
            ids = [(chunk[place][0].prompt_ids, sample.response_ids) for place, sample in batch]
            for record, divergence in zip(records, kl_to.of(ids), strict=True):
                record.extra[KL_TO_BASE] = divergence
        yield [record.to_dict() for record in records]


def _read_samples(path: Path) -> list[Rollout]:
    return list(read_rollouts(existing_file(path, "evaluation"), needs=("final",), on_torn=console.warn))


def _read_graded(path: Path) -> list[Rollout]:
    """Read the samples of an evaluation that is to be complete; warn if it was interrupted."""
    made = _read_samples(path)
    if path.name == SAMPLES and (path.parent / SETTINGS).exists() and not (path.parent / SUMMARY).exists():
        console.warn(f"{path.parent} is not finished: it has {len(made)} samples and no {SUMMARY}")
    return made


def _sizes(samples: Sequence[Rollout]) -> str:
    """Return the numbers of samples per problem: ``8``, or ``4 to 8``."""
    counts = {len(finals) for finals in by_problem(samples).values()}
    return " to ".join(str(one) for one in sorted({min(counts), max(counts)}))


def _read_settings(folder: Path) -> dict[str, Any]:
    """Read the settings of the evaluation in a folder; an empty dict when it has none."""
    path = folder / SETTINGS
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is corrupt: {error}", "remove that folder or name another --output-dir") from error


def _with_checkpoint(config: EvalConfig) -> EvalConfig:
    """Let ``--model RUN`` mean the run's checkpoint, and a run supply its own base model."""
    path = Path(config.model)
    if config.checkpoint is None and (path / "checkpoints").is_dir():
        config = dataclasses.replace(config, checkpoint=path, model=TINY)
    if config.checkpoint is not None and config.model == TINY:
        for folder in (config.checkpoint, *config.checkpoint.parents[:2]):
            if RunDir(folder).config.is_file():
                run = RunDir(folder).read_config()
                return dataclasses.replace(config, model=run["model"], revision=run["revision"])
    return config


def _apply_checkpoint(config: EvalConfig, loaded: LoadedModel) -> int:
    if config.checkpoint is None:
        return 0
    delta = DeltaFile(find_delta(config.checkpoint))
    apply_delta(delta, dict(loaded.model.named_parameters()), loaded.identity.fingerprint)
    return delta.count


def _claim_folder(config: EvalConfig, loaded: LoadedModel) -> None:
    """Write the settings of the evaluation into its folder, or check that they are the same."""
    settings = manifest.settings_of(config)
    decisive: dict[str, Any] = {key: settings[key] for key in DECISIVE}
    if config.chat_template is not None:  # its content decides, not its place
        decisive["chat_template"] = manifest.file_hash(config.chat_template)
    decisive["fingerprint"] = loaded.identity.fingerprint
    decisive["checkpoint"] = None if config.checkpoint is None else manifest.file_hash(find_delta(config.checkpoint))
    if (config.output_dir / SETTINGS).exists():
        before = _read_settings(config.output_dir)
        odd = [key for key in decisive if before.get(key) != decisive[key]]
        if odd:
            listed = ", ".join(f"{key} was {before.get(key)!r}, is {decisive[key]!r}" for key in odd)
            raise UserError(f"{config.output_dir} holds another evaluation: {listed}", "name another --output-dir")
    elif (config.output_dir / SAMPLES).exists():
        raise UserError(f"{config.output_dir} has samples but no {SETTINGS}", "name another --output-dir")
    else:
        settled = decisive | {"versions": manifest.versions()}
        write_text(config.output_dir / SETTINGS, json.dumps(settled, indent=2) + "\n")


def _show(summary: dict[str, Any], config: EvalConfig) -> None:
    """Print the result as a small table on stdout, with what it can and cannot show below."""
    source = summary["responses"] if config.responses else config.dataset
    columns = ("accuracy", f"{config.confidence:.0%} interval", *(["p"] if "paired" in summary else []))
    table = _table(f"{source}, {times(summary['num_problems'], 'problem')}", columns)
    if paired := summary.get("paired"):
        table.add_row("before", *_cells(paired["baseline_accuracy"]))
        table.add_row("after", *_cells(summary["accuracy"]))
        table.add_row("difference (paired)", *_cells(paired["difference"], signed=True), _p(paired["difference"]))
    else:
        table.add_row("given" if config.responses else "sampled", *_cells(summary["accuracy"]))
    for column, values in summary["groups"].items():
        for value, estimate in values.items():
            table.add_row(f"{column} {value} ({estimate['num_problems']})", *_cells(estimate))
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in summary["outcomes"].items())
    ways = ", ".join(f"{name} {share:.0%}" for name, share in summary["way_fracs"].items())
    lines = [counts, f"answers found by: {ways}"]
    if (n := summary["maj_at_n"]["n"]) > 1:
        passed = ", ".join(f"pass@{k} {value:.3f}" for k, value in summary["pass_at_k"].items() if k != "1")
        lines.append(
            f"avg@{n} {summary['accuracy']['value']:.3f}, {passed}, maj@{n} {summary['maj_at_n']['value']:.3f}"
        )
    if made := summary["runs"]:
        lines.append(
            f"{len(made['accuracies'])} runs: mean {made['mean']:.3f}, standard deviation between runs {made['sd']:.3f} "
            "(sampling only; the interval is over problems)"
        )
    if kl := summary["kl_to_base"]:
        between = "" if kl["low"] is None else f" ({number(kl['low'])} to {number(kl['high'])})"
        lines.append(f"KL to the base: {number(kl['value'])}{between} nats per token")
    if formats := summary["formats"]:
        lines.append(_formats_line(formats))
    if paired and paired["formats"]:
        lines.append(_formats_change(paired["formats"]))
    least = paired["difference"]["detectable"] if paired else summary["detectable_difference"]
    lines.append(_power_line(summary["num_problems"], least))
    _print(table, lines)


def _formats_line(formats: dict[str, Any]) -> str:
    return (
        f"formats: {times(formats['distinct'], 'sequence')} of step patterns in "
        f"{times(formats['num_responses'], 'response')}, entropy {formats['entropy']:.2f} bits, "
        f"the largest {formats['largest_frac']:.0%}"
    )


def _formats_change(found: dict[str, Any], name: str = "formats") -> str:
    before, after = found["baseline"], found["evaluation"]
    return (
        f"{name}: entropy {before['entropy']:.2f} to {after['entropy']:.2f} bits (p {_p_value(found['p_value'])}), the "
        f"largest {before['largest_frac']:.0%} to {after['largest_frac']:.0%}"
    )


def _power_line(num_problems: int, least: float) -> str:
    problems = times(num_problems, "problem")
    if least >= 1:
        return f"{problems} cannot show any difference (paired, 80% power)"
    return f"{problems} cannot show a difference below {least:.3f} (paired, 80% power)"


def _show_comparisons(result: dict[str, Any], confidence: float) -> None:
    """Print each evaluation with its difference to the first."""
    first = result["baseline_accuracy"]
    columns = ("accuracy", f"{confidence:.0%} interval", "p")
    table = _table(f"{times(first['num_problems'], 'problem')}, differences to {result['baseline']}", columns)
    table.add_row(result["baseline"], *_cells(first))
    for one in result["comparisons"]:
        table.add_row(one["evaluation"], *_cells(one["accuracy"]))
        table.add_row("  difference (paired)", *_cells(one["difference"], signed=True), _p(one["difference"]))
    differences = [one["difference"] for one in result["comparisons"]]
    least = max(one["detectable"] for one in differences)
    lines = [f"p-values: {' and '.join(sorted({one['test'] for one in differences}))} test"]
    if len(differences) > 1:
        lines[0] += f", adjusted for {len(differences)} comparisons (Holm)"
    lines.append(_power_line(first["num_problems"], least))
    lines += [
        _formats_change(one["formats"], f"formats, {one['evaluation']}")
        for one in result["comparisons"]
        if one["formats"]
    ]
    _print(table, lines)


def _table(title: str, columns: Sequence[str]) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left")
    for column in ("", *columns):
        table.add_column(column, justify="left" if not column else "right", no_wrap=bool(column))
    return table


def _print(table: Table, lines: Sequence[str]) -> None:
    from rich.text import Text

    from ssrctl.io.terminal import SafeConsole

    terminal = SafeConsole()
    terminal.print(table)
    for line in lines:  # below the table, whose width would fold a caption
        terminal.print(Text(line, style="italic"))


def _cells(estimate: dict[str, float], signed: bool = False) -> tuple[str, str]:
    form = "{:+.3f}" if signed else "{:.3f}"
    return form.format(estimate["value"]), f"{form.format(estimate['low'])} to {form.format(estimate['high'])}"


def _p(difference: dict[str, Any]) -> str:
    return _p_value(difference.get("p_value_holm", difference["p_value"]))


def _p_value(value: float) -> str:
    return f"{value:.3f}" if value >= 0.001 else "<0.001"
