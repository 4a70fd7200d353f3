"""Non-negative integers in few bytes: the gaps between indices, and the steps between values, of small files.

A stream is one zstd frame with a checksum. Decompressed, it is a sequence of blocks. A block of m numbers, each at most
w bytes wide, holds

- m, from 1 to 2^20, as a little-endian uint32;
- m bytes: each number, or 255 for a number of 255 or more;
- for those of 255 or more, in order, number - 255 in w bytes, byte plane by byte plane: the lowest byte of every number,
  then the next byte of every number, and so on.

The byte with an escape takes a little less room than a LEB128 varint once compressed, and a quarter of its time
(``benchmarks/delta_size.py``). Streams may come from strangers: memory is bounded by a block and a window of 8 MiB, and
anything wrong is a ``ValueError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 2**20
_ESCAPE = 255
# Of bytes that hardly repeat, a search for repetitions finds little: with the smallest table and only long matches, zstd
# is twice as fast as its level 1 and 2% smaller.
_PARAMETERS = {"window_log": 17, "hash_log": 6, "chain_log": 6, "min_match": 7}
_WINDOW_BYTES = 2**23
_NARROW = 2**32  # coordinates of a tensor whose gaps fit into four bytes
_TORN = "the compressed data end too early"


class ByteSource(Protocol):
    """Anything that bytes are read from."""

    def read(self, size: int = -1, /) -> bytes:
        """Return at most ``size`` bytes, none at the end."""


class _Packer:
    """A stream under construction, whose bytes are returned piece by piece.

    Args:
        width: bytes of the widest number, 1, 2, 4 or 8.
    """

    def __init__(self, width: int) -> None:
        import zstandard

        self._width = width
        parameters = zstandard.ZstdCompressionParameters(
            strategy=zstandard.STRATEGY_FAST, write_checksum=True, **_PARAMETERS
        )
        self._frame = zstandard.ZstdCompressor(compression_params=parameters).compressobj()

    def _add(self, numbers: Any) -> bytes:
        """Append numbers, a numpy array of integers from 0 to below 2^(8 width)."""
        import numpy as np

        packed = []
        for start in range(0, len(numbers), BLOCK):
            block = numbers[start : start + BLOCK]
            low = np.minimum(block, _ESCAPE).astype(np.uint8)
            wide = (block[low == _ESCAPE] - _ESCAPE).astype(f"<u{self._width}")
            planes = wide.view(np.uint8).reshape(-1, self._width).T  # tobytes() below writes them row by row
            for part in (len(block).to_bytes(4, "little"), low.data, planes.tobytes()):
                packed.append(self._frame.compress(part))
        return b"".join(packed)

    def finish(self) -> bytes:
        """End the stream."""
        return self._frame.flush()


def unpack_numbers(source: ByteSource | memoryview, width: int, dtype: str) -> Iterator[Any]:
    """Yield the numbers of a stream, block by block, as numpy arrays.

    Args:
        source: the stream, or a buffer that holds it.
        width: as packed.
        dtype: numpy's name of an integer type that is wide enough for honest numbers.

    Raises:
        ValueError: truncated or corrupt data.
    """
    import numpy as np
    import zstandard

    decompressor: Any = zstandard.ZstdDecompressor(max_window_size=_WINDOW_BYTES)
    try:
        with decompressor.stream_reader(source, closefd=False) as frame:
            while head := frame.read(4):
                length = int.from_bytes(head, "little")
                if len(head) < 4 or not 1 <= length <= BLOCK:
                    raise ValueError(f"the compressed data hold a block of {length:,} numbers, not 1 to {BLOCK:,}")
                low = np.frombuffer(_read(frame, length), np.uint8)
                numbers = low.astype(dtype)
                places = np.flatnonzero(low == _ESCAPE)
                planes = np.frombuffer(_read(frame, width * len(places)), np.uint8).reshape(width, len(places))
                numbers[places] += np.ascontiguousarray(planes.T).view(f"<u{width}").ravel().astype(dtype)
                yield numbers
    except zstandard.ZstdError as error:
        raise ValueError(f"the compressed data are corrupt ({error})") from error


def _read(frame: Any, count: int) -> bytes:
    data: bytes = frame.read(count)
    if len(data) < count:
        raise ValueError(_TORN)
    return data


class IndexPacker(_Packer):
    """The stream of a tensor's ascending flat indices: the number of coordinates between each and the one before.

    Args:
        numel: of the tensor.
    """

    def __init__(self, numel: int) -> None:
        super().__init__(_index_width(numel))
        self._last = -1

    def add(self, indices: Tensor) -> bytes:
        """Append indices, int64 ``[m]``, ascending and above those before."""
        import numpy as np

        if not len(indices):
            return b""
        gaps = np.diff(indices.numpy(), prepend=self._last)
        gaps -= 1
        self._last = int(indices[-1])
        return self._add(gaps)


def pack_indices(parts: Iterable[Tensor], numel: int) -> Tensor:
    """Return the stream, uint8, of ascending flat indices that come in parts."""
    packer = IndexPacker(numel)
    return byte_tensor(b"".join([*map(packer.add, parts), packer.finish()]))


def unpack_indices(source: ByteSource | memoryview, numel: int) -> Iterator[Any]:
    """Yield the indices of a stream in order, as int64 numpy arrays of at most 2^20.

    Raises:
        ValueError: truncated or corrupt data, or an index outside of the tensor.
    """
    import numpy as np

    last = -1
    for indices in unpack_numbers(source, _index_width(numel), "int64"):
        # 2^20 gaps of four bytes cannot overflow; in float64, those of eight cannot either
        outside = numel > _NARROW and (indices.min() < 0 or indices.sum(dtype=np.float64) > numel)
        if not outside:
            indices += 1
            indices[0] += last
            np.cumsum(indices, out=indices)
            last = int(indices[-1])
        if outside or last >= numel:
            raise ValueError(f"indices are not ascending within 0..{numel - 1}")
        yield indices


def _index_width(numel: int) -> int:
    return 4 if numel <= _NARROW else 8


class StepPacker(_Packer):
    """The stream of a tensor's new values as steps from the old ones: the difference of the integer bit patterns.

    The difference is taken modulo 2^bits and zigzag coded (0, -1, 1, -2, ... become 0, 1, 2, 3, ...), so that a weight
    that moves by few units in the last place has a small number, and every bit comes back. An old value that is NaN
    counts as zero: its payload may differ where a dtype was converted.

    Args:
        dtype: of the values.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__(dtype.itemsize)

    def add(self, values: Tensor, before: Tensor) -> bytes:
        """Append new values ``[m]`` and the old ones in their place, in one dtype."""
        signed = (_patterns(values) - _patterns(before, nan_as_zero=True)).view(f"i{values.dtype.itemsize}")
        zigzag = (signed << 1) ^ (signed >> (8 * values.dtype.itemsize - 1))
        return self._add(zigzag.view(f"u{values.dtype.itemsize}"))


def unpack_steps(source: ByteSource, width: int) -> Iterator[Any]:
    """Yield the zigzag coded steps of a stream, as numpy arrays of at most 2^20; errors as in ``unpack_numbers``.

    Args:
        source: the stream.
        width: bytes of a value.
    """
    return unpack_numbers(source, width, f"u{width}")


def add_steps(before: Tensor, steps: Any) -> Tensor:
    """Return the new values ``[m]``, in the dtype of the old ones ``[m]``, to which steps lead."""
    import torch

    patterns = _patterns(before, nan_as_zero=True) + ((steps >> 1) ^ -(steps & 1))
    return torch.from_numpy(patterns.view(f"i{before.dtype.itemsize}")).view(before.dtype)


def _patterns(values: Tensor, *, nan_as_zero: bool = False) -> Any:
    """Return bit patterns as a numpy array of unsigned integers."""
    from ssrctl.core.bits import bit_patterns

    patterns = bit_patterns(values)
    # the sum is NaN if a value is, and found ten times as fast; torch has none of 8-bit floats
    if nan_as_zero and (values.dtype.itemsize == 1 or bool(values.sum().isnan())):
        patterns = patterns.masked_fill(values.isnan(), 0)
    return patterns.numpy().view(f"u{values.dtype.itemsize}")


def byte_tensor(data: bytes) -> Tensor:
    """Return bytes as a uint8 tensor."""
    import torch

    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
