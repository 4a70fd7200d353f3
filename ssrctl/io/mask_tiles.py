"""The stored tiles of a mask, checked and counted without torch."""

from __future__ import annotations

from typing import Any

from ssrctl.core.tiles import TILE, TILE_BYTES, matrix_shape, tile_grid


def count_tiles(shape: tuple[int, ...], crow: Any, col: Any, tiles: Any) -> int:
    """Return the number of selected coordinates of a tensor, after the checks of ``TileSet.from_row_pointers``.

    Args:
        shape: of the tensor.
        crow: row pointers, a numpy array of integers ``[tile rows + 1]``.
        col: tile columns, integers ``[num_tiles]``.
        tiles: uint8 ``[num_tiles, 32]``.

    Raises:
        ValueError: anything that does not describe a set over a tensor of ``shape``.
    """
    import numpy as np

    rows, columns = matrix_shape(shape)
    tile_rows, tile_columns = tile_grid(shape)
    if crow.shape != (tile_rows + 1,) or col.ndim != 1 or tiles.shape != (len(col), TILE_BYTES):
        raise ValueError(
            f"crow {list(crow.shape)}, col {list(col.shape)} and tiles {list(tiles.shape)} do not fit a "
            f"{tile_rows}x{tile_columns} grid of tiles"
        )
    if tiles.dtype != np.uint8 or crow.dtype.kind not in "iu" or col.dtype.kind not in "iu":
        raise ValueError(f"wrong dtypes: crow {crow.dtype}, col {col.dtype}, tiles {tiles.dtype}")
    crow, col = crow.astype(np.int64), col.astype(np.int64)
    in_row = np.diff(crow)
    if crow[0] != 0 or crow[-1] != len(col) or (in_row < 0).any():
        raise ValueError("row pointers do not ascend from 0 to the number of tiles")
    if ((col < 0) | (col >= tile_columns)).any():
        raise ValueError(f"a tile column lies outside 0..{tile_columns - 1}")
    row = np.repeat(np.arange(tile_rows), in_row)
    if (np.diff(row * tile_columns + col) <= 0).any():
        raise ValueError("tiles are not in ascending order")
    height, width = rows - row * TILE, columns - col * TILE
    edge = np.flatnonzero((height < TILE) | (width < TILE))
    bits = np.unpackbits(tiles[edge], axis=1, bitorder="little").reshape(-1, TILE, TILE)
    lines = np.arange(TILE)
    padding = (lines[:, None] >= height[edge, None, None]) | (lines >= width[edge, None, None])
    if bits[padding].any():
        raise ValueError(f"a bit is set outside the tensor of shape {shape}")
    return int(np.bitwise_count(tiles).sum(dtype=np.int64))
