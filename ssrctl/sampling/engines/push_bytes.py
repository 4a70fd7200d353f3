"""The bytes of a push of weights: safetensors with the changed entries of some tensors, or with whole tensors.

The changed entries of a tensor ``NAME`` are those near the weights before, ``NAME.near``, whose top byte is left out
(``nearest``), and the others, ``NAME.far``. Each part has ``.high`` and ``.low`` (uint8: ascending flat indices as in
``core.kept_bytes``, whose low parts are a byte, or half a byte where a part is dense) and ``.values``. The metadata has the
tensor's dtype and shape. For changes of 5% of the weights that makes about 30 bits each in float32 and 14 in bfloat16. A
whole tensor is ``NAME``.

The engine's environment imports this module too: it needs torch, safetensors and ``ssrctl.core``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from ssrctl.core.kept_bytes import pack_indices, unpack_indices
from ssrctl.sampling.engines import nearest

_TENSORS = "tensors"


@dataclass(frozen=True)
class TensorChanges:
    """The changed entries of a tensor.

    Attributes:
        name: in the checkpoint.
        shape: of the tensor.
        dtype: of the tensor.
        near: flat indices (int64 ``[k]``), and the tails of the values there (``nearest.tails``).
        far: flat indices and values.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    near: tuple[Tensor, Tensor]
    far: tuple[Tensor, Tensor]


def packed_changes(
    changes: Mapping[str, tuple[Tensor, Tensor]],
    shapes: Mapping[str, tuple[int, ...]],
    before: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a push of changes.

    Args:
        changes: by name in the checkpoint, ascending flat indices (int64 ``[k]``) and the values ``[k]`` there, on the CPU.
        shapes: of these tensors.
        before: the values there that the receiver has; None sends whole values.
    """
    tensors: dict[str, Tensor] = {}
    about = {}
    for name, (indices, values) in changes.items():
        near = torch.zeros(len(values), dtype=torch.bool)
        if before is not None and math.prod(shapes[name]) > 1:  # loaders fill in a lone weight by its value
            near = nearest.near(values, before[name])
        for part, kept in (("near", near), ("far", ~near)):
            if kept.any():
                high, low = _packed(indices[kept])
                found = values[kept]
                tensors |= {f"{name}.{part}.high": high, f"{name}.{part}.low": low}
                tensors[f"{name}.{part}.values"] = nearest.tails(found) if part == "near" else found
        about[name] = [str(values.dtype).removeprefix("torch."), list(shapes[name])]
    return tensors, {_TENSORS: json.dumps(about)}


def unpacked_changes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[TensorChanges]:
    """Return the changes of the tensors and metadata of a push of changes."""
    found = []
    for name, (kind, shape) in json.loads(metadata[_TENSORS]).items():
        dtype = getattr(torch, kind)
        nothing = torch.empty(0, dtype=torch.int64)
        parts = {"near": (nothing, nothing), "far": (nothing, torch.empty(0, dtype=dtype))}
        for part in parts:
            if (values := tensors.get(f"{name}.{part}.values")) is not None:
                high, low = tensors[f"{name}.{part}.high"], tensors[f"{name}.{part}.low"]
                parts[part] = _unpacked(high, low, len(values)), values
        found.append(TensorChanges(name, tuple(shape), dtype, parts["near"], parts["far"]))
    return found


def _packed(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return ascending indices as the bits of their high parts and their low bytes or half bytes, whichever is less."""
    count, last = len(indices), int(indices[-1])
    if count == 1 or (last >> 4) - (last >> 8) >= 4 * count:  # bits of the high parts against those of the low ones
        return pack_indices(indices)
    high, low = pack_indices(indices, low_bits=4)
    low = torch.nn.functional.pad(low, (0, len(low) % 2)).view(-1, 2)
    return high, low[:, 0] | low[:, 1] << 4


def _unpacked(high: Tensor, low: Tensor, count: int) -> Tensor:
    """Return the ``count`` indices that ``_packed`` packed."""
    if len(low) == count:
        return unpack_indices(high, low)
    halves = torch.stack([low & 15, low >> 4], 1).view(-1)[:count]
    return unpack_indices(high, halves, low_bits=4)


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Return the bytes of all tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def to_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return a push as one string of bytes."""
    return bytes(save(dict(tensors), dict(metadata)))


def from_bytes(data: bytes) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of ``to_bytes``."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header.get("__metadata__", {})


def to_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a push to a file."""
    save_file(dict(tensors), path, dict(metadata))


def from_file(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a push from a file, memory-mapped."""
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
