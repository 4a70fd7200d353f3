"""Overlap of the coordinates that the steps of a question selected, over a whole run (``--jaccard``).

Every mean is over single cases with equal weight (a case is one pair of units of one question in one logged
training step, or one unit of one), not over averages of averages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ssrctl.io.mask_log import StepMaskLog
from ssrctl.measures.base import Findings, StepMeasure
from ssrctl.measures.group_tables import RowColumn, row_dots, row_table
from ssrctl.measures.maths.averages import means, plain_mean
from ssrctl.measures.maths.grouping import by_key
from ssrctl.measures.maths.step_sets import PairOverlap, PairSets, StepOverlap, UnitOverlap, UnitSet, measure_step
from ssrctl.measures.step_figures import by_unit, jaccard_maps, pair_map, pair_table, training_lines
from ssrctl.report.document import Cell, Column, Format, Section, Table
from ssrctl.report.formats import count, number, percent, signed, times


@dataclass(frozen=True, kw_only=True)
class CosineSummary:
    """Gradient cosines over pairs: ``{"mean": 0.03, "min": -0.1, "max": 0.2, "num_pairs": 60, "conflict_frac": 0.3}``.

    ``conflict_frac`` is the share of pairs with a negative cosine (sign conflict).
    """

    mean: float
    min: float
    max: float
    num_pairs: int
    conflict_frac: float


def summarise_cosine(pairs: Iterable[PairOverlap]) -> CosineSummary | None:
    """Return None when no pair has a cosine."""
    values = [pair.cosine for pair in pairs if pair.cosine is not None]
    if not values:
        return None
    return CosineSummary(
        mean=sum(values) / len(values),
        min=min(values),
        max=max(values),
        num_pairs=len(values),
        conflict_frac=sum(value < 0 for value in values) / len(values),
    )


@dataclass(frozen=True, kw_only=True)
class PairSummary(PairSets):
    """Means over the ``num_pairs`` cases; i and j are None when they are of all positions."""

    i: int | None
    j: int | None
    num_pairs: int
    cosine: CosineSummary | None


def summarise_pairs(pairs: Sequence[PairOverlap], i: int | None = None, j: int | None = None) -> PairSummary:
    """Return means over pairs."""
    return PairSummary(
        i=i, j=j, num_pairs=len(pairs), cosine=summarise_cosine(pairs), **means(PairSets, pairs, plain_mean)
    )


@dataclass(frozen=True, kw_only=True)
class UnitSummary(UnitSet):
    """Means over ``num_units`` cases; ``position`` is None when they are of all positions."""

    position: int | None
    num_units: int


def summarise_units(units: Sequence[UnitOverlap], position: int | None = None) -> UnitSummary:
    """Return means over units."""
    return UnitSummary(position=position, num_units=len(units), **means(UnitSet, units, plain_mean))


@dataclass(frozen=True, kw_only=True)
class OverlapMeans:
    """Means over some logged training steps.

    Attributes:
        num_questions: questions over these steps; one seen in two steps counts twice.
        pairs, units: within questions.
        cross_question: pairs across questions.
        touched_frac: mean share of the unprotected coordinates that a batch touched.
        expected_touched_frac: its random expectation.
    """

    num_questions: int
    pairs: PairSummary
    units: UnitSummary
    cross_question: PairSummary
    touched_frac: float | None
    expected_touched_frac: float | None


@dataclass(frozen=True, kw_only=True)
class TrainingPoint(OverlapMeans):
    """One logged training step."""

    step: int


@dataclass(frozen=True, kw_only=True)
class RunOverlap(OverlapMeans):
    """A run's overlap in all.

    Attributes:
        num_single: questions with fewer than two units, which have no pairs.
        all_disjoint: no two units of any question share a coordinate; None when there are no pairs.
        by_pair: one per position pair, ordered by (i, j).
        by_position: one per position, from 0 without gaps.
        over_training: one per logged step, in order.
    """

    num_single: int
    all_disjoint: bool | None
    by_pair: list[PairSummary]
    by_position: list[UnitSummary]
    over_training: list[TrainingPoint]


def summarise_run(steps: Sequence[StepOverlap]) -> RunOverlap:
    """Aggregate the logged training steps of a run."""
    questions = [question for step in steps for question in step.questions]
    pairs = [pair for question in questions for pair in question.pairs]
    by_pair = by_key(pairs, lambda pair: (pair.i, pair.j))
    by_position = by_key((unit for question in questions for unit in question.units), lambda unit: unit.position)
    return RunOverlap(
        num_single=sum(len(question.units) < 2 for question in questions),
        all_disjoint=all(pair.overlap == 0 for pair in pairs) if pairs else None,
        by_pair=[summarise_pairs(by_pair[i, j], i, j) for i, j in sorted(by_pair)],
        by_position=[summarise_units(by_position[key], key) for key in sorted(by_position)],
        over_training=[
            TrainingPoint(step=step.step, **_means([step])) for step in sorted(steps, key=lambda one: one.step)
        ],
        **_means(steps),
    )


def _means(steps: Sequence[StepOverlap]) -> dict[str, Any]:
    """Return the fields of ``OverlapMeans``."""
    questions = [question for step in steps for question in step.questions]
    return {
        "num_questions": len(questions),
        "pairs": summarise_pairs([pair for question in questions for pair in question.pairs]),
        "units": summarise_units([unit for question in questions for unit in question.units]),
        "cross_question": summarise_pairs([pair for step in steps for pair in step.cross_question]),
        "touched_frac": plain_mean(step.touched_frac for step in steps),
        "expected_touched_frac": plain_mean(step.expected_touched_frac for step in steps),
    }


# --------------------------------------------------------------------------------------------------
# the measure


class StepOverlapMeasure(StepMeasure[StepOverlap, "tuple[list[StepOverlap], RunOverlap]"]):
    """Overlap of the sets that the steps of a question selected."""

    def log(self, log: StepMaskLog) -> StepOverlap:
        """Return the overlaps of one logged training step."""
        return measure_step(log)

    def combine(self, parts: Sequence[StepOverlap]) -> tuple[list[StepOverlap], RunOverlap]:
        """Return the steps, and their summary."""
        return list(parts), summarise_run(parts)

    def present(self, result: tuple[list[StepOverlap], RunOverlap]) -> Findings:
        """Return sentences, figures and tables."""
        steps, summary = result
        disjoint = disjoint_by_construction(self.settings.get("allocation"), self.settings.get("reuse_factor"))
        cosines = [] if summary.pairs.cosine is None else [_cosine_section(summary)]
        notes = []
        if summary.num_single:
            total = times(summary.num_questions, "question")
            notes.append(f"Of {total}, {summary.num_single} had fewer than two update units and so no pairs.")
        return Findings(
            numbers={"summary": dataclasses.asdict(summary), "steps": [dataclasses.asdict(step) for step in steps]},
            headlines=overlap_headlines(summary, disjoint),
            notes=notes,
            sections=[_pair_section(summary), *cosines, _position_section(summary)],
            details=[_training_section(summary), _question_section(steps)],
        )


_PAIR_COLUMNS: tuple[RowColumn, ...] = (
    ("cases", "num_pairs", count),
    ("shared", "overlap", count),
    ("chance", "expected_overlap", count),
    ("Jaccard", "jaccard", number),
    ("chance", "expected_jaccard", number),
    ("share of i", "share_of_i", percent),
    ("chance", "expected_share_of_i", percent),
    ("share of j", "share_of_j", percent),
    ("chance", "expected_share_of_j", percent),
)
_COSINE_COLUMNS: tuple[RowColumn, ...] = (
    ("cases", "cosine.num_pairs", count),
    ("mean", "cosine.mean", signed),
    ("min", "cosine.min", signed),
    ("max", "cosine.max", signed),
    ("in conflict", "cosine.conflict_frac", percent),
)
_UNIT_COLUMNS: tuple[RowColumn, ...] = (
    ("cases", "num_units", count),
    ("mean size", "size", count),
    ("uniqueness", "uniqueness", percent),
    ("chance", "expected_uniqueness", percent),
)
_TRAINING_COLUMNS: tuple[RowColumn, ...] = (
    ("Jaccard", "pairs.jaccard", number),
    ("chance", "pairs.expected_jaccard", number),
    ("uniqueness", "units.uniqueness", percent),
    ("cosine", "pairs.cosine.mean", signed),
    ("across questions", "cross_question.jaccard", number),
    ("chance", "cross_question.expected_jaccard", number),
    ("touched", "touched_frac", percent),
)
_EXPECTED = "expected by chance"
# Allocations under which no coordinate can belong to two steps of a question.
DISJOINT_ALLOCATIONS = ("disjoint", "shuffled")
_CHANCE = "Chance is the expectation for uniformly random sets of the same sizes among the unprotected coordinates."


def disjoint_by_construction(allocation: str | None, reuse_factor: float | None) -> bool | None:
    """Return True if no two steps of a question can share a coordinate; None if the run does not say."""
    if allocation is None:
        return None
    return allocation in DISJOINT_ALLOCATIONS and not reuse_factor


def overlap_headlines(summary: RunOverlap, disjoint: bool | None) -> list[str]:
    """Return the answer in sentences.

    Args:
        disjoint: from ``disjoint_by_construction``.
    """
    lines = [_overlap_line(summary, disjoint)]
    if summary.units.uniqueness is not None and summary.pairs.num_pairs:
        lines.append(
            f"On average {percent(summary.units.uniqueness)} of a step's coordinates were selected by no other "
            f"step of its question (chance: {percent(summary.units.expected_uniqueness)})."
        )
    if (cosine := summary.pairs.cosine) is not None:
        lines.append(
            f"The gradients of two steps have a mean cosine of {signed(cosine.mean)}, from "
            f"{signed(cosine.min)} to {signed(cosine.max)} over {times(cosine.num_pairs, 'pair')}; "
            f"{percent(cosine.conflict_frac)} of the pairs are in conflict (negative cosine)."
        )
    across = summary.cross_question
    if across.num_pairs:
        lines.append(
            f"Different questions of a batch overlap with a mean Jaccard index of {number(across.jaccard)}"
            f"{_against_chance(across)}; nothing keeps them apart."
        )
    if summary.touched_frac is not None:
        lines.append(
            f"A batch touched {percent(summary.touched_frac)} of the unprotected coordinates on average "
            f"(questions that overlap by chance alone: {percent(summary.expected_touched_frac)})."
        )
    return lines


def _overlap_line(summary: RunOverlap, disjoint: bool | None) -> str:
    pairs = summary.pairs
    if not pairs.num_pairs:
        return f"No question of {summary.num_questions} has two update units, so there are no pairs to compare."
    if summary.all_disjoint:
        line = f"No two steps of a question share a coordinate ({times(pairs.num_pairs, 'pair')}). "
        if disjoint:
            line += "Sets are disjoint by construction; the random expectation is what chance would give: "
        elif disjoint is None:
            line += (
                "The run does not say how it allocated coordinates; the disjoint allocation makes this so by "
                "construction. The random expectation is what chance would give: "
            )
        else:
            line += "This allocation did not forbid it. The random expectation is what chance would give: "
        shared = number(pairs.expected_overlap) if (pairs.expected_overlap or 0) < 10 else count(pairs.expected_overlap)
        return line + f"a Jaccard index of {number(pairs.expected_jaccard)}, {shared} shared coordinates per pair."
    line = (
        f"Two steps of a question select sets with a mean Jaccard index of {number(pairs.jaccard)}"
        f"{_against_chance(pairs)}, over {times(pairs.num_pairs, 'pair')}."
    )
    if disjoint:
        line += " The run's allocation should have kept them apart: its config and its mask logs do not fit."
    return line


def _against_chance(pairs: PairSummary) -> str:
    """Return ``, 12.0 times chance (0.00400)``, or only the chance where a ratio says nothing."""
    if pairs.jaccard and pairs.expected_jaccard:
        ratio = pairs.jaccard / pairs.expected_jaccard
        return f", {number(ratio)} times chance ({number(pairs.expected_jaccard)})"
    return f" (chance: {number(pairs.expected_jaccard)})"


def _pair_section(summary: RunOverlap) -> Section:
    maps = {"Jaccard index, measured": "jaccard", "Jaccard index, chance": "expected_jaccard"}
    note = (
        f"Means over the cases: questions that have both units. {_CHANCE} Share of i: the part of unit i's set that is "
        "also in unit j's."
    )
    return Section(
        title="Which steps overlap",
        text="Units are the steps of a question in the order in which they claimed coordinates, numbered from 1; "
        "fused steps are one unit, and steps that claimed nothing are passed over.",
        # Of disjoint sets they would show zeros only.
        figures=[] if summary.all_disjoint else jaccard_maps(summary.by_pair, maps, len(summary.by_position)),
        tables=[pair_table("Overlap by pair of units (i, j)", summary.by_pair, _PAIR_COLUMNS, note)],
    )


def _cosine_section(summary: RunOverlap) -> Section:
    pairs = [pair for pair in summary.by_pair if pair.cosine is not None]
    scale = max(abs(pair.cosine.mean) for pair in pairs if pair.cosine is not None)
    figure = pair_map(
        "Gradient cosine, mean",
        pairs,
        "cosine.mean",
        len(summary.by_position),
        scale=scale,
        decimals=2,
        caption=f"Full colour is ±{number(scale)}; blue is agreement, orange is conflict.",
    )
    note = "Of the gradients before masking. In conflict: share of cases with a negative cosine."
    table = pair_table("Gradient cosine by pair of units", pairs, _COSINE_COLUMNS, note)
    return Section(title="Do the steps pull in the same direction", figures=[figure], tables=[table])


def _position_section(summary: RunOverlap) -> Section:
    title, units = "Uniqueness by unit", by_unit(summary.by_position)
    series = {"measured": "uniqueness", _EXPECTED: "expected_uniqueness"}
    bars = row_dots(title, units, series, "share of the set that no other unit selected")
    table = row_table(
        title,
        "unit",
        units,
        _UNIT_COLUMNS,
        "Uniqueness: the share of a unit's set that no other unit of its question selected.",
        terminal_rows=0,
    )
    return Section(title="How much of each set is its own", figures=[bars] if units else [], tables=[table])


def _training_section(summary: RunOverlap) -> Section:
    points = {point.step: point for point in summary.over_training}
    table = row_table(
        "By training step",
        "step",
        points,
        _TRAINING_COLUMNS,
        "Across questions: Jaccard index of the unions of two questions' sets, mean over the pairs of a batch.",
    )
    pairs = {"measured": "pairs.jaccard", _EXPECTED: "pairs.expected_jaccard"}
    unique = {"measured": "units.uniqueness", _EXPECTED: "units.expected_uniqueness"}
    across = {"measured": "cross_question.jaccard", _EXPECTED: "cross_question.expected_jaccard"}
    touched = {"measured": "touched_frac", _EXPECTED: "expected_touched_frac"}
    figures = [
        ("Overlap of a question's steps", "mean Jaccard index", pairs, False),
        ("Uniqueness", "mean share", unique, False),
        ("Gradient cosine of a question's steps", "mean cosine", {"measured": "pairs.cosine.mean"}, False),
        ("Overlap of different questions", "mean Jaccard index", across, False),
        ("Coordinates touched by a batch", "share of the unprotected", touched, False),
    ]
    return Section(title="Over training", figures=training_lines(points, figures), tables=[table])


# More rows make the page slow; the json report has all.
_MOST_QUESTIONS = 200


def _question_section(steps: Sequence[StepOverlap]) -> Section:
    questions = [question for step in steps for question in step.questions]
    rows: list[list[Cell]] = [
        [
            question.id,
            question.step,
            len(question.units),
            sum(unit.size for unit in question.units),
            plain_mean(pair.jaccard for pair in question.pairs),
            plain_mean(pair.expected_jaccard for pair in question.pairs),
            plain_mean(unit.uniqueness for unit in question.units),
        ]
        for question in questions[:_MOST_QUESTIONS]
    ]
    shown = "" if len(questions) == len(rows) else f" The first {len(rows)} of {len(questions)} are shown."
    formats: dict[str, Format] = {
        "training step": str,
        "units": count,
        "selected": count,
        "Jaccard": number,
        "chance": number,
    }
    table = Table(
        title="All questions",
        columns=["question", *(Column(name, show) for name, show in formats.items()), Column("uniqueness", percent)],
        rows=rows,
        note=f"Means over the question's pairs and units; the pairs themselves are in the json report.{shown}",
        terminal_rows=0,
    )
    return Section(title="Question by question", tables=[table])
