"""A fingerprint of weights: equal exactly when names, shapes, dtypes and every bit of every tensor are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return ``xxh3:`` and 32 hex digits over the tensors, sorted by name.

    Not a cryptographic hash: it tells accidents apart, not attackers. Each tensor is hashed on its own and
    then their hashes are, so that tensors may come in any order and one at a time.

    Args:
        tensors: (name, tensor) pairs; a tied tensor once. On any device.
    """
    running = RunningFingerprint()
    for name, tensor in tensors:
        running.begin(name, tensor.dtype, tuple(tensor.shape))
        running.update(tensor.detach().cpu())
    return running.digest()


class RunningFingerprint:
    """``fingerprint`` of tensors that come in pieces: ``begin`` a tensor, ``update`` with its pieces in order."""

    def __init__(self) -> None:
        import xxhash

        self._new_hash = xxhash.xxh3_128
        self._hash = xxhash.xxh3_128()
        self._prefix: str | None = None
        self._lines: list[str] = []

    def begin(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        """Start a tensor, to which the pieces that follow belong."""
        self._end_tensor()
        self._prefix = f"{name} {str(dtype).removeprefix('torch.')} {'x'.join(map(str, shape))}"
        self._hash = self._new_hash()

    def update(self, piece: Tensor) -> None:
        """Add a piece, on the CPU, in the tensor's dtype."""
        import torch

        self._hash.update(piece.contiguous().flatten().view(torch.uint8).numpy().data)

    def digest(self) -> str:
        """Return the fingerprint of all tensors begun so far."""
        self._end_tensor()
        return "xxh3:" + self._new_hash("\n".join(sorted(self._lines)).encode()).hexdigest()

    def _end_tensor(self) -> None:
        if self._prefix is not None:
            self._lines.append(f"{self._prefix} {self._hash.hexdigest()}")
            self._prefix = None
