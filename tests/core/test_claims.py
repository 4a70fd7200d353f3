"""Allocations on small numbers by hand, and the tallies of a selection. Whole runs: ``test_kronos_scopes``."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import allocations

from ssrctl.core.bits import bits_to_indices, set_bits
from ssrctl.core.claims import ALLOCATIONS, KeptUnit, Selection
from ssrctl.core.layout import Shards
from ssrctl.core.topk import NonFiniteGradient

SHAPES = {"w": (3, 5), "v": (7,), "s": ()}


def by_name(w, v=None):
    return {"w": torch.tensor(w)} | ({} if v is None else {"v": torch.tensor(v)})


def lists(indices):
    return {name: found.tolist() for name, found in indices.items()}


def kept(unit):
    return {
        name: dict(zip(found.to_indices().tolist(), unit.values[name].tolist(), strict=True))
        for name, found in unit.sets.items()
    }


def made(kind, sizes, selection=None, **protected):
    """Claims over tensors of these sizes; ``protected``: flat indices by name."""
    shards = Shards({name: torch.empty(size) for name, size in sizes.items()})
    bits = [torch.zeros(layout.size // 8, dtype=torch.uint8) for layout in shards.layouts]
    for name, indices in protected.items():
        set_bits(shards.bits(bits)[name], torch.tensor(indices, dtype=torch.int64))
    return ALLOCATIONS[kind](shards, bits, selection or Selection())


def take(claims, gradients, k):
    claims.open_unit()
    return lists(claims.take(gradients, k))


def test_a_unit_takes_what_is_left():
    claims = made("disjoint", {"w": 3, "v": 2})
    assert take(claims, by_name([5.0, -6.0, 1.0], [2.0, 5.5]), 2) == {"w": [1], "v": [1]}
    assert take(claims, by_name([5.0, -6.0, 1.0], [2.0, 5.5]), 2) == {"w": [0], "v": [0]}
    assert take(claims, by_name([5.0, -6.0, 1.0], [2.0, 5.5]), 2) == {"w": [2], "v": []}
    assert claims.selection.tally.num_missing == 1
    assert [kept(unit) for unit in claims.units] == [
        {"w": {1: -6.0}, "v": {1: 5.5}},
        {"w": {0: 5.0}, "v": {0: 2.0}},
        {"w": {2: 1.0}},
    ]


def test_protected_bits_are_not_written_to():
    claims = made("disjoint", {"w": 3}, w=[1])
    assert take(claims, by_name([5.0, -6.0, 1.0]), 1) == {"w": [0]}
    assert bits_to_indices(claims.protected[0], 3).tolist() == [1]
    assert bits_to_indices(claims.taken["w"], 3).tolist() == [0, 1]


def test_overlap_forgets_what_was_taken_but_not_what_is_protected():
    claims = made("overlap", {"w": 3}, w=[1])
    for _ in range(2):
        assert take(claims, by_name([5.0, -6.0, 1.0]), 1) == {"w": [0]}
    assert claims.selection.tally.num_reused == 0


def test_pooled_selects_once_from_the_sum():
    claims = made("pooled", {"w": 3})
    assert take(claims, by_name([9.0, 0.0, 0.0]), 1) == {}
    assert take(claims, by_name([9.0, 8.0, -7.0]), 1) == {}  # what is there now is the sum over both units
    claims.finish(by_name([9.0, 8.0, -7.0]))
    assert [kept(unit) for unit in claims.units] == [{"w": {0: 9.0, 1: 8.0}}]


def test_pooled_without_gradients_keeps_nothing():
    claims = made("pooled", {"w": 3})
    claims.finish({})
    assert claims.units == []


def test_shuffled_keeps_each_gradient_at_the_set_of_the_unit_before():
    claims = made("shuffled", {"w": 4})
    gradients = [[4.0, 1.0, 2.0, 3.0], [5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 12.0]]
    assert [take(claims, by_name(g), 1)["w"] for g in gradients] == [[0], [3], [2]]
    held = by_name(gradients[0])["w"]
    claims.finish({})
    assert [kept(unit) for unit in claims.units] == [{"w": {2: 2.0}}, {"w": {0: 5.0}}, {"w": {3: 12.0}}]
    assert claims.first == {}
    assert torch.equal(held, torch.tensor(gradients[0]))


def test_shuffled_copies_the_first_gradient():
    claims = made("shuffled", {"w": 2})
    first = by_name([3.0, 1.0])
    take(claims, first, 1)
    first["w"].zero_()  # as when the optimizer drops it and the memory is used again
    take(claims, by_name([1.0, 2.0]), 1)
    claims.finish({})
    assert kept(claims.units[0]) == {"w": {1: 1.0}}


def test_shuffled_with_one_unit_and_with_none():
    claims = made("shuffled", {"w": 2})
    claims.finish({})
    assert claims.units == []
    take(claims, by_name([3.0, 1.0]), 1)
    claims.finish({})
    assert kept(claims.units[0]) == {"w": {0: 3.0}}


def test_reuse_by_hand():
    selection = Selection(reuse_factor=2.0)
    claims = made("disjoint", {"w": 6}, selection, w=[5])
    assert take(claims, by_name([9.0, 8.0, 7.0, 0.0, 0.0, 99.0]), 3) == {"w": [0, 1, 2]}
    # Free: 3 and 4 with 4 and 2. Of the claimed, 5.0 is at least twice 2, and 7.5 is not twice 4.
    assert take(claims, by_name([5.0, 1.0, 7.5, 4.0, -2.0, 99.0]), 2) == {"w": [2, 3]}
    assert selection.tally.num_reused == 1
    # Exactly twice is enough.
    assert take(claims, by_name([4.0, 0.0, 0.0, 0.0, -2.0, 99.0]), 1) == {"w": [0]}
    assert selection.tally.num_reused == 2


def test_ties_of_reuse():
    claims = made("disjoint", {"w": 6}, Selection(reuse_factor=1.0))
    take(claims, by_name([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]), 3)
    # All equal: three free ones would be taken, and each claimed one may displace one: all three go.
    assert take(claims, by_name([2.0] * 6), 3) == {"w": [0, 1, 2]}
    claims = made("disjoint", {"w": 6}, Selection(reuse_factor=1.0))
    take(claims, by_name([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]), 2)
    # Two claimed for three free ones: the last of the free go.
    assert take(claims, by_name([2.0] * 6), 3) == {"w": [0, 1, 2]}
    claims = made("disjoint", {"w": 4}, Selection(reuse_factor=1.0))
    take(claims, by_name([1.0, 1.0, 1.0, 0.0]), 3)
    # One free one for three claimed: the first of the claimed comes in.
    assert take(claims, by_name([2.0] * 4), 1) == {"w": [0]}


def test_reuse_before_anything_was_claimed_and_with_new_tensors():
    claims = made("disjoint", {"w": 2, "v": 1}, Selection(reuse_factor=1.0))
    assert take(claims, {}, 3) == {}
    assert take(claims, by_name([1.0, 2.0]), 1) == {"w": [1]}
    assert take(claims, {"v": torch.tensor([3.0])}, 1) == {"v": [0]}
    assert take(claims, by_name([1.0, 2.0], [3.0]), 1) == {"w": [], "v": [0]}


coarse = st.integers(0, 2**31)


@given(seed=coarse, factor=st.sampled_from([1.0, 1.5, 3.0]), density=st.sampled_from([0.0, 0.3]))
def test_reuse_on_random_gradients_full_of_ties(seed, factor, density):
    generator = torch.Generator().manual_seed(seed)
    protected = {name: torch.rand(shape, generator=generator) < density for name, shape in SHAPES.items()}
    units = []
    for number in range(4):
        gradients = {name: torch.randn(shape, generator=generator).mul(2).round() for name, shape in SHAPES.items()}
        if number == 2:
            del gradients["v"]
        units.append((gradients, int(torch.randint(0, 12, (), generator=generator))))
    claims = made(
        "disjoint",
        {name: mask.numel() for name, mask in protected.items()},
        Selection(reuse_factor=factor),
        **{name: mask.flatten().nonzero().flatten().tolist() for name, mask in protected.items()},
    )
    found = [take(claims, gradients, k) for gradients, k in units]
    expected, _ = allocations.reusing(factor)(
        [({name: g.numpy() for name, g in gradients.items()}, k) for gradients, k in units],
        {name: mask.numpy() for name, mask in protected.items()},
    )
    reused, seen = 0, {name: set() for name in SHAPES}
    for ours, masks in zip(found, expected, strict=True):
        for name, mask in masks.items():
            theirs = mask.reshape(-1).nonzero()[0].tolist()
            assert ours.get(name, []) == theirs
            reused += len(seen[name] & set(theirs))
            seen[name] |= set(theirs)
    assert claims.selection.tally.num_reused == reused


def test_nothing_is_taken_from_gradients_with_nan():
    claims = made("disjoint", {"w": 2, "v": 2})
    with pytest.raises(NonFiniteGradient, match="the gradient of v has 1 value"):
        take(claims, by_name([1.0, 2.0], [float("nan"), 1.0]), 1)
    assert not any(bits.any() for bits in claims.taken.values())
    assert claims.units[-1].count == 0


def test_what_a_unit_keeps():
    unit = KeptUnit(Shards({"w": torch.empty(4), "v": torch.empty(9, dtype=torch.bfloat16)}))
    assert (unit.count, unit.num_bytes, unit.rms()) == (0, 0, 0.0)
    gradients = {"w": torch.tensor([[3.0, -4.0], [5.0, 0.0]]).t(), "v": torch.ones(9, dtype=torch.bfloat16)}
    assert not gradients["w"].is_contiguous()
    unit.keep(gradients, {"w": torch.tensor([0, 2]), "v": torch.tensor([], dtype=torch.int64), "x": torch.tensor([1])})
    assert kept(unit) == {"w": {0: 3.0, 2: -4.0}}
    assert unit.count == 2
    assert unit.rms() == pytest.approx(12.5**0.5, rel=1e-15)
    # two float32 values, two int16 indices, one int32 count of a block of 65,536
    assert unit.num_bytes == 2 * 4 + 2 * 2 + 4


def test_a_unit_keeps_half_precision_values_as_they_are():
    unit = KeptUnit(Shards({"v": torch.empty(9)}))
    unit.keep({"v": torch.full((9,), 3.0, dtype=torch.bfloat16)}, {"v": torch.tensor([1, 4])})
    assert unit.values["v"].dtype == torch.bfloat16
    assert unit.num_bytes == 2 * 2 + 2 * 2 + 4
