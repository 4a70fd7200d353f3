"""Counting bits, compared with Python's own count."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core import popcount as module
from ssrctl.core.popcount import count_bits, popcount


@given(st.lists(st.integers(-(2**63), 2**63 - 1), max_size=20))
def test_bits_of_words(words):
    assert popcount(torch.tensor(words, dtype=torch.int64)).tolist() == [(w % 2**64).bit_count() for w in words]


def test_every_single_bit_and_every_run_of_bits():
    words = [1 << i for i in range(64)] + [(1 << i) - 1 for i in range(65)]
    signed = torch.tensor([w - 2**64 if w >= 2**63 else w for w in words])
    assert popcount(signed).tolist() == [1] * 64 + list(range(65))


@given(st.binary(max_size=70), st.integers(0, 9), st.sampled_from([3, 8, 1 << 22]))
def test_bits_of_bytes_wherever_they_lie(data, skipped, chunk):
    packed = torch.tensor(list(data), dtype=torch.uint8)[skipped:]
    with_chunk, module._CHUNK_BYTES = module._CHUNK_BYTES, chunk
    try:
        assert count_bits(packed) == sum(byte.bit_count() for byte in data[skipped:])
        assert count_bits(packed[::2]) == sum(byte.bit_count() for byte in data[skipped::2])
    finally:
        module._CHUNK_BYTES = with_chunk


def test_the_operand_is_left_as_it_was():
    words = torch.tensor([-1, 5])
    popcount(words)
    assert words.tolist() == [-1, 5]
