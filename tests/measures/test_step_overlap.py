"""Overlap counts against plain python sets, and the random expectation against random sets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.core.mask import BlockMask
from ssrctl.io.mask_log import QuestionLog, StepMaskLog, UnitLog
from ssrctl.measures.maths.step_sets import (
    StepOverlap,
    expected_jaccard,
    expected_overlap,
    expected_uniqueness,
    measure_step,
    overlap_counts,
)
from ssrctl.measures.step_overlap import (
    StepOverlapMeasure,
    disjoint_by_construction,
    overlap_headlines,
    summarise_run,
)

SHAPES = {"a.weight": (5, 19), "b.bias": (7,)}
COORDINATES = [(name, index) for name, size in (("a.weight", 95), ("b.bias", 7)) for index in range(size)]
Coordinates = frozenset[tuple[str, int]]

coordinate_sets = st.lists(st.frozensets(st.sampled_from(COORDINATES), max_size=30), max_size=6)


def mask(chosen: Coordinates) -> BlockMask:
    indices = {name: sorted(index for one, index in chosen if one == name) for name in SHAPES}
    return BlockMask.from_indices(SHAPES, {name: torch.tensor(found).long() for name, found in indices.items()})


def first(count: int, start: int = 0) -> Coordinates:
    return frozenset(COORDINATES[start : start + count])


def question(*chosen: Coordinates, name: str = "q", gradient_cosine: list[list[float]] | None = None) -> QuestionLog:
    units = [UnitLog(steps=[i], budget=0.25 * i, advantages=[1.0], mask=mask(one)) for i, one in enumerate(chosen)]
    return QuestionLog(id=name, units=units, gradient_cosine=gradient_cosine)


def step_log(*questions: QuestionLog, step: int = 10, protected: int = 2) -> StepMaskLog:
    return StepMaskLog(step=step, num_coordinates=len(COORDINATES), num_protected=protected, questions=list(questions))


def measured(*questions: QuestionLog) -> StepOverlap:
    return measure_step(step_log(*questions))


@given(coordinate_sets)
def test_counts_are_those_of_python_sets(chosen: list[Coordinates]) -> None:
    counts = overlap_counts([mask(one) for one in chosen])
    assert counts.shared.tolist() == [[len(a & b) for b in chosen] for a in chosen]
    others = [frozenset().union(*chosen[:i], *chosen[i + 1 :]) for i in range(len(chosen))]
    assert counts.unique.tolist() == [len(one - rest) for one, rest in zip(chosen, others, strict=True)]
    assert counts.num_touched == len(frozenset().union(*chosen))


def test_sets_over_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match="different tensors"):
        overlap_counts([mask(first(3)), BlockMask.empty({"a.weight": (5, 19)})])


@settings(max_examples=30)
@given(coordinate_sets)
def test_every_pair_and_unit_of_a_question(chosen: list[Coordinates]) -> None:
    eligible = len(COORDINATES) - 2
    found = measured(question(*chosen)).questions[0]
    assert [(pair.i, pair.j) for pair in found.pairs] == list(combinations(range(len(chosen)), 2))
    for pair in found.pairs:
        a, b = chosen[pair.i], chosen[pair.j]
        assert pair.overlap == len(a & b)
        assert pair.jaccard == (len(a & b) / len(a | b) if a | b else 0.0)
        assert pair.share_of_i == (len(a & b) / len(a) if a else None)
        assert pair.share_of_j == (len(a & b) / len(b) if b else None)
        # a member of one set lies in the other, of |b| among N, with probability |b| / N
        assert pair.expected_share_of_i == pytest.approx(len(b) / eligible)
        assert pair.expected_share_of_j == pytest.approx(len(a) / eligible)
        assert pair.expected_overlap == pytest.approx(len(a) * len(b) / eligible)
        assert pair.cosine is None
    for unit, one in zip(found.units, chosen, strict=True):
        rest = [other for place, other in enumerate(chosen) if place != unit.position]
        alone = 1.0
        for other in rest:
            alone *= (eligible - len(other)) / eligible
        assert unit.size == len(one) and unit.steps == [unit.position] and unit.budget == 0.25 * unit.position
        assert unit.uniqueness == (len(one - frozenset().union(*rest)) / len(one) if one else None)
        assert unit.expected_uniqueness == pytest.approx(alone)


@settings(max_examples=30)
@given(st.lists(coordinate_sets, max_size=3))
def test_questions_are_compared_as_unions(batch: list[list[Coordinates]]) -> None:
    eligible = len(COORDINATES) - 2
    found = measured(*(question(*chosen, name=f"q{q}") for q, chosen in enumerate(batch)))
    unions = {q: frozenset().union(*chosen) for q, chosen in enumerate(batch) if chosen}
    assert [(pair.i, pair.j) for pair in found.cross_question] == list(combinations(unions, 2))
    for pair in found.cross_question:
        assert pair.overlap == len(unions[pair.i] & unions[pair.j])
    assert found.num_touched == len(frozenset().union(*unions.values()))
    assert found.touched_frac == found.num_touched / eligible
    missed = 1.0
    for union in unions.values():
        missed *= 1 - len(union) / eligible
    assert found.expected_touched_frac == pytest.approx(1 - missed)


def test_expectations_are_the_means_of_random_sets() -> None:
    # Standard errors below come from the trials themselves, so the tolerance of 5 of them is missed by chance
    # about once in two million; the expected Jaccard index adds its bias, a ratio of means against a mean of
    # ratios, at most var(overlap) / 2 times the largest second derivative of x / (a + b - x).
    draw, trials, eligible = random.Random(0), 2000, 400
    for a, b in ((40, 100), (200, 300)):
        shared, index, alone = [], [], []
        for _ in range(trials):
            one, two, three = (set(draw.sample(range(eligible), size)) for size in (a, b, 60))
            shared.append(len(one & two))
            index.append(len(one & two) / len(one | two))
            alone.append(len(one - two - three) / a)
        for values, expected, bias in (
            (shared, expected_overlap(a, b, eligible), 0.0),
            (index, expected_jaccard(a, b, eligible), _variance(shared) * (a + b) / (a + b - min(a, b)) ** 3),
            (alone, expected_uniqueness((b, 60), eligible), 0.0),
        ):
            error = 5 * (_variance(values) / trials) ** 0.5
            assert abs(sum(values) / trials - expected) < error + bias
            assert error + bias < 0.1 * expected  # so that a wrong formula cannot hide


def _variance(values: Sequence[float]) -> float:
    mean = sum(values) / len(values)
    return sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def test_expected_jaccard_in_shares() -> None:
    p, q = 30 / 200, 50 / 200
    assert expected_jaccard(30, 50, 200) == pytest.approx(p * q / (p + q - p * q))
    assert expected_jaccard(0, 0, 200) == expected_jaccard(0, 0, 0) == expected_overlap(0, 0, 0) == 0.0
    assert expected_jaccard(200, 200, 200) == 1.0
    assert expected_uniqueness((), 0) == 1.0


def test_logs_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(ValueError, match="a set of 50 coordinates among 42"):
        measure_step(step_log(question(first(50)), protected=60))
    with pytest.raises(ValueError, match="103 of 102 coordinates protected"):
        measure_step(step_log(protected=103))
    with pytest.raises(ValueError, match="does not fit its 2 units"):
        measured(question(first(3), first(3), gradient_cosine=[[1.0]]))


def test_cosines_belong_to_their_pairs_and_nan_is_left_out() -> None:
    cosine = [[1.0, 0.5, -0.25], [0.5, 1.0, float("nan")], [-0.25, float("nan"), 1.0]]
    found = measured(question(first(3), first(3, 3), first(3, 6), gradient_cosine=cosine))
    assert [pair.cosine for pair in found.questions[0].pairs] == [0.5, -0.25, None]
    summary = summarise_run([found]).pairs.cosine
    assert summary is not None
    assert (summary.mean, summary.min, summary.max) == (0.125, -0.25, 0.5)
    assert (summary.num_pairs, summary.conflict_frac) == (2, 0.5)


def test_conflict_is_a_negative_cosine() -> None:
    # two negative, none positive, and 0 is no conflict: a flipped or a loose comparison gives another share
    cosine = [[1.0, -0.5, -0.25], [-0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]]
    found = measured(question(first(3), first(3, 3), first(3, 6), gradient_cosine=cosine))
    summary = summarise_run([found]).pairs.cosine
    assert summary is not None
    assert (summary.num_pairs, summary.conflict_frac) == (3, pytest.approx(2 / 3))


def test_means_are_over_cases_not_over_means() -> None:
    # two questions in one step, one in another: pair (0, 1) has three cases, (0, 2) and (1, 2) one
    same, apart = question(first(4), first(4)), question(first(4), first(4, 4))
    three = question(first(8), first(4), first(4, 50))
    steps = [measure_step(step_log(same, apart, step=20)), measure_step(step_log(three, step=10))]
    run = summarise_run(steps)
    assert [(pair.i, pair.j, pair.num_pairs) for pair in run.by_pair] == [(0, 1, 3), (0, 2, 1), (1, 2, 1)]
    assert run.by_pair[0].jaccard == pytest.approx((1 + 0 + 4 / 8) / 3)
    assert run.by_pair[0].share_of_i == pytest.approx((1 + 0 + 4 / 8) / 3)
    assert run.by_pair[0].share_of_j == pytest.approx((1 + 0 + 1) / 3)
    assert run.pairs.jaccard == pytest.approx((1 + 0 + 4 / 8 + 0 + 0) / 5)
    assert [unit.num_units for unit in run.by_position] == [3, 3, 1]
    assert run.by_position[0].uniqueness == pytest.approx((0 + 1 + 4 / 8) / 3)
    assert [point.step for point in run.over_training] == [10, 20]  # in order of training
    assert run.over_training[1].pairs.jaccard == pytest.approx(0.5)
    assert run.touched_frac == pytest.approx((8 + 12) / 2 / 100)


def test_an_empty_set_leaves_means_that_divide_by_its_size() -> None:
    run = summarise_run([measured(question(first(4), frozenset()))])
    assert run.pairs.share_of_i == 0.0 and run.pairs.share_of_j is None
    assert [unit.uniqueness for unit in run.by_position] == [1.0, None]


@pytest.mark.parametrize(
    ("allocation", "reuse", "expected"),
    [("disjoint", 0.0, True), ("shuffled", None, True), ("disjoint", 4.0, False), ("overlap", 0.0, False),
     ("pooled", None, False), (None, None, None)],
)  # fmt: skip
def test_which_runs_are_disjoint_by_construction(
    allocation: str | None, reuse: float | None, expected: bool | None
) -> None:
    assert disjoint_by_construction(allocation, reuse) is expected


def sentence(chosen: list[Coordinates], disjoint: bool | None) -> str:
    return overlap_headlines(summarise_run([measured(question(*chosen))]), disjoint)[0]


def test_disjoint_sets_are_described_as_what_they_are() -> None:
    apart = [first(10), first(20, 10)]
    by_rule, by_luck, unknown = (sentence(apart, disjoint) for disjoint in (True, False, None))
    for line in (by_rule, by_luck, unknown):
        assert line.startswith("No two steps of a question share a coordinate (1 pair).")
        # 10 * 20 / 100 shared by chance, of 28 in either
        assert "a Jaccard index of 0.0714, 2.00 shared" in line
    assert "disjoint by construction" in by_rule
    assert "by construction" not in by_luck and "did not forbid" in by_luck
    assert "does not say" in unknown


def test_overlapping_sets_are_not_described_as_disjoint() -> None:
    overlapping = [first(10), first(20, 5)]
    line = sentence(overlapping, False)
    assert "construction" not in line and "share a coordinate" not in line
    # 5 of 25 in either
    assert "mean Jaccard index of 0.200, 2.80 times chance (0.0714), over 1 pair." in line
    contradiction = sentence(overlapping, True)
    assert "by construction" not in contradiction and "do not fit" in contradiction


def test_runs_without_pairs() -> None:
    nothing = summarise_run([])
    assert nothing.num_questions == 0 and nothing.all_disjoint is None and nothing.touched_frac is None
    empty = summarise_run([measured()])
    assert empty.touched_frac == 0.0 and empty.pairs.jaccard is None
    single = summarise_run([measured(question(first(5)), question())])
    assert single.num_questions == single.num_single == 2 and single.all_disjoint is None
    assert single.by_pair == [] and single.by_position[0].uniqueness == 1.0
    for summary in (nothing, empty, single):
        lines = overlap_headlines(summary, True)
        assert "no pairs to compare" in lines[0]
        assert not any("other step of its question" in line for line in lines)
        assert StepOverlapMeasure({"allocation": "disjoint"}).present(([], summary)).headlines == lines
