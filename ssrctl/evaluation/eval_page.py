"""The page of evaluations: accuracy with intervals next to one another, by group and by number of samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssrctl.errors import UserError
from ssrctl.evaluation.transcripts import first_of_each, transcript
from ssrctl.io import console
from ssrctl.io.jsonl import parse_json
from ssrctl.io.records import Rollout, read_rollouts
from ssrctl.report.document import Column, Document, Dots, Figure, Interval, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, text_safe

SUMMARY, SAMPLES = "summary.json", "samples.jsonl"


@dataclass(frozen=True, kw_only=True)
class EvalLog:
    """A finished evaluation.

    Attributes:
        label: the folder's name, unique on the page.
        summary: as ``ssrctl eval`` writes it.
        samples: a right and a wrong one, as far as there are.
    """

    label: str
    summary: Mapping[str, Any]
    samples: Sequence[Rollout]

    @property
    def accuracy(self) -> Mapping[str, Any]:
        """Value, ends of the interval, confidence and number of problems."""
        found: Mapping[str, Any] = self.summary["accuracy"]
        return found


def is_evaluation(folder: Path) -> bool:
    """Return True if the folder holds an evaluation, finished or not."""
    return (folder / SUMMARY).is_file() or (folder / SAMPLES).is_file()


def read_evaluation(folder: Path, label: str) -> EvalLog:
    """Read an evaluation.

    Raises:
        UserError: it is not finished, or its summary cannot be read.
    """
    path = folder / SUMMARY
    if not path.is_file():
        raise UserError(f"{folder} has samples but no {SUMMARY}", "finish it with the same `ssrctl eval` command")
    try:
        summary = parse_json(path.read_text(encoding="utf-8"))
        values = [float(summary["accuracy"][key]) for key in ("value", "low", "high", "confidence", "num_problems")]
        assert len(values) == 5
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is not a summary of `ssrctl eval`: {error}", "evaluate again") from error
    samples = folder / SAMPLES
    found = first_of_each(read_rollouts(samples, on_torn=console.warn)) if samples.is_file() else []
    return EvalLog(label=label, summary=summary, samples=found)


def eval_document(evaluations: Sequence[EvalLog]) -> Document:
    """Return the page of one evaluation, or of several next to one another."""
    several = len(evaluations) > 1
    lines = [f"{one.label}: a{line[1:]}" if several else line for one in evaluations for line in [_sentence(one)]]
    accuracy = Dots(
        title="Accuracy",
        labels=[one.label for one in evaluations],
        series={"accuracy": [one.accuracy["value"] for one in evaluations]},
        intervals={"accuracy": [_interval(one.accuracy) for one in evaluations]},
        axis="mean over problems",
        caption=f"Lines: {evaluations[0].accuracy['confidence']:.0%} interval over problems.",
    )
    section = Section(
        title="Accuracy",
        figures=[accuracy, *_groups(evaluations), *_passed(evaluations), *_divergences(evaluations)],
        tables=[_table(evaluations)],
    )
    formats = _formats(evaluations)
    transcripts = [
        transcript(sample, f"{one.label}, {sample.id}, {_verdict(sample)}")
        for one in evaluations
        for sample in one.samples
    ]
    shown = (
        [Section(title="Samples", text="A right and a wrong response.", transcripts=transcripts)] if transcripts else []
    )
    return Document(
        title="How do the evaluations compare?" if several else "How accurate is the model?",
        facts=[(one.label, _fact(one)) for one in evaluations],
        headlines=lines,
        notes=[],
        sections=[section, *([formats] if formats else []), *shown],
    )


def _interval(estimate: Mapping[str, Any]) -> Interval:
    return estimate["low"], estimate["high"]


def _verdict(sample: Rollout) -> str:
    return "right" if sample.final is not None and sample.final.correct else "wrong"


def _fact(one: EvalLog) -> str:
    model = one.summary.get("model") or {}
    parts = [model.get("name"), one.summary.get("checkpoint"), one.summary.get("responses")]
    source = " + ".join(Path(text_safe(str(part))).name for part in parts if part) or "given responses"
    return f"{source}; {one.accuracy['num_problems']} problems, {one.summary.get('num_samples', '?')} samples"


def _sentence(one: EvalLog) -> str:
    found = one.accuracy
    line = f"Accuracy {found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"
    paired = one.summary.get("paired")
    if paired is None:
        return line + "."
    change = paired["difference"]
    return (
        f"{line}, {change['value']:+.3f} ({change['low']:+.3f} to {change['high']:+.3f}) against the baseline "
        f"{Path(text_safe(str(paired['baseline']))).name}, paired."
    )


def _groups(evaluations: Sequence[EvalLog]) -> list[Figure]:
    """Return the accuracy by each column of groups that any evaluation has."""
    columns = dict.fromkeys(column for one in evaluations for column in one.summary.get("groups") or {})
    figures: list[Figure] = []
    for column in columns:
        found = {one.label: (one.summary.get("groups") or {}).get(column, {}) for one in evaluations}
        labels = list(dict.fromkeys(value for groups in found.values() for value in groups))
        figures.append(
            Dots(
                title=f"Accuracy by {column}",
                labels=labels,
                series={
                    label: [groups[value]["value"] if value in groups else None for value in labels]
                    for label, groups in found.items()
                },
                intervals={
                    label: [_interval(groups[value]) if value in groups else None for value in labels]
                    for label, groups in found.items()
                },
                axis="mean over problems",
            )
        )
    return figures


def _passed(evaluations: Sequence[EvalLog]) -> list[Figure]:
    """Return pass@k over k; nothing where problems have one sample."""
    found = {
        one.label: {int(k): value for k, value in (one.summary.get("pass_at_k") or {}).items()} for one in evaluations
    }
    ks = sorted({k for values in found.values() for k in values})
    if len(ks) < 2:
        return []
    series = {label: [values.get(k) for k in ks] for label, values in found.items()}
    figure = Lines(
        title="pass@k", x=ks, series=series, x_label="k samples", y_label="share solved", log_x=True, shares=True
    )
    return [figure]


def _divergences(evaluations: Sequence[EvalLog]) -> list[Figure]:
    """Return the KL divergence of each evaluation's model from its base; nothing where none was measured."""
    found = {one.label: kl for one in evaluations if (kl := one.summary.get("kl_to_base"))}
    if not found:
        return []
    figure = Dots(
        title="Divergence from the base model",
        labels=list(found),
        series={"KL(model, base)": [one["value"] for one in found.values()]},
        intervals={"KL(model, base)": [None if one["low"] is None else _interval(one) for one in found.values()]},
        axis="nats per token of the responses",
        shares=False,
        caption="Mean over problems, with its interval over them.",
    )
    return [figure]


def _formats(evaluations: Sequence[EvalLog]) -> Section | None:
    """Return the diversity of the responses' formats; None where no evaluation has it."""
    found = [(one.label, formats) for one in evaluations if (formats := one.summary.get("formats"))]
    if not found:
        return None
    columns = {
        "num_responses": Column("responses", count),
        "distinct": Column("distinct", count),
        "entropy": Column("entropy (bits)", number),
        "largest_frac": Column("share of the largest", percent),
    }
    table = Table(
        title="Sequences of step patterns",
        columns=["evaluation", *columns.values(), "the largest"],
        rows=[[label, *(one.get(key) for key in columns), text_safe(str(one.get("largest")))] for label, one in found],
        note="Distinct sequences and entropy grow with the number of responses: compare evaluations with as many.",
    )
    return Section(
        title="Formats of the responses", text="How many ways of writing does the model use?", tables=[table]
    )


def _table(evaluations: Sequence[EvalLog]) -> Table:
    outcomes = list(dict.fromkeys(name for one in evaluations for name in one.summary.get("outcomes") or {}))
    keys = {"answered": "answered_frac", "finished": "finished_frac", "solved once": "solved_at_least_once"}
    divergences = [(one.summary.get("kl_to_base") or {}).get("value") for one in evaluations]
    measured = any(value is not None for value in divergences)
    return Table(
        title="Evaluations",
        columns=[
            "evaluation",
            *(Column(name, percent) for name in ("accuracy", "low", "high")),
            *(Column(name.replace("_", " "), count) for name in outcomes),
            *(Column(name, percent) for name in keys),
            Column("tokens", count),
            *([Column("KL to base", number)] if measured else []),
        ],
        rows=[
            [
                one.label,
                *(one.accuracy[key] for key in ("value", "low", "high")),
                *((one.summary.get("outcomes") or {}).get(name, 0) for name in outcomes),
                *(one.summary.get(key) for key in keys.values()),
                one.summary.get("mean_response_tokens"),
                *([divergence] if measured else []),
            ]
            for one, divergence in zip(evaluations, divergences, strict=True)
        ],
        note="Tokens: mean of a response. Solved once: problems with a right sample."
        + (" KL to base: nats per token." if measured else ""),
    )
