"""The bytes of a push of weights: safetensors with the changed entries of some tensors, or with whole tensors.

A changed tensor ``NAME`` is ``NAME.high`` and ``NAME.low`` (uint8, ascending flat indices as in ``core.kept_bytes``, about
nine bits each at a density of 4%) and ``NAME.values`` in its dtype; the metadata has its shape. A whole tensor is ``NAME``.

The engine's environment imports this module too: it needs torch, safetensors and ``ssrctl.core``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import Tensor

from ssrctl.core.kept_bytes import pack_indices, unpack_indices

_SHAPES = "shapes"


def packed_changes(
    changes: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a push of changes.

    Args:
        changes: by name in the checkpoint, ascending flat indices (int64 ``[k]``) and the values ``[k]`` there, on the CPU.
        shapes: of these tensors.
    """
    tensors: dict[str, Tensor] = {}
    for name, (indices, values) in changes.items():
        tensors[f"{name}.high"], tensors[f"{name}.low"] = pack_indices(indices)
        tensors[f"{name}.values"] = values.contiguous()
    return tensors, {_SHAPES: json.dumps({name: list(shapes[name]) for name in changes})}


def unpacked_changes(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, tuple[tuple[int, ...], Tensor, Tensor]]:
    """Return (shape, flat indices int64, values) by name of the tensors and metadata of a push of changes."""
    return {
        name: (
            tuple(shape),
            unpack_indices(tensors[f"{name}.high"], tensors[f"{name}.low"]),
            tensors[f"{name}.values"],
        )
        for name, shape in json.loads(metadata[_SHAPES]).items()
    }


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
