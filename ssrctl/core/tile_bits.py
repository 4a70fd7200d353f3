"""Between flat indices of a matrix and bit-packed 16x16 tiles, one strip of whole tile rows at a time.

A strip covers consecutive rows of the matrix, hence consecutive flat indices and consecutive tile ids: what is
made strip by strip is in order, and scratch memory is bounded by the strip and not by the tensor. Layouts are
those of ``core.mask``; bytes are put together in 64-bit words, least significant byte first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ssrctl.core.tiles import TILE, TILE_BYTES

_TILE_WORDS = TILE_BYTES // 8

# Coordinates of a strip: one that is wholly selected takes some 200 MB of scratch.
STRIP = 1 << 22
# More tiles than this for each index are cheaper to find by sorting than to search for those that are not empty.
_SPARSE_TILES = 16


def strips(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) tile row of each strip of a matrix, in order; a strip has at least one tile row."""
    height = max(1, STRIP // max(1, TILE * columns))
    tile_rows = -(-rows // TILE)
    for first in range(0, tile_rows, height):
        yield first, min(tile_rows, first + height)


def pack_tiles(indices: Tensor, columns: int, first: int, last: int) -> tuple[Tensor, Tensor]:
    """Return the tiles of the selected coordinates of one strip.

    Args:
        indices: flat indices, int64 ``[k]``, distinct, all in tile rows ``first..last-1``.
        columns: of the matrix.
        first: tile row that the strip starts with.
        last: tile row that it ends before.

    Returns:
        (tile ids int64 ``[num_tiles]``, ascending; tiles uint8 ``[num_tiles, 32]``, none empty).
    """
    tile_columns = -(-columns // TILE)
    row = torch.div(indices, columns, rounding_mode="floor")
    column = indices - row * columns
    row -= first * TILE
    slot = (row >> 4) * tile_columns + (column >> 4)
    bit = ((row & 15) << 4) + (column & 15)
    num_slots, names = (last - first) * tile_columns, None
    if num_slots > _SPARSE_TILES * indices.numel():
        names, slot = torch.unique(slot, sorted=True, return_inverse=True)
        num_slots = names.numel()
    words = torch.zeros(num_slots, _TILE_WORDS, dtype=torch.int64, device=indices.device)
    # Distinct coordinates have distinct bits: their sum is their union.
    words.view(-1).index_add_(0, slot * _TILE_WORDS + (bit >> 6), torch.ones_like(bit) << (bit & 63))
    if names is None:
        names = (words != 0).any(dim=1).nonzero().flatten()
        words = words[names]
    return names + first * tile_columns, words.view(torch.uint8)


def unpack_tiles(tile_ids: Tensor, tiles: Tensor, columns: int) -> Tensor:
    """Ascending flat indices (int64) of the bits of whole tile rows, without sorting them.

    Args:
        tile_ids: int64 ``[num_tiles]``, ascending; all tiles of each tile row that has one here.
        tiles: uint8 ``[num_tiles, 32]``.
        columns: of the matrix.
    """
    device = tile_ids.device
    tile_row = torch.div(tile_ids, -(-columns // TILE), rounding_mode="floor")
    tile_column = tile_ids - tile_row * -(-columns // TILE)
    # Ascending order goes along a matrix row through all tiles of a tile row, then to the next matrix row. With
    # m tiles in the tile row, the first being number f: row r of tile t comes at 16 f + r m + (t - f).
    # By indexing: repeat_interleave wakes all threads for any size, which costs milliseconds where cores are busy.
    _, of_tile, in_row = torch.unique_consecutive(tile_row, return_inverse=True, return_counts=True)
    width = in_row[of_tile].unsqueeze(1)
    start = (in_row.cumsum(0) - in_row)[of_tile].unsqueeze(1)
    number = torch.arange(tile_ids.numel(), device=device).unsqueeze(1)
    place = 16 * start + torch.arange(TILE, device=device) * width + (number - start)
    source = torch.empty(place.numel(), dtype=torch.int64, device=device)
    source[place.flatten()] = torch.arange(place.numel(), device=device)
    halves = (tiles[:, 0::2].to(torch.int32) + (tiles[:, 1::2].to(torch.int32) << 8)).flatten()[source]
    source = source[halves != 0]
    halves = halves[halves != 0]
    found, bit = ((halves.unsqueeze(1) >> torch.arange(TILE, device=device)) & 1).nonzero(as_tuple=True)
    origin = (tile_row * TILE * columns + tile_column * TILE)[source >> 4] + (source & 15) * columns
    return origin[found] + bit


def inside(rows: int, columns: int, tile_ids: Tensor) -> Tensor:
    """uint8 ``[len(tile_ids), 32]``: the bits of tiles that lie in the matrix rather than in the padding."""
    tile_columns = -(-columns // TILE)
    bits = torch.full((tile_ids.numel(), TILE_BYTES), 0xFF, dtype=torch.uint8, device=tile_ids.device)
    tile_row = torch.div(tile_ids, tile_columns, rounding_mode="floor")
    height, width = rows - tile_row * TILE, columns - (tile_ids - tile_row * tile_columns) * TILE
    edge = ((height < TILE) | (width < TILE)).nonzero().flatten()
    height, width = height[edge].clamp(max=TILE), width[edge].clamp(max=TILE)
    row_bits = (1 << width.int()) - 1  # which columns of a tile's row lie inside
    two_bytes = torch.stack([row_bits & 0xFF, row_bits >> 8], dim=-1).to(torch.uint8)
    inside_rows = torch.arange(TILE, device=tile_ids.device) < height.unsqueeze(-1)
    bits[edge] = (inside_rows.unsqueeze(-1).to(torch.uint8) * two_bytes.unsqueeze(1)).view(-1, TILE_BYTES)
    return bits
