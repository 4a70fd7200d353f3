"""Numbers that papers measured on public checkpoints, next to one's own.

The numbers ship as ``profiles/published/*.json``, one file for each paper: the values of its tables as shares in [0, 1].
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ssrctl.io.package_data import profile_path, shipped_names
from ssrctl.report.document import Column, Dots, Format, Interval, Reference, Section, Table
from ssrctl.report.formats import number, percent, times

PublishedKey = Literal[
    "sparsity_1e-8", "sparsity_1e-7", "sparsity_1e-6", "sparsity_1e-5", "sparsity_bf16",
    "rank", "run_overlap", "run_jaccard", "changed_per_checkpoint", "changed_per_step",
    "outside_final",
]  # fmt: skip
Training = Literal["RL", "SFT"]
_KINDS: tuple[Training, ...] = ("RL", "SFT")

NAMES: dict[PublishedKey, str] = {
    "sparsity_1e-8": "update sparsity, tolerance 1e-8",
    "sparsity_1e-7": "update sparsity, tolerance 1e-7",
    "sparsity_1e-6": "update sparsity, tolerance 1e-6",
    "sparsity_1e-5": "update sparsity, tolerance 1e-5",
    "sparsity_bf16": "update sparsity, bf16-aware",
    "rank": "rank of an update matrix over its maximum, mean",
    "run_overlap": "one-sided overlap of two runs",
    "run_jaccard": "Jaccard index of runs, changed weights of a matrix",
    "changed_per_checkpoint": "weights changed from one checkpoint to the next",
    "changed_per_step": "weights changed by one training step",
    "outside_final": "ever changed, but not in the final subnetwork",
}


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published number.

    Attributes:
        paper: authors and year.
        table: its place in the paper: ``table 1``.
        measure: the quantity, a key of ``NAMES``.
        model: the checkpoint, or the matrix or setting where the table has one model only.
        training: RL (preference optimisation included) or SFT.
        value: a share in [0, 1].
        baseline: the paper's value for chance; None where it gives none.
    """

    paper: str
    table: str
    measure: PublishedKey
    model: str
    algorithm: str
    training: Training
    value: float
    baseline: float | None = None


@functools.cache
def published() -> tuple[Published, ...]:
    """Return all published numbers, by paper and in the order of its tables; read from disk once."""
    found: list[Published] = []
    for name in shipped_names("published", ".json"):
        held = json.loads(profile_path("published", name, ".json").read_text(encoding="utf-8"))
        found += (Published(paper=held["paper"], **row) for row in held["numbers"])
    return tuple(found)


def references(measure: PublishedKey, training: Training | None = None, *, changed: bool = False) -> list[Reference]:
    """Return the published ranges of a measure, one for each table that has it (RL before SFT).

    Args:
        measure: a key of ``NAMES``.
        training: RL or SFT only; None is both.
        changed: of a sparsity, the changed shares: 1 - sparsity.
    """
    tables: dict[tuple[str, str, str], list[float]] = {}
    for kind in ("RL", "SFT") if training is None else (training,):
        for one in published():
            if (one.measure, one.training) == (measure, kind):
                tables.setdefault((one.paper, one.table, kind), []).append(1 - one.value if changed else one.value)
    return [_reference(", ".join(source), measure, values) for source, values in tables.items()]


def _reference(source: str, measure: PublishedKey, values: Sequence[float]) -> Reference:
    low, high = min(values), max(values)
    style = "{:.3f}" if measure == "run_jaccard" else "{:.1%}"
    span = " to ".join(style.format(one) for one in dict.fromkeys((low, high)))
    return Reference(f"{source}: {span}", low, high if high > low else None)


def position(measure: PublishedKey, value: float) -> Literal["below", "within", "above"]:
    """Return the place of a value relative to all numbers that were published for RL."""
    values = [one.value for one in published() if one.measure == measure and one.training == "RL"]
    if value < min(values):
        return "below"
    return "above" if value > max(values) else "within"


def unusual(values: Mapping[PublishedKey, float | None]) -> list[str]:
    """Return a sentence for each fact outside of all numbers that were published for RL.

    Sparsity by several rules is one fact, told by one of them.

    Args:
        values: shares in [0, 1]; None was not measured. A measure with a single published number has no range and is
            left out.
    """
    odd: dict[tuple[str, str], list[PublishedKey]] = {}
    for measure, value in values.items():
        if value is not None and any(one.high is not None for one in references(measure, "RL")):
            where = position(measure, value)
            if where != "within":
                odd.setdefault((measure.split("_1e")[0].split("_bf16")[0], where), []).append(measure)
    found = []
    for (_, place), measures in odd.items():
        measure = measures[-1]  # of sparsity the bf16-aware rule, or the largest tolerance
        value = values[measure]
        assert value is not None
        sources = "; ".join(one.label for one in references(measure, "RL") if one.high is not None)
        sft = [one for one in references(measure, "SFT") if one.high is not None and one.low <= value <= one.high]
        like_sft = f", and as published for SFT ({sft[0].label})" if sft else ""
        others = f"; so it is by {times(len(measures) - 1, 'other rule')}" if len(measures) > 1 else ""
        name, shown = NAMES[measure], _format(measure)(value)
        found.append(f"{name[0].upper()}{name[1:]}: {shown}, {place} what was published ({sources}){like_sft}{others}.")
    return found


def _span(measure: PublishedKey, training: Training) -> Interval | None:
    """Return the least and the largest published value; None without any."""
    found = [one.value for one in published() if (one.measure, one.training) == (measure, training)]
    return (min(found), max(found)) if found else None


def _format(measure: PublishedKey) -> Format:
    return number if measure == "run_jaccard" else percent


def published_section(values: Mapping[PublishedKey, float | None]) -> Section:
    """Return a section that shows measured values next to the papers' ranges, and all published numbers.

    Args:
        values: shares in [0, 1] of the measures that were taken; None shows only the published range.
    """
    spans = {f"published, {kind}": [_span(measure, kind) for measure in values] for kind in _KINDS}
    figure = Dots(
        title="Measured values and published ranges",
        labels=[NAMES[measure] for measure in values],
        series={"measured": list(values.values())}
        | {name: [span[0] if span and span[0] == span[1] else None for span in found] for name, found in spans.items()},
        intervals=spans,
        axis="share",
        caption="Lines: ranges over the papers' checkpoints; the table names the papers.",
    )
    compared = Table(
        title="Measured and published",
        columns=["measure", Column("here", list(map(_format, values))), "against published RL", "published"],
        rows=[
            [
                NAMES[measure],
                value,
                None if value is None else position(measure, value),
                "; ".join(one.label for one in references(measure)),
            ]
            for measure, value in values.items()
        ],
        note="The published checkpoints are stored in bf16. Sparsity falls during training (Mukherjee et al. 2025, "
        "figure 5), so that a short run lies above the range.",
    )
    return Section(
        title="Next to published numbers",
        text="Does the update look like those of published RL checkpoints?",
        figures=[figure] if values else [],
        tables=[compared, _published_table(values)],
    )


def _published_table(measures: Collection[PublishedKey]) -> Table:
    """Return the published numbers of some measures, one row each; a column for chance where any has it."""
    kept = [one for one in published() if one.measure in measures]
    formats = [_format(one.measure) for one in kept]
    with_chance = any(one.baseline is not None for one in kept)
    return Table(
        title="Published numbers",
        columns=[
            "model",
            "training",
            "measure",
            Column("value", formats),
            *([Column("chance", formats)] if with_chance else []),
            "source",
        ],
        rows=[
            [
                one.model,
                one.algorithm,
                NAMES[one.measure],
                one.value,
                *([one.baseline] if with_chance else []),
                f"{one.paper}, {one.table}",
            ]
            for one in kept
        ],
        note=f"{times(len(kept), 'number')} on public checkpoints.",
        terminal_rows=0,
    )
