"""A flat bit per coordinate: the dense cache that a question's claims are made in (SSR section A.4).

Bit ``i`` of a tensor with ``n`` coordinates is bit ``i % 8`` of byte ``i // 8`` of a uint8 tensor of
``ceil(n / 8)`` bytes. A set bit means *taken* (claimed or protected).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ssrctl.core.mask import BlockMask


def bit_patterns(tensor: Tensor) -> Tensor:
    """Return the numbers of a tensor as integers of their own width (uint8, int16, int32 or int64), copied if not contiguous.

    Equal patterns are equal bits: a NaN equals itself, and 0 is not -0.
    """
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.contiguous().view(integer)


def bits_from_indices(indices: Tensor, numel: int) -> Tensor:
    """uint8 ``[ceil(numel / 8)]`` with the bits of the given distinct flat indices (int64 ``[k]``) set."""
    packed = torch.zeros(-(-numel // 8), dtype=torch.uint8, device=indices.device)
    set_bits(packed, indices)
    return packed


def set_bits(packed: Tensor, indices: Tensor) -> None:
    """Set the bits of distinct flat indices (int64 ``[k]``, any order) in place."""
    fresh = indices.masked_select(~get_bits(packed, indices))
    # Distinct and clear until now: within a byte the sum of the bits is their union.
    packed.index_add_(0, fresh >> 3, (1 << (fresh & 7)).to(torch.uint8))


def unpack_bits(packed: Tensor, start: int, stop: int) -> Tensor:
    """bool ``[stop - start]``: the bits of coordinates ``start..stop-1``; ``start`` is a multiple of 8."""
    assert start % 8 == 0, start
    # Looking up eight flags at once is several times as fast as shifting every byte by 0..7.
    chunk = packed[start // 8 : -(-stop // 8)].to(torch.int32)
    return _eight_flags(packed.device).index_select(0, chunk).view(torch.bool)[: stop - start]


@cache
def _eight_flags(device: torch.device) -> Tensor:
    """int64 ``[256]``: per byte value, its bits as eight bytes of 0 or 1, in the order of memory."""
    places = torch.arange(8)
    return ((torch.arange(256).unsqueeze(-1) >> places) & 1).to(torch.uint8).view(torch.int64).flatten().to(device)


def get_bits(packed: Tensor, indices: Tensor) -> Tensor:
    """bool ``[k]``: the bits at flat indices (int64 ``[k]``)."""
    # ``packed[indices]`` would start threads from 3,000 indices on, which costs more than it saves; so all over core
    octets = packed.index_select(0, indices >> 3)
    return ((octets >> (indices & 7).to(torch.uint8)) & 1).bool()


def bits_to_indices(packed: Tensor, numel: int, chunk: int = 1 << 22) -> Tensor:
    """Ascending flat indices (int64) of the set bits."""
    parts = [
        unpack_bits(packed, start, min(numel, start + chunk)).nonzero().flatten() + start
        for start in range(0, numel, chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def bits_from_mask(mask: BlockMask) -> dict[str, Tensor]:
    """Return the flat bits of every tensor of a mask, by name."""
    return {name: bits_from_indices(tiles.to_indices(), tiles.numel) for name, tiles in mask.tensors.items()}
