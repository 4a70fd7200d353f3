"""Overlap of the coordinate sets that the steps of a question selected, next to what chance would give.

Notation: ``a``, ``b`` sizes of two sets; ``N`` the eligible (unprotected) coordinates; ``S_i`` the set of
unit i. Units are numbered from 0, in the order in which they claimed. An average leaves out what is
undefined (None), and is None itself when nothing remains.

The random expectation is that of uniformly random sets of the same sizes among the N coordinates, drawn
independently of one another: ``E|A n B| = ab / N`` (the mean of a hypergeometric variable).
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssrctl.measures.maths.averages import ratio

if TYPE_CHECKING:
    from torch import Tensor

    from ssrctl.core.mask import BlockMask
    from ssrctl.io.mask_log import QuestionLog, StepMaskLog


@dataclass(frozen=True)
class OverlapCounts:
    """Counts of the intersections of several sets.

    Attributes:
        shared: int64 ``[num_sets, num_sets]``, ``|S_i n S_j|``; the diagonal holds the sizes.
        unique: int64 ``[num_sets]``, members of S_i that are in no other set.
        num_touched: size of the union of all sets.
    """

    shared: Tensor
    unique: Tensor
    num_touched: int


def overlap_counts(sets: Sequence[BlockMask]) -> OverlapCounts:
    """Count, exactly, how sets over the same tensors overlap; no sets give counts of shape ``[0, 0]``.

    The indices of all sets are sorted together, so that equal ones lie side by side: the cost is that of
    one sort and grows with the selected coordinates, not with the number of pairs times their size.

    Raises:
        ValueError: sets over different tensors or shapes.
    """
    import torch

    number = len(sets)
    shared = torch.zeros(number * number, dtype=torch.int64)
    unique = torch.zeros(number, dtype=torch.int64)
    touched = 0
    for other in sets[1:]:
        if other.shapes != sets[0].shapes:
            raise ValueError("sets over different tensors cannot be compared")
    for name in sets[0].tensors if sets else ():
        parts = [one.tensors[name].to_indices() for one in sets]
        owner = torch.cat([torch.full_like(part, place) for place, part in enumerate(parts)])
        # The sort is stable, so equal coordinates stay in the order of their owners: i < j below.
        coordinate, order = torch.cat(parts).sort(stable=True)
        owner = owner[order]
        _, run, lengths = coordinate.unique_consecutive(return_inverse=True, return_counts=True)
        touched += lengths.numel()
        unique += torch.bincount(owner[lengths[run] == 1], minlength=number)
        for distance in range(int(lengths.max()) if lengths.numel() else 0):
            same = run[distance:] == run[: run.numel() - distance]
            pair = owner[: run.numel() - distance][same] * number + owner[distance:][same]
            shared += torch.bincount(pair, minlength=number * number)
    square = shared.view(number, number)
    return OverlapCounts(square + square.triu(1).T, unique, touched)


def expected_overlap(a: int, b: int, eligible: int) -> float:
    """Return ``ab / N``, the expected size of the intersection of two random sets."""
    _check_sizes((a, b), eligible)
    return a * b / eligible if eligible else 0.0


def expected_jaccard(a: int, b: int, eligible: int) -> float:
    """Return the Jaccard index at the expected overlap, ``pq / (p + q - pq)`` with ``p = a/N``, ``q = b/N``.

    A ratio of expectations: it differs from the expectation of the ratio by terms of order 1/N. 0 when both
    sets are empty.
    """
    shared = expected_overlap(a, b, eligible)
    either = a + b - shared
    return shared / either if either else 0.0


def expected_uniqueness(others: Iterable[int], eligible: int) -> float:
    """Return the chance that a coordinate is in none of the other sets: ``prod (1 - b/N)`` over their sizes."""
    sizes = list(others)
    _check_sizes(sizes, eligible)
    return math.prod(1 - size / eligible for size in sizes) if eligible else 1.0


def _check_sizes(sizes: Iterable[int], eligible: int) -> None:
    if (largest := max(sizes, default=0)) > eligible:
        raise ValueError(f"a set of {largest} coordinates among {eligible} unprotected ones")


@dataclass(frozen=True, kw_only=True)
class PairSets:
    """Two sets, or means over several pairs of sets.

    Attributes:
        overlap: ``|S_i n S_j|``.
        jaccard: ``|S_i n S_j| / |S_i u S_j|``, 0 when both are empty.
        share_of_i: one-sided overlap ``|S_i n S_j| / |S_i|``; None for an empty ``S_i``.
        share_of_j: the same over ``|S_j|``.
        expected_*: of random sets of these sizes.
    """

    overlap: float | None
    expected_overlap: float | None
    jaccard: float | None
    expected_jaccard: float | None
    share_of_i: float | None
    expected_share_of_i: float | None
    share_of_j: float | None
    expected_share_of_j: float | None


@dataclass(frozen=True, kw_only=True)
class PairOverlap(PairSets):
    """Two sets of one question, or the unions of two questions.

    ``{"i": 0, "j": 1, "overlap": 0, "expected_overlap": 9.6, "jaccard": 0.0, "expected_jaccard": 0.004,
    "share_of_i": 0.0, "expected_share_of_i": 0.008, "share_of_j": 0.0, "expected_share_of_j": 0.008,
    "cosine": -0.02}``

    Attributes:
        i, j: positions from 0, ``i < j``.
        cosine: between the units' gradients before masking; None when it was not logged or not finite.
    """

    i: int
    j: int
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class UnitSet:
    """One unit's set among those of its question, or means over several units.

    Attributes:
        size: selected coordinates.
        uniqueness: share of them that no other unit of the question selected; None for an empty set.
        expected_uniqueness: with random sets of these sizes.
    """

    size: float | None
    uniqueness: float | None
    expected_uniqueness: float | None


@dataclass(frozen=True, kw_only=True)
class UnitOverlap(UnitSet):
    """One unit of a question.

    ``{"position": 0, "steps": [0], "budget": 0.002, "size": 840, "uniqueness": 1.0, "expected_uniqueness": 0.98}``

    Attributes:
        position: from 0, in the order of claiming.
        steps: the reasoning steps fused in it, from 0.
        budget: the fraction it was granted.
    """

    position: int
    steps: list[int]
    budget: float
    size: int


@dataclass(frozen=True, kw_only=True)
class QuestionOverlap:
    """One question in one training step: its units, and every pair of them with ``i < j``."""

    step: int
    id: str
    units: list[UnitOverlap]
    pairs: list[PairOverlap]


@dataclass(frozen=True, kw_only=True)
class StepOverlap:
    """One training step.

    Attributes:
        step: from 1.
        num_eligible: unprotected coordinates N.
        questions: in training order.
        cross_question: pairs of questions, each as the union of its units' sets; i and j count questions.
        num_touched: coordinates that any unit of any question selected.
        touched_frac: the same as a share of N.
        expected_touched_frac: with random unions of the same sizes, ``1 - prod(1 - |U_q|/N)``.
    """

    step: int
    num_eligible: int
    questions: list[QuestionOverlap]
    cross_question: list[PairOverlap]
    num_touched: int
    touched_frac: float | None
    expected_touched_frac: float | None


def measure_question(question: QuestionLog, step: int, eligible: int) -> QuestionOverlap:
    """Measure the overlap of the units of one question.

    Args:
        eligible: N, the unprotected coordinates.

    Raises:
        ValueError: a set larger than N, or a cosine matrix that is not ``[units][units]``.
    """
    counts = overlap_counts([unit.mask for unit in question.units])
    sizes = counts.shared.diagonal().tolist()
    _check_sizes(sizes, eligible)
    unique = counts.unique.tolist()
    units = [
        UnitOverlap(
            position=i,
            steps=list(unit.steps),
            budget=unit.budget,
            size=sizes[i],
            uniqueness=ratio(unique[i], sizes[i]),
            expected_uniqueness=expected_uniqueness(sizes[:i] + sizes[i + 1 :], eligible),
        )
        for i, unit in enumerate(question.units)
    ]
    cosine = question.gradient_cosine
    if cosine is not None and [len(row) for row in cosine] != [len(units)] * len(units):
        raise ValueError(f"question {question.id}: the cosine matrix does not fit its {len(units)} units")
    return QuestionOverlap(step=step, id=question.id, units=units, pairs=_pairs(counts, eligible, cosine))


def measure_step(log: StepMaskLog) -> StepOverlap:
    """Measure the overlap within each question of a training step, and between its questions.

    Raises:
        ValueError: a log that contradicts itself: sets that do not fit the unprotected coordinates, or more
            protected coordinates than there are.
    """
    eligible = log.num_coordinates - log.num_protected
    if eligible < 0:
        raise ValueError(f"{log.num_protected} of {log.num_coordinates} coordinates protected")
    questions = [measure_question(question, log.step, eligible) for question in log.questions]
    unions = {
        place: functools.reduce(operator.or_, [unit.mask for unit in question.units])
        for place, question in enumerate(log.questions)
        if question.units
    }
    counts = overlap_counts(list(unions.values()))
    sizes = counts.shared.diagonal().tolist()
    return StepOverlap(
        step=log.step,
        num_eligible=eligible,
        questions=questions,
        cross_question=_pairs(counts, eligible, None, list(unions)),
        num_touched=counts.num_touched,
        touched_frac=ratio(counts.num_touched, eligible),
        expected_touched_frac=1 - expected_uniqueness(sizes, eligible) if eligible else None,
    )


def _pairs(
    counts: OverlapCounts,
    eligible: int,
    cosine: list[list[float]] | None,
    places: Sequence[int] | None = None,
) -> list[PairOverlap]:
    """Return every pair ``i < j``; ``places`` renames the positions."""
    shared = counts.shared.tolist()
    places = range(len(shared)) if places is None else places
    pairs = []
    for i, j in itertools.combinations(range(len(shared)), 2):
        a, b, both = shared[i][i], shared[j][j], shared[i][j]
        pairs.append(
            PairOverlap(
                i=places[i],
                j=places[j],
                overlap=both,
                expected_overlap=expected_overlap(a, b, eligible),
                jaccard=ratio(both, a + b - both) or 0.0,
                expected_jaccard=expected_jaccard(a, b, eligible),
                share_of_i=ratio(both, a),
                expected_share_of_i=ratio(b, eligible) or 0.0,
                share_of_j=ratio(both, b),
                expected_share_of_j=ratio(a, eligible) or 0.0,
                cosine=None if cosine is None else finite(cosine[i][j]),
            )
        )
    return pairs


def finite(value: float | None) -> float | None:
    """Return the value, None for NaN and infinity."""
    return value if value is not None and math.isfinite(value) else None
