"""Sparse checkpoints: the coordinates that differ from a base model, and their new values, bit-exact.

A delta is one safetensors file. For each changed tensor ``NAME``: ``NAME.indices``, ascending flat indices
(int32 where they fit, otherwise int64), and ``NAME.values`` in the tensor's dtype. The metadata names the
base model and its fingerprint, and the shape of every tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, identity_field, load_tensors, save_tensors, shapes_field

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "delta"
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Delta:
    """Changed coordinates by tensor name.

    Attributes:
        base: the model it applies to.
        shapes: of every tensor of the base, changed or not.
        changes: name -> (ascending flat indices int64 ``[k]``, values ``[k]`` in the tensor's dtype).
    """

    base: ModelIdentity
    shapes: dict[str, tuple[int, ...]]
    changes: dict[str, tuple[Tensor, Tensor]]

    @property
    def count(self) -> int:
        """Changed coordinates."""
        return sum(indices.numel() for indices, _ in self.changes.values())


def same_bits(a: Tensor, b: Tensor) -> Tensor:
    """bool, elementwise: are two tensors of one dtype equal bit for bit (NaN equals itself, 0 is not -0)?"""
    import torch

    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.contiguous().view(integer) == b.contiguous().view(integer)


def changed_indices(base: Tensor, tuned: Tensor) -> Tensor:
    """Ascending flat indices (int64) of the coordinates that differ bit for bit."""
    return (~same_bits(base.flatten(), tuned.flatten())).nonzero().flatten()


def save_delta(path: str | Path, delta: Delta, settings: Mapping[str, Any] | None = None) -> None:
    """Write a delta, whole or not at all."""
    import torch

    tensors = {}
    for name, (indices, values) in delta.changes.items():
        fits = indices.numel() == 0 or int(indices[-1]) <= _INT32_MAX
        tensors[f"{name}.indices"] = indices.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}.values"] = values
    metadata = {
        "base": asdict(delta.base),
        "shapes": {name: list(shape) for name, shape in delta.shapes.items()},
        "count": delta.count,
        "settings": dict(settings or {}),
    }
    save_tensors(path, tensors, KIND, metadata)


def load_delta(path: str | Path) -> Delta:
    """Read a delta, its indices checked against the shapes.

    Raises:
        UserError: torn or foreign file, indices out of range or out of order, values that do not pair up.
    """
    import math

    import torch

    tensors, metadata = load_tensors(path, KIND)
    shapes = shapes_field(metadata, path)
    changes = {}
    for name in sorted({key.rpartition(".")[0] for key in tensors}):
        indices, values = tensors.get(f"{name}.indices"), tensors.get(f"{name}.values")
        if name not in shapes or indices is None or values is None or values.shape != indices.shape:
            raise UserError(f"{path}: {name}: indices and values do not pair up", "the delta is damaged")
        if indices.dim() != 1 or indices.dtype not in (torch.int32, torch.int64):
            raise UserError(f"{path}: {name}: the indices are no list of integers", "the delta is damaged")
        indices = indices.long()
        bad = indices.numel() and (
            int(indices[0]) < 0 or int(indices[-1]) >= math.prod(shapes[name]) or bool((indices.diff() <= 0).any())
        )
        if bad:
            raise UserError(
                f"{path}: {name}: indices are not ascending within 0..{math.prod(shapes[name]) - 1}",
                "the delta is damaged",
            )
        changes[name] = (indices, values)
    base = identity_field(metadata, "base", path)
    if base is None:
        raise UserError(f"{path}: metadata 'base' names no model", "the delta is damaged")
    return Delta(base, shapes, changes)


def apply_delta(delta: Delta, tensors: Mapping[str, Tensor], fingerprint: str, path: str | Path) -> None:
    """Write a delta's values into a model's tensors, in place, after checking that it belongs to it.

    Args:
        delta: what to apply.
        tensors: the base model's tensors by name, in the dtype that the delta's values have.
        fingerprint: the base model's.
        path: the delta's file, for messages.

    Raises:
        UserError: another base, other shapes, or another dtype; nothing is written then.
    """
    import torch

    if fingerprint != delta.base.fingerprint:
        raise UserError(
            f"{path} belongs to {delta.base.name} {delta.base.fingerprint}, this model has {fingerprint}",
            "give the model that the run started from",
        )
    for name, (_, values) in delta.changes.items():
        tensor = tensors.get(name)
        if tensor is None or tuple(tensor.shape) != delta.shapes[name]:
            raise UserError(f"{path}: {name} is absent or has another shape in the model")
        if tensor.dtype != values.dtype:
            raise UserError(
                f"{path}: {name} holds {_dtype(values.dtype)}, the model was loaded as {_dtype(tensor.dtype)}",
                f"load the model with --dtype {_dtype(values.dtype)}",
            )
    with torch.no_grad():
        for name, (indices, values) in delta.changes.items():
            tensor = tensors[name]
            tensor.view(-1)[indices.to(tensor.device)] = values.to(tensor.device)


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
