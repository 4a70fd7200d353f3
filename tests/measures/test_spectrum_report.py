"""From tensors to numbers, sentences, tables and figures: nothing that is not json, nothing undefined shown as zero."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from ssrctl.measures import matrices as matrix_measures
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update
from ssrctl.measures.matrices import MatrixMeasures, measure_tensor, skip_reason
from ssrctl.measures.rank import UpdateRank, update_rank
from ssrctl.measures.rank_report import rank_section
from ssrctl.measures.spectrum import SpectrumChange
from ssrctl.measures.spectrum_report import headlines, notes, spectrum_numbers, spectrum_section
from ssrctl.report.document import Bars, Heatmap, Lines, Section
from ssrctl.report.formats import json_safe


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def name_of(layer: int, kind: str) -> str:
    return f"model.layers.{layer}.self_attn.{kind}_proj.weight"


def measured_model(changed: tuple[int, ...] = (0, 2)) -> dict[str, MatrixMeasures]:
    """Three layers of q and o, of which some changed, and an embedding; o of layer 2 changed most."""
    found: dict[str, MatrixMeasures] = {}
    for layer in range(3):
        for place, kind in enumerate(("q", "o")):
            base = normal(24, 16, seed=10 * layer + place)
            size = 0.001 * (1 + layer) * (1 + 4 * place) if layer in changed else 0.0
            tuned = base + size * normal(24, 16, seed=100 + 10 * layer + place)
            found |= measure_tensor(name_of(layer, kind), base, tuned, k=3)
    base = normal(40, 16, seed=99)
    return found | measure_tensor("model.embed_tokens.weight", base, base + 0.0001, k=3)


def shown(section: Section) -> str:
    return json.dumps(
        [[table.title, table.columns, table.rows, table.note] for table in section.tables], ensure_ascii=False
    )


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
    assert skip_reason(shape, dtype) == reason
    tensor = torch.zeros(shape, dtype=dtype)
    if reason is None:
        assert measure_tensor("w", tensor, tensor)
    else:
        with pytest.raises(ValueError, match="w has no spectrum: it"):
            measure_tensor("w", tensor, tensor)


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"w: shapes differ: \[4, 5\] and \[5, 4\]"):
        measure_tensor("w", torch.ones(4, 5), torch.ones(5, 4))


def test_a_matrix_is_measured_as_asked_for() -> None:
    base, tuned = normal(12, 9, seed=1), normal(12, 9, seed=2)
    both = measure_tensor("w", base, tuned)["w"]
    assert isinstance(both.rank, UpdateRank) and isinstance(both.spectrum, SpectrumChange)
    assert (both.shape, both.dtypes) == ((12, 9), ("float32", "float32"))
    one = measure_tensor("w", base, tuned, spectrum=False)["w"]
    other = measure_tensor("w", base, tuned, rank=False)["w"]
    assert one.spectrum is None and other.rank is None
    assert one.rank == both.rank
    # alone it computes the norm that the rank would have given
    assert isinstance(other.spectrum, SpectrumChange)
    assert other.spectrum.spectral_norm == pytest.approx(both.rank.spectral_norm, rel=1e-9)
    assert other.spectrum.left == both.spectrum.left


def test_names_and_seeds_decide_the_random_updates() -> None:
    base, tuned = normal(12, 9, seed=3), normal(12, 9, seed=4)
    found = [
        measure_tensor(name, base, tuned, seed=seed)[name].spectrum for name, seed in (("a", 0), ("b", 0), ("a", 1))
    ]
    assert all(isinstance(one, SpectrumChange) for one in found)
    draws = [one.gaussian for one in found if isinstance(one, SpectrumChange)]
    assert draws[0] != draws[1] and draws[0] != draws[2]


def test_experts_are_matrices_of_their_own() -> None:
    base, tuned = normal(3, 8, 6, seed=5), normal(3, 8, 6, seed=6)
    tuned[1] = base[1]
    found = measure_tensor("model.layers.0.mlp.experts.down_proj", base, tuned, k=2)
    assert list(found) == [f"model.layers.0.mlp.experts.down_proj.{expert}" for expert in range(3)]
    update = read_update(base[2], tuned[2])
    assert isinstance(update, UpdateMatrix)
    assert found["model.layers.0.mlp.experts.down_proj.2"].rank == update_rank(update)
    row = spectrum_numbers(found)["rank"]["kinds"][0]
    assert (row["kind"], row["num_matrices"], row["num_unchanged"]) == ("down", 3, 1)


def test_of_many_experts_some_are_taken_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix_measures, "MAX_EXPERTS", 4)
    stack = normal(10, 4, 3, seed=7)
    assert list(measure_tensor("e", stack, stack)) == ["e.0", "e.3", "e.6", "e.9"]
    assert list(measure_tensor("e", stack[:1], stack[:1])) == ["e.0"]


def test_weights_that_are_no_numbers_are_unmeasured_by_name() -> None:
    base, tuned = normal(5, 4, seed=8), normal(5, 4, seed=9)
    tuned[2, 1] = math.nan
    found = measure_tensor("w", base, tuned)
    assert found["w"].rank == found["w"].spectrum == Unmeasured("1 weight of the tuned is NaN or infinite")
    numbers = spectrum_numbers(found)
    assert numbers["rank"]["unmeasured"] == [{"name": "w", "reason": "1 weight of the tuned is NaN or infinite"}]
    assert numbers["spectrum"]["total"]["num_matrices"] == 0
    assert headlines(numbers) == []
    assert notes(numbers) == ["Matrices without a rank or a spectrum, with the reason in a table: 1."]
    assert [table.title for table in rank_section(numbers["rank"]).tables] == ["Matrices without a rank"]
    section = spectrum_section(numbers["spectrum"])
    assert section.figures == [] and [table.title for table in section.tables] == ["Matrices without a spectrum"]


# --------------------------------------------------------------------------------------------------
# numbers


def test_numbers_are_json_and_group_by_layer_and_kind() -> None:
    measures = measured_model()
    numbers = spectrum_numbers(measures, {"model.norm.weight": "it is no matrix but a vector"})
    assert json.loads(json.dumps(numbers, allow_nan=False)) == json_safe(numbers)
    assert numbers["skipped"] == [{"name": "model.norm.weight", "reason": "it is no matrix but a vector"}]
    for part in ("rank", "spectrum"):
        assert [row["layer"] for row in numbers[part]["layers"]] == [0, 1, 2, None]
        assert [row["kind"] for row in numbers[part]["kinds"]] == ["embed", "q", "o"]
        assert [row["name"] for row in numbers[part]["tensors"]] == list(measures)
        assert numbers[part]["total"]["num_matrices"] == 7 and numbers[part]["total"]["num_unchanged"] == 2


def test_groups_hold_the_largest_angle_and_means_over_what_changed() -> None:
    measures = measured_model()
    spectra: dict[str, Any] = {name: one.spectrum for name, one in measures.items()}
    numbers = spectrum_numbers(measures)["spectrum"]
    layer = numbers["layers"][2]
    names = [name_of(2, "q"), name_of(2, "o")]
    assert layer["left_largest"] == max(spectra[name].left[-1] for name in names)
    assert layer["left_largest_name"] in names
    assert layer["right_mean"] == pytest.approx(sum(sum(spectra[name].right) / 3 for name in names) / 2)
    assert layer["gaussian_right_largest"] == max(spectra[name].gaussian.right_largest for name in names)
    assert layer["shift_largest"] == max(spectra[name].shift for name in names)
    assert layer["energy_left_ratio"] == pytest.approx(sum(spectra[name].energy_left / (3 / 24) for name in names) / 2)
    unchanged = numbers["layers"][1]
    assert unchanged["num_unchanged"] == 2
    assert unchanged["left_largest"] is None and unchanged["shift_mean"] is None
    kind = next(row for row in numbers["kinds"] if row["kind"] == "o")
    changed = [spectra[name_of(layer, "o")].shift for layer in (0, 2)]
    assert kind["shift_mean"] == pytest.approx(sum(changed) / 2)


def test_ranks_of_groups_are_means_over_what_changed() -> None:
    measures = measured_model()
    ranks: dict[str, Any] = {name: one.rank for name, one in measures.items()}
    numbers = spectrum_numbers(measures)["rank"]
    assert ranks["model.embed_tokens.weight"].rank == 16  # a constant is of rank 1, but float32 rounds it
    assert ranks["model.embed_tokens.weight"].signal_rank == 1
    total = numbers["total"]
    changed = [one for one in ranks.values() if one.rank]
    assert total["effective_rank_frac"] == pytest.approx(sum(one.effective_rank / 16 for one in changed) / 5)
    assert (total["num_full_rank"], total["num_beyond_chance"]) == (5, 1)
    assert numbers["layers"][1]["rank_frac"] is None


def test_a_measure_that_was_not_asked_for_is_absent() -> None:
    measures = measure_tensor("w", normal(6, 5, seed=1), normal(6, 5, seed=2), spectrum=False)
    numbers = spectrum_numbers(measures)
    assert numbers["spectrum"] is None and numbers["rank"] is not None
    assert len(headlines(numbers)) == 2 and notes(numbers) == []
    assert spectrum_numbers({})["rank"] is None


# --------------------------------------------------------------------------------------------------
# words, tables, figures


def test_headlines_name_what_changed_most_beside_chance() -> None:
    numbers = spectrum_numbers(measured_model())
    lines = headlines(numbers)
    total = numbers["spectrum"]["total"]
    assert lines[0].startswith("Rank: the updates of 5 weight matrices have 100.00% of the largest possible rank")
    assert "1 of these 5 updates have directions that stand out" in lines[1]
    assert f"The leading singular directions of {name_of(2, 'o')}".lower() in lines[2].lower()
    assert f"{total['left_largest']:#.3g}°" in lines[2] or f"{total['right_largest']:#.3g}°" in lines[2]
    assert f"at most {total['shift_largest']:#.3g} ({name_of(2, 'o')})" in lines[3]
    assert "times the energy that chance puts" in lines[4]


def test_identical_checkpoints_have_no_rank_and_no_angles() -> None:
    base = normal(9, 6, seed=1)
    numbers = spectrum_numbers(measure_tensor("w", base, base.clone()))
    assert headlines(numbers) == ["Rank: no update, since nothing changed in 1 weight matrix."]
    assert notes(numbers) == []
    assert rank_section(numbers["rank"]).tables
    assert spectrum_section(numbers["spectrum"]).figures == []


def test_small_gaps_are_noted() -> None:
    base = torch.diag(torch.tensor([3.0, 2.0, 2.0 - 1e-6, 1.0]))
    numbers = spectrum_numbers(measure_tensor("w", base, base + 1e-3 * normal(4, 4, seed=2), k=2))
    assert notes(numbers)[0].startswith("In 1 of 1 matrices the gap between singular values k and k + 1")


def test_sections_draw_layers_with_what_chance_gives() -> None:
    numbers = spectrum_numbers(measured_model())
    section = spectrum_section(numbers["spectrum"])
    by_title = {figure.title: figure for figure in section.figures}
    angles = by_title["Largest principal angle in each layer"]
    assert isinstance(angles, Lines) and list(angles.x) == [0, 1, 2]
    assert list(angles.series) == ["left", "right", "expected, random update of the same norm"]
    assert angles.series["left"][1] is None  # nothing changed there
    row = numbers["spectrum"]["layers"][0]
    assert angles.series["expected, random update of the same norm"][0] == max(
        row["gaussian_left_largest"], row["gaussian_right_largest"]
    )
    heat = by_title["Mean principal angle over that of a random update"]
    assert isinstance(heat, Heatmap) and list(heat.row_labels) == ["q", "o"] and heat.centre == 1
    assert heat.values[0][1] is None and heat.values[1][2] is not None
    curve = by_title[f"Singular values of {name_of(2, 'o')}"]
    assert isinstance(curve, Lines) and set(curve.series) == {"base", "tuned"}
    energy = by_title["Energy of the update in the base's leading directions"]
    assert isinstance(energy, Bars) and energy.references[0].low == 1
    ranks = rank_section(numbers["rank"]).figures[0]
    assert isinstance(ranks, Bars) and any("Mukherjee" in one.label for one in ranks.references)


def test_tables_have_a_row_each_and_plain_numbers_beside_them() -> None:
    numbers = spectrum_numbers(measured_model())
    for section in (rank_section(numbers["rank"]), spectrum_section(numbers["spectrum"])):
        assert [len(table.rows) for table in section.tables] == [3, 4, 7]
        for table in section.tables:
            assert len(set(table.columns)) == len(table.columns)
            assert table.raw is not None
            json.dumps(table.raw, allow_nan=False)
        assert "–" in shown(section)  # what is not defined is blank, not zero
    by_layer = spectrum_section(numbers["spectrum"]).tables[1]
    place = by_layer.columns.index("left, largest")
    assert by_layer.raw is not None
    assert by_layer.raw[2][place] == numbers["spectrum"]["layers"][2]["left_largest"]
    assert by_layer.raw[1][place] is None


def test_sections_can_be_drawn() -> None:
    charts = pytest.importorskip("ssrctl.report.charts")
    pytest.importorskip("matplotlib")
    numbers = spectrum_numbers(measured_model())
    for section in (rank_section(numbers["rank"]), spectrum_section(numbers["spectrum"])):
        assert section.figures
        for figure in section.figures:
            assert charts.draw(figure).startswith("<svg")
