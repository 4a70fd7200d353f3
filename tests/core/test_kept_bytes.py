"""Kept units as bytes: nothing is lost, and few bytes are sent."""

import pytest
import torch

from ssrctl.core.claims import KeptUnit
from ssrctl.core.kept_bytes import Numbering, pack_unit, unpack_unit
from ssrctl.core.layout import Shards

SIZES = {"a": 70_000, "empty": 3, "b": 300, "c": 200_000, "d": 900}
SHARDS = Shards({name: torch.empty(size) for name, size in SIZES.items()})
SHARDS.add({"in another shard": torch.empty(5)})


def kept(dtype, share, spoil=None, names=("in another shard", "c", "a", "d", "b")):
    """A unit that keeps about ``share`` of the coordinates, the largest of random gradients, named in another order."""
    generator = torch.Generator().manual_seed(3)
    unit = KeptUnit(SHARDS)
    for name in names:
        size = SIZES.get(name, 5)
        gradient = torch.randn(size, generator=generator).to(dtype) * 1e-3
        chosen = gradient.abs().topk(max(1, int(share * size))).indices.sort().values
        if spoil is not None:
            gradient[chosen[0]] = spoil
        unit.keep({name: gradient}, {name: chosen})
    return unit


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("spoil", [None, 0.0, -0.0, float("inf"), -1e30])
@pytest.mark.parametrize("share", [0.01, 0.4, 0.0])
def test_sets_values_and_their_order_survive(dtype, spoil, share) -> None:
    unit, numbering = kept(dtype, share, spoil), Numbering(SHARDS, dtype)
    found = unpack_unit(pack_unit(unit, numbering), numbering)
    assert list(found.sets) == list(unit.sets) == list(found.values) == ["in another shard", "c", "a", "d", "b"]
    for name, chosen in unit.sets.items():
        assert found.sets[name].equals(chosen)
        assert torch.equal(
            found.values[name].view(torch.uint8), unit.values[name].view(torch.uint8)
        )  # also -0.0 and NaN


def test_a_unit_that_keeps_nothing_takes_no_bytes() -> None:
    numbering = Numbering(SHARDS, torch.bfloat16)
    packed = pack_unit(KeptUnit(SHARDS), numbering)
    assert packed.numel() == 0 and not unpack_unit(packed, numbering).sets


def test_a_percent_in_bfloat16_takes_less_than_twenty_bits_each() -> None:
    unit = kept(torch.bfloat16, 0.01, names=("c", "a"))
    bits = 8 * pack_unit(unit, Numbering(SHARDS, torch.bfloat16)).numel() / unit.count
    assert bits < 20
