"""Counting set bits in bulk."""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_BYTES = 1 << 22


def popcount(words: Tensor) -> Tensor:
    """Count the set bits of each word, int64 in and out, any shape.

    Neighbouring bit fields are added, first of 1 bit, then of 2, 4 and 8 (Warren, Hacker's Delight, 5-1). The
    shifts are arithmetic; the masks clear the copies of the sign bit that they bring in.
    """
    counts = words - ((words >> 1) & 0x5555555555555555)
    counts = (counts & 0x3333333333333333).add_((counts >> 2).bitwise_and_(0x3333333333333333))
    counts.add_(counts >> 4).bitwise_and_(0x0F0F0F0F0F0F0F0F)
    return counts.mul_(0x0101010101010101).bitwise_right_shift_(56)


def count_bits(packed: Tensor) -> int:
    """Count the set bits of all bytes of a uint8 tensor of any shape, with scratch of a few megabytes."""
    total = 0
    for part in packed.reshape(-1).split(_CHUNK_BYTES):
        # A fresh buffer of whole words: the part may end, or lie in memory, anywhere.
        words = torch.zeros(-(-part.numel() // 8), dtype=torch.int64, device=part.device)
        words.view(torch.uint8)[: part.numel()] = part
        total += int(popcount(words).sum())
    return total
