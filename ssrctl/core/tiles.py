"""The tiles into which a mask cuts a tensor; without torch, for readers of a mask's header and counts."""

from __future__ import annotations

import math
from collections.abc import Iterable

TILE = 16
TILE_BYTES = TILE * TILE // 8


def matrix_shape(shape: Iterable[int]) -> tuple[int, int]:
    """Return the (rows, columns) view of a tensor shape: ``(first, rest)``, 1-d as one row, 0-d as one cell."""
    sizes = tuple(shape)
    if len(sizes) == 0:
        return 1, 1
    if len(sizes) == 1:
        return 1, sizes[0]
    return sizes[0], math.prod(sizes[1:])


def tile_grid(shape: Iterable[int]) -> tuple[int, int]:
    """Return the (tile rows, tile columns) of a tensor shape."""
    rows, columns = matrix_shape(shape)
    return -(-rows // TILE), -(-columns // TILE)
