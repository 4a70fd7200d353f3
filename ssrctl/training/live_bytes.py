"""Bytes of live tensors, now and at their peak: exact, on any device, without the allocator's help."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """A counter of the storages that operations make inside ``with``; older ones are not counted.

    Attributes:
        now: bytes alive.
        peak: most bytes alive at once since the last ``reset_peak``.
        operations: count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = self.operations = 0
        self._known: set[int] = set()

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Exclude these tensors' storages, such as a model's parameters, from the count."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage()._cdata)

    def reset_peak(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        for storage in _storages(result):
            if storage._cdata not in given and storage._cdata not in self._known:
                self._count(storage)
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), storage._cdata
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def gone() -> None:
            self.now -= size
            self._known.discard(key)

        weakref.finalize(storage, gone)


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of all tensors in a tree; a sparse one has those of its indices and values."""
    for tensor in tree_leaves(tree):
        if isinstance(tensor, torch.Tensor):
            parts = (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)
            yield from (part.untyped_storage() for part in parts)
