"""Safetensors in bounded memory: tensors that are read and written in pieces.

The safetensors library maps a file into memory, where every page that was touched counts until the system
reclaims it, and writes only tensors that are in memory all at once. Here a piece is read into memory of its own. The
format is public: the header's length (64 bits, little endian), the header (json, padded with spaces), then the
tensors' bytes in the header's order without gaps.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from ssrctl.checkpoints.header import read_header
from ssrctl.errors import UserError
from ssrctl.io.tensor_writing import DTYPES, NewTensor, stored_bytes, write_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# This many elements stay in a core's cache from reading through hashing to comparing; with fewer, the fixed cost of
# each call shows. 2^22 took 1.6 times as long, 2^18 1.1 times.
PIECE_ELEMENTS = 2**20
_COPY_BYTES = 16 * 2**20


@dataclass(frozen=True)
class StoredTensor:
    """The place of a tensor in a file.

    Attributes:
        stored_dtype: as the file spells it.
        shape: as stored.
        start: byte offset in the file.
        nbytes: length in the file.
    """

    stored_dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype_name(self) -> str | None:
        """Torch's name of the dtype; None for one that it has no name for here (4-bit floats and the like)."""
        return DTYPES.get(self.stored_dtype)

    @functools.cached_property
    def dtype(self) -> torch.dtype | None:
        """The dtype; None for one without a name. Only this imports torch."""
        import torch

        return None if self.dtype_name is None else getattr(torch, self.dtype_name)


def stored_tensors(path: str | Path) -> dict[str, StoredTensor]:
    """Find the place of each tensor of a safetensors file, in the order of the bytes.

    Raises:
        UserError: missing, truncated, foreign or hostile file.
    """
    entries, data = read_header(path)
    found = {}
    for name, entry in entries.items():
        start, end = entry["data_offsets"]
        found[name] = StoredTensor(entry["dtype"], tuple(entry["shape"]), data + start, end - start)
    return found


def read_pieces(
    path: str | Path,
    place: StoredTensor,
    piece_elements: int | None = None,
    start: int = 0,
    stop: int | None = None,
    *,
    reuse: bool = False,
) -> Iterator[Tensor]:
    """Yield a stored tensor in flat pieces of ``piece_elements`` (2^20), the last one shorter; an empty one has none.

    Args:
        path: the file.
        place: of the tensor in it.
        piece_elements: elements of each piece.
        start: flat index of the first element to read.
        stop: flat index behind the last one; the tensor's end when None or beyond it.
        reuse: a piece is overwritten by the next one, which spares the system finding new memory for each.

    Raises:
        UserError: the file became shorter since its header was read.
    """
    import torch

    assert place.dtype is not None
    elements = piece_elements or PIECE_ELEMENTS
    end = place.numel if stop is None else min(stop, place.numel)
    room = torch.empty(max(min(elements, end - start), 0) if reuse else 0, dtype=place.dtype)
    with Path(path).open("rb", buffering=0) as file:
        file.seek(place.start + start * place.dtype.itemsize)
        for first in range(start, end, elements):
            length = min(elements, end - first)
            piece = room[:length] if reuse else torch.empty(length, dtype=place.dtype)
            buffer = piece.view(torch.uint8).numpy().data
            if _fill(file, buffer) < len(buffer):
                raise _too_short(path)
            yield piece


def _too_short(path: str | Path) -> UserError:
    return UserError(f"{path} ends too early", "it was changed while it was read; copy it again")


def read_integers(path: str | Path, place: StoredTensor, most: int) -> Iterator[Any]:
    """Yield a stored tensor of dtype I32 or I64 as flat numpy arrays of at most ``most`` elements, without torch.

    Raises:
        UserError: the file became shorter since its header was read.
    """
    import numpy as np

    dtype = np.dtype(f"<i{int(place.stored_dtype[1:]) // 8}")
    with Path(path).open("rb") as file:
        source = TensorBytes(file, place)
        for first in range(0, place.numel, most):
            data = source.read(min(most, place.numel - first) * dtype.itemsize)
            if len(data) < min(most, place.numel - first) * dtype.itemsize:
                raise _too_short(path)
            yield np.frombuffer(data, dtype)


class TensorBytes:
    """The bytes of a stored tensor, from an open file that nothing else reads, as a stream of their own."""

    def __init__(self, file: BinaryIO, place: StoredTensor) -> None:
        file.seek(place.start)
        self._file, self._left = file, place.nbytes

    def read(self, size: int = -1) -> bytes:
        """Return at most ``size`` bytes (all without one), none at the tensor's end."""
        data = self._file.read(self._left if size < 0 else min(size, self._left))
        self._left -= len(data)
        return data


def _fill(file: Any, buffer: memoryview) -> int:
    """Read until ``buffer`` is full or the file ends; one read returns at most 2 GiB, and may return less."""
    done = 0
    while done < len(buffer) and (count := file.readinto(buffer[done:])):
        done += count
    return done


class TensorSpool:
    """1-d tensors whose lengths are not known beforehand: spooled to files, then put together.

    Tensors of one item size and one suffix (the part behind the last dot) share a file, so the pieces of
    ``a.indices`` may alternate with those of ``a.values``, not with those of ``b.indices``.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[tuple[int, str], BinaryIO] = {}
        self._tensors: dict[tuple[int, str], dict[str, NewTensor]] = {}

    def append(self, name: str, piece: Tensor) -> None:
        """Add a piece to the end of tensor ``name``, which begins with its first piece."""
        key = (-piece.dtype.itemsize, name.rpartition(".")[2])
        if key not in self._files:
            self._files[key] = (self._folder / f"spool{len(self._files)}").open("w+b")
        tensors = self._tensors.setdefault(key, {})
        assert name not in tensors or name == next(reversed(tensors)), "pieces of two tensors alternate"
        before = tensors[name].shape[0] if name in tensors else 0
        tensors[name] = NewTensor(name, piece.dtype, (before + piece.numel(),))
        self._files[key].write(stored_bytes(piece))

    def save(self, path: Path, metadata: Mapping[str, str]) -> None:
        """Put everything together into one safetensors file."""
        keys = sorted(self._files)  # wide types first
        with path.open("wb") as target:
            write_header(target, [tensor for key in keys for tensor in self._tensors[key].values()], metadata)
            for key in keys:
                self._files[key].seek(0)
                shutil.copyfileobj(self._files[key], target, _COPY_BYTES)

    def close(self) -> None:
        """Close the spool files; whoever made the folder removes it."""
        with contextlib.ExitStack() as stack:
            for file in self._files.values():
                stack.callback(file.close)
