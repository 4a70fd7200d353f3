"""Optimizer state that exists only for the coordinates of a tensor that were ever touched.

One bit per coordinate of the tensor says whether it was touched, and every field is an array with one value
per touched coordinate, in ascending order of coordinate. The place of coordinate ``i`` in these arrays is its
*rank*: how many touched coordinates lie before it (Jacobson 1989), found from a running popcount of the bits.
So the bookkeeping costs ``numel / 8`` bytes once, and nothing per touched coordinate besides the fields.

The alternatives were measured by ``benchmarks/state_bookkeeping.py``. Sorted int32 indices, merged by
``searchsorted``, are smaller below 3% touched (where the bits are kept anyway, to know what was touched) and up
to 1.6 times slower from 10% on. Pages of 256 coordinates are up to twice as fast where touched coordinates
cluster, but hold two coordinates there for each touched one, and up to 200 where they do not. A dense array
never moves anything, which is several times faster at 40% touched, and pays for every coordinate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ssrctl.core.bits import bits_to_indices
from ssrctl.core.layout import Layout
from ssrctl.core.popcount import count_bits, popcount

# Queries are answered this many at a time, which bounds the int64 scratch to some tens of megabytes.
CHUNK = 1 << 22

_BITS = "bits"


class SparseState:
    """Named values for the touched coordinates of one tensor.

    Args:
        numel: coordinates of the tensor.
        fields: dtype of each field.
        device: where everything is kept.

    Attributes:
        numel: as given.
        fields: per name, a tensor ``[count]`` in ascending order of coordinate; write into it in place.
    """

    def __init__(self, numel: int, fields: Mapping[str, torch.dtype], device: torch.device | str = "cpu") -> None:
        if _BITS in fields:
            raise ValueError(f"no field can be named '{_BITS}': the touched coordinates are stored under it")
        self.numel = numel
        # Whole 64-bit words, so that ranks are counted by the word; the bytes beyond ``bits`` stay 0.
        self._words = torch.zeros(-(-numel // 64), dtype=torch.int64, device=device)
        self.fields = {name: torch.zeros(0, dtype=dtype, device=device) for name, dtype in fields.items()}
        self._count = 0

    @property
    def bits(self) -> Tensor:
        """uint8 ``[ceil(numel / 8)]``: bit ``i % 8`` of byte ``i // 8`` is set when ``i`` was touched; read only."""
        return self._words.view(torch.uint8)[: -(-self.numel // 8)]

    @property
    def count(self) -> int:
        """Number of touched coordinates."""
        return self._count

    @property
    def num_bytes(self) -> int:
        """Memory of the bits and of all fields."""
        return 8 * self._words.numel() + sum(values.numel() * values.element_size() for values in self.fields.values())

    def contains(self, indices: Tensor) -> Tensor:
        """bool ``[k]``: which of the flat indices (int64 ``[k]``) were touched."""
        return ((self._words.index_select(0, indices >> 6) >> (indices & 63)) & 1).bool()

    def insert(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Add the coordinates that are not there yet, with 0 in every field.

        Args:
            indices: strictly ascending flat indices, int64 ``[k]``.

        Returns:
            (positions int64 ``[k]`` of all given coordinates in the fields, ascending;
            is_new bool ``[k]``: which were added now).

        Raises:
            IndexError: an index outside the tensor.
            ValueError: not strictly ascending.
        """
        self._check(indices)
        is_new = ~self.contains(indices)
        new = indices.masked_select(is_new)
        if new.numel() == 0:
            return self._ranks(indices), is_new
        # Bits that are known to be clear and distinct: their sum is their union.
        self._words.index_add_(0, new >> 6, torch.ones_like(new) << (new & 63))
        positions = self._ranks(indices)
        was_there = torch.ones(self._count + new.numel(), dtype=torch.bool, device=indices.device)
        was_there.index_fill_(0, positions.masked_select(is_new), False)
        for name, values in self.fields.items():
            self.fields[name] = values.new_zeros(was_there.numel()).masked_scatter_(was_there, values)
        self._count = was_there.numel()
        return positions, is_new

    def positions(self, indices: Tensor) -> Tensor:
        """Positions in the fields, int64 ``[k]``, of coordinates that were all touched (flat, any order).

        Raises:
            ValueError: some were never touched.
        """
        if bool((missing := ~self.contains(indices)).any()):
            raise ValueError(f"{int(missing.sum())} of {indices.numel()} coordinates were never touched")
        return self._ranks(indices)

    def indices(self) -> Tensor:
        """Ascending flat indices of the touched coordinates, int64 ``[count]``."""
        return bits_to_indices(self.bits, self.numel)

    def tensors(self) -> dict[str, Tensor]:
        """Everything, for a checkpoint: ``bits`` and the fields by name."""
        return {_BITS: self.bits, **self.fields}

    def tensors_of(self, layout: Layout) -> dict[str, dict[str, Tensor]]:
        """Split ``tensors`` by the tensors of a layout (a shard's), as views; untouched ones are left out."""
        counts = {name: indices.numel() for name, indices in layout.split(self.indices()).items()}
        fields = {key: values.split(list(counts.values())) for key, values in self.fields.items()}
        bits = layout.bits(self.bits)
        return {
            name: {_BITS: bits[name], **{key: values[place] for key, values in fields.items()}}
            for place, (name, count) in enumerate(counts.items())
            if count
        }

    @classmethod
    def joined(cls, layout: Layout, parts: Mapping[str, SparseState]) -> SparseState:
        """Join states of tensors of a layout, at least one, all with the same fields."""
        first = next(iter(parts.values()))
        made = cls(layout.size, {key: values.dtype for key, values in first.fields.items()}, first.bits.device)
        ordered = {name: parts[name] for name in layout.numels if name in parts}
        for name, bits in layout.bits(made.bits).items():
            if name in ordered:
                bits.copy_(ordered[name].bits)
        made._count = sum(part.count for part in ordered.values())
        made.fields = {key: torch.cat([part.fields[key] for part in ordered.values()]) for key in made.fields}
        return made

    @classmethod
    def from_tensors(cls, numel: int, tensors: Mapping[str, Tensor]) -> SparseState:
        """Restore what ``tensors`` returned; dtypes and device are those of the tensors, which are copied.

        Raises:
            KeyError: no ``bits``.
            ValueError: bits for another number of coordinates, or fields of another length than bits are set.
        """
        fields = {name: values for name, values in tensors.items() if name != _BITS}
        bits = tensors[_BITS]
        made = cls(numel, {name: values.dtype for name, values in fields.items()}, bits.device)
        if bits.dtype != torch.uint8 or bits.shape != made.bits.shape:
            raise ValueError(
                f"bits are {bits.dtype} {list(bits.shape)}, a tensor of {numel} coordinates has "
                f"{-(-numel // 8)} bytes of bits"
            )
        if numel % 8 and int(bits[-1]) >> (numel % 8):
            raise ValueError(f"a bit is set beyond the {numel} coordinates of the tensor")
        made.bits.copy_(bits)
        made._count = count_bits(bits)
        for name, values in fields.items():
            if values.shape != (made._count,):
                raise ValueError(f"{name} has shape {list(values.shape)}, {made._count} coordinates were touched")
            made.fields[name] = values.clone()
        return made

    def _ranks(self, indices: Tensor) -> Tensor:
        """Count the touched coordinates before each of the flat indices, int64 ``[k]``."""
        # One running count per word: numel / 16 bytes of scratch, half of what the bits take.
        dtype = torch.int32 if self.numel < 2**31 else torch.int64
        before = torch.zeros(self._words.numel() + 1, dtype=dtype, device=self._words.device)
        torch.cumsum(popcount(self._words), 0, dtype=dtype, out=before[1:])
        ranks = torch.empty_like(indices)
        for out, part in zip(ranks.split(CHUNK), indices.split(CHUNK), strict=True):
            word = part >> 6
            lower = (torch.ones_like(part) << (part & 63)) - 1
            inside = self._words.index_select(0, word).bitwise_and_(lower)
            out.copy_(popcount(inside)).add_(before.index_select(0, word))
        return ranks

    def _check(self, indices: Tensor) -> None:
        if indices.numel() == 0:
            return
        if bool((indices[1:] <= indices[:-1]).any()):
            raise ValueError(f"the {indices.numel()} indices are not strictly ascending")
        first, last = int(indices[0]), int(indices[-1])
        if first < 0 or last >= self.numel:
            raise IndexError(f"flat index {first if first < 0 else last} is outside a tensor of {self.numel} elements")
