"""Packed bits against Python sets."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.bits import bits_from_indices, bits_from_mask, bits_to_indices, get_bits, set_bits, unpack_bits
from ssrctl.core.mask import BlockMask

SETS = st.integers(1, 70).flatmap(lambda n: st.tuples(st.just(n), st.sets(st.integers(0, n - 1))))


def tensor(indices: set[int] | list[int]) -> torch.Tensor:
    return torch.tensor(list(indices), dtype=torch.int64)


@given(SETS)
def test_bits_are_little_endian_within_a_byte(case: tuple[int, set[int]]) -> None:
    numel, chosen = case
    packed = bits_from_indices(tensor(chosen), numel)
    expected = sum(1 << index for index in chosen).to_bytes(-(-numel // 8), "little")
    assert bytes(packed.tolist()) == expected


@given(SETS, st.sampled_from([8, 16, 1 << 22]))
def test_there_and_back(case: tuple[int, set[int]], chunk: int) -> None:
    numel, chosen = case
    packed = bits_from_indices(tensor(chosen), numel)
    assert bits_to_indices(packed, numel, chunk).tolist() == sorted(chosen)
    assert get_bits(packed, torch.arange(numel)).tolist() == [i in chosen for i in range(numel)]


@given(SETS, st.data())
def test_setting_is_a_union_in_place(case: tuple[int, set[int]], data: st.DataObject) -> None:
    numel, chosen = case
    more = data.draw(st.lists(st.integers(0, numel - 1), unique=True))
    packed = bits_from_indices(tensor(chosen), numel)
    set_bits(packed, tensor(more))
    assert bits_to_indices(packed, numel).tolist() == sorted(chosen | set(more))


def test_a_window_of_bits() -> None:
    packed = bits_from_indices(tensor([0, 8, 15, 17, 22]), 23)
    assert unpack_bits(packed, 8, 18).tolist() == [True, *[False] * 6, True, False, True]
    assert unpack_bits(packed, 16, 23).tolist() == [False, True, False, False, False, False, True]
    assert unpack_bits(packed, 8, 8).tolist() == []


def test_nothing() -> None:
    assert bits_from_indices(tensor([]), 0).numel() == 0
    assert bits_to_indices(bits_from_indices(tensor([]), 0), 0).tolist() == []


def test_of_a_mask() -> None:
    mask = BlockMask.from_indices({"w": (3, 20), "b": (5,)}, {"w": tensor([59, 0, 21])})
    bits = bits_from_mask(mask)
    assert bits_to_indices(bits["w"], 60).tolist() == [0, 21, 59]
    assert bits_to_indices(bits["b"], 5).tolist() == []
