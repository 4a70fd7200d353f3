"""The block selection of SSR (section 2.3.4): approximate, and here to be compared with the exact one.

Gradients are cut into tiles; only tiles with the largest maxima are looked at, and the k largest coordinates
inside these are selected. What it misses are large coordinates in tiles that are not among the kept ones;
``recall`` says how many. ``core.topk`` is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ssrctl.core.bits import bits_from_indices, get_bits, unpack_bits
from ssrctl.core.tiles import matrix_shape
from ssrctl.core.topk import NonFiniteGradient, count_non_finite, select_topk
from ssrctl.core.topk_plain import CHUNK


def select_blocks(
    gradients: Mapping[str, Tensor],
    k: int,
    taken: Mapping[str, Tensor] | None = None,
    *,
    tile: int = 16,
    oversample: float = 2.0,
) -> dict[str, Tensor]:
    """Select ``k`` coordinates with large |g| from the tiles with the largest maxima.

    The ``(first, rest)`` matrix view of every tensor is cut into ``tile x tile`` tiles, smaller at ragged edges. The
    ``ceil(oversample * k / tile**2)`` tiles with the largest eligible |g| are kept, over all tensors together and
    ties to the lowest (tensor, tile), so that whole free tiles hold ``oversample * k`` coordinates. Of the eligible
    coordinates in these, the k largest are selected exactly.

    Args:
        gradients, k, taken: as for ``select_topk``.
        tile: rows and columns of a tile.
        oversample: coordinates to look at for each one to be selected.

    Returns:
        As ``select_topk``. Fewer than k where the kept tiles hold fewer eligible coordinates, which ``select_topk``
        would make up for from other tiles.

    Raises:
        ValueError: as ``select_topk``; a tile below 1, or an oversample below 1.
        NonFiniteGradient: NaN or infinity in an eligible coordinate.
    """
    if tile < 1 or oversample < 1:
        raise ValueError(f"tile and oversample must be at least 1, got {tile} and {oversample}")
    taken = taken or {}
    maxima = {
        name: _tile_maxima(name, gradient.detach(), taken.get(name), tile) for name, gradient in gradients.items()
    }
    without = {
        name: bits_from_indices((largest < 0).nonzero().flatten(), largest.numel()) for name, largest in maxima.items()
    }
    kept = select_topk(maxima, math.ceil(oversample * k / tile**2), without)
    members, values = {}, {}
    for name, tile_ids in kept.items():
        inside = _coordinates(gradients[name], tile_ids, tile)
        members[name] = inside[~get_bits(taken[name], inside)] if name in taken else inside
        values[name] = gradients[name].detach().take(members[name])
    return {name: members[name][best] for name, best in select_topk(values, k).items()}


def recall(selected: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    """Return |selected n exact| / |exact|: the share of the true coordinates that a selection found, in [0, 1].

    Args:
        selected, exact: distinct flat indices (int64 ``[k_t]``) per tensor; the same names.

    Raises:
        ValueError: other names, or nothing in ``exact``.
    """
    if selected.keys() != exact.keys():
        raise ValueError(f"selections over other tensors: {sorted(selected.keys() ^ exact.keys())}")
    total = sum(indices.numel() for indices in exact.values())
    if total == 0:
        raise ValueError("the recall of an empty selection is undefined")
    return sum(int(torch.isin(exact[name], selected[name]).sum()) for name in exact) / total


def _tile_maxima(name: str, gradient: Tensor, bits: Tensor | None, tile: int) -> Tensor:
    """float32 ``[tiles]``: the largest eligible |g| of every tile, row by row; -1 where none is eligible."""
    rows, columns = matrix_shape(gradient.shape)
    matrix = gradient.reshape(rows, columns)
    across = -(-columns // tile)
    parts = [torch.empty(0, device=gradient.device)]
    # whole rows of tiles, whose first coordinate starts a byte of the bits
    strip = tile * 8 * max(1, CHUNK // max(1, 8 * tile * columns))
    for first in range(0, rows if columns else 0, strip):
        size = matrix[first : first + strip].abs()
        if bits is not None:
            start = first * columns
            size.masked_fill_(unpack_bits(bits, start, start + size.numel()).view(size.shape), -1)
        # along rows first, so that a tensor of one row is not padded to a row of whole tiles
        padded = torch.nn.functional.pad(size, (0, across * tile - columns), value=-1)
        of_rows = padded.view(-1, across, tile).amax(2)
        missing = -of_rows.shape[0] % tile
        of_rows = torch.nn.functional.pad(of_rows, (0, 0, 0, missing), value=-1)
        parts.append(of_rows.view(-1, tile, across).amax(1).flatten().float())
    maxima = torch.cat(parts)
    if not bool(maxima.isfinite().all()):
        raise NonFiniteGradient(name, count_non_finite(gradient, bits))
    return maxima


def _coordinates(gradient: Tensor, tile_ids: Tensor, tile: int) -> Tensor:
    """Ascending flat indices (int64) of the coordinates in tiles (int64 ``[t]``), without the padding."""
    rows, columns = matrix_shape(gradient.shape)
    across = max(1, -(-columns // tile))
    place = torch.arange(tile, device=tile_ids.device)
    row = (torch.div(tile_ids, across, rounding_mode="floor") * tile).view(-1, 1, 1) + place.view(1, -1, 1)
    column = (tile_ids % across * tile).view(-1, 1, 1) + place.view(1, 1, -1)
    inside = (row < rows) & (column < columns)
    return (row * columns + column)[inside].sort().values
