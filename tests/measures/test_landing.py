"""Overlap with principal and small weights: planted sets, exact chance, and drawn masks as the slow reference."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_memory import taken

from ssrctl.measures.base import Taken
from ssrctl.measures.landing import (
    SETS,
    LandingMeasure,
    LandingResult,
    Picture,
    headlines,
    landing_row,
    landing_section,
    measure_landing,
    reference_sets,
    skip_reason,
)
from ssrctl.measures.maths.grouping import group
from ssrctl.measures.maths.landings import Landing, Landings, chance_interval, land, summary
from ssrctl.measures.maths.magnitude import count_by_magnitude, magnitude_classes
from ssrctl.measures.maths.row_column_counts import coarse_map, concentration, mean_concentration, profile
from ssrctl.measures.maths.update_matrix import Unmeasured
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page

SETTINGS = {"rank_share": 0.25, "density": 0.5}


def landing(numel: int, num_set: int, num_changed: int, num_both: int = 0) -> Landing:
    return Landing(numel=numel, num_set=num_set, num_changed=num_changed, num_both=num_both)


def masks_of(shape: tuple[int, ...], *counts: int, seed: int = 0) -> list[torch.Tensor]:
    """A random mask for each count."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        chosen = torch.zeros(shape, dtype=torch.bool)
        chosen.view(-1)[torch.randperm(chosen.numel(), generator=generator)[:count]] = True
        found.append(chosen)
    return found


def result_of(
    found: dict[str, dict[str, Landings]],
    unmeasured: dict[str, str] | None = None,
    examples: list[Picture] | None = None,
) -> LandingResult:
    line = profile(masks_of((6, 8), 9)[0])
    assert line is not None
    return LandingResult(
        **SETTINGS,
        rule="any",
        rows=group(found, landing_row),
        concentration=group(dict.fromkeys(found, concentration(line)), mean_concentration),
        unmeasured=unmeasured or {},
        examples=examples or [],
    )


def landed(weight: torch.Tensor, changed: torch.Tensor, *, rank_share: float, density: float) -> dict[str, Landings]:
    sets = reference_sets(weight, rank_share=rank_share, density=density)
    assert not isinstance(sets, Unmeasured)
    return measure_landing(weight, changed, sets)


def measured(name: str, base: torch.Tensor, changed: torch.Tensor, **settings: float) -> Taken[LandingResult]:
    """Take the measure of one tensor, of which the changed weights moved by a bit or more."""
    tuned = torch.where(changed, base + base.abs() + 1, base)
    (found,) = taken([LandingMeasure], {name: base}, {name: tuned}, **settings)
    return found


# --------------------------------------------------------------------------------------------------
# one matrix


@pytest.mark.parametrize("planted", [0, 3, 7, 10])
def test_a_planted_overlap_is_found(planted: int) -> None:
    chosen = torch.zeros(8, 10, dtype=torch.bool)
    chosen[:2] = True  # a quarter
    changed = torch.zeros_like(chosen)
    changed[0, :planted] = True
    changed[5, : 10 - planted] = True
    one = land(changed, chosen)
    assert one == landing(80, 20, 10, planted)
    assert one.overlap == planted / 10 and one.density == one.expected_both / 10 == 0.25
    assert summary([one]).ratio == pytest.approx(planted / 2.5)


@given(st.integers(0, 2**24 - 1), st.integers(0, 2**24 - 1))
def test_counts_are_those_of_python_sets(a: int, b: int) -> None:
    bits = [{place for place in range(24) if number >> place & 1} for number in (a, b)]
    masks = [torch.tensor([place in one for place in range(24)]).view(4, 6) for one in bits]
    one = land(*masks)
    assert (one.num_changed, one.num_set, one.num_both) == (len(bits[0]), len(bits[1]), len(bits[0] & bits[1]))
    assert one.least_both <= one.num_both <= one.most_both
    low, high = chance_interval([one])
    assert one.least_both <= low <= one.expected_both <= high <= one.most_both or low == high


def test_nothing_changed_has_no_overlap_and_no_ratio() -> None:
    row = summary([landing(40, 10, 0)])
    assert (row.num_changed, row.overlap, row.expected_overlap, row.ratio) == (0, None, None, None)
    assert (row.expected_low, row.expected_high, row.density) == (None, None, 0.25)
    assert summary([]).density is None and chance_interval([]) == (0, 0)
    assert landing(0, 0, 0).density == 0.0


def test_everything_changed_overlaps_by_the_density_exactly() -> None:
    row = summary([landing(40, 10, 40, 10)])
    assert row.overlap == row.expected_overlap == row.expected_low == row.expected_high == 0.25


def test_shapes_must_agree() -> None:
    with pytest.raises(ValueError, match="shapes"):
        land(torch.zeros(4, 6, dtype=torch.bool), torch.zeros(6, 4, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------
# chance


def test_mean_and_variance_are_those_of_all_possible_sets() -> None:
    # every one of the C(9, 4) sets of 4 of 9 coordinates
    one = landing(9, 5, 4)
    counts = [sum(place < 5 for place in chosen) for chosen in itertools.combinations(range(9), 4)]
    assert one.expected_both == pytest.approx(np.mean(counts), abs=1e-12)
    assert one.variance_both == pytest.approx(np.var(counts), abs=1e-12)
    assert (one.least_both, one.most_both) == (min(counts), max(counts))


def test_the_normalised_overlap_of_random_sets_is_the_other_sets_density() -> None:
    """Mukherjee et al. 2025, appendix E; Zhu et al. 2025, section 4.2."""
    (chosen,) = masks_of((40, 50), 600)
    overlaps = [land(drawn, chosen).overlap for drawn in masks_of((40, 50), *[300] * 400, seed=1)]
    # the mean of 400 draws, each with a standard deviation of 0.025
    assert np.mean(overlaps) == pytest.approx(0.3, abs=4 * 0.025 / 20)
    assert summary([land(masks_of((40, 50), 300)[0], chosen)]).expected_overlap == pytest.approx(0.3, abs=1e-15)


@pytest.mark.parametrize(("numel", "num_set", "num_changed"), [(2000, 1000, 400), (200, 20, 30), (50, 45, 40)])
def test_the_exact_interval_holds_95_percent_of_drawn_masks(numel: int, num_set: int, num_changed: int) -> None:
    (chosen,) = masks_of((numel,), num_set)
    low, high = chance_interval([landing(numel, num_set, num_changed)])
    drawn = [land(one, chosen).num_both for one in masks_of((numel,), *[num_changed] * 1500, seed=2)]
    # equal tails of at most 2.5% each; 4 standard errors of 1500 draws are 1.6 and 2.3 percentage points
    assert np.mean([one < low for one in drawn]) <= 0.025 + 0.016
    assert np.mean([one > high for one in drawn]) <= 0.025 + 0.016
    assert np.mean([low <= one <= high for one in drawn]) >= 0.95 - 0.023
    # and it is no wider than it must be: one count less on either side would leave out more than the tail
    assert np.mean([one <= low for one in drawn]) >= 0.025 - 0.016
    assert np.mean([one >= high for one in drawn]) >= 0.025 - 0.016


def test_the_interval_of_several_matrices_holds_95_percent_of_drawn_masks() -> None:
    sizes = [(3000, 1500, 200), (500, 50, 80), (80, 20, 8), (10, 10, 4), (10, 5, 0)]
    low, high = chance_interval([landing(*one) for one in sizes])
    generator = np.random.default_rng(3)
    drawn = sum(generator.hypergeometric(p, n - p, m, size=4000) for n, p, m in sizes)
    inside = np.mean((drawn >= low) & (drawn <= high))
    assert 0.95 - 0.014 <= inside <= 0.975  # outward rounding to whole counts adds up to two of them


def test_the_normal_interval_of_several_meets_the_exact_one_of_a_large_matrix() -> None:
    whole = landing(4_000_000, 2_000_000, 400_000)
    exact, summed = chance_interval([whole]), chance_interval([landing(1_000_000, 500_000, 100_000)] * 4)
    assert summed == pytest.approx(exact, abs=2)


@given(st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60), st.integers(0, 60)), max_size=5))
def test_an_interval_lies_within_what_is_possible(sizes: list[tuple[int, int, int]]) -> None:
    landings = [landing(n, min(p, n), min(m, n)) for n, p, m in sizes]
    low, high = chance_interval(landings)
    assert sum(one.least_both for one in landings) <= low <= high <= sum(one.most_both for one in landings)


def test_totals_weigh_matrices_by_their_changes() -> None:
    row = summary([landing(100, 50, 10, 9), landing(100, 10, 30, 3)])
    assert row.overlap == 12 / 40
    assert row.expected_overlap == pytest.approx((10 * 0.5 + 30 * 0.1) / 40)
    assert row.ratio == pytest.approx(12 / 8)
    assert row.density == 60 / 200  # of the sets, weighted by size


# --------------------------------------------------------------------------------------------------
# principal and small weights


def planted_matrix() -> torch.Tensor:
    """Noise of 0.01 with a strong rank-one block in rows 0-7, columns 0-11 of a [32, 24] matrix."""
    generator = torch.Generator().manual_seed(4)
    weight = 0.01 * torch.randn(32, 24, generator=generator)
    weight[:8, :12] += 5.0
    return weight


def test_the_sets_are_those_of_the_definition() -> None:
    weight = planted_matrix()
    sets = reference_sets(weight, rank_share=1 / 24, density=1 / 8)
    assert not isinstance(sets, Unmeasured) and list(sets) == list(SETS)[:3]
    block = torch.zeros(32, 24, dtype=torch.bool)
    block[:8, :12] = True  # 96 of 768: an eighth
    assert torch.equal(sets["principal"], block)
    order = np.argsort(np.abs(weight.numpy()).ravel(), kind="stable")[:96]
    assert set(sets["low_magnitude"].flatten().nonzero().flatten().tolist()) == set(order.tolist())
    assert torch.equal(sets["principal_not_low"], sets["principal"] & ~sets["low_magnitude"])


def test_principal_and_small_at_once_are_left_out_of_the_third_set() -> None:
    weight = planted_matrix()
    weight[0, 0] = 0.0  # still large in the reconstruction
    sets = reference_sets(weight, rank_share=1 / 24, density=1 / 8)
    assert not isinstance(sets, Unmeasured)
    assert sets["principal"][0, 0] and sets["low_magnitude"][0, 0] and not sets["principal_not_low"][0, 0]
    assert int(sets["principal_not_low"].sum()) == 95


def test_changes_off_the_principal_weights_are_seen_to_avoid_them() -> None:
    weight = planted_matrix()
    changed = torch.zeros(32, 24, dtype=torch.bool)
    changed[:8, :3] = True  # 24 of 96 on principal weights
    changed[20:29, 12:20] = True  # 72 elsewhere
    found = landed(weight, changed, rank_share=1 / 24, density=1 / 8)
    assert found["principal"] == (landing(768, 96, 96, 24),)
    row = summary(found["principal"])
    assert row.overlap == 0.25 and row.expected_overlap == 1 / 8 and row.ratio == 2.0


def rounded_noise(avoid: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """A bf16 matrix of rank 8 and noise, and which of its weights an even update moves; not those in ``avoid``."""
    generator = torch.Generator().manual_seed(11)
    weight = torch.randn(96, 8, generator=generator) @ torch.randn(8, 128, generator=generator)
    weight = (weight + torch.randn(96, 128, generator=generator)).bfloat16()
    update = torch.randn(96, 128, generator=generator) * 2e-3
    if avoid is not None:
        update[avoid] = 0.0
    return weight, (weight.float() + update).bfloat16() != weight


def test_noise_seems_to_avoid_principal_weights_until_magnitudes_are_matched() -> None:
    """Zhu et al. 2025, gate III: rounding hides small updates of large weights, whatever made them."""
    weight, changed = rounded_noise()
    found = landed(weight, changed, rank_share=8 / 96, density=0.5)
    plain, matched = summary(found["principal"]), summary(found["principal_same_size"])
    assert plain.num_changed == matched.num_changed and plain.overlap == matched.overlap
    assert plain.ratio < 0.6 and plain.overlap < plain.expected_low
    assert matched.expected_low <= matched.overlap <= matched.expected_high


def test_real_avoidance_is_still_seen_at_equal_magnitude() -> None:
    weight, _ = rounded_noise()
    sets = reference_sets(weight, rank_share=8 / 96, density=0.5)
    assert not isinstance(sets, Unmeasured)
    half = sets["principal"] & masks_of((96, 128), 6144, seed=12)[0]
    _, changed = rounded_noise(avoid=half)
    found = landed(weight, changed, rank_share=8 / 96, density=0.5)
    matched = summary(found["principal_same_size"])
    assert matched.overlap < matched.expected_low and 0.4 < matched.ratio < 0.8


def test_counts_by_magnitude_are_those_of_the_definition() -> None:
    weights = torch.tensor([0.0, -0.0, 1.0, -1.5, 1.99, 2.0, 0.5, 3e-40, 1e-45, float("nan"), -float("inf"), 1e300])
    first = torch.arange(12) % 3 == 0
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        here = weights.to(dtype)
        classes = magnitude_classes(here)
        for i, j in itertools.combinations(range(9), 2):
            logs = [math.floor(math.log2(abs(x))) if x else None for x in (float(here[i]), float(here[j]))]
            assert (classes[i] == classes[j]) == (logs[0] == logs[1]), (dtype, i, j)
        assert classes[9] == classes[10] == classes.max()
        counts = count_by_magnitude(here, first, ~first)
        assert counts[0].sum() == 12 and counts[1].sum() == 4 and bool((counts[0] > 0).all())
        assert torch.equal(counts[0], counts[1] + counts[2])
    assert count_by_magnitude(torch.zeros(0, 3)).shape == (1, 0)
    with pytest.raises(ValueError, match="shapes differ"):
        count_by_magnitude(weights, first[:3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_floating_dtype_is_measured(dtype: torch.dtype) -> None:
    found = landed(planted_matrix().to(dtype), torch.ones(32, 24, dtype=torch.bool), rank_share=1 / 24, density=1 / 8)
    assert found["principal"] == (landing(768, 96, 768, 96),)


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_have_no_sets(broken: float) -> None:
    weight = planted_matrix()
    weight[3, 4] = broken
    found = measured("model.layers.0.self_attn.q_proj.weight", weight, weight == weight[0, 0])
    (reason,) = found.result.unmeasured.values()
    assert "NaN or infinite" in reason and found.result.examples == []
    assert found.findings.sections[0].figures == found.findings.headlines == []


def test_skipped_tensors_are_named_with_a_reason() -> None:
    bf16 = torch.bfloat16
    assert skip_reason("model.layers.0.self_attn.q_proj.weight", (32, 24), bf16) is None
    assert "embedding" in str(skip_reason("model.embed_tokens.weight", (32, 24), bf16))
    assert "head" in str(skip_reason("lm_head.weight", (32, 24), bf16))
    assert "vector" in str(skip_reason("model.layers.0.input_layernorm.weight", (24,), bf16))
    assert "side of 1" in str(skip_reason("w", (1, 24), bf16))
    assert "int8" in str(skip_reason("w", (32, 24), torch.int8))


def test_experts_are_matrices_of_their_own_and_evenly_spread() -> None:
    stack = torch.stack([planted_matrix()] * 15)
    changed = torch.zeros(15, 32, 24, dtype=torch.bool)
    changed[14, 0, 0] = True
    name = "model.layers.3.mlp.experts.down_proj"
    settings = {"principal_rank": 1 / 24, "mask_density": 1 / 8}
    found = measured(name, stack, changed, **settings).result
    assert list(found.rows.tensors) == [f"{name}.{place}" for place in (0, 2, 4, 6, 8, 10, 12, 14)]
    last = found.rows.tensors[f"{name}.14"]
    assert last.principal == summary([landing(768, 96, 1, 1)])
    assert found.concentration.tensors == {} and found.examples == []  # of matrices only
    one = measured("model.layers.3.mlp.down_proj.weight", stack[0], changed[14], **settings).result
    assert list(one.rows.tensors.values()) == [last]
    assert one.concentration.total.row_gini is not None
    assert skip_reason(name, stack.shape, stack.dtype) is None


def test_tensors_that_did_not_change_or_have_no_principal_weights_are_told_apart() -> None:
    same = measured("w", planted_matrix(), torch.zeros(32, 24, dtype=torch.bool))
    assert same.result.unmeasured == {"w": "nothing in it changed"}
    assert same.findings.numbers["landing"]["unmeasured"] == [{"name": "w", "reason": "nothing in it changed"}]
    vector = measured("w", torch.ones(5), torch.ones(5, dtype=torch.bool))
    assert vector.findings.numbers == {} and vector.findings.sections == []


def test_an_example_shows_where_changes_and_principal_weights_lie() -> None:
    weight = planted_matrix()
    changed = torch.zeros(32, 24, dtype=torch.bool)
    changed[20:] = True
    name = "model.layers.0.self_attn.q_proj.weight"
    found = measured(name, weight, changed, principal_rank=1 / 24, mask_density=1 / 8)
    (one,) = found.result.examples
    assert one.name == name and one.changed == coarse_map(changed)
    assert one.changed.shares == changed.double().tolist()
    assert [sum(row) for row in one.principal.shares] == [12.0] * 8 + [0.0] * 24
    assert found.findings.numbers["landing"]["examples"][0]["changed"]["shares"] == one.changed.shares
    titles = [figure.title for figure in found.findings.sections[0].figures[-2:]]
    assert titles == [f"Changed weights of {name}", f"Principal weights of {name}"]


# --------------------------------------------------------------------------------------------------
# the report


def report() -> LandingResult:
    names = [f"model.layers.{layer}.self_attn.{kind}_proj.weight" for layer in (0, 1) for kind in ("q", "o")]
    parts = (
        [landing(48, 24, 9, 1)],
        [landing(48, 24, 9, 8)],
        [landing(48, 12, 9, 0)],
        [landing(24, 12, 8, 1), landing(24, 12, 1, 0)],
    )
    found = {name: dict(zip(SETS, map(tuple, parts), strict=True)) for name in names}
    return result_of(found, {"model.layers.1.mlp.up_proj.weight": "<b>1</b> of 48 weights are NaN or infinite"})


def test_numbers_are_grouped_and_json_ready() -> None:
    numbers = report().numbers()
    assert numbers == json_safe(numbers)
    assert [row["layer"] for row in numbers["layers"]] == [0, 1]
    assert [row["kind"] for row in numbers["kinds"]] == ["q", "o"]
    assert len(numbers["cells"]) == len(numbers["tensors"]) == 4
    assert numbers["total"]["num_changed"] == 36 and numbers["total"]["principal"]["overlap"] == 4 / 36
    assert numbers["unmeasured"][0]["name"] == "model.layers.1.mlp.up_proj.weight"
    assert numbers["profiles"]["total"]["row_gini"] is not None


def test_headlines_say_which_side_of_chance() -> None:
    avoid, prefer = headlines(report())
    assert avoid.startswith("11.11%") and "0.222 times chance (50.00%) and 0.222 times" in avoid
    assert avoid.endswith("among weights of equal magnitude: changes avoid them.")
    assert "low-magnitude" in prefer and "changes prefer them, as rounding" in prefer


@pytest.mark.parametrize(
    "control, said",
    [
        ((landing(4800, 2400, 900, 450),), "their magnitude explains it."),
        ((landing(48, 24, 9, 8),), "at equal magnitude changes prefer them."),
        ((landing(48_000_000, 24_000_000, 9_000_000, 4_520_000),), "their magnitude explains it."),
    ],
)
def test_the_control_has_the_last_word(control: tuple[Landing, ...], said: str) -> None:
    """Also where a difference of 0.4% is significant, since millions of weights changed."""
    sets = dict.fromkeys(SETS, (landing(48, 24, 9, 1),)) | {"principal_same_size": control}
    assert headlines(result_of({"w": sets}))[0].endswith(said)


def test_an_overlap_within_the_interval_is_not_called_a_preference() -> None:
    numbers = result_of({"w": dict.fromkeys(SETS, (landing(48, 24, 9, 5),))})
    assert all("no more or less than chance" in line for line in headlines(numbers))


def test_reports_without_changes_or_matrices_are_still_reports() -> None:
    assert headlines(result_of({})) == []
    assert landing_section(result_of({})).figures == []
    unchanged = result_of({"w": dict.fromkeys(SETS, (landing(48, 24, 0),))})
    assert "nothing landed" in headlines(unchanged)[0]
    table = landing_section(unchanged).tables[0]
    assert table.rows[0][2:] == [None] * 4 and table.formatted()[0][2:] == ["–"] * 4


def test_the_section_is_drawn() -> None:
    from ssrctl.report.document import Document

    result = report()
    section = landing_section(result)
    assert [table.title for table in section.tables][-1] == "Matrices without principal weights"
    by_kind = section.tables[0]
    assert by_kind.rows[0][:3] == ["q", 18, 2 / 9] and by_kind.formatted()[1] == [
        "o",
        "18",
        *("0.222", "1.78", "0", "0.222"),
    ]
    by_tensor = section.tables[2]
    assert by_tensor.rows[1][1:4] == ["low-magnitude", 9, 8 / 9] and by_tensor.formatted()[0][3] == "11.11%"
    assert "expected by chance" in section.figures[1].series  # type: ignore[union-attr]
    page = html_page(
        Document(title="t", facts=[], headlines=headlines(result), notes=[], sections=[section]), version="0"
    )
    assert "principal, not low" in page and "<b>1</b>" not in page
