"""Flat bits, compared with Python sets."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.bits import bits_from_indices, bits_from_mask, bits_to_indices, get_bits, set_bits, unpack_bits
from ssrctl.core.mask import BlockMask

sizes_and_sets = st.integers(0, 90).flatmap(
    lambda n: st.tuples(st.just(n), st.sets(st.integers(0, max(n - 1, 0)) if n else st.nothing()))
)


def shuffled(indices):
    return torch.tensor(sorted(indices, key=lambda i: (i * 7919) % 101), dtype=torch.int64)


@given(sizes_and_sets)
def test_round_trip_and_layout(case):
    size, chosen = case
    packed = bits_from_indices(shuffled(chosen), size)
    # bit i is bit i % 8 of byte i // 8, so the bytes are the little-endian form of the sum of 2**i
    assert bytes(packed.tolist()) == sum(2**i for i in chosen).to_bytes(-(-size // 8), "little")
    assert bits_to_indices(packed, size).tolist() == sorted(chosen)
    assert bits_to_indices(packed, size, chunk=8).tolist() == sorted(chosen)
    assert get_bits(packed, torch.arange(size)).tolist() == [i in chosen for i in range(size)]
    for start in range(0, size, 8):
        assert unpack_bits(packed, start, size).tolist() == [i in chosen for i in range(start, size)]


@given(sizes_and_sets, st.integers(0, 2**20))
def test_setting_adds_to_what_is_set(case, seed):
    size, chosen = case
    before = {i for i in range(size) if (seed >> (i % 20)) & 1}
    packed = bits_from_indices(shuffled(before), size)
    set_bits(packed, shuffled(chosen))
    assert bits_to_indices(packed, size).tolist() == sorted(before | chosen)


def test_bits_of_a_mask():
    mask = BlockMask.from_indices({"a": (3, 40), "b": ()}, {"a": torch.tensor([119, 0, 17])})
    bits = bits_from_mask(mask)
    assert bits_to_indices(bits["a"], 120).tolist() == [0, 17, 119]
    assert bits["b"].tolist() == [0]


def test_unpacking_starts_at_a_byte():
    with pytest.raises(AssertionError):
        unpack_bits(torch.zeros(4, dtype=torch.uint8), 3, 9)
