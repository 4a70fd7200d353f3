"""A fingerprint of weights: equal exactly when names, shapes, dtypes and every bit of every tensor are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """``xxh3:`` and 32 hex digits over the tensors, sorted by name.

    Not a cryptographic hash: it tells accidents apart, not attackers. Each tensor is hashed on its own and
    then their hashes are, so that tensors may come in any order and one at a time.

    Args:
        tensors: (name, tensor) pairs; a tied tensor once. On any device.
    """
    import torch
    import xxhash

    lines = []
    for name, tensor in tensors:
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        shape = "x".join(map(str, tensor.shape))
        lines.append(f"{name} {str(tensor.dtype).removeprefix('torch.')} {shape} {xxhash.xxh3_128_hexdigest(data)}")
    return "xxh3:" + xxhash.xxh3_128_hexdigest("\n".join(sorted(lines)).encode())
