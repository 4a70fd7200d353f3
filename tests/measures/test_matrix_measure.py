"""From tensors to numbers, sentences, tables and figures: nothing that is not json, nothing undefined shown as zero."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from in_memory import taken

from ssrctl.measures.base import Taken
from ssrctl.measures.landing import LandingMeasure
from ssrctl.measures.maths import low_rank, matrices
from ssrctl.measures.maths.update_matrix import UpdateMatrix, read_update
from ssrctl.measures.rank import RankMeasure, RankResult, update_rank
from ssrctl.measures.spectrum import SpectrumMeasure, SpectrumResult
from ssrctl.report.document import Dots, Heatmap, Lines, Section
from ssrctl.report.formats import json_safe


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def name_of(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.self_attn.{kind}_proj.weight"


def measured(
    base: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], **settings: Any
) -> tuple[Taken[RankResult], Taken[SpectrumResult]]:
    rank, spectrum = taken([RankMeasure, SpectrumMeasure], base, tuned, **settings)
    return rank, spectrum


@pytest.fixture(scope="module")
def model() -> tuple[Taken[RankResult], Taken[SpectrumResult]]:
    """Layers 0 to 2 of q and o, of which layer 1 did not change, and an embedding; o of layer 2 changed most."""
    base, tuned = {}, {}
    for layer in range(3):
        for place, kind in enumerate(("q", "o")):
            name = name_of(layer, kind)
            base[name] = normal(24, 16, seed=10 * layer + place)
            size = 0.0 if layer == 1 else 0.001 * (1 + layer) * (1 + 4 * place)
            tuned[name] = base[name] + size * normal(24, 16, seed=100 + 10 * layer + place)
    base["model.embed_tokens.weight"] = normal(40, 16, seed=99)
    tuned["model.embed_tokens.weight"] = base["model.embed_tokens.weight"] + 0.0001
    base["model.norm.weight"] = tuned["model.norm.weight"] = torch.ones(16)
    return measured(base, tuned, num_directions=3)


def shown(section: Section) -> str:
    return json.dumps([table.formatted() for table in section.tables], ensure_ascii=False)


# --------------------------------------------------------------------------------------------------
# one tensor


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((5, 4), torch.bfloat16, None),
        ((8, 5, 4), torch.float32, None),
        ((7,), torch.float32, "it is no matrix but a vector"),
        ((), torch.float32, "it is no matrix but a single number"),
        ((7, 1), torch.float32, "it has a side of 1"),
        ((1, 7), torch.float32, "it has a side of 1"),
        ((0, 7), torch.float32, "it has a side of 0"),
        ((0, 4, 4), torch.float32, "it is empty"),
        ((9, 1, 4), torch.float32, "it has a side of 1"),
        ((3, 3, 3, 3), torch.float32, "it has 4 dimensions"),
        ((4, 4), torch.int64, "its dtype is int64: not real weights"),
        ((4, 4), torch.complex64, "its dtype is complex64: not real weights"),
        ((4, 4), torch.bool, "its dtype is bool: not real weights"),
    ],
)
def test_what_has_no_spectrum_is_skipped_with_a_reason(
    shape: tuple[int, ...], dtype: torch.dtype, reason: str | None
) -> None:
    assert matrices.skip_reason(shape, dtype) == reason
    tensors = {"w": torch.zeros(shape, dtype=dtype)}
    for one in measured(tensors, tensors):
        assert one.result.skipped == ({} if reason is None else {"w": reason})
        assert bool(one.result.shapes) == (reason is None)
        if reason is not None:
            assert one.findings.numbers == {"skipped": [{"name": "w", "reason": reason}]}
            assert one.findings.sections == one.findings.headlines == []


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape are needed, got \[4, 5\] and \[5, 4\]"):
        taken([RankMeasure], {"w": torch.ones(4, 5)}, {"w": torch.ones(5, 4)})


def test_a_measure_alone_finds_what_both_together_find() -> None:
    base, tuned = {"w": normal(12, 9, seed=1)}, {"w": normal(12, 9, seed=2)}
    rank, spectrum = measured(base, tuned)
    assert rank.result.shapes == spectrum.result.shapes == {"w": (12, 9)}
    (one,), (other,) = taken([RankMeasure], base, tuned), taken([SpectrumMeasure], base, tuned)
    assert one.result == rank.result and len(one.findings.headlines) == 1 and one.findings.notes == []
    # alone the spectrum computes the norm that the rank would have given
    found, alone = spectrum.result.rows.tensors["w"], other.result.rows.tensors["w"]
    assert found.spectral_norm == rank.result.rows.tensors["w"].spectral_norm
    assert alone.spectral_norm == pytest.approx(found.spectral_norm, rel=1e-9)
    assert alone.left == found.left


def test_the_base_is_decomposed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, tuned = {"w": normal(40, 30, seed=1)}, {"w": normal(40, 30, seed=2)}
    alone = [taken([measure], base, tuned)[0].result for measure in (SpectrumMeasure, LandingMeasure)]
    decomposed = []
    monkeypatch.setattr(matrices, "spectrum", lambda rows: decomposed.append(rows.shape) or low_rank.spectrum(rows))
    together = taken([RankMeasure, SpectrumMeasure, LandingMeasure], base, tuned)
    assert decomposed == [(40, 30)]
    assert together[2].result == alone[1]
    found, other = (result.rows.tensors["w"] for result in (together[1].result, alone[0]))
    assert (found.left, found.right, found.curve_base) == (other.left, other.right, other.curve_base)


def test_names_and_seeds_decide_the_random_updates() -> None:
    def draw(name: str, seed: int) -> object:
        (found,) = taken([SpectrumMeasure], {name: normal(12, 9, seed=3)}, {name: normal(12, 9, seed=4)}, seed=seed)
        return found.result.rows.tensors[name].gaussian

    draws = [draw(name, seed) for name, seed in (("a", 0), ("a", 0), ("b", 0), ("a", 1))]
    assert draws[0] is not None and draws[0] == draws[1]
    assert draws[0] != draws[2] and draws[0] != draws[3]


def test_experts_are_matrices_of_their_own() -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    base, tuned = normal(3, 8, 6, seed=5), normal(3, 8, 6, seed=6)
    tuned[1] = base[1]
    rank, spectrum = measured({name: base}, {name: tuned}, num_directions=2)
    labels = [f"{name}.{expert}" for expert in range(3)]
    assert list(rank.result.rows.tensors) == list(spectrum.result.rows.tensors) == labels
    update = read_update(base[2], tuned[2])
    assert isinstance(update, UpdateMatrix)
    assert rank.result.rows.tensors[labels[2]] == update_rank(update)
    row = rank.result.rows.kinds["down"]
    assert (row.num_matrices, row.num_unchanged) == (3, 1)


def test_of_many_experts_some_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "MAX_EXPERTS", 4)
    stack = normal(10, 4, 3, seed=7)
    for some, labels in ((stack, ["e.0", "e.3", "e.6", "e.9"]), (stack[:1], ["e.0"])):
        (found,) = taken([RankMeasure], {"e": some}, {"e": some})
        assert list(found.result.shapes) == labels


def test_weights_that_are_no_numbers_are_unmeasured_by_name() -> None:
    base, tuned = normal(5, 4, seed=8), normal(5, 4, seed=9)
    tuned[2, 1] = math.nan
    for one in measured({"w": base}, {"w": tuned}):
        what = one.measure.name
        assert one.result.unmeasured == {"w": "1 weight of the tuned is NaN or infinite"}
        assert one.result.rows.total.num_matrices == 0
        found = one.findings
        assert found.numbers[what]["unmeasured"] == [
            {"name": "w", "reason": "1 weight of the tuned is NaN or infinite"}
        ]
        assert found.headlines == [] and found.sections[0].figures == []
        assert found.notes == [f"Matrices without a {what}, with the reason in a table: 1."]
        assert [table.title for table in found.sections[0].tables] == [f"Matrices without a {what}"]


# --------------------------------------------------------------------------------------------------
# numbers


def test_numbers_are_json_and_group_by_layer_and_kind(model: tuple[Taken[Any], Taken[Any]]) -> None:
    for one in model:
        numbers = one.findings.numbers
        assert json.loads(json.dumps(numbers, allow_nan=False)) == json_safe(numbers)
        assert numbers["skipped"] == [{"name": "model.norm.weight", "reason": "it is no matrix but a vector"}]
        rows = numbers[one.measure.name]
        assert [row["layer"] for row in rows["layers"]] == [0, 1, 2, None]
        assert [row["kind"] for row in rows["kinds"]] == ["embed", "q", "o"]
        assert [row["name"] for row in rows["tensors"]] == list(one.result.shapes)
        assert [row["shape"] for row in rows["tensors"]] == [[24, 16]] * 6 + [[40, 16]]
        assert rows["total"]["num_matrices"] == 7 and rows["total"]["num_unchanged"] == 2


def test_groups_hold_the_largest_angle_and_means_over_what_changed(model: tuple[Taken[Any], Taken[Any]]) -> None:
    rows = model[1].result.rows
    names = [name_of(2, "q"), name_of(2, "o")]
    some = [rows.tensors[name] for name in names]
    layer = rows.layers[2]
    assert layer.left_largest == max(one.left[-1] for one in some)
    assert layer.left_largest_name in names
    assert layer.right_mean == pytest.approx(sum(sum(one.right) / 3 for one in some) / 2)
    assert layer.gaussian_right_largest == max(one.gaussian.right_largest for one in some)
    assert layer.shift_largest == max(one.shift for one in some)
    assert layer.energy_left_ratio == pytest.approx(sum(one.energy_left / (3 / 24) for one in some) / 2)
    unchanged = rows.layers[1]
    assert unchanged.num_unchanged == 2
    assert unchanged.left_largest is None and unchanged.shift_mean is None
    changed = [rows.tensors[name_of(layer, "o")].shift for layer in (0, 2)]
    assert rows.kinds["o"].shift_mean == pytest.approx(sum(changed) / 2)


def test_ranks_of_groups_are_means_over_what_changed(model: tuple[Taken[Any], Taken[Any]]) -> None:
    rows = model[0].result.rows
    embedding = rows.tensors["model.embed_tokens.weight"]
    assert embedding.rank == 16  # a constant is of rank 1, but float32 rounds it
    assert embedding.signal_rank == 1
    changed = [one for one in rows.tensors.values() if one.rank]
    assert rows.total.effective_rank_frac == pytest.approx(sum(one.effective_rank / 16 for one in changed) / 5)
    assert (rows.total.num_full_rank, rows.total.num_beyond_chance) == (5, 1)
    assert rows.layers[1].rank_frac is None


# --------------------------------------------------------------------------------------------------
# words, tables, figures


def test_headlines_name_what_changed_most_beside_chance(model: tuple[Taken[Any], Taken[Any]]) -> None:
    rank, spectrum = model
    [first] = rank.findings.headlines
    assert first.startswith("Rank: the updates of 5 weight matrices have 100.00% of the largest possible rank")
    assert "1 of the 5 updates have directions that stand out" in rank.findings.sections[0].text
    [angles], text = spectrum.findings.headlines, spectrum.findings.sections[0].text
    total = spectrum.result.rows.total
    assert angles.endswith(f"most in {name_of(2, 'o')} ({max(total.left_largest, total.right_largest):#.3g}°).")
    assert f"at most {total.shift_largest:#.3g} ({name_of(2, 'o')})" in text
    assert "times the energy that chance puts" in text


def test_identical_checkpoints_have_no_rank_and_no_angles() -> None:
    base = {"w": normal(9, 6, seed=1)}
    rank, spectrum = measured(base, {"w": base["w"].clone()})
    assert rank.findings.headlines == ["Rank: no update, since nothing changed in 1 weight matrix."]
    assert spectrum.findings.headlines == rank.findings.notes == spectrum.findings.notes == []
    assert rank.findings.sections[0].tables
    assert spectrum.findings.sections[0].figures == []


def test_small_gaps_are_noted() -> None:
    base = torch.diag(torch.tensor([3.0, 2.0, 2.0 - 1e-6, 1.0]))
    _, spectrum = measured({"w": base}, {"w": base + 1e-3 * normal(4, 4, seed=2)}, num_directions=2)
    assert spectrum.findings.notes[0].startswith("In 1 of 1 matrices the gap between singular values k and k + 1")


def test_sections_draw_layers_with_what_chance_gives(model: tuple[Taken[Any], Taken[Any]]) -> None:
    rank, spectrum = model
    by_title = {figure.title: figure for figure in spectrum.findings.sections[0].figures}
    angles = by_title["Largest principal angle in each layer"]
    assert isinstance(angles, Lines) and list(angles.x) == [0, 1, 2]
    assert list(angles.series) == ["left", "right", "expected, random update of the same norm"]
    assert angles.series["left"][1] is None  # nothing changed there
    row = spectrum.result.rows.layers[0]
    assert angles.series["expected, random update of the same norm"][0] == max(
        row.gaussian_left_largest, row.gaussian_right_largest
    )
    heat = by_title["Mean principal angle over that of a random update"]
    assert isinstance(heat, Heatmap) and list(heat.row_labels) == ["embed", "q", "o"] and heat.centre == 1
    assert heat.values[1][1] is None and heat.values[2][2] is not None
    curve = by_title[f"Singular values of {name_of(2, 'o')}"]
    assert isinstance(curve, Lines) and set(curve.series) == {"base", "tuned"}
    energy = by_title["Energy of the update in the base's leading directions"]
    assert isinstance(energy, Dots) and energy.references[0].low == 1
    ranks = rank.findings.sections[0].figures[0]
    assert isinstance(ranks, Dots) and any("Mukherjee" in one.label for one in ranks.references)


def test_tables_have_a_row_each_of_plain_numbers(model: tuple[Taken[Any], Taken[Any]]) -> None:
    for one in model:
        (section,) = one.findings.sections
        assert [len(table.rows) for table in section.tables] == [3, 4, 7]
        for table in section.tables:
            assert len(set(table.headings)) == len(table.headings)
            json.dumps(table.rows, allow_nan=False)
            assert all(not isinstance(cell, str) for row in table.rows for cell in row[1:])
        assert "–" in shown(section)  # what is not defined is blank, not zero
    by_layer = model[1].findings.sections[0].tables[1]
    place = by_layer.headings.index("left, largest")
    assert by_layer.rows[2][place] == model[1].result.rows.layers[2].left_largest
    assert by_layer.rows[1][place] is None
    assert by_layer.formatted()[2][place].endswith("°")


def test_sections_can_be_drawn(model: tuple[Taken[Any], Taken[Any]]) -> None:
    charts = pytest.importorskip("ssrctl.report.charts")
    pytest.importorskip("matplotlib")
    for one in model:
        assert one.findings.sections[0].figures
        for figure in one.findings.sections[0].figures:
            assert charts.draw(figure).startswith("<svg")
