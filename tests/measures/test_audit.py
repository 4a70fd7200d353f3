"""The audit of protected weights against planted sets, counted one weight at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssrctl.core.mask import TileSet
from ssrctl.errors import UserError
from ssrctl.measures.audit import (
    AuditResult,
    SpikeAudit,
    TensorAudit,
    audit_row,
    audit_section,
    audit_tensor,
    failures,
    headlines,
    spike_audit,
)
from ssrctl.measures.maths.grouping import group

Q0 = "model.layers.0.self_attn.q_proj.weight"
DOWN0 = "model.layers.0.mlp.down_proj.weight"
DOWN1 = "model.layers.1.mlp.down_proj.weight"


def planted(shape: tuple[int, ...], places: list[tuple[int, ...]]) -> torch.Tensor:
    """Bool, True at ``places``."""
    made = torch.zeros(shape, dtype=torch.bool)
    for place in places:
        made[place] = True
    return made


def audit(found: dict[str, TensorAudit], **more: Any) -> AuditResult:
    return AuditResult(group(found, audit_row), **more)


def planted_audit(**more: Any) -> AuditResult:
    """q: 2 of 4 protected moved, 8 of 40 changed; down 0: protected and still; down 1: moved, unprotected."""
    q_protected = planted((4, 10), [(0, 0), (1, 9), (2, 3), (3, 9)])
    q_changed = planted((4, 10), [(0, 0), (3, 9), *((2, column) for column in range(4, 10))])
    down = planted((20, 17), [(19, 16), (0, 16)])
    return audit(
        {
            Q0: audit_tensor(Q0, TileSet.from_dense(q_protected), q_changed),
            DOWN0: audit_tensor(DOWN0, TileSet.from_dense(down), torch.zeros_like(down)),
            DOWN1: audit_tensor(DOWN1, None, down),
        },
        **more,
    )


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    shape=st.sampled_from([(1,), (40,), (3, 5), (17, 33), (2, 3, 40)]),
    protected_share=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    changed_share=st.sampled_from([0.0, 0.2, 1.0]),
    seed=st.integers(0, 1000),
)
def test_counts_are_those_of_a_walk_over_the_weights(
    shape: tuple[int, ...], protected_share: float, changed_share: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    protected = torch.rand(shape, generator=generator) < protected_share
    changed = torch.rand(shape, generator=generator) < changed_share
    pairs = list(zip(protected.flatten().tolist(), changed.flatten().tolist(), strict=True))
    assert audit_tensor("w", TileSet.from_dense(protected), changed) == TensorAudit(
        numel=len(pairs),
        num_protected=sum(p for p, _ in pairs),
        num_changed=sum(c for _, c in pairs),
        num_protected_changed=sum(p and c for p, c in pairs),
    )


def test_a_changed_tensor_that_is_no_copy_of_its_own_memory_is_counted_in_its_own_order() -> None:
    changed = planted((20, 3), [(19, 0)]).T  # not contiguous; (0, 19) is True
    assert audit_tensor("w", TileSet.from_dense(planted((3, 20), [(0, 19)])), changed).num_protected_changed == 1


def test_shares_of_planted_sets() -> None:
    result = planted_audit()
    total, q = result.rows.total, result.rows.tensors[Q0]
    assert (q.numel, q.num_protected, q.num_changed, q.num_protected_changed) == (40, 4, 8, 2)
    assert q.protected_changed_frac == 0.5
    assert q.overlap == 0.25
    assert q.expected_overlap == pytest.approx(0.1)  # one tensor: its protected density
    assert q.ratio == pytest.approx(2.5)
    assert (total.num_protected, total.num_changed, total.num_protected_changed) == (6, 10, 2)
    # 8 changes in a tensor that is 10% protected, 2 in one that is not protected: 0.8 of 10 by chance.
    assert total.expected_overlap == pytest.approx(0.08)
    assert list(result.rows.layers) == [0, 1]
    assert {kind: row.num_protected for kind, row in result.rows.kinds.items()} == {"q": 4, "down": 2}


def test_numbers_of_the_report() -> None:
    spike = SpikeAudit({"parameter": DOWN0, "out_channel": 1, "in_channel": 2, "ratio": 7.5}, 19, True, False)
    numbers = planted_audit(spikes=[spike], not_compared={"lm_head.weight": 7}).numbers()
    assert numbers["tensors"][0]["name"] == Q0 and numbers["tensors"][0]["overlap"] == 0.25
    assert numbers["spikes"] == [
        {"parameter": DOWN0, "out_channel": 1, "in_channel": 2, "ratio": 7.5, "index": 19, "protected": True,
         "moved": False},
    ]  # fmt: skip
    assert numbers["not_compared"] == [{"name": "lm_head.weight", "num_protected": 7}]


def test_nothing_measured_has_no_shares() -> None:
    total = audit({}).rows.total
    assert total.numel == 0
    assert {total.protected_frac, total.overlap, total.expected_overlap, total.ratio} == {None}


def test_a_mask_of_another_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"\[4, 4\].*\[4, 5\]"):
        audit_tensor("w", TileSet.empty((4, 4)), torch.zeros(4, 5, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------
# activation outliers


@pytest.mark.parametrize(
    ("place", "protected", "moved"), [((19, 16), True, False), ((18, 16), False, True), ((0, 0), False, False)]
)
def test_a_spike_is_found_at_its_out_and_in_channel(place: tuple[int, int], protected: bool, moved: bool) -> None:
    inside = TileSet.from_dense(planted((20, 17), [(19, 16), (16, 18 - 16)]))
    changed = planted((20, 17), [(18, 16)])
    spike = {"parameter": DOWN0, "out_channel": place[0], "in_channel": place[1]}
    found = spike_audit(spike, inside, changed)
    assert (found.protected, found.moved) == (protected, moved)
    assert found.index == place[0] * 17 + place[1]


def test_a_spikes_own_index_counts_more_than_its_channels() -> None:
    # A Conv1D stores [in, out], so out_channel 5, in_channel 1 is the weight at (1, 5).
    spike = {"parameter": "h.0.mlp.c_proj.weight", "index": 1 * 8 + 5, "out_channel": 5, "in_channel": 1}
    found = spike_audit(spike, TileSet.from_dense(planted((32, 8), [(1, 5)])), planted((32, 8), [(5, 1)]))
    assert (found.protected, found.moved) == (True, False)


def test_a_spike_without_a_mask_is_unprotected() -> None:
    spike = {"parameter": DOWN0, "out_channel": 1, "in_channel": 1}
    assert spike_audit(spike, None, torch.ones(2, 2, dtype=torch.bool)).protected is False


@pytest.mark.parametrize(
    "spike",
    [
        {"out_channel": 20, "in_channel": 0},
        {"out_channel": -1, "in_channel": 0},
        {"out_channel": 0, "in_channel": 17},
        {"out_channel": True, "in_channel": 0},
        {"out_channel": "3", "in_channel": 0},
        {"index": 340},
        {"index": 1.0},
        {},
    ],
)
def test_a_spike_outside_of_the_tensor_is_refused(spike: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"outside of model\.layers\.0\.mlp"):
        spike_audit({"parameter": DOWN0} | spike, None, torch.zeros(20, 17, dtype=torch.bool))


# --------------------------------------------------------------------------------------------------
# assertions


def test_moved_protected_weights_fail_with_counts_and_names() -> None:
    [line] = failures(planted_audit(), frozen=True, moved_pattern=None)
    assert line.startswith("2 of 6 protected weights changed")
    assert f"{Q0} (2)" in line
    assert DOWN0 not in line


def test_frozen_holds_when_only_others_moved() -> None:
    still = audit({DOWN0: TensorAudit(100, 10, 50, 0)})
    assert failures(still, frozen=True, moved_pattern=None) == []
    assert failures(planted_audit(), frozen=False, moved_pattern=None) == []


def test_a_mask_that_protects_nothing_asserts_nothing_and_fails() -> None:
    [line] = failures(audit({DOWN0: TensorAudit(100, 0, 50, 0)}), frozen=True, moved_pattern=None)
    assert "protects none" in line


def test_protected_weights_that_the_checkpoints_lack_fail() -> None:
    numbers = audit({DOWN0: TensorAudit(100, 10, 50, 0)}, not_compared={"lm_head.weight": 7, "x": 0})
    [line] = failures(numbers, frozen=True, moved_pattern=None)
    assert line == "7 protected weights could not be compared: the checkpoints lack lm_head.weight."


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("*q_proj*", None),
        ("*layers.1.*", None),
        ("*down_proj.weight", f"1 of 2 tensors that match '*down_proj.weight' did not change: {DOWN0}."),
        ("*Q_PROJ*", "No tensor's name matches '*Q_PROJ*'"),
        ("q_proj", "No tensor's name matches 'q_proj'"),
    ],
)
def test_tensors_that_match_must_have_moved(pattern: str, expected: str | None) -> None:
    lines = failures(planted_audit(), frozen=False, moved_pattern=pattern)
    assert len(lines) == (expected is not None)
    assert expected is None or lines[0].startswith(expected)


def test_long_lists_are_cut() -> None:
    found = {f"layers.{layer}.w": TensorAudit(4, 2, 1, 1) for layer in range(12)}
    [frozen] = failures(audit(found), frozen=True, moved_pattern=None)
    assert frozen.endswith("layers.4.w (1) and 7 more.")


# --------------------------------------------------------------------------------------------------
# the report


def test_headlines_say_what_moved() -> None:
    spikes = [SpikeAudit({"parameter": DOWN0}, 0, True, False), SpikeAudit({"parameter": DOWN1}, 0, False, True)]
    lines = headlines(planted_audit(spikes=spikes))
    assert lines[0] == "Of 6 protected weights (0.83% of all), 2 changed (33.33%)."
    assert "20.00% of the changed weights are protected ones; at random it would be 8.00%" in lines[1]
    assert lines[2] == ("Of 2 activation outliers, 1 has its weight inside the protected set; 1 was changed.")
    assert headlines(audit({DOWN0: TensorAudit(100, 10, 0, 0)})) == [
        "None of 10 protected weights (10.00% of all) changed."
    ]
    unprotected = audit({DOWN0: TensorAudit(100, 0, 3, 0), DOWN1: TensorAudit(100, 0, 0, 0)})
    assert headlines(unprotected) == ["No protected weight was compared.", "1 of 2 tensors changed."]


def test_section_has_the_tables_and_figures_that_there_is_something_to_show_for() -> None:
    spike = SpikeAudit({"parameter": DOWN0, "out_channel": 19, "in_channel": 16}, 339, True, False)
    section = audit_section(planted_audit(spikes=[spike]))
    tables = {table.title: table for table in section.tables}
    assert [row[0] for row in tables["Protected weights by tensor"].rows] == [Q0, DOWN0]
    assert tables["Weights behind activation outliers"].rows == [[DOWN0, 19, 16, "yes", "no"]]
    assert [list(figure.series["protected"]) for figure in section.figures] == [[0.5, 0.0], [2 / 6]]  # type: ignore[union-attr]
    still = audit_section(audit({DOWN0: TensorAudit(100, 10, 0, 0)}))
    assert still.figures == []
    assert "Weights behind activation outliers" not in {table.title for table in still.tables}


def test_section_without_protected_weights_shows_which_tensors_changed() -> None:
    section = audit_section(audit({DOWN0: TensorAudit(100, 0, 3, 0), DOWN1: TensorAudit(100, 0, 0, 0)}))
    assert section.title == "Which tensors changed?"
    assert section.tables[0].rows == [[DOWN0, 100, 3, 0.03], [DOWN1, 100, 0, 0.0]]
    assert section.tables[0].formatted()[0] == [DOWN0, "100", "3", "3.00%"]
    assert audit_section(audit({})).tables[0].rows == []
