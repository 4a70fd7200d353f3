"""Overlap over a whole run: by position pair, by position, by training step, and in all.

Every mean is over single cases with equal weight (a case is one pair of units of one question in one logged
training step, or one unit of one), not over averages of averages.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ssrctl.measures.step_overlap import PairOverlap, StepOverlap, UnitOverlap


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of what is not None; None when nothing is left."""
    kept = [value for value in values if value is not None]
    return sum(kept) / len(kept) if kept else None


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
