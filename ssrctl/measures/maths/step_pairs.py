"""Gradients of a question's steps before masking: the sets they would have taken, what claims cost, and conflicts.

The sets of ``step_sets`` are what steps got. The *unconstrained* sets are what they would have taken if no step had
claimed anything. All is as the training logged it (``io.mask_log``); what a log does not hold is None, and means leave
it out.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from ssrctl.io.mask_log import QuestionLog, StepMaskLog
from ssrctl.measures.maths.averages import plain_mean
from ssrctl.measures.maths.step_sets import OverlapCounts, expected_jaccard, finite, overlap_counts

EQUAL, OPPOSITE = "equal", "opposite"
# A mean this small relative to its advantages has the sign of a rounding error.
SIGN_TOLERANCE = 1e-9


@dataclass(frozen=True, kw_only=True)
class UnitGradient:
    """A unit's gradient and its two sets, or means over several units.

    S is what it selected, and U the largest entries of its gradient without claims.

    Attributes:
        gradient_norm: L2 norm before masking.
        captured: share of the gradient's squared norm in S.
        unconstrained_captured: share of the squared norm in U; never less than ``captured`` when S is as large as U.
        claims_loss: ``unconstrained_captured - captured``.
        displaced_frac: ``|U \\ S| / |U|``, what it wanted and did not get; None for an empty U.
        unconstrained_uniqueness: share of U that is in no other unit's U.
    """

    gradient_norm: float | None
    captured: float | None
    unconstrained_captured: float | None
    claims_loss: float | None
    displaced_frac: float | None
    unconstrained_uniqueness: float | None


@dataclass(frozen=True, kw_only=True)
class UnitGeometry(UnitGradient):
    """One unit of a question.

    Attributes:
        position: from 0, in the order of claiming.
        mean_advantage: over the responses and steps of the unit; None without any.
        unconstrained_size: ``|U|``.
    """

    position: int
    mean_advantage: float | None
    unconstrained_size: int | None


@dataclass(frozen=True, kw_only=True)
class PairGradients:
    """The gradients of two units before masking, or means over several pairs.

    Attributes:
        unconstrained_overlap: ``|U_i n U_j|``: what would have collided.
        unconstrained_jaccard: ``|U_i n U_j| / |U_i u U_j|``, 0 when both are empty.
        expected_unconstrained_jaccard: of random sets of these sizes.
        cosine: between the gradients.
        conflict: share of the coordinates where neither gradient is 0 in which their signs differ.
        weighted_conflict: share of sum |a b| in these.
        top_conflict, top_weighted_conflict: both within ``U_i u U_j``.

    For independent random signs every conflict is 1/2 on average.
    """

    unconstrained_overlap: float | None
    unconstrained_jaccard: float | None
    expected_unconstrained_jaccard: float | None
    cosine: float | None
    conflict: float | None
    weighted_conflict: float | None
    top_conflict: float | None
    top_weighted_conflict: float | None


@dataclass(frozen=True, kw_only=True)
class PairGeometry(PairGradients):
    """Two units of one question.

    Attributes:
        i, j: positions from 0, ``i < j``.
        advantage_signs: ``equal`` or ``opposite`` signs of the units' mean advantages; None when one is 0 or unknown.
    """

    i: int
    j: int
    advantage_signs: str | None


@dataclass(frozen=True, kw_only=True)
class QuestionGeometry:
    """One question in one training step."""

    step: int
    id: str
    units: list[UnitGeometry]
    pairs: list[PairGeometry]


def measure_step_geometry(log: StepMaskLog) -> list[QuestionGeometry]:
    """Measure every question of a logged training step.

    Raises:
        ValueError: a set larger than the unprotected coordinates, or sets over other tensors than their question's.
    """
    eligible = log.num_coordinates - log.num_protected
    return [measure_question_geometry(question, log.step, eligible) for question in log.questions]


def measure_question_geometry(question: QuestionLog, step: int, eligible: int) -> QuestionGeometry:
    """Measure one question.

    Args:
        eligible: N, the unprotected coordinates.

    Raises:
        ValueError: see ``measure_step_geometry``.
    """
    known = [i for i, unit in enumerate(question.units) if unit.unconstrained is not None]
    sets = [unit.unconstrained for unit in question.units if unit.unconstrained is not None]
    counts = overlap_counts(sets)
    places = {i: place for place, i in enumerate(known)}
    units = [_unit(question, i, counts, places.get(i)) for i in range(len(question.units))]
    pairs = [_pair(question, i, j, counts, places, eligible) for i, j in itertools.combinations(range(len(units)), 2)]
    return QuestionGeometry(step=step, id=question.id, units=units, pairs=pairs)


def _unit(question: QuestionLog, i: int, counts: OverlapCounts, place: int | None) -> UnitGeometry:
    unit = question.units[i]
    size = displaced = uniqueness = None
    if place is not None and unit.unconstrained is not None:
        size = int(counts.shared[place, place])
        if size:
            shared = int(overlap_counts([unit.mask, unit.unconstrained]).shared[0, 1])
            displaced = (size - shared) / size
            uniqueness = int(counts.unique[place]) / size
    captured, free = finite(unit.captured), finite(unit.unconstrained_captured)
    return UnitGeometry(
        position=i,
        mean_advantage=plain_mean(unit.advantages),
        gradient_norm=finite(unit.gradient_norm),
        captured=captured,
        unconstrained_size=size,
        unconstrained_captured=free,
        claims_loss=None if captured is None or free is None else free - captured,
        displaced_frac=displaced,
        unconstrained_uniqueness=uniqueness,
    )


def _pair(
    question: QuestionLog, i: int, j: int, counts: OverlapCounts, places: dict[int, int], eligible: int
) -> PairGeometry:
    shared = jaccard = expected = None
    if i in places and j in places:
        a, b = (int(counts.shared[places[one], places[one]]) for one in (i, j))
        shared = int(counts.shared[places[i], places[j]])
        jaccard = shared / (a + b - shared) if a + b else 0.0
        expected = expected_jaccard(a, b, eligible)
    cosine = None if question.gradient_cosine is None else finite(question.gradient_cosine[i][j])
    conflicts = {
        name: None if question.conflict is None else finite(question.conflict[name][i][j])
        for name in ("conflict", "weighted_conflict", "top_conflict", "top_weighted_conflict")
    }
    return PairGeometry(
        i=i,
        j=j,
        advantage_signs=advantage_signs(question.units[i].advantages, question.units[j].advantages),
        unconstrained_overlap=shared,
        unconstrained_jaccard=jaccard,
        expected_unconstrained_jaccard=expected,
        cosine=cosine,
        **conflicts,
    )


def advantage_signs(one: Sequence[float], other: Sequence[float]) -> str | None:
    """Return ``equal`` or ``opposite`` by the signs of two units' mean advantages; None when one is 0 (to rounding)."""
    signs = [_sign_of_mean(one), _sign_of_mean(other)]
    if 0 in signs:
        return None
    return EQUAL if signs[0] == signs[1] else OPPOSITE


def _sign_of_mean(values: Sequence[float]) -> int:
    total = math.fsum(values)
    if not math.isfinite(total) or abs(total) <= SIGN_TOLERANCE * math.fsum(map(abs, values)):
        return 0
    return 1 if total > 0 else -1
