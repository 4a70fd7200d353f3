"""Distances in representable steps, against a walk over all of them."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.measures.maths.ulp import bin_label, count_by_powers, step_dtype, ulp_distance

SMALL = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", SMALL, ids=str)
def test_distance_is_the_number_of_values_between(dtype: torch.dtype) -> None:
    bits = {1: torch.uint8, 2: torch.uint16}[dtype.itemsize]
    every = torch.arange(256**dtype.itemsize, dtype=torch.int32).to(bits).view(dtype).double()
    # All numbers of the dtype in order: a rank differs by one from one value to the next, and -0 ranks as 0 does.
    values = every[every.isfinite()].unique()
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(len(values), (2000,), generator=generator) for _ in range(2))
    found = ulp_distance(values[a].to(dtype), values[b].to(dtype))
    assert found.tolist() == (a - b).abs().tolist()
    ends = values[[0, -1]].to(dtype)
    assert ulp_distance(ends[:1], ends[1:]).tolist() == [len(values) - 1]


def test_zeros_are_one_point() -> None:
    for dtype in (*SMALL, torch.float32, torch.float64):
        tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        zero = torch.zeros(3, dtype=dtype)
        assert ulp_distance(zero, torch.tensor([-0.0, tiny, -tiny], dtype=dtype)).tolist() == [0, 1, 1]
        assert ulp_distance(torch.tensor([-tiny], dtype=dtype), torch.tensor([tiny], dtype=dtype)).tolist() == [2]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(1, 5))
def test_each_step_of_float32_counts_one(value: float, steps: int) -> None:
    start = torch.tensor([value], dtype=torch.float32)
    there = start
    for _ in range(steps):
        there = torch.nextafter(there, torch.tensor([math.inf]))
    if there.isfinite():
        assert ulp_distance(start, there).tolist() == ulp_distance(there, start).tolist() == [steps]


@given(*[st.floats(allow_nan=False, allow_infinity=False)] * 2)
def test_float64_saturates(a: float, b: float) -> None:
    def rank(value: float) -> int:
        bits = struct.unpack("<Q", struct.pack("<d", value))[0]
        return bits if bits < 2**63 else 2**63 - bits

    expected = min(abs(rank(a) - rank(b)), 2**63 - 1)
    assert ulp_distance(*(torch.tensor([x], dtype=torch.float64) for x in (a, b))).tolist() == [expected]


def test_shape_is_kept_and_dtypes_must_agree() -> None:
    assert ulp_distance(torch.ones(2, 3), torch.zeros(2, 3)).shape == (2, 3)
    for b in (torch.ones(1, dtype=torch.float64), torch.ones(1, dtype=torch.int32)):
        with pytest.raises(ValueError, match="floats of one dtype"):
            ulp_distance(torch.ones(1), b)
    with pytest.raises(ValueError, match="floats of one dtype"):
        ulp_distance(torch.ones(1, dtype=torch.int8), torch.ones(1, dtype=torch.int8))


EDGES = sorted({2**k + d for k in range(63) for d in (-1, 0, 1)} | {2**63 - 1})


@given(st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 9) | st.sampled_from(EDGES)))
def test_bins_are_powers_of_two(distances: list[int]) -> None:
    counts = count_by_powers(torch.tensor(distances, dtype=torch.int64).numpy())
    expected = [sum((d - 1).bit_length() == place for d in distances if d) for place in range(64)]
    assert [*counts, *[0] * (64 - len(counts))] == expected
    assert not counts or counts[-1] > 0
    for place in range(64):
        first, _, last = bin_label(place).partition("-")
        low, high = int(first), int(last or first)
        assert expected[place] == sum(low <= d <= high for d in distances)


def test_labels() -> None:
    assert [bin_label(place) for place in range(6)] == ["1", "2", "3-4", "5-8", "9-16", "17-32"]


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float16, torch.bfloat16),
        (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e5m2),
        (torch.float64, torch.float32, torch.float32),
        (torch.int8, torch.float32, None),
        (torch.int8, torch.int8, None),
    ],
)
def test_the_narrower_dtype_decides(a: torch.dtype, b: torch.dtype, expected: torch.dtype | None) -> None:
    assert step_dtype(a, b) == step_dtype(b, a) == expected
