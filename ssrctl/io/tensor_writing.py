"""Writing safetensors files: the header and the tensors' bytes, the same bytes for the same contents.

The safetensors library writes the metadata in random order and needs all tensors in memory at once. The format is
public: the header's length (64 bits, little endian), the header (json, padded with spaces), then the tensors' bytes in
the header's order without gaps.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_ALIGNMENT = 8

DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "U16": "uint16",
    "I32": "int32",
    "U32": "uint32",
    "I64": "int64",
    "U64": "uint64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_BITS = re.compile(r"\d+")
_STORED = {ours: stored for stored, ours in DTYPES.items()}


def dtype_bytes(name: str) -> int:
    """Return the bytes of an element of one of the dtypes that ``DTYPES`` names."""
    bits = _BITS.search(name)
    return 1 if bits is None else int(bits[0]) // 8


def stored_bytes(tensor: Tensor) -> memoryview:
    """Return a CPU tensor's bytes as safetensors stores them."""
    import torch

    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


@dataclass(frozen=True)
class NewTensor:
    """A tensor to be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def aligned_order(tensors: Iterable[NewTensor]) -> list[NewTensor]:
    """Sort wide types first, then by name, as the library does: so every tensor starts at a multiple of its item size."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def write_header(file: BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> None:
    """Write the header of a file that holds ``tensors`` in this order; their bytes must follow."""
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.nbytes
        stored = _STORED[str(tensor.dtype).removeprefix("torch.")]
        header[tensor.name] = {"dtype": stored, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    file.write(len(text).to_bytes(8, "little") + text)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file from tensors in memory, on any device; an OSError leaves a truncated file."""
    order = aligned_order(NewTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items())
    with path.open("wb") as file:
        write_header(file, order, metadata)
        for tensor in order:
            file.write(stored_bytes(tensors[tensor.name].cpu()))
