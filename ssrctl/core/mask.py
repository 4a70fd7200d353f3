"""Masks: sets of coordinates over named tensors, in block sparse rows with bit-packed 16x16 tiles.

A tensor of shape ``[a, b, ...]`` is viewed as the matrix ``[a, b * ...]``, a 1-d tensor as one row, a 0-d
tensor as one cell. The matrix is cut into 16x16 tiles (ragged edges padded with zeros); only tiles with a
selected coordinate are kept, as 256 bits each: row by row, least significant bit first (SSR section A.4
stores a boolean per coordinate; a bit takes an eighth of that).

Polarity everywhere: a set bit, or True, means *selected*.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.core.popcount import count_bits
from ssrctl.core.tile_bits import inside, pack_tiles, strips, unpack_tiles
from ssrctl.core.tiles import TILE, TILE_BYTES, matrix_shape, tile_grid


@dataclass(frozen=True)
class TileSet:
    """The selected coordinates of one tensor.

    Attributes:
        shape: the tensor's own shape.
        tile_ids: int64 ``[num_tiles]``, ascending: tile row * tile columns + tile column.
        tiles: uint8 ``[num_tiles, 32]``, each tile's 256 bits; no tile is empty.
    """

    shape: tuple[int, ...]
    tile_ids: Tensor
    tiles: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """(tile rows, tile columns)."""
        return tile_grid(self.shape)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Storage of the block-sparse-row form: tiles, column indices (int32) and row pointers (int32)."""
        return self.tiles.numel() + 4 * self.tile_ids.numel() + 4 * (self.grid[0] + 1)

    @property
    def device(self) -> torch.device:
        return self.tiles.device

    def to(self, device: torch.device | str) -> TileSet:
        """Return the same set on another device."""
        return TileSet(self.shape, self.tile_ids.to(device), self.tiles.to(device))

    def count(self) -> int:
        """Return the number of selected coordinates."""
        return count_bits(self.tiles)

    @classmethod
    def empty(cls, shape: Iterable[int], device: torch.device | str = "cpu") -> TileSet:
        """No coordinate of a tensor of ``shape``."""
        tile_ids = torch.empty(0, dtype=torch.int64, device=device)
        return cls(tuple(shape), tile_ids, torch.empty(0, TILE_BYTES, dtype=torch.uint8, device=device))

    @classmethod
    def from_indices(cls, shape: Iterable[int], indices: Tensor) -> TileSet:
        """From distinct flat (row-major) indices, int64 ``[k]``, in any order; ascending ones need no sorting.

        Raises:
            IndexError: an index outside the tensor.
            ValueError: an index given twice.
        """
        sizes = tuple(shape)
        if indices.numel() == 0:
            return cls.empty(sizes, indices.device)
        indices = indices.to(torch.int64).contiguous()
        if bool((indices[1:] <= indices[:-1]).any()):
            indices = indices.sort().values
            if bool((indices[1:] == indices[:-1]).any()):
                raise ValueError(f"{indices.numel()} indices name only some coordinates once: there are duplicates")
        low, high = int(indices[0]), int(indices[-1])
        if low < 0 or high >= math.prod(sizes):
            raise IndexError(f"flat index {low if low < 0 else high} is outside a tensor of shape {sizes}")
        rows, columns = matrix_shape(sizes)
        ends = torch.tensor([last * TILE * columns for _, last in strips(rows, columns)], device=indices.device)
        parts = indices.tensor_split(torch.searchsorted(indices, ends)[:-1].cpu())
        return cls._from_strips(sizes, parts, indices.device)

    @classmethod
    def from_dense(cls, selected: Tensor) -> TileSet:
        """From a bool tensor, True = selected."""
        if selected.dtype != torch.bool:
            raise TypeError(f"expected a bool tensor, got {selected.dtype}")
        rows, columns = matrix_shape(selected.shape)
        flat = selected.reshape(-1)
        edges = [(first * TILE * columns, last * TILE * columns) for first, last in strips(rows, columns)]
        parts = (flat[start:stop].nonzero().flatten() + start for start, stop in edges)
        return cls._from_strips(tuple(selected.shape), parts, selected.device)

    def index_parts(self) -> Iterator[Tensor]:
        """``to_indices`` piece by piece, for a tensor whose selected indices would take too much memory at once."""
        rows, columns = matrix_shape(self.shape)
        tile_columns = self.grid[1]
        ends = torch.tensor([last * tile_columns for _, last in strips(rows, columns)], device=self.device)
        cuts = torch.searchsorted(self.tile_ids, ends).tolist()
        for start, stop in zip([0, *cuts[:-1]], cuts, strict=True) if cuts else ():
            if start < stop:
                yield unpack_tiles(self.tile_ids[start:stop], self.tiles[start:stop], columns)

    def to_indices(self) -> Tensor:
        """Ascending flat indices of the selected coordinates, int64 ``[count]``."""
        indices = torch.empty(self.count(), dtype=torch.int64, device=self.device)
        filled = 0
        for part in self.index_parts():
            indices[filled : filled + part.numel()] = part
            filled += part.numel()
        return indices

    def to_dense(self) -> Tensor:
        """Return a bool tensor of the original shape, True = selected."""
        dense = torch.zeros(self.numel, dtype=torch.bool, device=self.device)
        for part in self.index_parts():
            dense[part] = True
        return dense.view(self.shape)

    def to_sparse_bsr(self) -> Tensor:
        """``torch.sparse_bsr`` with bool 16x16 blocks, of the matrix view padded to whole tiles."""
        crow, col = self.row_pointers()
        rows, columns = self.grid
        return torch.sparse_bsr_tensor(
            crow, col, self._bits().view(-1, TILE, TILE), size=(rows * TILE, columns * TILE), check_invariants=True
        )

    @classmethod
    def from_sparse_bsr(cls, matrix: Tensor, shape: Iterable[int]) -> TileSet:
        """Read what ``to_sparse_bsr`` returned; ``shape`` is the tensor's own shape.

        Raises:
            ValueError: other blocks than 16x16, or a tensor that is not a set over a tensor of ``shape``.
        """
        if matrix.values().shape[1:] != (TILE, TILE):
            raise ValueError(f"expected blocks of {TILE}x{TILE}, got {list(matrix.values().shape[1:])}")
        blocks = matrix.values().bool().flatten(1)
        weights = (1 << torch.arange(8, dtype=torch.int32)).to(blocks.device)
        tiles = (blocks.view(-1, TILE_BYTES, 8).int() * weights).sum(-1).to(torch.uint8)
        return cls.from_row_pointers(shape, matrix.crow_indices(), matrix.col_indices(), tiles)

    def row_pointers(self) -> tuple[Tensor, Tensor]:
        """(crow_indices int32 ``[tile rows + 1]``, col_indices int32 ``[num_tiles]``)."""
        tile_rows, tile_columns = self.grid
        row = torch.div(self.tile_ids, tile_columns, rounding_mode="floor")
        counts = torch.bincount(row, minlength=tile_rows)
        crow = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).to(torch.int32)
        return crow, (self.tile_ids - row * tile_columns).to(torch.int32)

    @classmethod
    def from_row_pointers(cls, shape: Iterable[int], crow: Tensor, col: Tensor, tiles: Tensor) -> TileSet:
        """From the stored form, checked: shapes, ordering, ranges, and no bit in the padding.

        Raises:
            ValueError: anything that does not describe a set over a tensor of ``shape``.
        """
        shape = tuple(shape)
        rows, columns = cls.empty(shape).grid
        if crow.shape != (rows + 1,) or col.dim() != 1 or tiles.shape != (col.numel(), TILE_BYTES):
            raise ValueError(
                f"crow {list(crow.shape)}, col {list(col.shape)} and tiles {list(tiles.shape)} do not fit a "
                f"{rows}x{columns} grid of tiles"
            )
        if tiles.dtype != torch.uint8 or crow.is_floating_point() or col.is_floating_point():
            raise ValueError(f"wrong dtypes: crow {crow.dtype}, col {col.dtype}, tiles {tiles.dtype}")
        crow, col = crow.long(), col.long()
        steps = crow.diff()
        if int(crow[0]) != 0 or int(crow[-1]) != col.numel() or bool((steps < 0).any()):
            raise ValueError("row pointers do not ascend from 0 to the number of tiles")
        if bool((col < 0).any()) or bool((col >= columns).any()):
            raise ValueError(f"a tile column lies outside 0..{columns - 1}")
        row = torch.searchsorted(crow, torch.arange(col.numel(), device=crow.device), right=True) - 1
        tile_ids = row * columns + col
        if bool((tile_ids.diff() <= 0).any()):
            raise ValueError("tiles are not in ascending order")
        if bool((tiles & ~inside(*matrix_shape(shape), tile_ids)).any()):
            raise ValueError(f"a bit is set outside the tensor of shape {shape}")
        return cls(shape, tile_ids, tiles)._without_empty()

    def union(self, other: TileSet) -> TileSet:
        """Coordinates in either."""
        self._check_match(other)
        tile_ids = torch.unique(torch.cat([self.tile_ids, other.tile_ids]), sorted=True)
        tiles = torch.zeros(tile_ids.numel(), TILE_BYTES, dtype=torch.uint8, device=self.tiles.device)
        tiles[torch.searchsorted(tile_ids, self.tile_ids)] = self.tiles
        tiles[torch.searchsorted(tile_ids, other.tile_ids)] |= other.tiles
        return TileSet(self.shape, tile_ids, tiles)

    def intersection(self, other: TileSet) -> TileSet:
        """Coordinates in both."""
        mine, theirs = self._shared_tiles(other)
        return TileSet(self.shape, self.tile_ids[mine], self.tiles[mine] & other.tiles[theirs])._without_empty()

    def difference(self, other: TileSet) -> TileSet:
        """Coordinates in this set and not in the other."""
        mine, theirs = self._shared_tiles(other)
        tiles = self.tiles.clone()
        tiles[mine] &= ~other.tiles[theirs]
        return TileSet(self.shape, self.tile_ids, tiles)._without_empty()

    def complement(self) -> TileSet:
        """Coordinates of the tensor that are not in this set."""
        rows, columns = self.grid
        tile_ids = torch.arange(rows * columns, device=self.tile_ids.device)
        tiles = inside(*matrix_shape(self.shape), tile_ids)
        tiles[self.tile_ids] &= ~self.tiles
        return TileSet(self.shape, tile_ids, tiles)._without_empty()

    def _bits(self) -> Tensor:
        """bool ``[num_tiles, 256]``."""
        places = torch.arange(8, dtype=torch.uint8, device=self.tiles.device)
        return (self.tiles.unsqueeze(-1) >> places).bitwise_and_(1).bool().view(-1, TILE * TILE)

    def _shared_tiles(self, other: TileSet) -> tuple[Tensor, Tensor]:
        """Positions (in self, in other) of the tiles that both have."""
        self._check_match(other)
        if other.tile_ids.numel() == 0 or self.tile_ids.numel() == 0:
            none = torch.empty(0, dtype=torch.int64, device=self.tile_ids.device)
            return none, none
        place = torch.searchsorted(other.tile_ids, self.tile_ids).clamp_(max=other.tile_ids.numel() - 1)
        mine = (other.tile_ids[place] == self.tile_ids).nonzero().flatten()
        return mine, place[mine]

    def _without_empty(self) -> TileSet:
        kept = (self.tiles != 0).any(dim=1)
        return self if bool(kept.all()) else TileSet(self.shape, self.tile_ids[kept], self.tiles[kept])

    def _check_match(self, other: TileSet) -> None:
        if self.shape != other.shape:
            raise ValueError(f"masks over tensors of different shapes: {self.shape} and {other.shape}")
        if self.device != other.device:
            raise ValueError(f"masks on different devices, {self.device} and {other.device}: move one with to()")

    @classmethod
    def _from_strips(cls, shape: tuple[int, ...], parts: Iterable[Tensor], device: torch.device) -> TileSet:
        """From the ascending indices of each strip of the tensor, none of them twice."""
        rows, columns = matrix_shape(shape)
        packed = [
            pack_tiles(part, columns, first, last)
            for part, (first, last) in zip(parts, strips(rows, columns), strict=True)
            if part.numel()
        ]
        if not packed:
            return cls.empty(shape, device)
        return cls(shape, torch.cat([ids for ids, _ in packed]), torch.cat([tiles for _, tiles in packed]))


class BlockMask:
    """A set of coordinates over named tensors: a ``TileSet`` per name.

    Operations between two masks need the same names and shapes (``ValueError`` otherwise).
    """

    def __init__(self, tensors: Mapping[str, TileSet]) -> None:
        self.tensors = dict(tensors)

    @classmethod
    def empty(cls, shapes: Mapping[str, Iterable[int]], device: torch.device | str = "cpu") -> BlockMask:
        return cls({name: TileSet.empty(shape, device) for name, shape in shapes.items()})

    @classmethod
    def from_indices(cls, shapes: Mapping[str, Iterable[int]], indices: Mapping[str, Tensor]) -> BlockMask:
        """From flat indices per tensor; a name without indices has none selected."""
        if unknown := sorted(set(indices) - set(shapes)):
            raise ValueError(f"indices for unknown tensors: {', '.join(unknown)}")
        none = next((given.new_empty(0) for given in indices.values()), torch.empty(0, dtype=torch.int64))
        return cls({name: TileSet.from_indices(shape, indices.get(name, none)) for name, shape in shapes.items()})

    @classmethod
    def from_dense(cls, selected: Mapping[str, Tensor]) -> BlockMask:
        """From bool tensors, True = selected."""
        return cls({name: TileSet.from_dense(tensor) for name, tensor in selected.items()})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tiles.shape for name, tiles in self.tensors.items()}

    @property
    def numel(self) -> int:
        """Coordinates of all tensors together, selected or not."""
        return sum(tiles.numel for tiles in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        return sum(tiles.num_bytes for tiles in self.tensors.values())

    def to(self, device: torch.device | str) -> BlockMask:
        """Return the same mask on another device."""
        return BlockMask({name: tiles.to(device) for name, tiles in self.tensors.items()})

    def count(self) -> int:
        return sum(tiles.count() for tiles in self.tensors.values())

    def density(self) -> float:
        """Return the selected share of all coordinates, in [0, 1]; 0 for a mask over nothing."""
        return self.count() / self.numel if self.numel else 0.0

    def to_indices(self) -> dict[str, Tensor]:
        return {name: tiles.to_indices() for name, tiles in self.tensors.items()}

    def to_dense(self) -> dict[str, Tensor]:
        return {name: tiles.to_dense() for name, tiles in self.tensors.items()}

    def __or__(self, other: BlockMask) -> BlockMask:
        return self._paired(other, TileSet.union)

    def __and__(self, other: BlockMask) -> BlockMask:
        return self._paired(other, TileSet.intersection)

    def __sub__(self, other: BlockMask) -> BlockMask:
        return self._paired(other, TileSet.difference)

    def __invert__(self) -> BlockMask:
        return BlockMask({name: tiles.complement() for name, tiles in self.tensors.items()})

    def jaccard(self, other: BlockMask) -> float:
        """Return the Jaccard index |A n B| / |A u B|, in [0, 1]; 0 when both are empty."""
        shared = (self & other).count()
        either = self.count() + other.count() - shared
        return shared / either if either else 0.0

    def _paired(self, other: BlockMask, operation: Callable[[TileSet, TileSet], TileSet]) -> BlockMask:
        if self.tensors.keys() != other.tensors.keys():
            odd = sorted(self.tensors.keys() ^ other.tensors.keys())
            raise ValueError(f"masks over different tensors: {', '.join(odd[:5])}")
        return BlockMask({n: operation(t, other.tensors[n]) for n, t in self.tensors.items()})
