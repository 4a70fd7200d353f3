"""Overlap of the coordinates that the steps of a question selected, over a whole run (``--jaccard``).

Every mean is over single cases with equal weight (a case is one pair of units of one question in one logged
training step, or one unit of one), not over averages of averages.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssrctl.measures.base import Findings, StepMeasure
from ssrctl.measures.group_tables import RowColumn
from ssrctl.measures.maths.step_sets import PairOverlap, StepOverlap, UnitOverlap, mean, measure_step
from ssrctl.report.document import Bars, Cell, Column, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, signed, times

if TYPE_CHECKING:
    from ssrctl.io.mask_log import StepMaskLog


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
    """None when no pair has a cosine."""
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
class PairSummary:
    """Means of ``PairOverlap`` over the ``num_pairs`` cases; i and j are None when they are of all positions."""

    i: int | None
    j: int | None
    num_pairs: int
    overlap: float | None
    expected_overlap: float | None
    jaccard: float | None
    expected_jaccard: float | None
    share_of_i: float | None
    expected_share_of_i: float | None
    share_of_j: float | None
    expected_share_of_j: float | None
    cosine: CosineSummary | None


_MEANS = (
    "overlap",
    "expected_overlap",
    "jaccard",
    "expected_jaccard",
    "share_of_i",
    "expected_share_of_i",
    "share_of_j",
    "expected_share_of_j",
)


def summarise_pairs(pairs: Sequence[PairOverlap], i: int | None = None, j: int | None = None) -> PairSummary:
    """Means over pairs."""
    means = {name: mean(getattr(pair, name) for pair in pairs) for name in _MEANS}
    return PairSummary(i=i, j=j, num_pairs=len(pairs), cosine=summarise_cosine(pairs), **means)


@dataclass(frozen=True, kw_only=True)
class UnitSummary:
    """Means of ``UnitOverlap`` over ``num_units`` cases; ``position`` is None when they are of all positions."""

    position: int | None
    num_units: int
    size: float | None
    uniqueness: float | None
    expected_uniqueness: float | None


def summarise_units(units: Sequence[UnitOverlap], position: int | None = None) -> UnitSummary:
    """Means over units."""
    return UnitSummary(
        position=position,
        num_units=len(units),
        size=mean(unit.size for unit in units),
        uniqueness=mean(unit.uniqueness for unit in units),
        expected_uniqueness=mean(unit.expected_uniqueness for unit in units),
    )


@dataclass(frozen=True, kw_only=True)
class TrainingPoint:
    """One logged training step: its pairs and units within questions, pairs across, and what it touched."""

    step: int
    num_questions: int
    pairs: PairSummary
    units: UnitSummary
    cross_question: PairSummary
    touched_frac: float | None
    expected_touched_frac: float | None


@dataclass(frozen=True, kw_only=True)
class RunOverlap:
    """A run's overlap in all.

    Attributes:
        num_questions: questions over all logged steps; one seen in two steps counts twice.
        num_single: questions with fewer than two units, which have no pairs.
        all_disjoint: no two units of any question share a coordinate; None when there are no pairs.
        pairs, units, cross_question: means over everything.
        by_pair: one per position pair, ordered by (i, j).
        by_position: one per position, from 0 without gaps.
        over_training: one per logged step, in order.
        touched_frac: mean share of the unprotected coordinates that a batch touched.
        expected_touched_frac: its random expectation.
    """

    num_questions: int
    num_single: int
    all_disjoint: bool | None
    pairs: PairSummary
    units: UnitSummary
    cross_question: PairSummary
    by_pair: list[PairSummary]
    by_position: list[UnitSummary]
    over_training: list[TrainingPoint]
    touched_frac: float | None
    expected_touched_frac: float | None


def summarise_run(steps: Sequence[StepOverlap]) -> RunOverlap:
    """Aggregate the logged training steps of a run."""
    questions = [question for step in steps for question in step.questions]
    by_pair: dict[tuple[int, int], list[PairOverlap]] = defaultdict(list)
    by_position: dict[int, list[UnitOverlap]] = defaultdict(list)
    for question in questions:
        for pair in question.pairs:
            by_pair[pair.i, pair.j].append(pair)
        for unit in question.units:
            by_position[unit.position].append(unit)
    pairs = [pair for question in questions for pair in question.pairs]
    return RunOverlap(
        num_questions=len(questions),
        num_single=sum(len(question.units) < 2 for question in questions),
        all_disjoint=all(pair.overlap == 0 for pair in pairs) if pairs else None,
        pairs=summarise_pairs(pairs),
        units=summarise_units([unit for question in questions for unit in question.units]),
        cross_question=summarise_pairs([pair for step in steps for pair in step.cross_question]),
        by_pair=[summarise_pairs(by_pair[key], *key) for key in sorted(by_pair)],
        by_position=[summarise_units(by_position[key], key) for key in sorted(by_position)],
        over_training=[_training_point(step) for step in sorted(steps, key=lambda one: one.step)],
        touched_frac=mean(step.touched_frac for step in steps),
        expected_touched_frac=mean(step.expected_touched_frac for step in steps),
    )


def _training_point(step: StepOverlap) -> TrainingPoint:
    return TrainingPoint(
        step=step.step,
        num_questions=len(step.questions),
        pairs=summarise_pairs([pair for question in step.questions for pair in question.pairs]),
        units=summarise_units([unit for question in step.questions for unit in question.units]),
        cross_question=summarise_pairs(step.cross_question),
        touched_frac=step.touched_frac,
        expected_touched_frac=step.expected_touched_frac,
    )


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
    ("shared", "overlap", count),
    ("chance", "expected_overlap", count),
    ("Jaccard", "jaccard", number),
    ("chance", "expected_jaccard", number),
    ("share of i", "share_of_i", percent),
    ("chance", "expected_share_of_i", percent),
    ("share of j", "share_of_j", percent),
    ("chance", "expected_share_of_j", percent),
)
# Allocations under which no coordinate can belong to two steps of a question.
DISJOINT_ALLOCATIONS = ("disjoint", "shuffled")
# More pairs than four units have fill a screen; the sentences already hold their means.
_TERMINAL_PAIRS = 6
_CHANCE = "Chance is the expectation for uniformly random sets of the same sizes among the unprotected coordinates."


def disjoint_by_construction(allocation: str | None, reuse_factor: float | None) -> bool | None:
    """Return True if no two steps of a question can share a coordinate; None if the run does not say."""
    if allocation is None:
        return None
    return allocation in DISJOINT_ALLOCATIONS and not reuse_factor


def overlap_headlines(summary: RunOverlap, disjoint: bool | None) -> list[str]:
    """Return the answer in sentences.

    Args:
        summary: of the run.
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


def _labels(summary: RunOverlap) -> list[str]:
    return [str((unit.position or 0) + 1) for unit in summary.by_position]


def _square(summary: RunOverlap, values: dict[tuple[int, int], float | None]) -> list[list[float | None]]:
    size = len(summary.by_position)
    return [[values.get((min(i, j), max(i, j))) if i != j else None for j in range(size)] for i in range(size)]


def _key(pair: PairSummary) -> tuple[int, int]:
    assert pair.i is not None and pair.j is not None
    return pair.i, pair.j


def _pair_name(pair: PairSummary) -> str:
    i, j = _key(pair)
    return f"{i + 1}, {j + 1}"


def _pair_section(summary: RunOverlap) -> Section:
    measured = {_key(pair): pair.jaccard for pair in summary.by_pair}
    expected = {_key(pair): pair.expected_jaccard for pair in summary.by_pair}
    scale = max([value or 0.0 for value in (*measured.values(), *expected.values())], default=0.0)
    decimals = 3 if scale >= 0.01 else 4
    maps = [
        Heatmap(
            title=title,
            labels=_labels(summary),
            values=_square(summary, values),
            axis="update unit",
            scale=scale,
            decimals=decimals,
            caption=f"Full colour is {number(scale)}, the same in both maps.",
        )
        for title, values in (("Jaccard index, measured", measured), ("Jaccard index, chance", expected))
    ]
    table = Table(
        title="Overlap by pair of units (i, j)",
        columns=["pair", Column("cases", count), *(Column(name, show) for name, _, show in _PAIR_COLUMNS)],
        rows=[
            [_pair_name(pair), pair.num_pairs, *(getattr(pair, key) for _, key, _ in _PAIR_COLUMNS)]
            for pair in summary.by_pair
        ],
        note=f"Means over the cases: questions that have both units. {_CHANCE} Share of i: the part of unit i's "
        "set that is also in unit j's.",
        terminal_rows=_TERMINAL_PAIRS if len(summary.by_pair) <= _TERMINAL_PAIRS else 0,
        collapsed=len(summary.by_pair) > 30,
    )
    return Section(
        title="Which steps overlap",
        text="Units are the steps of a question in the order in which they claimed coordinates, numbered from 1; "
        "fused steps are one unit, and steps that claimed nothing are passed over.",
        figures=list(maps) if measured else [],
        tables=[table],
    )


def _cosine_section(summary: RunOverlap) -> Section:
    means: dict[tuple[int, int], float | None] = {}
    for pair in summary.by_pair:
        if pair.cosine is not None:
            means[_key(pair)] = pair.cosine.mean
    scale = max(abs(value or 0.0) for value in means.values())
    figure = Heatmap(
        title="Gradient cosine, mean",
        labels=_labels(summary),
        values=_square(summary, means),
        axis="update unit",
        scale=scale,
        decimals=2,
        caption=f"Full colour is ±{number(scale)}; blue is agreement, orange is conflict.",
    )
    rows: list[list[Cell]] = [
        [
            _pair_name(pair),
            pair.cosine.num_pairs,
            pair.cosine.mean,
            pair.cosine.min,
            pair.cosine.max,
            pair.cosine.conflict_frac,
        ]
        for pair in summary.by_pair
        if pair.cosine is not None
    ]
    table = Table(
        title="Gradient cosine by pair of units",
        columns=[
            "pair",
            Column("cases", count),
            *(Column(name, signed) for name in ("mean", "min", "max")),
            Column("in conflict", percent),
        ],
        rows=rows,
        note="Of the gradients before masking. In conflict: share of cases with a negative cosine.",
        terminal_rows=_TERMINAL_PAIRS if len(rows) <= _TERMINAL_PAIRS else 0,
        collapsed=len(rows) > 30,
    )
    return Section(title="Do the steps pull in the same direction", figures=[figure], tables=[table])


def _position_section(summary: RunOverlap) -> Section:
    units = summary.by_position
    figures = []
    if units:
        figures = [
            Bars(
                title="Uniqueness by unit",
                labels=_labels(summary),
                series={
                    "measured": [unit.uniqueness for unit in units],
                    "expected by chance": [unit.expected_uniqueness for unit in units],
                },
                axis="share of the set that no other unit selected",
            )
        ]
    table = Table(
        title="Uniqueness by unit",
        columns=[
            "unit",
            Column("cases", count),
            Column("mean size", count),
            Column("uniqueness", percent),
            Column("chance", percent),
        ],
        rows=[
            [(unit.position or 0) + 1, unit.num_units, unit.size, unit.uniqueness, unit.expected_uniqueness]
            for unit in units
        ],
        note="Uniqueness: the share of a unit's set that no other unit of its question selected.",
        terminal_rows=0,
        collapsed=len(units) > 30,
    )
    return Section(title="How much of each set is its own", figures=list(figures), tables=[table])


def _training_section(summary: RunOverlap) -> Section:
    points = summary.over_training
    table = Table(
        title="By training step",
        columns=[
            "step",
            Column("Jaccard", number),
            Column("chance", number),
            Column("uniqueness", percent),
            Column("cosine", signed),
            Column("across questions", number),
            Column("chance", number),
            Column("touched", percent),
        ],
        rows=[
            [
                point.step,
                point.pairs.jaccard,
                point.pairs.expected_jaccard,
                point.units.uniqueness,
                None if point.pairs.cosine is None else point.pairs.cosine.mean,
                point.cross_question.jaccard,
                point.cross_question.expected_jaccard,
                point.touched_frac,
            ]
            for point in points
        ],
        note="Across questions: Jaccard index of the unions of two questions' sets, mean over the pairs of a batch.",
        collapsed=len(points) > 30,
    )
    figures = _training_lines(summary) if len(points) > 1 else []
    return Section(title="Over training", figures=list(figures), tables=[table])


def _training_lines(summary: RunOverlap) -> list[Lines]:
    """Return one figure per quantity that was measured at all."""
    points = summary.over_training
    figures = []

    def add(title: str, y_label: str, measured: list[float | None], chance: list[float | None] | None) -> None:
        if any(value is not None for value in measured):
            series = {"measured": measured} | ({} if chance is None else {"expected by chance": chance})
            steps = [point.step for point in points]
            figures.append(Lines(title=title, x=steps, series=series, x_label="training step", y_label=y_label))

    add(
        "Overlap of a question's steps",
        "mean Jaccard index",
        [point.pairs.jaccard for point in points],
        [point.pairs.expected_jaccard for point in points],
    )
    add(
        "Uniqueness",
        "mean share",
        [point.units.uniqueness for point in points],
        [point.units.expected_uniqueness for point in points],
    )
    cosines = [point.pairs.cosine for point in points]
    add(
        "Gradient cosine of a question's steps",
        "mean cosine",
        [None if cosine is None else cosine.mean for cosine in cosines],
        None,
    )
    add(
        "Overlap of different questions",
        "mean Jaccard index",
        [point.cross_question.jaccard for point in points],
        [point.cross_question.expected_jaccard for point in points],
    )
    add(
        "Coordinates touched by a batch",
        "share of the unprotected",
        [point.touched_frac for point in points],
        [point.expected_touched_frac for point in points],
    )
    return figures


# Beyond this many rows a page becomes slow and nobody reads them; report.json has all.
_MOST_QUESTIONS = 200


def _question_section(steps: Sequence[StepOverlap]) -> Section:
    questions = [question for step in steps for question in step.questions]
    rows: list[list[Cell]] = [
        [
            question.id,
            question.step,
            len(question.units),
            sum(unit.size for unit in question.units),
            mean(pair.jaccard for pair in question.pairs),
            mean(pair.expected_jaccard for pair in question.pairs),
            mean(unit.uniqueness for unit in question.units),
        ]
        for question in questions[:_MOST_QUESTIONS]
    ]
    shown = "" if len(questions) == len(rows) else f" The first {len(rows)} of {len(questions)} are shown."
    table = Table(
        title="All questions",
        columns=[
            "question",
            Column("training step", str),
            Column("units", count),
            Column("selected", count),
            Column("Jaccard", number),
            Column("chance", number),
            Column("uniqueness", percent),
        ],
        rows=rows,
        note=f"Means over the question's pairs and units; the pairs themselves are in report.json.{shown}",
        terminal_rows=0,
        collapsed=True,
    )
    return Section(title="Question by question", tables=[table])
