"""Overlap of runs against plain python sets, and the identities that the papers give for chance."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_memory import taken

from ssrctl.core.mask import TileSet
from ssrctl.measures.maths.magnitude import count_by_magnitude
from ssrctl.measures.maths.row_column_counts import agreement, profile
from ssrctl.measures.maths.run_sets import RunOverlap, at_least, bernoulli_jaccard, run_overlap
from ssrctl.measures.overlap import (
    OverlapMeasure,
    OverlapResult,
    consensus,
    consensus_example,
    headlines,
    overlap_result,
    overlap_row,
    overlap_section,
    pair_matrices,
)
from ssrctl.measures.published import references
from ssrctl.report.document import Document
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page

SHAPE = (5, 19)
NUMEL = 95

coordinate_sets = st.lists(st.frozensets(st.integers(0, NUMEL - 1), max_size=60), min_size=1, max_size=5)
shares = st.lists(st.floats(0, 1), max_size=6)


def tiles(chosen: frozenset[int] | set[int] | range, shape: tuple[int, ...] = SHAPE) -> TileSet:
    return TileSet.from_indices(shape, torch.tensor(sorted(chosen), dtype=torch.int64))


def runs_of(*chosen: frozenset[int] | set[int] | range, shape: tuple[int, ...] = SHAPE) -> RunOverlap:
    return run_overlap([tiles(one, shape) for one in chosen])


# --------------------------------------------------------------------------------------------------
# counting


@given(coordinate_sets)
def test_counts_are_those_of_python_sets(chosen: list[frozenset[int]]) -> None:
    found = runs_of(*chosen)
    assert [list(row) for row in found.shared] == [[len(a & b) for b in chosen] for a in chosen]
    hits = [sum(place in one for one in chosen) for place in range(NUMEL)]
    assert list(found.depth) == [hits.count(runs) for runs in range(len(chosen) + 1)]
    assert found.sizes == [len(one) for one in chosen]
    assert sum(found.depth) == found.numel == NUMEL


def test_large_tensors_are_counted_strip_by_strip() -> None:
    # 2,200 x 4,100 has 35,466 tiles, more than one strip, with ragged edges on both sides
    generator = torch.Generator().manual_seed(0)
    dense = [torch.rand(2200, 4100, generator=generator) < share for share in (0.3, 0.001, 0.6)]
    dense[1][:2000] = False  # tiles that one run alone has not
    found = run_overlap([TileSet.from_dense(one) for one in dense])
    stack = torch.stack(dense).numpy()
    assert [list(row) for row in found.shared] == [[int((a & b).sum()) for b in stack] for a in stack]
    assert list(found.depth) == np.bincount(stack.sum(axis=0).ravel(), minlength=4).tolist()
    assert found.row_agreement is None


def test_profiles_are_compared_between_runs() -> None:
    dense = [torch.rand(24, 30, generator=torch.Generator().manual_seed(seed)) < 0.4 for seed in range(3)]
    lines = [profile(one) for one in dense]
    found = run_overlap([TileSet.from_dense(one) for one in dense], lines)
    wanted = agreement([line for line in lines if line is not None])
    assert (found.row_agreement, found.column_agreement) == wanted
    assert found.row_agreement is not None and abs(found.row_agreement) < 1
    assert run_overlap([tiles(range(3), (7,))] * 2, [None, None]).row_agreement is None


def counted_at(base: torch.Tensor, dense: list[torch.Tensor]) -> RunOverlap:
    return run_overlap([TileSet.from_dense(one) for one in dense], by_magnitude=count_by_magnitude(base, *dense))


def test_noise_seems_to_agree_until_magnitudes_are_matched() -> None:
    """Two updates of noise that bf16 hides where weights are large: independent but for the step sizes."""
    generator = torch.Generator().manual_seed(13)
    base = torch.randn(200, 150, generator=generator).bfloat16()
    moved = [(base.float() + 1e-3 * torch.randn(200, 150, generator=generator)).bfloat16() != base for _ in range(2)]
    one = counted_at(base, moved)
    found = pair_matrices([one])
    measured, chance, matched = (
        getattr(found, key)[0][1] for key in ("jaccard", "expected_jaccard", "expected_jaccard_same_size")
    )
    assert measured > 1.5 * chance
    # 2,000 shared weights: a standard error of about 2%
    assert measured == pytest.approx(matched, rel=0.08)
    size = count_by_magnitude(base, *moved).double()
    shared = float((size[1] * size[2] / size[0]).sum())
    assert found.expected_one_sided_same_size[0][1] == pytest.approx(shared / float(size[1].sum()))
    assert overlap_row([one]).expected_jaccard_same_size == pytest.approx(matched)


def test_without_magnitudes_there_is_no_such_chance() -> None:
    base = torch.ones(SHAPE)
    whole = counted_at(base, [tiles(range(9)).to_dense(), tiles(range(5, 20)).to_dense()])
    found = pair_matrices([whole])
    assert found.expected_jaccard_same_size == found.expected_jaccard  # all weights are of one magnitude
    assert pair_matrices([whole, runs_of(range(3), range(3))]).expected_jaccard_same_size[0][1] is None
    names = ["a", "b"]
    assert any("same magnitudes" in line for line in headlines(overlap_result({"w": whole}, names, "any")))


def test_sets_must_be_of_one_tensor() -> None:
    with pytest.raises(ValueError, match="shapes"):
        run_overlap([tiles(range(3)), tiles(range(3), (19, 5))])
    with pytest.raises(ValueError, match="one tensor"):
        run_overlap([])


# --------------------------------------------------------------------------------------------------
# measured


@pytest.mark.parametrize(("shared", "one", "two"), [(0, 10, 20), (5, 10, 20), (10, 10, 20), (10, 10, 10)])
def test_a_planted_overlap_is_found(shared: int, one: int, two: int) -> None:
    found = pair_matrices([runs_of(range(one), range(one - shared, one - shared + two))])
    assert found.one_sided == [[1.0, shared / one], [shared / two, 1.0]]
    assert found.jaccard[0][1] == shared / (one + two - shared)


@given(coordinate_sets)
def test_overlaps_keep_their_identities(chosen: list[frozenset[int]]) -> None:
    counted = runs_of(*chosen)
    found = pair_matrices([counted])
    for i, j in itertools.product(range(len(chosen)), repeat=2):
        o1, o2 = found.one_sided[i][j], found.one_sided[j][i]
        assert (o1 is None) == (not chosen[i])
        if o1 is not None and o2 is not None:
            assert o1 * len(chosen[i]) == pytest.approx(o2 * len(chosen[j]), abs=1e-9)
        for matrix in (found.jaccard, found.expected_jaccard):
            assert matrix[i][j] == matrix[j][i]
            assert (matrix[i][j] is None) == (not chosen[i] and not chosen[j])
        for matrix in vars(found).values():
            assert matrix[i][j] is None or 0 <= matrix[i][j] <= 1 + 1e-12
        if chosen[i] and chosen[i] == chosen[j]:
            assert o1 == found.jaccard[i][j] == 1.0
        if chosen[i] and chosen[j] and not chosen[i] & chosen[j]:
            assert o1 == found.jaccard[i][j] == 0.0


def test_empty_sets_have_no_overlap() -> None:
    found = pair_matrices([runs_of(set(), set(), range(4))])
    assert found.jaccard[0][1] is None and found.expected_jaccard[0][1] is None
    assert found.jaccard[0][2] == 0.0 and found.expected_jaccard[0][2] == 0.0
    assert found.one_sided[0] == [None, None, None]
    assert found.one_sided[2] == found.expected_one_sided[2] == [0.0, 0.0, 1.0]
    assert bernoulli_jaccard(0, 0) is None
    nothing = runs_of(set(), set(), shape=(0, 4))
    assert consensus([nothing])[0].frac is None and nothing.densities == [0.0, 0.0]


# --------------------------------------------------------------------------------------------------
# by chance


def test_the_expected_index_of_one_tensor_is_the_bernoulli_baseline() -> None:
    """Zhu et al. 2025, section 2.2: pq / (p + q - pq)."""
    p, q = Fraction(19, 95), Fraction(38, 95)
    found = pair_matrices([runs_of(range(19), range(57, 95))])
    exact = float(p * q / (p + q - p * q))
    assert found.expected_jaccard[0][1] == pytest.approx(exact, abs=1e-15)
    assert bernoulli_jaccard(float(p), float(q)) == pytest.approx(exact, abs=1e-15)
    assert bernoulli_jaccard(0.6, 0.6) == pytest.approx(3 / 7)


def test_the_normalised_random_overlap_is_the_other_sets_density() -> None:
    """Mukherjee et al. 2025, appendix E."""
    found = pair_matrices([runs_of(range(19), range(57, 95))])
    assert found.expected_one_sided[0][1] == pytest.approx(38 / 95, abs=1e-15)
    assert found.expected_one_sided[1][0] == pytest.approx(19 / 95, abs=1e-15)


def test_the_expected_jaccard_is_that_of_drawn_sets() -> None:
    generator = torch.Generator().manual_seed(5)
    size, drawn = (40, 50), []
    for _ in range(150):
        dense = [torch.zeros(size, dtype=torch.bool) for _ in range(2)]
        for one, count in zip(dense, (500, 1000), strict=True):
            one.view(-1)[torch.randperm(2000, generator=generator)[:count]] = True
        drawn.append(run_overlap([TileSet.from_dense(one) for one in dense]))
    measured = [pair_matrices([one]).jaccard[0][1] for one in drawn]
    # ratio of expectations against expectation of ratios: they differ by less than 1/N
    tolerance = 4 * np.std(measured) / math.sqrt(len(measured)) + 1 / 2000
    assert pair_matrices(drawn[:1]).expected_jaccard[0][1] == pytest.approx(np.mean(measured), abs=tolerance)


def test_expectations_are_added_tensor_by_tensor() -> None:
    """Two runs that change the same one of two tensors, at random: no more than chance, though far above the model's."""
    dense, untouched = runs_of(range(0, 60), range(30, 90)), runs_of(set(), set())
    found = pair_matrices([dense, untouched])
    assert found.expected_one_sided[0][1] == pytest.approx(60 / 95)
    whole = overlap_result({"a": dense, "b": untouched}, ["x", "y"], "any").whole_model
    assert whole.expected_one_sided[0][1] == pytest.approx(60 / 190)
    assert whole.expected_jaccard[0][1] == pytest.approx(bernoulli_jaccard(60 / 190, 60 / 190))
    mixed = pair_matrices([runs_of(range(10), range(20)), runs_of(range(50), range(5))])
    assert mixed.expected_one_sided[0][1] == pytest.approx((10 * 20 + 50 * 5) / 95 / 60)
    assert mixed.expected_jaccard[0][1] == pytest.approx((450 / 95) / (60 + 25 - 450 / 95))


@given(shares)
def test_poisson_binomial_is_the_sum_over_all_outcomes(densities: list[float]) -> None:
    found = at_least(densities)
    for runs in range(len(densities) + 1):
        exact = math.fsum(
            math.prod(p if hit else 1 - p for p, hit in zip(densities, outcome, strict=True))
            for outcome in itertools.product((0, 1), repeat=len(densities))
            if sum(outcome) >= runs
        )
        assert found[runs] == pytest.approx(exact, abs=1e-12)


def test_consensus_counts_weights_and_knows_chance() -> None:
    rows = consensus([runs_of(range(0, 40), range(20, 60), range(30, 50)), runs_of(set(), range(5), range(5))])
    assert [row.runs for row in rows] == [1, 2, 3]
    assert [row.count for row in rows] == [60 + 5, 30 + 5, 10]
    assert rows[1].frac == 35 / 190 and rows[1].frac_of_ever == 35 / 65
    p, q, r = 40 / 95, 40 / 95, 20 / 95
    assert rows[2].expected_frac == pytest.approx(95 * p * q * r / 190)
    ever = 95 * (1 - (1 - p) * (1 - q) * (1 - r)) + 95 * (1 - (1 - 5 / 95) ** 2)
    assert rows[2].expected_frac_of_ever == pytest.approx(95 * p * q * r / ever)


def test_a_consensus_example_is_the_mean_of_the_runs() -> None:
    dense = [tiles(one).to_dense() for one in (range(40), range(20, 60), range(30, 50))]
    one = consensus_example("w", dense)
    assert np.array(one.consensus.shares) == pytest.approx(torch.stack(dense).double().mean(dim=0).numpy())
    numbers = overlap_result({"w": runs_of(range(4), range(2))}, ["a", "b"], "any", [one])
    assert overlap_section(numbers).figures[-1].title == "Consensus of runs on w"


def test_means_are_over_the_pairs_that_have_an_index() -> None:
    row = overlap_row([runs_of(set(), set(), range(10), range(5, 15))])
    # pairs (0, 1) has none; (2, 3) has 1/3; the other four 0
    assert row.jaccard == pytest.approx((1 / 3) / 5)
    assert row.num_changed == [0, 0, 10, 10]
    # one-sided of the two that are not empty, to the three others each
    assert row.one_sided == pytest.approx((0.5 + 0.5) / 6)


# --------------------------------------------------------------------------------------------------
# the report

NAMES = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]


def result_of(*runs: range, names: list[str] | None = None) -> OverlapResult:
    found = {name: runs_of(*runs) for name in (NAMES if names is None else names)}
    return overlap_result(found, [f"<i>run {place}" for place in range(len(runs))], "any change")


def test_numbers_are_grouped_and_json_ready() -> None:
    numbers = result_of(range(40), range(20, 60), range(30, 50)).numbers()
    assert numbers == json_safe(numbers)
    assert [row["layer"] for row in numbers["layers"]] == [0, 1, None]
    assert [row["kind"] for row in numbers["kinds"]] == ["up", "norm"]
    assert numbers["total"]["numel"] == 3 * NUMEL
    assert numbers["kinds"][0]["jaccard"] == pytest.approx(numbers["total"]["jaccard"])
    with pytest.raises(ValueError, match="1 names of runs, but 2 sets"):
        overlap_result({"w": runs_of(range(2), range(3))}, ["one"], "any")


@pytest.mark.parametrize(
    "runs", [(range(40), range(20, 60)), (range(40), range(20, 60), range(30, 50)), (range(0),) * 2]
)
def test_the_section_is_drawn(runs: tuple[range, ...]) -> None:
    numbers = result_of(*runs)
    section = overlap_section(numbers, references("run_jaccard"))
    page = html_page(
        Document(title="t", facts=[], headlines=headlines(numbers), notes=[], sections=[section]), version="0"
    )
    assert "expected by chance" in page and "<i>" not in page
    pairs, steps = section.tables[:2]
    assert len(pairs.rows) == len(runs) * (len(runs) - 1) // 2
    assert [row[0] for row in steps.rows] == list(range(1, len(runs) + 1))
    assert steps.formatted()[1][0] == "2 or more"
    assert all(isinstance(cell, float | int | None) for row in pairs.rows for cell in row[2:])


def test_headlines_stand_beside_chance() -> None:
    two = headlines(result_of(range(40), range(20, 60)))
    assert "Jaccard index of 0.333, 1.25 times chance" in two[0] and "50.00%" in two[1] and len(two) == 2
    three = headlines(result_of(range(40), range(20, 60), range(30, 50)))
    assert "All 3 runs changed 16.67%" in three[2]
    assert headlines(result_of(range(0), range(0)))[0].startswith("No run changed")
    nothing = result_of(range(3), range(3), names=[])
    assert headlines(nothing)[0].startswith("No run changed") and overlap_section(nothing).figures == []


def test_checkpoints_are_compared_through_the_protocol() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
    base = {name: torch.ones(SHAPE) for name in names}
    tuned = [{name: 1 + tiles(one).to_dense().float() for name in names} for one in (range(40), range(20, 60))]
    (found,) = taken([OverlapMeasure], base, *tuned, mode="several", changed_by="bf16")
    assert found.result.runs == ["1", "2"]
    assert found.result.rows.tensors[names[0]].num_changed == [40, 40]
    total = found.result.rows.total
    assert total.jaccard == pytest.approx(1 / 3)
    assert found.findings.published == {"run_overlap": total.one_sided, "run_jaccard": total.jaccard}
    (example,) = found.result.examples
    assert example.name == names[1]  # of the middle layer
    numbers = found.findings.numbers["overlap"]
    assert numbers["examples"][0]["consensus"]["shares"] == example.consensus.shares
    assert numbers["matrices"]["jaccard"] == found.result.matrices.jaccard
