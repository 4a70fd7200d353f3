"""A flat bit per coordinate: the dense cache that a question's claims are made in (SSR section A.4).

Bit ``i`` of a tensor with ``n`` coordinates is bit ``i % 8`` of byte ``i // 8`` of a uint8 tensor of
``ceil(n / 8)`` bytes. A set bit means *taken* (claimed or protected).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssrctl.core.mask import BlockMask


def bits_from_indices(indices: Tensor, numel: int) -> Tensor:
    """uint8 ``[ceil(numel / 8)]`` with the bits of the given distinct flat indices (int64 ``[k]``) set."""
    packed = torch.zeros(-(-numel // 8), dtype=torch.uint8, device=indices.device)
    set_bits(packed, indices)
    return packed


def set_bits(packed: Tensor, indices: Tensor) -> None:
    """Set the bits of distinct flat indices (int64 ``[k]``, any order) in place."""
    if indices.numel() == 0:
        return
    indices = indices.sort().values
    byte, value = indices >> 3, (1 << (indices & 7)).to(torch.int32)
    # Indices are distinct, so within a byte the sum of the bits is their OR.
    touched, inverse = torch.unique_consecutive(byte, return_inverse=True)
    merged = torch.zeros(touched.numel(), dtype=torch.int32, device=packed.device).index_add_(0, inverse, value)
    packed[touched] |= merged.to(torch.uint8)


def unpack_bits(packed: Tensor, start: int, stop: int) -> Tensor:
    """bool ``[stop - start]``: the bits of coordinates ``start..stop-1``; ``start`` is a multiple of 8."""
    assert start % 8 == 0, start
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    chunk = packed[start // 8 : -(-stop // 8)]
    return (chunk.unsqueeze(-1) >> places).bitwise_and_(1).view(-1)[: stop - start].bool()


def get_bits(packed: Tensor, indices: Tensor) -> Tensor:
    """bool ``[k]``: the bits at flat indices (int64 ``[k]``)."""
    return ((packed[indices >> 3] >> (indices & 7).to(torch.uint8)) & 1).bool()


def bits_to_indices(packed: Tensor, numel: int, chunk: int = 1 << 22) -> Tensor:
    """Ascending flat indices (int64) of the set bits."""
    parts = [
        unpack_bits(packed, start, min(numel, start + chunk)).nonzero().flatten() + start
        for start in range(0, numel, chunk)
    ]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def bits_from_mask(mask: BlockMask) -> dict[str, Tensor]:
    """The flat bits of every tensor of a mask, by name."""
    return {name: bits_from_indices(tiles.to_indices(), tiles.numel) for name, tiles in mask.tensors.items()}
