"""What steps want before masking: planted sets, energies, conflicts and advantages against python sets and means."""

from __future__ import annotations

import dataclasses
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.mask import BlockMask
from ssrctl.io.mask_log import CONFLICTS, QuestionLog, StepMaskLog, UnitLog
from ssrctl.measures.maths.step_pairs import advantage_signs, measure_question_geometry, measure_step_geometry
from ssrctl.measures.step_geometry import (
    RunGeometry,
    geometry_headlines,
    geometry_notes,
    geometry_sections,
    summarise_geometry,
)
from ssrctl.report.formats import json_safe

SHAPES = {"w": (10, 10)}
ELIGIBLE = 90
coordinates = st.frozensets(st.integers(0, 99), max_size=20)


def mask(chosen: frozenset[int] | range) -> BlockMask:
    return BlockMask.from_indices(SHAPES, {"w": torch.tensor(sorted(chosen), dtype=torch.int64)})


def unit(
    got: frozenset[int] | range, wanted: frozenset[int] | range | None = None, *advantages: float, **given: float
) -> UnitLog:
    free = None if wanted is None else mask(wanted)
    return UnitLog(steps=[0], budget=0.1, advantages=list(advantages), mask=mask(got), unconstrained=free, **given)


def matrices(number: int, value: float) -> dict[str, list[list[float | None]]]:
    """Matrices that differ by name and by pair: value + place of the name / 100 + (i + j) / 1000."""
    return {
        name: [[None if i == j else value + place / 100 + (i + j) / 1000 for j in range(number)] for i in range(number)]
        for place, name in enumerate(CONFLICTS)
    }


def summary(*questions: QuestionLog, step: int = 10) -> RunGeometry:
    log = StepMaskLog(step=step, num_coordinates=100, num_protected=10, questions=list(questions))
    return summarise_geometry(measure_step_geometry(log))


@given(st.lists(st.tuples(coordinates, coordinates), max_size=4))
def test_sets_without_claims_are_compared_as_python_sets(drawn: list[tuple[frozenset[int], frozenset[int]]]) -> None:
    question = QuestionLog(id="q", units=[unit(got, wanted, 1.0) for got, wanted in drawn])
    found = measure_question_geometry(question, 3, ELIGIBLE)
    assert [(pair.i, pair.j) for pair in found.pairs] == [
        (i, j) for i in range(len(drawn)) for j in range(i + 1, len(drawn))
    ]
    for pair in found.pairs:
        a, b = drawn[pair.i][1], drawn[pair.j][1]
        assert pair.unconstrained_overlap == len(a & b)
        assert pair.unconstrained_jaccard == (len(a & b) / len(a | b) if a | b else 0.0)
        p, q = len(a) / ELIGIBLE, len(b) / ELIGIBLE
        chance = p * q / (p + q - p * q) if a or b else 0.0
        assert pair.expected_unconstrained_jaccard == pytest.approx(chance)
    for one, (got, wanted) in zip(found.units, drawn, strict=True):
        rest = frozenset().union(*(other for place, (_, other) in enumerate(drawn) if place != one.position))
        assert one.unconstrained_size == len(wanted)
        assert one.displaced_frac == (len(wanted - got) / len(wanted) if wanted else None)
        assert one.unconstrained_uniqueness == (len(wanted - rest) / len(wanted) if wanted else None)


def test_energies_and_what_claims_cost() -> None:
    question = QuestionLog(
        id="q",
        units=[
            unit(range(10), range(10), 1.0, captured=0.5, unconstrained_captured=0.5, gradient_norm=2.0),
            unit(range(10, 20), range(5, 15), 1.0, captured=0.25, unconstrained_captured=0.375, gradient_norm=4.0),
            unit(range(20, 30), None, 1.0, captured=float("nan")),
        ],
    )
    first, second, third = measure_question_geometry(question, 3, ELIGIBLE).units
    assert (first.claims_loss, first.displaced_frac, first.unconstrained_uniqueness) == (0.0, 0.0, 0.5)
    assert (second.claims_loss, second.displaced_frac, second.unconstrained_uniqueness) == (0.125, 0.5, 0.5)
    assert third.captured is third.claims_loss is third.displaced_frac is third.unconstrained_size is None
    found = summary(question)
    assert (found.units.captured, found.units.unconstrained_captured) == (0.375, 0.4375)
    assert (found.units.claims_loss, found.units.gradient_norm, found.units.num_units) == (0.0625, 3.0, 3)
    # only one pair has both sets; 5 of 15
    assert found.pairs.unconstrained_jaccard == pytest.approx(1 / 3) and found.pairs.num_pairs == 3


@pytest.mark.parametrize(
    ("one", "other", "signs"),
    [
        ((1.0, -0.5), (0.2,), "equal"),
        ((-1.0, 0.5), (-0.2,), "equal"),
        ((1.0, -0.5), (-0.2, 0.1), "opposite"),
        ((0.5, -0.5), (1.0,), None),
        ((0.1, 0.2, -0.3), (1.0,), None),  # 2.8e-17 in floating point
        ((), (1.0,), None),
        ((float("nan"),), (1.0,), None),
    ],
)
def test_signs_of_mean_advantages(one: tuple, other: tuple, signs: str | None) -> None:
    assert advantage_signs(one, other) == advantage_signs(other, one) == signs


def test_conflict_by_the_signs_of_the_advantages() -> None:
    cosine = [[1.0, 0.4, -0.2, 0.0], [0.4, 1.0, -0.6, 0.1], [-0.2, -0.6, 1.0, 0.3], [0.0, 0.1, 0.3, 1.0]]
    units = [unit(range(5), range(5), advantage) for advantage in (1.0, 2.0, -1.0, 0.0)]
    found = summary(QuestionLog(id="q", units=units, gradient_cosine=cosine, conflict=matrices(4, 0.3)))
    # (0, 1) agree, (0, 2) and (1, 2) do not, the pairs of unit 3 are in neither class
    assert (found.equal.num_pairs, found.opposite.num_pairs, found.num_without_signs) == (1, 2, 3)
    assert found.equal.cosine == 0.4 and found.opposite.cosine == pytest.approx(-0.4)
    assert (found.equal.negative_frac, found.opposite.negative_frac) == (0.0, 1.0)
    assert found.equal.conflict == pytest.approx(0.3 + 0.001)
    assert found.opposite.conflict == pytest.approx(0.3 + fmean((0.002, 0.003)))
    for place, name in enumerate(CONFLICTS):
        assert getattr(found.opposite, name) == pytest.approx(0.3 + place / 100 + 0.0025)
    assert found.pairs.num_cosines == 6 and found.pairs.cosine == pytest.approx(fmean((0.4, -0.2, 0.0, -0.6, 0.1, 0.3)))
    lines = " ".join(geometry_headlines(found))
    assert "same sign have a mean cosine of +0.400 (1 pair), of opposite signs -0.400 (2 pairs)" in lines


def test_means_are_over_cases_and_steps_come_in_order() -> None:
    def log(step: int, *values: float) -> StepMaskLog:
        questions = [
            QuestionLog(
                id=str(value),
                units=[
                    unit(range(4), range(4), 1.0, captured=value),
                    unit(range(4, 8), range(2, 6), 1.0, captured=value),
                ],
                gradient_cosine=[[1.0, value], [value, 1.0]],
            )
            for value in values
        ]
        return StepMaskLog(step=step, num_coordinates=100, num_protected=10, questions=questions)

    found = summarise_geometry([*measure_step_geometry(log(20, 0.5)), *measure_step_geometry(log(10, 0.1, 0.3))])
    assert [point.step for point in found.over_training] == [10, 20]
    assert found.over_training[0].pairs.cosine == pytest.approx(0.2) and found.over_training[1].equal.cosine == 0.5
    assert found.over_training[0].units.captured == pytest.approx(0.2)
    assert found.pairs.cosine == pytest.approx(0.3)  # of three cases, not of two steps
    [pair] = found.by_pair
    assert (pair.i, pair.j, pair.means.num_pairs) == (0, 1, 3)
    assert [means.num_units for means in found.by_position] == [3, 3]
    assert found.by_position[1].displaced_frac == 0.5 and found.by_position[0].displaced_frac == 0.0


def full_question() -> QuestionLog:
    units = [
        unit(range(10), range(10), 1.0, captured=0.5, unconstrained_captured=0.5, gradient_norm=1.0),
        unit(range(10, 20), range(5, 15), -1.0, captured=0.3, unconstrained_captured=0.4, gradient_norm=1.0),
    ]
    return QuestionLog(id="q", units=units, gradient_cosine=[[1.0, -0.5], [-0.5, 1.0]], conflict=matrices(2, 0.6))


def test_the_report_has_a_section_for_what_was_logged_and_none_for_what_was_not() -> None:
    whole = full_question()
    sets_only = dataclasses.replace(whole, gradient_cosine=None, conflict=None)
    old = QuestionLog(id="q", units=[unit(range(10)), unit(range(10, 20))], gradient_cosine=[[1.0, 0.5], [0.5, 1.0]])
    oldest = dataclasses.replace(old, gradient_cosine=None)
    titles = [[section.title for section in geometry_sections(summary(one))] for one in (whole, sets_only, old, oldest)]
    assert len(titles[0]) == 5 and len(titles[1]) == 4 and "conflict" not in " ".join(titles[1][:2])
    assert len(titles[2]) == 3 and titles[3] == []
    said = [" ".join(geometry_notes(summary(one))) for one in (whole, sets_only, old, oldest)]
    assert said[0] == "" and "--log-gradient-cosine" in said[1] and "--sharding" not in said[1]
    assert "--sharding" in said[2] and "--log-gradient-cosine" not in said[2]
    assert "--sharding" in said[3] and "--log-gradient-cosine" in said[3]
    lines = geometry_headlines(summary(whole))
    assert "mean Jaccard index of 0.333 (chance: 0.0588)" in lines[0] and "25.00% of what" in lines[0]
    assert "holds 40.00%" in lines[1] and "would hold 45.00%" in lines[1]
    assert "disagree in sign at 60.10%" in lines[2] and "62.10% of those" in lines[2]
    assert geometry_headlines(summary(oldest)) == []


def test_nothing_gives_an_empty_report() -> None:
    for found in (summarise_geometry([]), summary(), summary(QuestionLog(id="q", units=[]))):
        assert geometry_headlines(found) == geometry_sections(found) == geometry_notes(found) == []
        assert json_safe(dataclasses.asdict(found)) == dataclasses.asdict(found)
