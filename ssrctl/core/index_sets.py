"""Compact immutable sets of flat indices: two bytes per index.

The coordinates of a tensor are cut into blocks of 65,536; an index is stored as its low 16 bits, and a count
per block says which block it is in (the array containers of Roaring bitmaps, Chambi et al. 2016). This is the
form in which an optimizer keeps the sets that its steps selected: at a quarter of a percent of the coordinates
it takes a thirteenth of bit-packed 16x16 tiles, half of them non-empty at that density, and a quarter of int64 indices.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.mask import TileSet

BLOCK_BITS = 16
_LOW = (1 << BLOCK_BITS) - 1


@dataclass(frozen=True, eq=False)
class IndexSet:
    """Some of the flat indices of one tensor.

    Attributes:
        numel: coordinates of the tensor, selected or not.
        low: int16 ``[count]``, the low 16 bits of the indices (as two's complement), in ascending index order.
        counts: int32 ``[ceil(numel / 65536)]``, how many indices lie in each block.
    """

    numel: int
    low: Tensor
    counts: Tensor

    @classmethod
    def from_indices(cls, indices: Tensor, numel: int) -> IndexSet:
        """From strictly ascending flat indices, int64 ``[k]``; ``k`` may be 0.

        Raises:
            IndexError: an index outside ``0..numel-1``.
            ValueError: not one dimension, not ascending, or an index given twice.
        """
        if indices.dim() != 1:
            raise ValueError(f"expected a list of flat indices, got a tensor of shape {list(indices.shape)}")
        indices = indices.to(torch.int64).contiguous()
        if indices.numel():
            if bool((indices[1:] <= indices[:-1]).any()):
                raise ValueError(f"the {indices.numel()} indices are not strictly ascending")
            first, last = int(indices[0]), int(indices[-1])
            if first < 0 or last >= numel:
                raise IndexError(f"flat index {first if first < 0 else last} is outside a tensor of {numel} elements")
        if 0 < numel <= 1 << BLOCK_BITS:  # small tensors are many
            counts = torch.full((1,), indices.numel(), dtype=torch.int32, device=indices.device)
        else:
            edges = torch.arange(-(-numel // (1 << BLOCK_BITS)) + 1, device=indices.device) << BLOCK_BITS
            counts = torch.searchsorted(indices, edges).diff().to(torch.int32)
        low = indices & _LOW
        return cls(numel, (low - ((low >> (BLOCK_BITS - 1)) << BLOCK_BITS)).to(torch.int16), counts)

    def to_indices(self) -> Tensor:
        """Ascending flat indices, int64 ``[count]``."""
        if self.counts.numel() == 1:
            return self.low.to(torch.int64).bitwise_and_(_LOW)
        bases = torch.arange(self.counts.numel(), device=self.low.device) << BLOCK_BITS
        indices = torch.repeat_interleave(bases, self.counts.long(), output_size=self.count)
        return indices.add_(self.low.to(torch.int32) & _LOW)

    @classmethod
    def from_tiles(cls, tiles: TileSet) -> IndexSet:
        """Return the same coordinates as a ``TileSet``, whose shape is forgotten."""
        return cls.from_indices(tiles.to_indices(), tiles.numel)

    def to_tiles(self, shape: Iterable[int]) -> TileSet:
        """Return the coordinates in 16x16 tiles, the form of files and set algebra; ``ValueError`` for another size."""
        sizes = tuple(shape)
        if math.prod(sizes) != self.numel:
            raise ValueError(f"a set over {self.numel} coordinates is none over a tensor of shape {sizes}")
        return TileSet.from_indices(sizes, self.to_indices())

    @property
    def count(self) -> int:
        """Number of indices in the set."""
        return self.low.numel()

    @property
    def num_bytes(self) -> int:
        """Memory of the set: two bytes per index and four per block."""
        return 2 * self.low.numel() + 4 * self.counts.numel()

    @property
    def device(self) -> torch.device:
        return self.low.device

    def to(self, device: torch.device | str) -> IndexSet:
        """Return the same set on another device."""
        return IndexSet(self.numel, self.low.to(device), self.counts.to(device))

    def equals(self, other: IndexSet) -> bool:
        """Return whether both hold the same indices of tensors of the same size; both must be on one device."""
        return self.numel == other.numel and torch.equal(self.counts, other.counts) and torch.equal(self.low, other.low)
