"""The papers' numbers: complete, true to each other, and put beside one's own."""

from __future__ import annotations

from collections import Counter

import pytest

from ssrctl.checkpoints.names import KINDS
from ssrctl.measures.published import (
    NAMES,
    Published,
    position,
    published,
    published_section,
    references,
    unusual,
)
from ssrctl.report.document import Dots, Reference

MUKHERJEE, ZHU = "Mukherjee et al. 2025", "Zhu et al. 2025"


def of(paper: str, table: str) -> list[Published]:
    return [one for one in published() if (one.paper, one.table) == (paper, table)]


def test_every_row_of_the_tables_is_there() -> None:
    counts = Counter((one.paper, one.table) for one in published())
    assert counts == {
        (MUKHERJEE, "table 1"): 10,
        (MUKHERJEE, "table 2"): 4,
        (MUKHERJEE, "table 4"): 6,
        (MUKHERJEE, "table 6"): 12 * 4,
        (MUKHERJEE, "section 3"): 2,
        (MUKHERJEE, "section 6"): 1,
        (MUKHERJEE, "appendix D"): 1,
        (ZHU, "table 1"): 15,
        (ZHU, "table 2"): 7,
        ("Miahi & Belilovsky 2026", "section 3"): 2,
        ("verl 2026", "measured results"): 2,
    }
    assert set(NAMES) == {one.measure for one in published()}
    assert all(0 < one.value < 1 for one in published())


@pytest.mark.parametrize(
    ("paper", "table", "measure", "total"),
    [
        (MUKHERJEE, "table 1", "sparsity_1e-5", 829.5),
        (MUKHERJEE, "table 2", "rank", 397.9),
        (MUKHERJEE, "table 4", "run_overlap", 307.2),
        (MUKHERJEE, "table 6", "sparsity_1e-8", 827.23),
        (MUKHERJEE, "table 6", "sparsity_1e-7", 827.36),
        (MUKHERJEE, "table 6", "sparsity_1e-6", 832.06),
        (MUKHERJEE, "table 6", "sparsity_1e-5", 972.56),
        (ZHU, "table 1", "sparsity_bf16", 778.8),
        (ZHU, "table 2", "run_jaccard", 404.7),
    ],
)
def test_columns_have_the_sums_of_the_papers(paper: str, table: str, measure: str, total: float) -> None:
    """Sums in per cent, made from the papers' own text."""
    found = sum(one.value for one in of(paper, table) if one.measure == measure)
    assert 100 * found == pytest.approx(total, abs=1e-6)


def test_ranges_are_those_that_the_papers_state() -> None:
    def span(measure: str, training: str = "RL") -> list[tuple[float, float | None]]:
        return [(one.low, one.high) for one in references(measure, training)]  # type: ignore[arg-type]

    assert span("sparsity_1e-5")[0] == (0.685, 0.96)  # Mukherjee et al., section 3
    assert span("sparsity_1e-5", "SFT") == [(0.06, 0.15)]
    assert span("sparsity_bf16") == [(0.363, 0.917)]  # Zhu et al., section 2.1: 36% to 92%
    assert span("sparsity_bf16", "SFT") == [(0.006, 0.188)]
    assert span("outside_final") == [(0.085, None)]
    chance = [one.baseline for one in of(ZHU, "table 2") if one.baseline is not None]
    assert (min(chance), max(chance)) == (0.373, 0.467)
    assert {one.baseline for one in published() if one.measure == "rank"} == {None}


def test_tables_1_and_6_agree_but_for_one_model_of_the_paper() -> None:
    one = {row.model: row.value for row in of(MUKHERJEE, "table 1")}
    six = {row.model: row.value for row in of(MUKHERJEE, "table 6") if row.measure == "sparsity_1e-5"}
    differ = {model for model in one.keys() & six.keys() if abs(one[model] - six[model]) > 0.000501}
    assert len(one.keys() & six.keys()) == 8 and differ == {"Llama-3-Instruct-8B-SimPO"}


def test_a_wider_tolerance_never_finds_less_unchanged() -> None:
    models = {row.model for row in of(MUKHERJEE, "table 6")}
    for model in models:
        values = [row.value for row in of(MUKHERJEE, "table 6") if row.model == model]
        assert len(values) == 4 and values == sorted(values)


def test_overlap_is_above_chance_and_kinds_are_named_as_ours() -> None:
    for one in published():
        assert one.baseline is None or one.baseline < one.value
    by_kind = {one.model.split()[0]: (one.value, one.baseline) for one in of(ZHU, "table 2")}
    assert len(by_kind) == 7 and set(by_kind) < set(KINDS)
    assert by_kind["o"] == (0.552, 0.373)


def test_references_say_where_they_stand() -> None:
    assert references("sparsity_bf16") == [
        Reference("Zhu et al. 2025, table 1, RL: 36.3% to 91.7%", 0.363, 0.917),
        Reference("Zhu et al. 2025, table 1, SFT: 0.6% to 18.8%", 0.006, 0.188),
    ]
    assert references("run_jaccard")[0].label == "Zhu et al. 2025, table 2, RL: 0.552 to 0.597"
    assert references("changed_per_checkpoint")[0].label == "Mukherjee et al. 2025, appendix D, RL: 7.0%"


@pytest.mark.parametrize(("value", "where"), [(0.36, "below"), (0.363, "within"), (0.917, "within"), (0.918, "above")])
def test_position_is_relative_to_rl(value: float, where: str) -> None:
    assert position("sparsity_bf16", value) == where


def test_only_values_outside_of_every_range_are_unusual() -> None:
    assert unusual({"sparsity_1e-5": 0.6, "sparsity_bf16": None, "rank": 0.995}) == []  # within table 6
    (high,) = unusual({"sparsity_1e-5": 0.9999})
    assert high.startswith("Update sparsity, tolerance 1e-5: 99.99%, above what was published (Mukherjee")
    (dense,) = unusual({"sparsity_bf16": 0.1})
    assert "below what was published (Zhu et al. 2025, table 1, RL: 36.3% to 91.7%)" in dense
    assert dense.endswith(", and as published for SFT (Zhu et al. 2025, table 1, SFT: 0.6% to 18.8%).")
    assert unusual({"outside_final": 0.5}) == []  # one published number is no range


def test_section_puts_values_beside_ranges() -> None:
    section = published_section({"sparsity_1e-5": 0.971, "rank": None})
    (figure,) = section.figures
    assert isinstance(figure, Dots) and figure.series["measured"] == [0.971, None]
    assert figure.intervals == {
        "published, RL": [(0.5323, 0.96), (0.992, 0.998)],
        "published, SFT": [(0.06, 0.15), None],
    }
    compared, everything = section.tables
    assert [row[:3] for row in compared.formatted()] == [
        ["update sparsity, tolerance 1e-5", "97.10%", "above"],
        ["rank of an update matrix over its maximum, mean", "–", "–"],
    ]
    assert len(everything.rows) == 10 + 12 + 2 + 4
    assert compared.rows[0][1] == 0.971 and "chance" not in everything.headings
    assert published_section({}).figures == []


def test_table_of_all_has_every_number_in_its_unit() -> None:
    _, table = published_section(dict.fromkeys(NAMES)).tables
    assert len(table.rows) == len(published())
    model = "Llama-3.1-Tulu-3-8B-DPO"
    place = [row[-1] for row in table.rows].index(f"{MUKHERJEE}, table 1")
    assert table.rows[place] == [model, "DPO", NAMES["sparsity_1e-5"], 0.814, None, f"{MUKHERJEE}, table 1"]
    shown = table.formatted()
    assert shown[place][3:5] == ["81.40%", "–"] and shown[-1][3:5] == ["0.575", "0.437"]
