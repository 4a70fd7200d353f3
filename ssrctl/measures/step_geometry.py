"""What the steps of a question want before masking, and what claims cost them, over a whole run (``--jaccard``)."""

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
from ssrctl.measures.maths.step_pairs import (
    EQUAL,
    OPPOSITE,
    PairGeometry,
    PairGradients,
    QuestionGeometry,
    UnitGeometry,
    UnitGradient,
    measure_step_geometry,
)
from ssrctl.measures.step_figures import (
    MOST_TERMINAL_ROWS,
    by_unit,
    jaccard_maps,
    pair_map,
    pair_table,
    training_lines,
)
from ssrctl.report.document import Section
from ssrctl.report.formats import count, number, percent, signed, times


@dataclass(frozen=True, kw_only=True)
class UnitMeans(UnitGradient):
    """Means over ``num_units`` cases; ``position`` is None when they are of all positions."""

    position: int | None
    num_units: int


def unit_means(units: Sequence[UnitGeometry], position: int | None = None) -> UnitMeans:
    """Return means over units, each with equal weight."""
    return UnitMeans(position=position, num_units=len(units), **means(UnitGradient, units, plain_mean))


@dataclass(frozen=True, kw_only=True)
class PairMeans(PairGradients):
    """Means over several pairs.

    Attributes:
        num_cosines: those of them whose gradients were compared.
        negative_frac: share of these with a negative cosine.
    """

    num_pairs: int
    num_cosines: int
    negative_frac: float | None

    @property
    def top_agreement(self) -> float | None:
        """``1 - top_conflict``."""
        return None if self.top_conflict is None else 1.0 - self.top_conflict


def pair_means(pairs: Sequence[PairGeometry]) -> PairMeans:
    """Return means over pairs, each with equal weight."""
    cosines = [pair.cosine for pair in pairs if pair.cosine is not None]
    negative = sum(cosine < 0 for cosine in cosines) / len(cosines) if cosines else None
    return PairMeans(
        num_pairs=len(pairs),
        num_cosines=len(cosines),
        negative_frac=negative,
        **means(PairGradients, pairs, plain_mean),
    )


@dataclass(frozen=True, kw_only=True)
class PositionPair:
    """All cases of units i and j."""

    i: int
    j: int
    means: PairMeans


@dataclass(frozen=True, kw_only=True)
class GeometryMeans:
    """Means over some questions.

    Attributes:
        units, pairs: over all.
        equal, opposite: over the pairs whose mean advantages have equal and opposite signs.
    """

    units: UnitMeans
    pairs: PairMeans
    equal: PairMeans
    opposite: PairMeans


@dataclass(frozen=True, kw_only=True)
class GeometryPoint(GeometryMeans):
    """One logged training step."""

    step: int


@dataclass(frozen=True, kw_only=True)
class RunGeometry(GeometryMeans):
    """A run in all; every mean is over single cases.

    Attributes:
        num_without_signs: pairs that are neither equal nor opposite: a mean advantage is 0 or unknown.
        by_position: one per position, from 0.
        by_pair: one per position pair, ordered by (i, j).
        over_training: one per logged step, in order.
    """

    num_without_signs: int
    by_position: list[UnitMeans]
    by_pair: list[PositionPair]
    over_training: list[GeometryPoint]


def summarise_geometry(questions: Iterable[QuestionGeometry]) -> RunGeometry:
    """Aggregate the questions of all logged training steps."""
    questions = list(questions)
    pairs = [pair for question in questions for pair in question.pairs]
    by_position = by_key((unit for question in questions for unit in question.units), lambda unit: unit.position)
    by_pair = by_key(pairs, lambda pair: (pair.i, pair.j))
    by_step = by_key(questions, lambda question: question.step)
    return RunGeometry(
        num_without_signs=sum(pair.advantage_signs is None for pair in pairs),
        by_position=[unit_means(by_position[key], key) for key in sorted(by_position)],
        by_pair=[PositionPair(i=i, j=j, means=pair_means(by_pair[i, j])) for i, j in sorted(by_pair)],
        over_training=[GeometryPoint(step=step, **_means(by_step[step])) for step in sorted(by_step)],
        **_means(questions),
    )


def _means(questions: Sequence[QuestionGeometry]) -> dict[str, Any]:
    """Return the fields of ``GeometryMeans``."""
    pairs = [pair for question in questions for pair in question.pairs]
    return {
        "units": unit_means([unit for question in questions for unit in question.units]),
        "pairs": pair_means(pairs),
        "equal": pair_means([pair for pair in pairs if pair.advantage_signs == EQUAL]),
        "opposite": pair_means([pair for pair in pairs if pair.advantage_signs == OPPOSITE]),
    }


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
_CONFLICT_COLUMNS: tuple[RowColumn, ...] = (
    ("cases", "means.num_cosines", count),
    ("conflict", "means.conflict", percent),
    ("weighted", "means.weighted_conflict", percent),
    ("in largest", "means.top_conflict", percent),
    ("weighted in largest", "means.top_weighted_conflict", percent),
)
_TRAINING_COLUMNS: tuple[RowColumn, ...] = (
    ("selected energy", "units.captured", percent),
    ("without claims", "units.unconstrained_captured", percent),
    ("displaced", "units.displaced_frac", percent),
    ("Jaccard without claims", "pairs.unconstrained_jaccard", number),
    ("cosine", "pairs.cosine", signed),
    ("equal signs", "equal.cosine", signed),
    ("opposite signs", "opposite.cosine", signed),
    ("conflict", "pairs.conflict", percent),
    ("in largest", "pairs.top_conflict", percent),
)
_MISSING_SETS = "The mask logs hold neither unconstrained sets nor energies: a run with --sharding does not log them."
_MISSING_CONFLICT = "Gradients of steps were not compared before masking: train with --log-gradient-cosine for that."
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


def _energy_section(found: RunGeometry) -> Section:
    units = by_unit(found.by_position)
    series = {"selected": "captured", "without claims": "unconstrained_captured"}
    table = row_table(
        "Energy by unit",
        "unit",
        units,
        _UNIT_COLUMNS,
        "Selected and without claims: share of the squared norm of the unit's gradient in its set, and in the set "
        "that it would have taken if no step had claimed anything. Displaced: the share of the latter that it did not get. "
        "Unique: the share of it that no other unit of the question would have taken.",
        terminal_rows=MOST_TERMINAL_ROWS,
    )
    return Section(
        title="How much of its gradient a step keeps",
        figures=[row_dots("Energy held by each unit's set", units, series, "share of the gradient's squared norm")],
        tables=[table],
    )


def _collision_section(found: RunGeometry) -> Section:
    maps = {
        "Jaccard index without claims, measured": "means.unconstrained_jaccard",
        "Jaccard index without claims, chance": "means.expected_unconstrained_jaccard",
    }
    return Section(
        title="What would have collided without claims",
        text="Every unit's largest gradient entries among the unprotected weights, as many as it was granted, compared "
        "as if no unit had claimed any. This is the interference that disjoint sets avoid.",
        figures=jaccard_maps(found.by_pair, maps, len(found.by_position)),
    )


def _conflict_section(found: RunGeometry) -> Section:
    pairs = [pair for pair in found.by_pair if pair.means.num_cosines]
    conflicts = [pair.means.top_conflict for pair in found.by_pair if pair.means.top_conflict is not None]
    figure = pair_map(
        "Equal signs among the largest coordinates",
        found.by_pair,
        "means.top_agreement",
        len(found.by_position),
        centre=0.5,
        scale=max([_LEAST_SCALE, *(abs(1.0 - conflict - 0.5) for conflict in conflicts)]),
        shares=True,
        decimals=0,
        caption="Of the coordinates that either unit ranks highest, the share where both gradients have the same sign. "
        "Random signs give 50%; blue is agreement, orange is conflict.",
    )
    note = (
        "Conflict: share of the coordinates where neither gradient is 0 in which their signs differ. Weighted: share of "
        "the sum of |a b|. In largest: within the union of the two sets without claims. Random signs: 50%."
    )
    table = pair_table("Sign conflict by pair of units", pairs, _CONFLICT_COLUMNS, note)
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


def _training_section(found: Sequence[GeometryPoint]) -> Section:
    points = {point.step: point for point in found}
    table = row_table(
        "Before masking, by training step",
        "step",
        points,
        _TRAINING_COLUMNS,
        terminal_rows=0,
    )
    energy = {"selected": "units.captured", "without claims": "units.unconstrained_captured"}
    overlap = {"measured": "pairs.unconstrained_jaccard", "expected by chance": "pairs.expected_unconstrained_jaccard"}
    conflict = {"all coordinates": "pairs.conflict", "largest coordinates": "pairs.top_conflict"}
    cosine = {"equal signs": "equal.cosine", "opposite signs": "opposite.cosine"}
    figures = [
        ("Energy held by a step's set", "share of the squared norm", energy, True),
        ("Overlap of a question's steps without claims", "mean Jaccard index", overlap, False),
        ("Sign conflict of a question's steps", "share of coordinates", conflict, True),
        ("Gradient cosine by the signs of the advantages", "mean cosine", cosine, False),
    ]
    return Section(
        title="Before masking, over training",
        figures=training_lines(points, figures),
        tables=[table],
    )
