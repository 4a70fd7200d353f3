"""The kept gradient of a unit as bytes, without loss and with few of them: what a process sends to the others.

All tensors' coordinates are numbered through, and the ascending numbers are stored as in Elias (1974) and Fano: the low
byte of each, and the high parts as one bit per number and one per 256 coordinates. A bfloat16 value is stored as sign
and mantissa (a byte), and its exponent in unary, counted from the smallest exponent: kept gradients are the largest
ones, most of them within a factor of four of the threshold. Of a float32 value the lower half is added as it is.

For a unit of 1% of the coordinates in bfloat16 that makes about 19 bits each, where an int32 index and the value take
48, and two bytes of index and the value 32.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ssrctl.core.bits import bits_from_indices, bits_to_indices
from ssrctl.core.claims import KeptPart, KeptUnit
from ssrctl.core.index_sets import IndexSet
from ssrctl.core.layout import Shards

# int64 numbers: coordinates, bytes of the high parts, smallest exponent, bits of the exponents, tensors
_HEADER = 5
_RAW = -1  # in place of the smallest exponent: values are stored as they are
# Unary exponents that would take more bits than this per value (zeros among the values) are not worth it.
_MOST_EXPONENT_BITS = 8


class Numbering:
    """The positions of all shards, numbered through.

    Args:
        shards: of the parameters.
        dtype: of the gradients.

    Attributes:
        starts: the number of each shard's first position.
        names: of the parameters, in the order of their numbers.
        edges: the number of each parameter's first coordinate, and one past the last number.
    """

    def __init__(self, shards: Shards, dtype: torch.dtype) -> None:
        self.shards, self.dtype = shards, dtype
        self.starts = [0, *itertools.accumulate(layout.size for layout in shards.layouts)]
        first = {
            name: start + offset
            for start, layout in zip(self.starts, shards.layouts, strict=False)
            for name, offset in layout.offsets.items()
        }
        self.names, self.edges = list(first), [*first.values(), self.starts[-1]]


def pack_unit(unit: KeptUnit, numbering: Numbering) -> Tensor:
    """Return a kept unit as bytes, uint8 ``[b]`` on its device; ``unpack_unit`` returns the same sets and values."""
    if not unit.parts:
        return torch.empty(0, dtype=torch.uint8)
    where = torch.cat([part.chosen.to_indices() + numbering.starts[part.shard] for part in unit.parts])
    kept = torch.cat([part.values for part in unit.parts])
    assert kept.dtype == numbering.dtype, (kept.dtype, numbering.dtype)
    if len(unit.parts) > 1:  # parameters may come one by one, in any order
        where, order_of = where.sort()
        kept = kept[order_of]
    high, low_bytes = pack_indices(where)
    parts = [high, low_bytes]
    top, rest = _halves(kept)
    smallest, num_unary = _RAW, 0
    if top is not None:
        exponents = (top >> 7) & 255
        low = int(exponents.min())
        ends = (exponents - (low - 1)).cumsum(0)  # one past the unary code of each exponent
        if int(ends[-1]) <= _MOST_EXPONENT_BITS * kept.numel():
            smallest, num_unary = low, int(ends[-1])
            parts += [bits_from_indices(ends - 1, num_unary), ((top >> 8) & 128 | top & 127).to(torch.uint8), *rest]
    if smallest == _RAW:
        parts.append(kept.contiguous().view(torch.uint8))
    # a unit's root mean square is summed in the order of its tensors, which the receiver keeps
    number_of = {name: number for number, name in enumerate(numbering.names)}
    order = [number_of[name] for part in unit.parts for name in part.counts]
    header = torch.tensor([where.numel(), high.numel(), smallest, num_unary, len(order), *order], device=where.device)
    return torch.cat([header.view(torch.uint8), *parts])


def unpack_unit(packed: Tensor, numbering: Numbering) -> KeptUnit:
    """Return the unit that ``pack_unit`` packed."""
    unit = KeptUnit(numbering.shards)
    if not packed.numel():
        return unit
    reader = _Reader(packed)
    count, num_high, smallest, num_unary, num_tensors = reader.take(8 * _HEADER).view(torch.int64).tolist()
    order = reader.take(8 * num_tensors).view(torch.int64).tolist()
    where = unpack_indices(reader.take(num_high), reader.take(count))
    if smallest == _RAW:
        values = reader.take(count * numbering.dtype.itemsize).view(numbering.dtype)
    else:
        ends = bits_to_indices(reader.take(-(-num_unary // 8)), num_unary)
        exponents = ends.diff(prepend=ends.new_tensor([-1])) + (smallest - 1)
        signed = reader.take(count).to(torch.int64)
        top = (signed & 128) << 8 | exponents << 7 | signed & 127
        values = _joined(top, reader, numbering.dtype)
    # where each parameter's kept coordinates begin among all
    cuts = torch.searchsorted(where, torch.tensor(numbering.edges, device=where.device)).tolist()
    for numbers in _runs(order, cuts, numbering):
        first, last = cuts[numbers[0]], cuts[numbers[-1] + 1]
        shard = numbering.shards.number_of[numbering.names[numbers[0]]]
        chosen = IndexSet.from_indices(
            where[first:last] - numbering.starts[shard], numbering.shards.layouts[shard].size
        )
        counts = {numbering.names[number]: cuts[number + 1] - cuts[number] for number in numbers}
        unit.parts.append(KeptPart(shard, counts, chosen, values[first:last]))
    return unit


def pack_indices(where: Tensor, low_bits: int = 8) -> tuple[Tensor, Tensor]:
    """Return ascending numbers (int64 ``[k]``) as the bits of their high parts and their low parts, both uint8."""
    if not where.numel():
        return torch.empty(0, dtype=torch.uint8), torch.empty(0, dtype=torch.uint8)
    places = (where >> low_bits) + torch.arange(where.numel(), device=where.device)
    return bits_from_indices(places, int(places[-1]) + 1), (where & ((1 << low_bits) - 1)).to(torch.uint8)


def unpack_indices(high: Tensor, low: Tensor, low_bits: int = 8) -> Tensor:
    """Return the numbers (int64) that ``pack_indices`` packed."""
    found = bits_to_indices(high, 8 * high.numel())
    return ((found - torch.arange(low.numel(), device=low.device)) << low_bits) + low


def _runs(order: list[int], cuts: list[int], numbering: Numbering) -> list[list[int]]:
    """Cut the parameters' numbers into runs in one shard whose kept coordinates follow each other, by their ``cuts``."""
    shard_of = [numbering.shards.number_of[name] for name in numbering.names]
    runs: list[list[int]] = []
    for number in order:
        before = runs[-1][-1] if runs else None
        if before is not None and cuts[before + 1] == cuts[number] and shard_of[before] == shard_of[number]:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


class _Reader:
    def __init__(self, packed: Tensor) -> None:
        self.packed, self.place = packed, 0

    def take(self, num_bytes: int) -> Tensor:
        """Return the next bytes, in memory of their own so that they can be viewed as wider numbers."""
        self.place += num_bytes
        return self.packed[self.place - num_bytes : self.place].clone()


def _halves(values: Tensor) -> tuple[Tensor | None, list[Tensor]]:
    """Return the upper 16 bits (int64 ``[k]``) and the bytes of the lower ones; None for float16 and others."""
    if values.dtype == torch.bfloat16:
        return values.view(torch.int16).to(torch.int64) & 0xFFFF, []
    if values.dtype == torch.float32:
        whole = values.view(torch.int32).to(torch.int64)
        lower = whole & 0xFFFF
        low = (lower - ((lower >> 15) << 16)).to(torch.int16)
        return (whole >> 16) & 0xFFFF, [low.view(torch.uint8)]
    return None, []


def _joined(top: Tensor, reader: _Reader, dtype: torch.dtype) -> Tensor:
    signed = top - ((top >> 15) << 16)
    if dtype == torch.bfloat16:
        return signed.to(torch.int16).view(dtype)
    lower = reader.take(2 * top.numel()).view(torch.int16).to(torch.int64) & 0xFFFF
    return (signed << 16 | lower).to(torch.int32).view(dtype)
