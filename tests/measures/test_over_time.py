"""A run over time, against plain python sets over planted checkpoints."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from in_memory import opened, taken, taken_of

from ssrctl.measures import over_time as module
from ssrctl.measures.maths.row_column_counts import profile, stability
from ssrctl.measures.over_time import (
    OverTime,
    OverTimeMeasure,
    OverTimeResult,
    headlines,
    over_time,
    over_time_result,
    over_time_section,
    time_row,
)
from ssrctl.report.document import Document, Lines
from ssrctl.report.formats import json_safe
from ssrctl.report.render import html_page

Values = list[list[int]]


def differ(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a != b


def beyond_one(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a - b).abs() > 1


def follow(base: torch.Tensor, checkpoints: list[torch.Tensor], differs=differ) -> OverTime:
    last = checkpoints[-1] if checkpoints else base
    return over_time(base, last, checkpoints, differs, differ)


def places(flags: torch.Tensor) -> set[int]:
    return set(flags.flatten().nonzero().flatten().tolist())


def plain(base: torch.Tensor, checkpoints: list[torch.Tensor], differs) -> dict:
    """The same by python sets, all of them held at once."""
    changed = [places(differs(base, one)) for one in checkpoints]
    ever = [set().union(*changed[: t + 1]) for t in range(len(changed))]
    back = places(base == checkpoints[-1])
    before = [base, *checkpoints]
    return {
        "numel": base.numel(),
        "changed": tuple(map(len, changed)),
        "moved": tuple(len(places(differs(a, b))) for a, b in zip(before, checkpoints, strict=False)),
        "ever": tuple(map(len, ever)),
        "outside_final": tuple(len(one - changed[-1]) for one in changed),
        "num_ever_outside": len(ever[-1] - changed[-1]),
        "num_cancelled": len(ever[-1] & back),
    }


APART = {"row_stability", "column_stability", "profiles"}


def counts(one: OverTime) -> dict:
    return {key: getattr(one, key) for key in OverTime.__dataclass_fields__ if key not in APART}


@st.composite
def runs(draw: st.DrawFn) -> tuple[torch.Tensor, list[torch.Tensor]]:
    shape = draw(st.sampled_from([(), (5,), (3, 4), (2, 3, 2), (0, 3)]))
    one = st.lists(st.integers(0, 3), min_size=math.prod(shape), max_size=math.prod(shape))
    found = [torch.tensor(draw(one), dtype=torch.int32).view(shape) for _ in range(draw(st.integers(2, 5)))]
    return found[0], found[1:]


@pytest.mark.parametrize("differs", [differ, beyond_one])
@pytest.mark.parametrize("part", [1, 5, 1 << 20])
@given(runs())
def test_counts_are_those_of_python_sets(differs, part: int, run: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    before, module._PART = module._PART, part
    try:
        assert counts(follow(*run, differs)) == plain(*run, differs)
    finally:
        module._PART = before


def test_a_planted_run_is_told_apart() -> None:
    """Of 10 weights 0-1 change and stay, 2 changes and returns, 3 comes late, 4 moves twice, 5-9 never change."""
    base = torch.zeros(2, 5)
    checkpoints = [base.clone() for _ in range(3)]
    for t, values in enumerate([{0: 1, 1: 1, 2: 1, 4: 1}, {0: 1, 1: 1, 4: 2}, {0: 1, 1: 1, 3: 1, 4: 3}]):
        for place, value in values.items():
            checkpoints[t].view(-1)[place] = value
    one = follow(base, checkpoints)
    assert counts(one) == {
        "numel": 10,
        "changed": (4, 3, 4),
        "moved": (4, 2, 2),
        "ever": (4, 4, 5),
        "outside_final": (1, 0, 0),
        "num_ever_outside": 1,
        "num_cancelled": 1,
    }
    row = time_row([one])
    assert row.sparsity == [0.6, 0.7, 0.6] and row.neighbour_sparsity == [0.6, 0.8, 0.8]
    assert row.outside_final_of_ever == row.cancelled_of_ever == 0.2
    assert row.ever_outside_frac == row.cancelled_frac == 0.1
    assert row.never_frac == 0.5 and row.final_frac == 0.4
    assert row.outside_final_of_changed == [0.25, 0.0, 0.0]
    assert row.expected_ever_frac == pytest.approx([0.4, 1 - 0.6 * 0.8, 1 - 0.6 * 0.8 * 0.8])


def test_within_a_tolerance_is_outside_the_final_subnetwork_but_not_cancelled() -> None:
    base = torch.zeros(4)
    one = follow(base, [torch.tensor([5.0, 5.0, 5.0, 0.0]), torch.tensor([5.0, 1.0, 0.0, 0.0])], beyond_one)
    assert (one.num_ever_outside, one.num_cancelled) == (2, 1)


def test_intervals_that_move_random_weights_grow_as_expected() -> None:
    generator = torch.Generator().manual_seed(6)
    base = torch.zeros(200, 300)
    checkpoints, now = [], base
    for _ in range(4):
        now = now.clone()
        now.view(-1)[torch.randperm(60_000, generator=generator)[:9000]] += 1
        checkpoints.append(now)
    row = time_row([follow(base, checkpoints)])
    # a standard deviation of about sqrt(60000 * 0.25) = 122 weights
    assert row.ever_frac == pytest.approx(row.expected_ever_frac, abs=4 * 122 / 60_000)
    assert row.expected_ever_frac[-1] == pytest.approx(1 - 0.85**4)


def test_a_run_that_changes_nothing_divides_by_nothing() -> None:
    row = time_row([follow(torch.ones(3, 4), [torch.ones(3, 4)] * 2)])
    assert row.sparsity == [1.0, 1.0] and row.never_frac == 1.0
    assert row.outside_final_of_ever is None and row.cancelled_of_ever is None
    assert row.outside_final_of_changed == row.row_stability == [None, None]
    empty = time_row([])
    assert empty.sparsity == [] and empty.never_frac is None and empty.final_frac is None


def test_profiles_are_compared_with_the_last() -> None:
    generator = torch.Generator().manual_seed(8)
    base = torch.zeros(30, 20)
    checkpoints = [(torch.rand(30, 20, generator=generator) < share).float() for share in (0.1, 0.3, 0.5)]
    one = follow(base, checkpoints)
    rows, columns = stability([line for c in checkpoints if (line := profile(c != base)) is not None])
    assert one.row_stability == pytest.approx(tuple(rows), abs=1e-12)
    assert one.column_stability == pytest.approx(tuple(columns), abs=1e-12)
    assert follow(torch.zeros(5), [torch.ones(5)]).row_stability == ()


def test_checkpoints_are_read_one_after_another() -> None:
    """The last is read first, for the final subnetwork, and no more than two besides it are alive at a time."""
    comparison = opened({"w": torch.zeros(4, 4)}, *({"w": torch.ones(4, 4)} for _ in range(5)))
    alive: list[weakref.ref] = []
    order, most = [], 0

    def reader(place: int):
        def read(name: str) -> torch.Tensor:
            nonlocal most
            tensor = torch.full((4, 4), float(place))
            alive.append(weakref.ref(tensor))
            order.append(place)
            most = max(most, sum(one() is not None for one in alive))
            return tensor

        return read

    for place, checkpoint in enumerate(comparison.tuned, 1):
        checkpoint.reader.tensor = reader(place)  # type: ignore[method-assign]
    (found,) = taken_of([OverTimeMeasure], comparison, "series")
    assert found.result.rows.total.sparsity == [0.0] * 5 and found.result.steps == [1, 2, 3, 4, 5]
    assert order == [5, 1, 2, 3, 4] and most == 3


def test_a_series_is_followed_through_the_protocol() -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    tensors = [{name: torch.full((2, 3), value) for name in names} for value in (1.0, 2.0, 1.0)]
    (found,) = taken([OverTimeMeasure], *tensors, mode="series", changed_by="bf16")
    assert found.result.rows.total.cancelled_of_ever == 1.0
    assert found.findings.numbers["over_time"]["tensors"][1]["name"] == names[1]
    assert found.findings.published == {"changed_per_checkpoint": 1.0, "outside_final": 1.0}
    steps, by_kind, _ = found.findings.sections[0].tables
    assert [row[0] for row in steps.rows] == [1, 2] and steps.rows[1][1] == 1.0
    assert [row[0] for row in by_kind.rows] == ["up", "norm"] and by_kind.formatted()[0][1] == "6"


def test_rows_and_columns_of_the_middle_layer_are_followed() -> None:
    form = "model.layers.{}.self_attn.{}_proj.weight"
    names = [form.format(layer, kind) for layer in range(3) for kind in "qko"]
    base = {name: torch.zeros(200, 4) for name in names}
    series = []
    for rows in (20, 40, 80, 120):
        one = {name: tensor.clone() for name, tensor in base.items()}
        one[form.format(1, "q")][:rows, :2] = 1.0
        series.append(one)
    (found,) = taken([OverTimeMeasure], base, *series, mode="series")
    q, o = found.result.ratios
    assert (q.name, o.name) == (form.format(1, "q"), form.format(1, "o"))
    assert q.steps == [1, 2, 4] and q.row_starts == list(range(0, 200, 3)) and q.column_starts == [0, 1, 2, 3]
    for place, rows in enumerate((20, 40, 120)):
        # half of each of the first rows, and of the first two columns as many
        by_row = [sum(start + i < rows for i in range(width)) / width / 2 for start, width in blocks(q.row_starts, 200)]
        assert q.rows[place] == pytest.approx(by_row)
        assert q.columns[place] == pytest.approx([rows / 200, rows / 200, 0, 0])
    assert not any(map(any, o.rows))
    titles = [figure.title for figure in found.findings.sections[0].figures]
    assert titles[-4:] == [f"Changed share by {side} of {one.name}" for one in (q, o) for side in ("row", "column")]
    (chosen,) = taken([OverTimeMeasure], base, *series, mode="series", picture=names[0])
    assert [one.name for one in chosen.result.ratios] == names[:1]
    (alone,) = taken([OverTimeMeasure], base, series[0], mode="run")
    assert alone.result.ratios[0].steps == [1]


def blocks(starts: list[int], size: int) -> list[tuple[int, int]]:
    return [(start, end - start) for start, end in itertools.pairwise([*starts, size])]


def test_checkpoints_a_step_apart_are_put_next_to_published_steps() -> None:
    opened_ones = opened(*({"model.norm.weight": torch.full((2, 3), value)} for value in (1.0, 2.0, 1.0)))
    for steps, key in (((7, 8), "changed_per_step"), ((7, 9), "changed_per_checkpoint")):
        tuned = [dataclasses.replace(one, step=step) for one, step in zip(opened_ones.tuned, steps, strict=True)]
        (found,) = taken_of([OverTimeMeasure], dataclasses.replace(opened_ones, tuned=tuned), "run", changed_by="bf16")
        assert found.findings.published == {key: 1.0, "outside_final": 1.0}


def test_other_shapes_and_no_checkpoints_are_refused() -> None:
    with pytest.raises(ValueError, match="shapes differ"):
        follow(torch.zeros(3, 4), [torch.zeros(4, 3)])
    with pytest.raises(ValueError, match="at least one"):
        follow(torch.zeros(3, 4), [])


# --------------------------------------------------------------------------------------------------
# the report


def numbers_of(num_steps: int = 3, names: int = 3) -> OverTimeResult:
    generator = np.random.default_rng(9)
    base = torch.zeros(8, 9)
    labels = ["model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.weight", "model.<b>norm.weight"]
    found = {
        name: follow(base, [torch.from_numpy(generator.integers(0, 2, (8, 9))).float() for _ in range(num_steps)])
        for name in labels[:names]
    }
    return over_time_result(found, [10 * (t + 1) for t in range(num_steps)], "any change")


def test_numbers_are_grouped_and_json_ready() -> None:
    numbers = numbers_of().numbers()
    assert numbers == json_safe(numbers)
    assert numbers["steps"] == [10, 20, 30] and numbers["total"]["numel"] == 3 * 72
    assert [row["layer"] for row in numbers["layers"]] == [0, 1, None]
    with pytest.raises(ValueError, match="2 steps"):
        over_time_result({"w": follow(torch.zeros(2), [torch.ones(2)])}, [1, 2], "any")


@pytest.mark.parametrize("num_steps", [1, 100])
def test_the_section_is_drawn(num_steps: int) -> None:
    numbers = numbers_of(num_steps)
    section = over_time_section(numbers, "sparsity_1e-5")
    page = html_page(
        Document(title="t", facts=[], headlines=headlines(numbers), notes=[], sections=[section]), version="0"
    )
    assert "Growth of the changed set" in page and "<b>norm" not in page
    growth = section.figures[2]
    assert isinstance(growth, Lines) and "expected, ever changed" in growth.series


def test_headlines_say_what_came_back() -> None:
    base = torch.zeros(10)
    changed = torch.tensor([1.0] * 4 + [0.0] * 6)
    numbers = over_time_result({"w": follow(base, [changed, changed * torch.arange(10)])}, [5, 10], "any")
    first, second, third = headlines(numbers)
    assert "from 60.00% at step 5 to 70.00% at step 10" in first
    assert second.startswith("25.00%") and "10.00% of all" in second and "25.00% are back" in second
    assert third.startswith("60.00%")


def test_reports_of_nothing_are_still_reports() -> None:
    nothing = over_time_result({}, [], "any")
    assert headlines(nothing) == [] and over_time_section(nothing).figures == []
    still = over_time_result({"w": follow(torch.ones(3), [torch.ones(3)])}, [1], "any")
    assert headlines(still) == ["No weight changed at any checkpoint."]
    assert over_time_section(still).tables
