"""The mask file format, bit by bit, from its description in the design."""

import numpy as np


def pack(dense):
    """(crow_indices, col_indices, tiles) of a bool array: 16x16 tiles, rows of 2 bytes, lowest bit first."""
    array = np.asarray(dense, dtype=bool)
    if array.ndim == 0:
        matrix = array.reshape(1, 1)
    elif array.ndim == 1:
        matrix = array.reshape(1, -1)
    else:
        matrix = array.reshape(array.shape[0], int(np.prod(array.shape[1:])))
    rows, columns = matrix.shape
    crow, col, tiles = [0], [], []
    for top in range(0, rows, 16):
        for left in range(0, columns, 16):
            tile = [0] * 32
            for r in range(top, min(top + 16, rows)):
                for c in range(left, min(left + 16, columns)):
                    if matrix[r, c]:
                        bit = (r - top) * 16 + (c - left)
                        tile[bit // 8] += 2 ** (bit % 8)
            if any(tile):
                col.append(left // 16)
                tiles.append(tile)
        crow.append(len(col))
    return crow, col, tiles
