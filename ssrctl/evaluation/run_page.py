"""The page of training runs: their course next to one another, costs, claims of the steps, and a few rollouts.

Everything is read from the logs of the run directories, also while a run is in progress.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ssrctl.evaluation.intervals import accuracy_interval
from ssrctl.evaluation.run_log import RunLog
from ssrctl.evaluation.transcripts import transcript
from ssrctl.io.mask_log import Claims
from ssrctl.report.document import (
    Column,
    Document,
    Dots,
    Figure,
    Interval,
    Lines,
    Numbers,
    Reference,
    Section,
    Table,
    Transcript,
)
from ssrctl.report.formats import count, duration, number, signed, text_safe

PAGE = "report.html"
# Points of a curve; a mean over the last tenth of the steps, at least this many, smooths them.
_MOST_POINTS, _LEAST_WINDOW = 150, 5
_PHASES = {"sampling": "sample", "scoring": "score", "updates": "update", "reference model": "reference"}
_NOT_COMPARED = ("output_dir", "report", "json", "force", "resume_from_checkpoint")


# --------------------------------------------------------------------------------------------------
# the document


def run_document(runs: Sequence[RunLog]) -> Document:
    """Return the page of one run, or of several next to one another."""
    window = max(_LEAST_WINDOW, round(max(len(run.rows) for run in runs) / 10))
    several = len(runs) > 1
    headlines = [line for run in runs for line in _headlines(run, window, several)]
    learning = [
        _curve(runs, window, "accuracy", "Accuracy", "share of responses", shares=True, interval=_share_interval),
        _curve(runs, window, "reward", "Reward", "mean over steps, -1 to 1"),
        _curve(runs, window, "response_tokens_mean", "Length of a response", "tokens"),
        _curve(runs, window, "entropy", "Entropy", "nats per token"),
        _curve(runs, window, "kl_to_start", "KL to the start model", "nats per token"),
        _curve(runs, window, "grad_norm", "Norm of the applied gradient, before the clip", "L2 norm"),
    ]
    sections = [
        Section(title="Learning", figures=_present(learning), tables=_settings(runs)),
        Section(title="What the steps claim", figures=_present(_claim_figures(runs, window))),
        _costs(runs),
        Section(
            title="Rollouts", text=_ROLLOUTS, transcripts=[one for run in runs for one in _transcripts(run, several)]
        ),
    ]
    return Document(
        title="What did training do?" if not several else "How do the runs compare?",
        facts=[(run.label, _fact(run)) for run in runs],
        headlines=headlines,
        notes=_notes(runs),
        sections=[one for one in sections if one.figures or one.tables or one.transcripts],
    )


def _fact(run: RunLog) -> str:
    model, *rest = (text_safe(str(run.settings.get(key, "?"))) for key in ("model", "optimizer", "credit"))
    of = "" if run.max_steps is None else f" of {run.max_steps}"
    return f"{Path(model).name}, {rest[0]}, credit {rest[1]}; {run.steps[-1]}{of} steps"


def _notes(runs: Sequence[RunLog]) -> list[str]:
    notes = [
        f"{run.label} has {run.steps[-1]} of {run.max_steps} steps: it is in progress, or it was stopped."
        for run in runs
        if not run.has_ended and run.max_steps is not None
    ]
    versions = {run.version for run in runs if run.version is not None}
    if len(versions) > 1:
        said = ", ".join(f"{run.label} {run.version or 'unknown'}" for run in runs)
        notes.append(f"The runs are of different versions of ssrctl ({said}): a metric may have another meaning.")
    return notes


def _headlines(run: RunLog, window: int, several: bool) -> list[str]:
    """Return accuracy, reward, length and costs; of one of several runs in one sentence."""
    parts = []
    accuracy, rewards = ([one for one in run.values(key) if one is not None] for key in ("accuracy", "reward"))
    if accuracy:
        before = "" if len(accuracy) <= window else f", {_interval_words(accuracy[:window])} in the first {window}"
        parts.append(
            f"accuracy {_interval_words(accuracy[-window:])} in the last {min(window, len(accuracy))} steps{before}"
        )
    if rewards:
        parts.append(
            f"reward {signed(statistics.fmean(rewards[-window:]))} after {signed(statistics.fmean(rewards[:window]))}"
        )
    shown = {"responses of {} tokens": "response_tokens_mean", "entropy {} nats": "entropy"}
    means = {words: _last_mean(run.values(key), window) for words, key in shown.items()}
    parts += [words.format(number(mean)) for words, mean in means.items() if mean is not None]
    seconds = _phase_seconds(run)
    if total := sum(seconds.values()):
        phases = ", ".join(f"{one / total:.0%} {name}" for name, one in seconds.items() if one)
        parts.append(f"{duration(total)} ({phases})")
    if run.cost_usd is not None:
        parts.append(f"${run.cost_usd:.2f} for {count(run.num_calls)} calls of the critic")
    if several:
        return [f"{run.label}: {'; '.join(parts)}."]
    return [f"{one[0].upper()}{one[1:]}." for one in parts]


def _interval_words(values: Sequence[float]) -> str:
    found = _share_interval(values)
    return f"{statistics.fmean(values):.3f}" + ("" if found is None else f" ({found[0]:.3f} to {found[1]:.3f})")


def _last_mean(values: Sequence[float | None], window: int) -> float | None:
    kept = [value for value in values[-window:] if value is not None]
    return statistics.fmean(kept) if kept else None


def _share_interval(values: Sequence[float]) -> Interval | None:
    """Return the 95% interval of a mean of shares, from their spread over the steps; None for a few steps."""
    if len(values) < _LEAST_WINDOW:
        return None
    found = accuracy_interval([min(1.0, max(0.0, value)) for value in values])
    return found.low, found.high


# --------------------------------------------------------------------------------------------------
# figures


def _curve(
    runs: Sequence[RunLog],
    window: int,
    metric: str,
    title: str,
    y_label: str,
    *,
    shares: bool = False,
    interval: Callable[[Sequence[float]], Interval | None] = lambda values: None,
    transform: Callable[[float], float] = lambda value: value,
) -> Lines | None:
    """Return the mean of a metric over the last steps that have it, a line for each run; None where no run has it."""
    measured = {
        run.label: {
            step: transform(one) for step, one in zip(run.steps, run.values(metric), strict=True) if one is not None
        }
        for run in runs
    }
    all_steps = sorted({step for values in measured.values() for step in values})
    if not all_steps:
        return None
    stride = max(1, -(-len(all_steps) // _MOST_POINTS))
    places = sorted({*all_steps[::stride], all_steps[-1]})
    series: dict[str, Numbers] = {}
    intervals: dict[str, list[Interval | None]] = {}
    for label, of_run in measured.items():
        values, position = list(of_run.values()), {step: place for place, step in enumerate(of_run)}
        windows = [_window(values, position.get(step), window) for step in places]
        # A run without the metric stays in the legend, so that each has one colour in all figures.
        series[label] = [statistics.fmean(one) if one else None for one in windows]
        intervals[label] = [interval(one) if one else None for one in windows]
    partly = any(0 < len(measured[run.label]) < len(run.steps) for run in runs)
    some = " that have it" if partly else ""
    ribbon = "; ribbon: 95% interval over these steps" if any(map(any, intervals.values())) else ""
    return Lines(
        title=title,
        x=places,
        series=series,
        intervals=intervals,
        x_label="training step",
        y_label=y_label,
        shares=shares,
        caption=f"Mean of the last {window} steps{some}{ribbon}.",
    )


def _window(values: Sequence[float], place: int | None, window: int) -> Sequence[float]:
    return [] if place is None else values[max(0, place + 1 - window) : place + 1]


def _present(figures: Iterable[Figure | None]) -> list[Figure]:
    return [one for one in figures if one is not None]


def _claim_figures(runs: Sequence[RunLog], window: int) -> list[Figure | None]:
    """Return claims by step index, conflict and cosine over training, and the survival of updates."""
    longest = max((len(units) for run in runs for one in run.claims for units in one.shares), default=0)
    claims = None
    if longest:
        claims = Lines(
            title="Claimed share by step index",
            x=list(range(1, longest + 1)),
            series={run.label: [_mean_claim(run, place) for place in range(longest)] for run in runs},
            x_label="update unit of a question",
            y_label="share of the unprotected",
            shares=True,
            caption="Mean over the questions of the logged training steps.",
        )
    return [
        claims,
        _logged(
            runs,
            "Conflict of a question's steps",
            "opposite signs",
            lambda one: one.conflicts,
            shares=True,
            references=[Reference("random signs: 50%", 0.5)],
            caption="Of the coordinates that either of two steps ranks highest, the share where their gradients have "
            "opposite signs; mean over pairs.",
        ),
        _logged(runs, "Cosine of the steps' gradients", "mean over pairs", lambda one: one.cosines),
        _curve(
            runs,
            window,
            "lost_update_frac",
            "Updates that survive storage",
            "share of the updates",
            shares=True,
            transform=lambda lost: 1 - lost,
        ),
        _curve(runs, window, "updated_frac", "Weights updated in a step", "share of all weights", shares=True),
        _curve(
            runs,
            window,
            "negative_energy_frac",
            "Part of the update from negative advantages",
            "share of the squared norm",
            shares=True,
        ),
    ]


def _mean_claim(run: RunLog, place: int) -> float | None:
    found = [units[place] for one in run.claims for units in one.shares if place < len(units)]
    return statistics.fmean(found) if found else None


def _logged(
    runs: Sequence[RunLog], title: str, y_label: str, values: Callable[[Claims], Sequence[float]], **settings: Any
) -> Lines | None:
    """Return the mean at each logged training step, a line for each run; None where no run has the values."""
    found = {run.label: {one.step: statistics.fmean(values(one)) for one in run.claims if values(one)} for run in runs}
    steps = sorted({step for means in found.values() for step in means})
    if not steps:
        return None
    series = {label: [means.get(step) for step in steps] for label, means in found.items()}
    return Lines(title=title, x=steps, series=series, x_label="training step", y_label=y_label, **settings)


# --------------------------------------------------------------------------------------------------
# costs, settings, rollouts


def _phase_seconds(run: RunLog) -> dict[str, float]:
    return {
        name: math.fsum(value for value in run.values(f"{key}_seconds") if value is not None)
        for name, key in _PHASES.items()
    }


def _costs(runs: Sequence[RunLog]) -> Section:
    """Return time by phase, tokens and money."""
    seconds = {run.label: _phase_seconds(run) for run in runs}
    phases = [name for name in _PHASES if any(one[name] for one in seconds.values())]
    figure = Dots(
        title="Seconds of a training step by phase",
        labels=phases,
        series={run.label: [seconds[run.label][name] / len(run.rows) for name in phases] for run in runs},
        axis="seconds, mean over the steps",
        shares=False,
    )
    table = Table(
        title="Time and money",
        columns=[
            "run",
            *(Column(name, duration) for name in phases),
            Column("tokens", count),
            Column("critic calls", count),
            Column("critic cost ($)", "{:.2f}".format if any(run.cost_usd is not None for run in runs) else count),
        ],
        rows=[
            [
                run.label,
                *(seconds[run.label][name] for name in phases),
                int(sum(value for value in run.values("response_tokens") if value is not None)),
                run.num_calls,
                run.cost_usd,
            ]
            for run in runs
        ],
    )
    return Section(title="Time and money", figures=[figure] if phases else [], tables=[table])


def _settings(runs: Sequence[RunLog]) -> list[Table]:
    """Return the settings in which runs differ; no table for one run."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = [[name, *(text_safe(str(run.settings.get(name, "–"))) for run in runs)] for name in names]
    odd = [row for row in rows if len(set(row[1:])) > 1 and row[0] not in _NOT_COMPARED]
    if not odd:
        return []
    return [Table(title="Settings that differ", columns=["setting", *(run.label for run in runs)], rows=odd)]


_ROLLOUTS = (
    "A right and a wrong response of the last step. Steps are coloured by their reward: blue is good, orange bad, the "
    "stronger the further from 0; a step without a score is dashed."
)


def _transcripts(run: RunLog, several: bool) -> list[Transcript]:
    return [
        transcript(one, f"{f'{run.label}, ' if several else ''}{one.id}, {'right' if one.final.correct else 'wrong'}")
        for one in run.rollouts
        if one.final is not None
    ]
