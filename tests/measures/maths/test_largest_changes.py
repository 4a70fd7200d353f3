"""The largest changes, against sorting everything."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.measures.maths.largest_changes import LargestChanges, WeightChange

# Few distinct values, so that there are ties, zeros and differences that are not finite.
VALUES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 3.0, 1e-300, 5e-324, 1e300, math.inf, -math.inf, math.nan])
PIECE = st.lists(st.tuples(VALUES, VALUES), max_size=8)


def sorted_whole(pieces: dict[tuple[str, int], list[tuple[float, float]]], count: int) -> tuple[list, list]:
    moved = [
        (name, start + place, before, after)
        for (name, start), values in pieces.items()
        for place, (before, after) in enumerate(values)
        if math.isfinite(after - before) and after != before
    ]
    absolute = sorted(moved, key=lambda one: (-abs(one[3] - one[2]), one[0], one[1]))
    nonzero = [one for one in moved if one[2] and math.isfinite(abs(one[3] - one[2]) / abs(one[2]))]
    relative = sorted(nonzero, key=lambda one: (-abs(one[3] - one[2]) / abs(one[2]), one[0], one[1]))
    return absolute[:count], relative[:count]


def plain(changes: list[WeightChange]) -> list[tuple[str, int, float, float]]:
    return [(one.name, one.index, one.before, one.after) for one in changes]


@given(st.lists(PIECE, max_size=6), st.integers(1, 5), st.randoms(use_true_random=False))
def test_largest_changes_are_those_of_a_sort_in_any_order(lists: list, count: int, shuffle: random.Random) -> None:
    pieces = {("ab"[number % 2], 100 * number): values for number, values in enumerate(lists)}
    one, parts = LargestChanges(count), []
    order = list(pieces)
    shuffle.shuffle(order)
    for name, start in order:
        values = np.array(pieces[name, start], dtype=np.float64).reshape(-1, 2)
        part = LargestChanges(count)
        for top in (one, part):
            top.add(name, values[:, 0].copy(), values[:, 1].copy(), np.arange(len(values)), start)
        parts.append(part)
    merged = LargestChanges(count)
    for part in parts:
        merged.merge(part)
    absolute, relative = sorted_whole(pieces, count)
    for top in (one, merged):
        assert plain(top.absolute) == absolute
        assert plain(top.relative) == relative


def test_a_change_in_numbers() -> None:
    change = WeightChange(name="w", index=17, before=-2.0, after=1.0)
    assert (change.change, change.relative_change) == (3.0, 1.5)
    assert (
        change.position((4, 5)) == (3, 2)
        and change.position((2, 3, 4)) == (1, 1, 1)
        and change.position((99,)) == (17,)
    )
    assert WeightChange(name="w", index=0, before=0.0, after=1.0).relative_change is None
    assert WeightChange(name="w", index=0, before=0.0, after=1.0).position(()) == ()


def test_places_are_those_in_the_tensor() -> None:
    top = LargestChanges(2)
    top.add("w", np.array([1.0, 1.0, 4.0]), np.array([2.0, 1.5, 4.25]), np.array([3, 8, 9]), start=1000)
    assert plain(top.absolute) == [("w", 1003, 1.0, 2.0), ("w", 1008, 1.0, 1.5)]
    with pytest.raises(ValueError, match="at least one"):
        LargestChanges(0)


def test_a_tie_that_stands_earlier_comes_in_late() -> None:
    top, one, two = LargestChanges(1), np.array([1.0]), np.array([2.0])
    for start, kept in ((500, 500), (900, 500), (100, 100)):
        top.add("w", one, two, np.array([0]), start)
        assert [change.index for change in (*top.absolute, *top.relative)] == [kept, kept]
