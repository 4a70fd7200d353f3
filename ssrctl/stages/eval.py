"""`ssrctl eval`: sampled accuracy with an interval, and the paired difference to an earlier evaluation."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ssrctl.analysis.intervals import accuracy_interval, paired_difference
from ssrctl.configs import TINY, EvalConfig
from ssrctl.core.seeds import derive_seed
from ssrctl.errors import UserError
from ssrctl.io import console, manifest
from ssrctl.io.delta import apply_delta, load_delta
from ssrctl.io.files import existing_file, write_text
from ssrctl.io.jsonl import JsonlLog
from ssrctl.io.problems import load_problems
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.io.run_dir import RunDir, find_delta
from ssrctl.models.collect import Prompted, prepare_prompts
from ssrctl.models.loading import LoadedModel, describe_model, load_model
from ssrctl.models.rollout import Sample, sample_responses
from ssrctl.text.answers import check_answer
from ssrctl.text.prompts import load_template

SAMPLES, SUMMARY, SETTINGS = "samples.jsonl", "summary.json", "settings.json"
# What decides which samples are drawn; an evaluation is only continued under the same.
DECISIVE = (
    "dataset", "dataset_config", "dataset_split", "question_column", "answer_column", "prompt_template", "limit",
    "temperature", "top_p", "top_k", "max_new_tokens", "generation_batch_size", "num_samples", "seed", "dtype",
)  # fmt: skip


def run(config: EvalConfig) -> dict[str, Any]:
    """Evaluate and return the summary that is also written to ``summary.json``.

    Raises:
        UserError: unusable settings or inputs, or a folder that holds another evaluation.
        KeyboardInterrupt: Ctrl-C; the samples drawn so far are kept and the next run goes on from them.
    """
    config = _with_checkpoint(config)
    console.note(describe_model(config) + (f" + {config.checkpoint}" if config.checkpoint else ""))
    baseline = None if config.baseline is None else _read_samples(config.baseline)
    template = load_template(config.prompt_template, config.dataset)
    problems = load_problems(config, "test", derive_seed(config.seed, "problems"))
    loaded = load_model(config)
    changed = _apply_checkpoint(config, loaded)
    prompts, num_left_out = prepare_prompts(loaded, problems, template, config.max_new_tokens)
    if num_left_out:
        console.warn(f"{num_left_out} of {len(problems)} questions do not fit the context and are left out")
    if config.dry_run:
        plan = {
            "problems": len(prompts),
            "samples": len(prompts) * config.num_samples,
            "most_response_tokens": len(prompts) * config.num_samples * config.max_new_tokens,
            "changed_coordinates": changed,
            "output_dir": str(config.output_dir),
        }
        console.show_plan("plan", plan)
        return plan
    _claim_folder(config, loaded)
    _draw(config, loaded, prompts)
    samples = _read_samples(config.output_dir)
    wanted = {f"{p.problem.id}/{i}" for p in prompts for i in range(config.num_samples)}
    summary = summarise([s for s in samples if s.id in wanted], config.confidence)
    summary = {"model": dataclasses.asdict(loaded.identity), "checkpoint": _name(config.checkpoint)} | summary
    if baseline is not None:
        summary["paired"] = compare(baseline, samples, config.confidence) | {"baseline": str(config.baseline)}
    write_text(config.output_dir / SUMMARY, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    if not config.json:
        _show(summary, config)
    return summary


def summarise(samples: Sequence[Rollout], confidence: float) -> dict[str, Any]:
    """Accuracy with its interval, and how responses ended."""
    by_problem = _per_problem(samples)
    accuracy = accuracy_interval(list(by_problem.values()), confidence)
    return {
        "accuracy": accuracy.to_dict(),
        "num_problems": len(by_problem),
        "num_samples": len(samples),
        "solved_at_least_once": sum(1 for share in by_problem.values() if share > 0) / len(by_problem),
        "answered_frac": sum(s.final is not None and s.final.extracted is not None for s in samples) / len(samples),
        "finished_frac": sum(bool(s.extra.get("finished")) for s in samples) / len(samples),
        "mean_response_tokens": statistics.fmean(s.extra.get("num_tokens", 0) for s in samples),
    }


def compare(before: Iterable[Rollout], after: Iterable[Rollout], confidence: float) -> dict[str, Any]:
    """The paired difference over the problems that both evaluations have.

    Raises:
        UserError: they have none in common, or one id names different questions.
    """
    first, second = list(before), list(after)
    questions = {s.group: s.question for s in first}
    for sample in second:
        if questions.get(sample.group, sample.question) != sample.question:
            raise UserError(
                f"problem {sample.group} has different questions in the two evaluations",
                "compare evaluations of the same data set",
            )
    old, new = _per_problem(first), _per_problem(second)
    shared = sorted(old.keys() & new.keys())
    if not shared:
        raise UserError(
            f"the baseline has {len(old)} problems, this evaluation {len(new)}, and none in common",
            "evaluate both on the same problems",
        )
    if left_out := len(old.keys() ^ new.keys()):
        console.warn(f"{left_out} problems are in only one of the two evaluations and are left out of the comparison")
    difference = paired_difference([old[p] for p in shared], [new[p] for p in shared], confidence)
    baseline = accuracy_interval([old[p] for p in shared], confidence)
    return {"baseline_accuracy": baseline.to_dict(), "difference": difference.to_dict()}


def _per_problem(samples: Iterable[Rollout]) -> dict[str, float]:
    right: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        right[sample.group].append(sample.final is not None and sample.final.correct is True)
    return {problem: sum(flags) / len(flags) for problem, flags in right.items()}


def _draw(config: EvalConfig, loaded: LoadedModel, prompts: Sequence[Prompted]) -> None:
    """Draw what is still missing, batch by batch; each batch has its own seed, so a continuation draws the same."""
    jobs = [(prompt, number) for prompt in prompts for number in range(config.num_samples)]
    path = config.output_dir / SAMPLES
    with JsonlLog(path) as log, console.progress(unit="samples") as bar:
        done = {s.id for s in _read_samples(config.output_dir)} if path.stat().st_size else set()
        if done:
            console.note(f"{len(done)} of {len(jobs)} samples are already in {path}")
        task = bar.add_task("eval", total=len(jobs), completed=0, status="")
        size = config.generation_batch_size
        for start in range(0, len(jobs), size):
            batch = jobs[start : start + size]
            missing = [place for place, (p, number) in enumerate(batch) if f"{p.problem.id}/{number}" not in done]
            if missing:
                seed = derive_seed(config.seed, "eval", start)
                drawn = sample_responses(loaded, [p.prompt_ids for p, _ in batch], config, seed)
                for place in missing:
                    log.append(_record(*batch[place], drawn[place]).to_dict())
            bar.update(task, advance=len(batch))


def _record(prompt: Prompted, number: int, sample: Sample) -> Rollout:
    problem = prompt.problem
    return Rollout(
        id=f"{problem.id}/{number}",
        question=problem.question,
        answer=problem.answer,
        prompt=prompt.prompt,
        response=sample.text,
        final=check_answer(sample.text, problem.answer),
        extra=dict(problem.extra) | {"num_tokens": len(sample.response_ids), "finished": sample.finished},
    )


def _read_samples(folder: Path) -> list[Rollout]:
    path = existing_file(folder / SAMPLES, "evaluation")
    return list(read_rollouts(path, needs=("question", "final"), on_torn=console.warn))


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
    path = find_delta(config.checkpoint)
    delta = load_delta(path)
    apply_delta(delta, dict(loaded.model.named_parameters()), loaded.identity.fingerprint, path)
    return delta.count


def _claim_folder(config: EvalConfig, loaded: LoadedModel) -> None:
    """Note in the folder what is evaluated there, or check that it is the same."""
    settings = manifest.settings_of(config)
    decisive: dict[str, Any] = {key: settings[key] for key in DECISIVE}
    decisive["fingerprint"] = loaded.identity.fingerprint
    decisive["checkpoint"] = None if config.checkpoint is None else manifest.file_hash(find_delta(config.checkpoint))
    path = config.output_dir / SETTINGS
    if path.exists():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is torn: {error}", "remove that folder or name another --output-dir") from error
        odd = [key for key in decisive if before.get(key) != decisive[key]]
        if odd:
            listed = ", ".join(f"{key} was {before.get(key)!r}, is {decisive[key]!r}" for key in odd)
            raise UserError(f"{config.output_dir} holds another evaluation: {listed}", "name another --output-dir")
    elif (config.output_dir / SAMPLES).exists():
        raise UserError(f"{config.output_dir} has samples but no {SETTINGS}", "name another --output-dir")
    else:
        write_text(path, json.dumps(decisive | {"versions": manifest.versions()}, indent=2) + "\n")


def _show(summary: dict[str, Any], config: EvalConfig) -> None:
    """The result as a small table on stdout."""
    from rich.console import Console
    from rich.table import Table

    level = f"{config.confidence:.0%} interval"
    table = Table(title=f"{config.dataset}, {summary['num_problems']} problems", title_justify="left")
    for column in ("", "accuracy", level):
        table.add_column(column, justify="left" if not column else "right")
    if paired := summary.get("paired"):
        table.add_row("before", *_cells(paired["baseline_accuracy"]))
        table.add_row("after", *_cells(summary["accuracy"]))
        table.add_row("difference (paired)", *_cells(paired["difference"], signed=True))
    else:
        table.add_row("sampled", *_cells(summary["accuracy"]))
    Console().print(table)


def _cells(estimate: dict[str, float], signed: bool = False) -> tuple[str, str]:
    form = "{:+.3f}" if signed else "{:.3f}"
    return form.format(estimate["value"]), f"{form.format(estimate['low'])} to {form.format(estimate['high'])}"


def _name(path: Path | None) -> str | None:
    return None if path is None else path.name
