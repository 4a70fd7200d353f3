"""Masters of half-precision weights, against exact rational arithmetic and every bf16 pattern."""

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssrctl.core.masters import REMAINDER_DTYPES, join_master, split_master

BF16_FINITE_MAX = 3.3895313892515355e38
LAST_MASTER = struct.unpack("<f", struct.pack("<I", 0x7F7F7FFF))[0]


def fp32_from_bits(bits):
    """float32 tensor whose bit patterns are the given integers in 0..2**32-1."""
    return torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32).view(torch.float32)


def bits_of(values):
    return [b % 2**32 for b in values.view(torch.int32).tolist()]


def all_bf16():
    return torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("low", [0, 1, 2, 0x1234, 0x7FFE, 0x7FFF, 0x8000, 0x8001, 0xABCD, 0xFFFF])
def test_every_upper_half_of_an_fp32_value_with_this_lower_half(low):
    bits = [(upper << 16) | low for upper in range(65536)]
    masters = fp32_from_bits(bits)
    stored, remainder = split_master(masters, torch.bfloat16)
    assert (stored.dtype, remainder.dtype) == (torch.bfloat16, torch.int16)
    joined = join_master(stored, remainder)
    number = ~masters.isnan()
    reached = masters.isinf() | (masters.abs() <= LAST_MASTER)
    assert [b for b, ok in zip(bits_of(joined), reached.tolist(), strict=True) if ok] == [
        b for b, ok in zip(bits, reached.tolist(), strict=True) if ok
    ]
    # what cannot be reached is saturated, with its sign, and stays finite
    saturated = number & ~reached
    assert int(saturated.sum()) == (2 if low >= 0x8000 else 0)  # one upper half, both signs
    assert joined[saturated].tolist() == [m * LAST_MASTER for m in masters[saturated].sign().tolist()]
    assert stored[saturated].double().abs().tolist() == [BF16_FINITE_MAX] * int(saturated.sum())
    # NaN stays NaN on both sides, infinity infinity, a finite weight finite
    assert torch.equal(stored.isnan(), masters.isnan())
    assert torch.equal(joined.isnan(), masters.isnan())
    assert torch.equal(stored.isinf(), masters.isinf())
    assert torch.equal(stored.signbit()[number], masters.signbit()[number])


def test_every_bf16_weight_is_its_own_master():
    stored = all_bf16()
    masters = join_master(stored, torch.zeros(65536, dtype=torch.int16))
    number = ~stored.isnan()
    assert torch.equal(masters[number], stored.float()[number])
    again, remainder = split_master(masters, torch.bfloat16)
    assert torch.equal(again.view(torch.int16)[number], stored.view(torch.int16)[number])
    assert not remainder.any()


def nearest_bf16(value):
    """The bf16 values nearest to a float, by exact rational distance over all finite bf16 values around it."""
    upper = struct.unpack("<I", struct.pack("<f", abs(value)))[0] >> 16
    candidates = [struct.unpack("<f", struct.pack("<I", u << 16))[0] for u in (upper, upper + 1) if u <= 0x7F7F]
    distances = [abs(Fraction(abs(value)) - Fraction(c)) for c in candidates]
    return [c if value > 0 else -c for c, d in zip(candidates, distances, strict=True) if d == min(distances)]


@given(st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-LAST_MASTER, max_value=LAST_MASTER))
def test_the_stored_weight_is_the_nearest_one_and_ties_go_away_from_zero(value):
    stored, _ = split_master(torch.tensor([value]), torch.bfloat16)
    nearest = nearest_bf16(value)
    assert float(stored) == max(nearest, key=abs)


@given(st.floats(-2, 2, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30), st.integers(1, 60))
def test_small_updates_add_up_as_in_fp32(start, count):
    stored = torch.tensor([start]).to(torch.bfloat16)
    remainder = torch.zeros(1, dtype=torch.int16)
    expected = stored.float()
    for _ in range(count):
        expected = expected + 1e-5
        stored, remainder = split_master(join_master(stored, remainder) + 1e-5, torch.bfloat16)
        assert torch.equal(join_master(stored, remainder), expected)


@given(st.floats(width=32, min_value=-65504, max_value=65504))
def test_fp16_masters_are_exact(value):
    masters = torch.tensor([value])
    stored, remainder = split_master(masters, torch.float16)
    assert (stored.dtype, remainder.dtype) == (torch.float16, torch.float32)
    assert bits_of(join_master(stored, remainder)) == bits_of(masters)
    assert float(stored) == struct.unpack("<e", struct.pack("<e", value))[0]  # Python rounds to nearest even


@pytest.mark.parametrize("around", [2.0**-25, 2.0**-24, 2.0**-14, 1.0, 1024.0, 32768.0])
def test_fp16_masters_are_exact_for_whole_stretches_of_fp32(around):
    start = int(torch.tensor(around).view(torch.int32))
    magnitudes = torch.arange(start - 20_000, start + 20_000, dtype=torch.int32).view(torch.float32)
    for masters in (magnitudes, -magnitudes):
        assert torch.equal(join_master(*split_master(masters, torch.float16)), masters)


def test_every_fp16_weight_is_its_own_master():
    stored = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
    joined = join_master(stored, torch.zeros(65536))
    number = ~stored.isnan()
    assert bits_of(joined[number]) == bits_of(stored.float()[number])
    again, remainder = split_master(joined, torch.float16)
    assert torch.equal(again.view(torch.int16)[number], stored.view(torch.int16)[number])
    assert not remainder.any()


def test_fp16_saturates_and_shows_infinity_and_nan():
    masters = torch.tensor([65519.0, 65520.0, 1e30, -1e30, float("inf"), -float("inf"), float("nan")])
    stored, remainder = split_master(masters, torch.float16)
    assert stored[:6].tolist() == [65504.0, 65504.0, 65504.0, -65504.0, float("inf"), -float("inf")]
    last = 65519.99609375
    assert join_master(stored, remainder)[:6].tolist() == [65519.0, last, last, -last, float("inf"), -float("inf")]
    assert bool(stored[6].isnan())
    assert bool(join_master(stored, remainder)[6].isnan())


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="float32 have no remainder"):
        split_master(torch.zeros(1), torch.float32)
    with pytest.raises(ValueError, match="float32 have no remainder"):
        join_master(torch.zeros(1), torch.zeros(1))
    with pytest.raises(ValueError, match=r"masters are torch\.float32, got torch\.float64"):
        split_master(torch.zeros(1, dtype=torch.float64), torch.bfloat16)
    with pytest.raises(ValueError, match=r"the remainder of torch\.bfloat16 is torch\.int16, got torch\.float32"):
        join_master(torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", REMAINDER_DTYPES)
def test_on_a_gpu_as_on_the_cpu(dtype):
    masters = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    for there, here in zip(split_master(masters.cuda(), dtype), split_master(masters, dtype), strict=True):
        assert torch.equal(there.cpu(), here)
    assert torch.equal(join_master(*split_master(masters.cuda(), dtype)).cpu(), masters)
