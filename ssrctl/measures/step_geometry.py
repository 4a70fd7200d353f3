"""What the steps of a question want before masking, and what claims cost them, over a whole run (``--jaccard``)."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ssrctl.measures.base import Findings, StepMeasure
from ssrctl.measures.group_tables import RowColumn, row_table
from ssrctl.measures.maths.step_pairs import (
    EQUAL,
    OPPOSITE,
    PairGeometry,
    QuestionGeometry,
    UnitGeometry,
    measure_step_geometry,
)
from ssrctl.measures.maths.step_sets import mean
from ssrctl.report.document import Bars, Column, Figure, Heatmap, Lines, Section, Table
from ssrctl.report.formats import count, number, percent, signed, times

if TYPE_CHECKING:
    from ssrctl.io.mask_log import StepMaskLog


@dataclass(frozen=True, kw_only=True)
class UnitMeans:
    """Means of ``UnitGeometry`` over ``num_units`` cases; ``position`` is None when they are of all positions."""

    position: int | None
    num_units: int
    gradient_norm: float | None
    captured: float | None
    unconstrained_captured: float | None
    claims_loss: float | None
    displaced_frac: float | None
    unconstrained_uniqueness: float | None


_UNIT_MEANS = (
    "gradient_norm", "captured", "unconstrained_captured", "claims_loss", "displaced_frac", "unconstrained_uniqueness",
)  # fmt: skip


def unit_means(units: Sequence[UnitGeometry], position: int | None = None) -> UnitMeans:
    """Return means over units, each with equal weight."""
    means = {name: mean(getattr(unit, name) for unit in units) for name in _UNIT_MEANS}
    return UnitMeans(position=position, num_units=len(units), **means)


@dataclass(frozen=True, kw_only=True)
class PairMeans:
    """Means of ``PairGeometry``.

    Attributes:
        num_pairs: cases.
        num_cosines: those of them whose gradients were compared.
        negative_frac: share of these with a negative cosine.
        others: as in ``PairGeometry``.
    """

    num_pairs: int
    num_cosines: int
    unconstrained_overlap: float | None
    unconstrained_jaccard: float | None
    expected_unconstrained_jaccard: float | None
    cosine: float | None
    negative_frac: float | None
    conflict: float | None
    weighted_conflict: float | None
    top_conflict: float | None
    top_weighted_conflict: float | None


_PAIR_MEANS = (
    "unconstrained_overlap", "unconstrained_jaccard", "expected_unconstrained_jaccard", "cosine", "conflict",
    "weighted_conflict", "top_conflict", "top_weighted_conflict",
)  # fmt: skip


def pair_means(pairs: Sequence[PairGeometry]) -> PairMeans:
    """Return means over pairs, each with equal weight."""
    means = {name: mean(getattr(pair, name) for pair in pairs) for name in _PAIR_MEANS}
    cosines = [pair.cosine for pair in pairs if pair.cosine is not None]
    negative = sum(cosine < 0 for cosine in cosines) / len(cosines) if cosines else None
    return PairMeans(num_pairs=len(pairs), num_cosines=len(cosines), negative_frac=negative, **means)


@dataclass(frozen=True, kw_only=True)
class PositionPair:
    """All cases of units i and j."""

    i: int
    j: int
    means: PairMeans


@dataclass(frozen=True, kw_only=True)
class GeometryPoint:
    """One logged training step."""

    step: int
    units: UnitMeans
    pairs: PairMeans
    equal: PairMeans
    opposite: PairMeans


@dataclass(frozen=True, kw_only=True)
class RunGeometry:
    """A run in all; every mean is over single cases.

    Attributes:
        units, pairs: over everything.
        equal, opposite: over the pairs whose mean advantages have equal and opposite signs.
        num_without_signs: pairs in neither class: a mean advantage is 0 or unknown.
        by_position: one per position, from 0.
        by_pair: one per position pair, ordered by (i, j).
        over_training: one per logged step, in order.
    """

    units: UnitMeans
    pairs: PairMeans
    equal: PairMeans
    opposite: PairMeans
    num_without_signs: int
    by_position: list[UnitMeans]
    by_pair: list[PositionPair]
    over_training: list[GeometryPoint]


def summarise_geometry(questions: Iterable[QuestionGeometry]) -> RunGeometry:
    """Aggregate the questions of all logged training steps."""
    questions = list(questions)
    units = [unit for question in questions for unit in question.units]
    pairs = [pair for question in questions for pair in question.pairs]
    by_position: dict[int, list[UnitGeometry]] = defaultdict(list)
    by_pair: dict[tuple[int, int], list[PairGeometry]] = defaultdict(list)
    by_step: dict[int, list[QuestionGeometry]] = defaultdict(list)
    for unit in units:
        by_position[unit.position].append(unit)
    for pair in pairs:
        by_pair[pair.i, pair.j].append(pair)
    for question in questions:
        by_step[question.step].append(question)
    return RunGeometry(
        units=unit_means(units),
        pairs=pair_means(pairs),
        equal=pair_means(_with_signs(pairs, EQUAL)),
        opposite=pair_means(_with_signs(pairs, OPPOSITE)),
        num_without_signs=len(_with_signs(pairs, None)),
        by_position=[unit_means(by_position[key], key) for key in sorted(by_position)],
        by_pair=[PositionPair(i=i, j=j, means=pair_means(by_pair[i, j])) for i, j in sorted(by_pair)],
        over_training=[_point(step, by_step[step]) for step in sorted(by_step)],
    )


def _with_signs(pairs: Sequence[PairGeometry], signs: str | None) -> list[PairGeometry]:
    return [pair for pair in pairs if pair.advantage_signs == signs]


def _point(step: int, questions: Sequence[QuestionGeometry]) -> GeometryPoint:
    pairs = [pair for question in questions for pair in question.pairs]
    return GeometryPoint(
        step=step,
        units=unit_means([unit for question in questions for unit in question.units]),
        pairs=pair_means(pairs),
        equal=pair_means(_with_signs(pairs, EQUAL)),
        opposite=pair_means(_with_signs(pairs, OPPOSITE)),
    )


# --------------------------------------------------------------------------------------------------
# the measure


class StepGeometryMeasure(StepMeasure["list[QuestionGeometry]", "tuple[list[QuestionGeometry], RunGeometry]"]):
    """The gradients of the steps before masking."""

    def log(self, log: StepMaskLog) -> list[QuestionGeometry]:
        """Return the questions of one logged training step."""
        return measure_step_geometry(log)

    def combine(self, parts: Sequence[list[QuestionGeometry]]) -> tuple[list[QuestionGeometry], RunGeometry]:
        """Return the questions, and their summary."""
        questions = [question for part in parts for question in part]
        return questions, summarise_geometry(questions)

    def present(self, result: tuple[list[QuestionGeometry], RunGeometry]) -> Findings:
        """Return sentences, figures and tables."""
        questions, summary = result
        numbers = {
            "summary": dataclasses.asdict(summary),
            "questions": [dataclasses.asdict(question) for question in questions],
        }
        return Findings(
            numbers={"before_masking": numbers},
            headlines=geometry_headlines(summary),
            notes=geometry_notes(summary),
            sections=geometry_sections(summary),
        )


_UNIT_COLUMNS: tuple[RowColumn, ...] = (
    ("cases", "num_units", count),
    ("norm", "gradient_norm", number),
    ("selected", "captured", percent),
    ("without claims", "unconstrained_captured", percent),
    ("lost to claims", "claims_loss", percent),
    ("displaced", "displaced_frac", percent),
    ("unique", "unconstrained_uniqueness", percent),
)
_SIGN_COLUMNS: tuple[RowColumn, ...] = (
    ("pairs", "num_pairs", count),
    ("compared", "num_cosines", count),
    ("cosine", "cosine", signed),
    ("negative", "negative_frac", percent),
    ("conflict", "conflict", percent),
    ("weighted", "weighted_conflict", percent),
    ("in largest", "top_conflict", percent),
    ("Jaccard without claims", "unconstrained_jaccard", number),
)
_MISSING_SETS = (
    "The mask logs hold neither unconstrained sets nor energies: they were written by an earlier version of ssrctl."
)
_MISSING_CONFLICT = "Gradients of steps were not compared before masking: train with --log-gradient-cosine for that."
_TERMINAL_PAIRS = 6
# Deviations from even odds smaller than this are not worth full colour.
_LEAST_SCALE = 0.05


def geometry_headlines(found: RunGeometry) -> list[str]:
    """Return the answer in sentences; none about what was not logged."""
    lines = []
    units, pairs = found.units, found.pairs
    if pairs.unconstrained_jaccard is not None:
        lines.append(
            "Without claims, two steps of a question would have taken sets with a mean Jaccard index of "
            f"{number(pairs.unconstrained_jaccard)} (chance: {number(pairs.expected_unconstrained_jaccard)}); on average "
            f"{percent(units.displaced_frac)} of what a step's gradient ranks highest was already claimed."
        )
    if units.captured is not None:
        line = f"A step's set holds {percent(units.captured)} of its gradient's squared norm on average"
        if units.unconstrained_captured is not None:
            line += f"; without claims it would hold {percent(units.unconstrained_captured)}"
        lines.append(line + ".")
    if pairs.conflict is not None:
        lines.append(
            f"Two steps' gradients disagree in sign at {percent(pairs.conflict)} of the coordinates where both are not "
            f"0 (weighted by size {percent(pairs.weighted_conflict)}; random signs: 50%), and at "
            f"{percent(pairs.top_conflict)} of those that either ranks highest."
        )
    if found.equal.cosine is not None and found.opposite.cosine is not None:
        lines.append(
            f"Steps with mean advantages of the same sign have a mean cosine of {signed(found.equal.cosine)} "
            f"({times(found.equal.num_cosines, 'pair')}), of opposite signs {signed(found.opposite.cosine)} "
            f"({times(found.opposite.num_cosines, 'pair')})."
        )
    return lines


def geometry_notes(found: RunGeometry) -> list[str]:
    """Return notes on what is missing, and why; none where there are no units at all."""
    notes: list[str] = []
    if not found.units.num_units:
        return notes
    if found.units.captured is None and found.pairs.unconstrained_jaccard is None:
        notes.append(_MISSING_SETS)
    if found.pairs.num_pairs and not found.pairs.num_cosines:
        notes.append(_MISSING_CONFLICT)
    return notes


def geometry_sections(found: RunGeometry) -> list[Section]:
    """Return energies, collisions, conflicts, and both over training; no section for what was not logged."""
    sections = []
    if found.units.captured is not None:
        sections.append(_energy_section(found))
    if found.pairs.unconstrained_jaccard is not None:
        sections.append(_collision_section(found))
    if found.pairs.num_cosines:
        sections.append(_conflict_section(found))
    if found.pairs.unconstrained_jaccard is not None or found.pairs.num_cosines:
        sections.append(_advantage_section(found))
    if sections:
        sections.append(_training_section(found.over_training))
    return sections


def _labels(found: RunGeometry) -> list[str]:
    return [str((unit.position or 0) + 1) for unit in found.by_position]


def _square(found: RunGeometry, value: Callable[[PairMeans], float | None]) -> list[list[float | None]]:
    values = {(pair.i, pair.j): value(pair.means) for pair in found.by_pair}
    size = len(found.by_position)
    return [[values.get((min(i, j), max(i, j))) if i != j else None for j in range(size)] for i in range(size)]


def _energy_section(found: RunGeometry) -> Section:
    units = found.by_position
    figure = Bars(
        title="Energy held by each unit's set",
        labels=_labels(found),
        series={
            "selected": [unit.captured for unit in units],
            "without claims": [unit.unconstrained_captured for unit in units],
        },
        axis="share of the gradient's squared norm",
    )
    table = Table(
        title="Energy by unit",
        columns=["unit", *(Column(name, show) for name, _, show in _UNIT_COLUMNS)],
        rows=[[(unit.position or 0) + 1, *(getattr(unit, key) for _, key, _ in _UNIT_COLUMNS)] for unit in units],
        note="Selected and without claims: share of the squared norm of the unit's gradient in its set, and in the set "
        "that it would have taken if no step had claimed anything. Displaced: the share of the latter that it did not get. "
        "Unique: the share of it that no other unit of the question would have taken.",
        terminal_rows=_TERMINAL_PAIRS,
        collapsed=len(units) > 30,
    )
    return Section(title="How much of its gradient a step keeps", figures=[figure], tables=[table])


def _collision_section(found: RunGeometry) -> Section:
    measured = _square(found, lambda means: means.unconstrained_jaccard)
    chance = _square(found, lambda means: means.expected_unconstrained_jaccard)
    scale = max((value or 0.0 for square in (measured, chance) for row in square for value in row), default=0.0)
    maps: list[Figure] = [
        Heatmap(
            title=title,
            labels=_labels(found),
            values=values,
            axis="update unit",
            scale=scale or None,
            decimals=3 if scale >= 0.01 else 4,
            caption=f"Full colour is {number(scale)}, the same in both maps.",
        )
        for title, values in (
            ("Jaccard index without claims, measured", measured),
            ("Jaccard index without claims, chance", chance),
        )
    ]
    return Section(
        title="What would have collided without claims",
        text="Every unit's largest gradient entries among the unprotected weights, as many as it was granted, compared "
        "as if no unit had claimed any. This is the interference that disjoint sets avoid.",
        figures=maps,
    )


def _conflict_section(found: RunGeometry) -> Section:
    columns: list[tuple[str, str]] = [
        ("conflict", "conflict"),
        ("weighted", "weighted_conflict"),
        ("in largest", "top_conflict"),
        ("weighted in largest", "top_weighted_conflict"),
    ]
    agreement = _square(found, lambda means: None if means.top_conflict is None else 1.0 - means.top_conflict)
    furthest = max((abs(value - 0.5) for row in agreement for value in row if value is not None), default=0.0)
    figure = Heatmap(
        title="Equal signs among the largest coordinates",
        labels=_labels(found),
        values=agreement,
        axis="update unit",
        centre=0.5,
        scale=max(furthest, _LEAST_SCALE),
        shares=True,
        decimals=0,
        caption="Of the coordinates that either unit ranks highest, the share where both gradients have the same sign. "
        "Random signs give 50%; blue is agreement, orange is conflict.",
    )
    rows: list[list[Any]] = [
        [f"{pair.i + 1}, {pair.j + 1}", pair.means.num_cosines, *(getattr(pair.means, key) for _, key in columns)]
        for pair in found.by_pair
        if pair.means.num_cosines
    ]
    table = Table(
        title="Sign conflict by pair of units",
        columns=["pair", Column("cases", count), *(Column(name, percent) for name, _ in columns)],
        rows=rows,
        note="Conflict: share of the coordinates where neither gradient is 0 in which their signs differ. Weighted: "
        "share of the sum of |a b|. In largest: within the union of the two sets without claims. Random signs: 50%.",
        terminal_rows=_TERMINAL_PAIRS if len(rows) <= _TERMINAL_PAIRS else 0,
        collapsed=len(rows) > 30,
    )
    return Section(title="Where the steps' gradients conflict", figures=[figure], tables=[table])


def _advantage_section(found: RunGeometry) -> Section:
    classes = {"equal": found.equal, "opposite": found.opposite, "all": found.pairs}
    table = row_table(
        "Conflict by the signs of the mean advantages",
        "signs",
        classes,
        _SIGN_COLUMNS,
        "A unit's mean advantage is over its steps and the responses that have them. "
        f"{times(found.num_without_signs, 'pair')} with a mean of 0 stand under all only.",
    )
    return Section(
        title="Does conflict follow the advantages",
        text="If steps interfere because one is rewarded and the other is not, pairs of opposite signs agree less than "
        "pairs of equal signs.",
        tables=[table],
    )


def _training_section(points: Sequence[GeometryPoint]) -> Section:
    rows = [
        [
            point.step, point.units.captured, point.units.unconstrained_captured, point.units.displaced_frac,
            point.pairs.unconstrained_jaccard, point.pairs.cosine, point.equal.cosine, point.opposite.cosine,
            point.pairs.conflict, point.pairs.top_conflict,
        ]
        for point in points
    ]  # fmt: skip
    columns = {
        "selected energy": percent, "without claims": percent, "displaced": percent, "Jaccard without claims": number,
        "cosine": signed, "equal signs": signed, "opposite signs": signed, "conflict": percent, "in largest": percent,
    }  # fmt: skip
    table = Table(
        title="Before masking, by training step",
        columns=["step", *(Column(name, show) for name, show in columns.items())],
        rows=rows,
        terminal_rows=0,
        collapsed=len(points) > 30,
    )
    return Section(
        title="Before masking, over training",
        figures=_training_lines(points) if len(points) > 1 else [],
        tables=[table],
    )


def _training_lines(points: Sequence[GeometryPoint]) -> list[Figure]:
    """Return one figure per quantity that was logged at all."""
    series: list[tuple[str, str, bool, dict[str, list[float | None]]]] = [
        (
            "Energy held by a step's set",
            "share of the squared norm",
            True,
            {
                "selected": [point.units.captured for point in points],
                "without claims": [point.units.unconstrained_captured for point in points],
            },
        ),
        (
            "Overlap of a question's steps without claims",
            "mean Jaccard index",
            False,
            {
                "measured": [point.pairs.unconstrained_jaccard for point in points],
                "expected by chance": [point.pairs.expected_unconstrained_jaccard for point in points],
            },
        ),
        (
            "Sign conflict of a question's steps",
            "share of coordinates",
            True,
            {
                "all coordinates": [point.pairs.conflict for point in points],
                "largest coordinates": [point.pairs.top_conflict for point in points],
            },
        ),
        (
            "Gradient cosine by the signs of the advantages",
            "mean cosine",
            False,
            {
                "equal signs": [point.equal.cosine for point in points],
                "opposite signs": [point.opposite.cosine for point in points],
            },
        ),
    ]
    return [
        Lines(
            title=title,
            x=[point.step for point in points],
            series=lines,
            x_label="training step",
            y_label=label,
            shares=shares,
        )
        for title, label, shares, lines in series
        if any(value is not None for values in lines.values() for value in values)
    ]
