"""Sparse checkpoints: the coordinates that differ from a base model, and their new values, bit-exact.

A delta is one safetensors file. For each changed tensor ``NAME``: ``NAME.indices``, ascending flat indices
(int32 where they fit, otherwise int64), and ``NAME.values`` in the tensor's dtype. The metadata names the
base model and its fingerprint, and the shape of every tensor. ``load_delta`` holds all changes at once,
``DeltaFile`` reads them in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.tensor_files import StoredTensor, read_pieces, stored_tensors
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, identity_field, json_field, read_metadata, save_tensors, shapes_field
from ssrctl.io.tensor_writing import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "delta"
DAMAGED = "the delta is damaged"
INT32_MAX = 2**31 - 1
BLOCK_ENTRIES = 2**20


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
    """Compare two tensors of one dtype bit for bit, elementwise: True = equal (NaN equals itself, 0 is not -0)."""
    from ssrctl.core.bits import bit_patterns

    return bit_patterns(a) == bit_patterns(b)


def changed_indices(base: Tensor, tuned: Tensor) -> Tensor:
    """Return ascending flat indices (int64) of the coordinates that differ bit for bit; both of one dtype."""
    import numpy as np
    import torch

    from ssrctl.core.bits import bit_patterns

    # numpy finds a few set flags among many about four times as fast as torch does
    ours, theirs = (bit_patterns(one.detach().cpu()).flatten().numpy() for one in (base, tuned))
    return torch.from_numpy(np.flatnonzero(ours != theirs))


def delta_metadata(
    base: ModelIdentity, shapes: Mapping[str, tuple[int, ...]], count: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the metadata that every delta has."""
    return {
        "base": asdict(base),
        "shapes": {name: list(shape) for name, shape in shapes.items()},
        "count": count,
        "settings": dict(settings),
    }


def save_delta(path: str | Path, delta: Delta, settings: Mapping[str, Any] | None = None) -> None:
    """Write a delta, whole or not at all."""
    import torch

    tensors = {}
    for name, (indices, values) in delta.changes.items():
        fits = indices.numel() == 0 or int(indices[-1]) <= INT32_MAX
        tensors[f"{name}.indices"] = indices.to(torch.int32 if fits else torch.int64)
        tensors[f"{name}.values"] = values
    save_tensors(path, tensors, KIND, delta_metadata(delta.base, delta.shapes, delta.count, settings or {}))


class DeltaFile:
    """A delta on disk: its header, checked, and its changes in blocks that are checked as they are read.

    Attributes:
        path: the file.
        base: the model it applies to.
        tuned: what it was compared with, which applying it gives again; None for a run's.
        shapes: of every tensor of the base, changed or not.
        dtypes: of every tensor once applied; None for a run's delta, whose tensors are all of one dtype.
        counts: entries by name, of the tensors that have any.
        settings: what made it.
    """

    def __init__(self, path: str | Path) -> None:
        """Open ``path`` and check its header.

        Raises:
            UserError: missing, truncated or foreign file, or entries that do not pair up or do not fit a tensor.
        """
        self.path = Path(path)
        metadata = read_metadata(path, KIND)
        self.version = metadata.get("ssrctl_version")
        self.shapes = shapes_field(metadata, path)
        self.dtypes = _dtypes_field(metadata, self.shapes, path)
        self.tuned = identity_field(metadata, "tuned", path) if "tuned" in metadata else None
        self.settings: dict[str, Any] = json_field(metadata, "settings", path)
        base = identity_field(metadata, "base", path)
        if base is None:
            raise UserError(f"{path}: metadata 'base' does not name a model", DAMAGED)
        self.base = base
        stored = stored_tensors(path)
        self._entries = {name: self._pair(name, stored) for name in sorted({key.rpartition(".")[0] for key in stored})}
        self.counts = {name: indices.numel for name, (indices, _) in self._entries.items()}
        if json_field(metadata, "count", path) != self.count or len(stored) != 2 * len(self._entries):
            raise UserError(f"{path}: it does not hold the {metadata['count']} entries that it names", DAMAGED)

    def _pair(self, name: str, stored: Mapping[str, StoredTensor]) -> tuple[StoredTensor, StoredTensor]:
        indices, values = stored.get(f"{name}.indices"), stored.get(f"{name}.values")
        if name not in self.shapes or indices is None or values is None or values.shape != indices.shape:
            raise UserError(f"{self.path}: {name}: indices and values do not pair up", DAMAGED)
        if len(indices.shape) != 1 or indices.stored_dtype not in ("I32", "I64"):
            raise UserError(f"{self.path}: {name}: the indices are not a list of integers", DAMAGED)
        declared = None if self.dtypes is None else self.dtypes[name]
        if values.dtype is None or (values.dtype != declared if declared else not values.dtype.is_floating_point):
            wanted = "floating-point numbers" if declared is None else dtype_name(declared)
            raise UserError(f"{self.path}: {name}: the values are {values.stored_dtype}, not {wanted}", DAMAGED)
        return indices, values

    @property
    def count(self) -> int:
        """Entries of all tensors."""
        return sum(self.counts.values())

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor's values; None when it has no entries."""
        return self._entries[name][1].dtype if name in self._entries else None

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a tensor's changes in order, as (indices int64 ``[m]``, values ``[m]``) with m at most 2^20.

        Raises:
            UserError: indices out of range or out of order.
        """
        if name not in self._entries:
            return
        last, numel = -1, math.prod(self.shapes[name])
        pieces = (read_pieces(self.path, one, BLOCK_ENTRIES) for one in self._entries[name])
        for indices, values in zip(*pieces, strict=True):
            indices = indices.long()
            if int(indices[0]) <= last or int(indices[-1]) >= numel or bool((indices.diff() <= 0).any()):
                raise UserError(f"{self.path}: {name}: indices are not ascending within 0..{numel - 1}", DAMAGED)
            last = int(indices[-1])
            yield indices, values

    def change(self, name: str) -> tuple[Tensor, Tensor]:
        """Read all changes of a tensor that has entries."""
        import torch

        blocks = list(self.blocks(name))
        if not blocks:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.dtype(name))
        indices, values = zip(*blocks, strict=True)
        return torch.cat(indices), torch.cat(values)


def load_delta(path: str | Path) -> Delta:
    """Read a delta, its indices checked against the shapes.

    Raises:
        UserError: truncated or foreign file, indices out of range or out of order, values that do not pair up.
    """
    file = DeltaFile(path)
    return Delta(file.base, file.shapes, {name: file.change(name) for name in file.counts})


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
                f"{path}: {name} holds {dtype_name(values.dtype)}, the model was loaded as {dtype_name(tensor.dtype)}",
                f"load the model with --dtype {dtype_name(values.dtype)}",
            )
    with torch.no_grad():
        for name, (indices, values) in delta.changes.items():
            tensor = tensors[name]
            tensor.view(-1)[indices.to(tensor.device)] = values.to(tensor.device)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and the like, as ``--dtype`` and config.json spell it."""
    return str(dtype).removeprefix("torch.")


def _dtypes_field(
    metadata: Mapping[str, str], shapes: Mapping[str, object], path: str | Path
) -> dict[str, torch.dtype] | None:
    import torch

    if "dtypes" not in metadata:
        return None
    names = json_field(metadata, "dtypes", path)
    known = DTYPES.values()
    if not isinstance(names, dict) or names.keys() != shapes.keys() or not all(one in known for one in names.values()):
        raise UserError(f"{path}: metadata 'dtypes' does not name every tensor's dtype", DAMAGED)
    return {name: getattr(torch, one) for name, one in names.items()}
