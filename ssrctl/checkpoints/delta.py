"""Sparse checkpoints: the coordinates that differ from a base model, and their new values, bit-exact.

A delta is one safetensors file. The metadata names the base model and its fingerprint, and the shape of every tensor.
For each changed tensor ``NAME`` it holds, in one of two forms,

- plain: ``NAME.indices``, ascending flat indices (int32 where they fit, otherwise int64), and ``NAME.values`` in the
  tensor's dtype;
- small: ``NAME.gaps`` and ``NAME.steps``, the gaps between indices and the steps from the base's values, packed
  (``io.packed_numbers``); the metadata's ``entries`` say how many there are, and of which dtype. Indices can be read
  without the base, values only with it.

``load_delta`` holds all changes at once, ``DeltaFile`` reads them in blocks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import StrictStr

from ssrctl.checkpoints.tensor_files import StoredTensor, TensorBytes, read_integers, read_pieces, stored_tensors
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, identity_field, json_field, read_metadata, save_tensors, shapes_field
from ssrctl.io.checked import Count, checked
from ssrctl.io.packed_numbers import (
    IndexPacker,
    StepPacker,
    add_steps,
    byte_tensor,
    unpack_indices,
    unpack_steps,
)
from ssrctl.io.tensor_writing import DTYPES, dtype_bytes

if TYPE_CHECKING:
    import torch
    from torch import Tensor

KIND = "delta"
DAMAGED = "the delta is damaged"
INT32_MAX = 2**31 - 1
BLOCK_ENTRIES = 2**20
CODING = {"name": "gaps-steps", "version": 1}

# Gives the base's values ``[m]`` of a tensor at flat indices ``[m]``, as the run loaded them.
BaseValues = Callable[[str, "Tensor"], "Tensor"]
Made = TypeVar("Made")


@dataclass(frozen=True)
class Delta:
    """Changed coordinates by tensor name.

    Attributes:
        base: the model it applies to.
        shapes: of every tensor of the base, changed or not.
        changes: name -> (ascending flat indices int64 ``[k]``, values ``[k]`` in the tensor's dtype).
        before: the base's values at the same indices, where they are known; such a delta is written in the small form.
    """

    base: ModelIdentity
    shapes: dict[str, tuple[int, ...]]
    changes: dict[str, tuple[Tensor, Tensor]]
    before: dict[str, Tensor] | None = None

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
    """Write a delta, whole or not at all: in the small form if the base's values are known."""
    import torch

    tensors: dict[str, Tensor] = {}
    metadata = delta_metadata(delta.base, delta.shapes, delta.count, settings or {})
    if delta.before is None:
        for name, (indices, values) in delta.changes.items():
            fits = indices.numel() == 0 or int(indices[-1]) <= INT32_MAX
            tensors[f"{name}.indices"] = indices.to(torch.int32 if fits else torch.int64)
            tensors[f"{name}.values"] = values
    else:
        before = delta.before

        def pack(name: str) -> dict[str, Tensor]:
            indices, values = delta.changes[name]
            gaps, steps = IndexPacker(math.prod(delta.shapes[name])), StepPacker(values.dtype)
            return {
                f"{name}.gaps": byte_tensor(gaps.add(indices) + gaps.finish()),
                f"{name}.steps": byte_tensor(steps.add(values, before[name]) + steps.finish()),
            }

        for packed in _in_threads(pack, delta.changes):
            tensors |= packed
        metadata |= small_metadata({name: (len(values), values.dtype) for name, (_, values) in delta.changes.items()})
    save_tensors(path, tensors, KIND, metadata)


def _in_threads(work: Callable[[str], Made], names: Iterable[str]) -> list[Made]:
    """Return the results of ``work`` for each name, in order; numpy, zstd and torch let go of the interpreter."""
    import torch

    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        return list(pool.map(work, names))


def small_metadata(entries: Mapping[str, tuple[int, torch.dtype]]) -> dict[str, Any]:
    """Return the metadata that a delta in the small form has besides: (number, dtype) of each changed tensor's entries."""
    listed = {name: {"count": count, "dtype": dtype_name(dtype)} for name, (count, dtype) in entries.items()}
    return {"coding": CODING, "entries": listed}


@dataclass(kw_only=True)
class _Entry:
    """What the metadata of a small delta say of a changed tensor."""

    count: Count
    dtype: StrictStr


@dataclass(frozen=True)
class _Entries:
    """The place of a changed tensor's entries: indices and values, or gaps and steps."""

    indices: StoredTensor
    values: StoredTensor
    count: int
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype:
        return torch_dtype(self.dtype_name)


class DeltaFile:
    """A delta on disk: its header, checked, and its changes in blocks that are checked as they are read.

    Attributes:
        path: the file.
        base: the model it applies to.
        tuned: what it was compared with, which applying it gives again; None for a run's.
        shapes: of every tensor of the base, changed or not.
        dtype_names: of every tensor once applied; None for a run's delta, whose tensors are all of one dtype.
        counts: entries by name, of the tensors that have any.
        small: True = gaps and steps, False = indices and values.
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
        self.dtype_names = _dtypes_field(metadata, self.shapes, path)
        self.tuned = identity_field(metadata, "tuned", path) if "tuned" in metadata else None
        self.settings: dict[str, Any] = json_field(metadata, "settings", path)
        base = identity_field(metadata, "base", path)
        if base is None:
            raise UserError(f"{path}: metadata 'base' does not name a model", DAMAGED)
        self.base = base
        stored = stored_tensors(path)
        self.small = "coding" in metadata
        self._entries = self._packed_entries(metadata, stored) if self.small else self._plain_entries(stored)
        self.counts = {name: entries.count for name, entries in self._entries.items()}
        if json_field(metadata, "count", path) != self.count or len(stored) != 2 * len(self._entries):
            raise UserError(f"{path}: it does not hold the {metadata['count']} entries that it names", DAMAGED)

    def _plain_entries(self, stored: Mapping[str, StoredTensor]) -> dict[str, _Entries]:
        found = {}
        for name in sorted({key.rpartition(".")[0] for key in stored}):
            indices, values = stored.get(f"{name}.indices"), stored.get(f"{name}.values")
            if name not in self.shapes or indices is None or values is None or values.shape != indices.shape:
                raise UserError(f"{self.path}: {name}: indices and values do not pair up", DAMAGED)
            if len(indices.shape) != 1 or indices.stored_dtype not in ("I32", "I64"):
                raise UserError(f"{self.path}: {name}: the indices are not a list of integers", DAMAGED)
            dtype = self._checked_dtype(name, values.dtype_name, values.stored_dtype)
            found[name] = _Entries(indices, values, indices.numel, dtype)
        return found

    def _packed_entries(self, metadata: Mapping[str, str], stored: Mapping[str, StoredTensor]) -> dict[str, _Entries]:
        if (coding := json_field(metadata, "coding", self.path)) != CODING:
            raise UserError(
                f"{self.path}: its entries are coded as {ascii(coding)[:80]}, this version reads {CODING}",
                "install a newer ssrctl",
            )
        entries = json_field(metadata, "entries", self.path)
        found = {}
        for name, entry in sorted(checked(dict[str, _Entry], entries, f"{self.path}: entries", DAMAGED).items()):
            gaps, steps = stored.get(f"{name}.gaps"), stored.get(f"{name}.steps")
            one_list = all(part and part.stored_dtype == "U8" and len(part.shape) == 1 for part in (gaps, steps))
            if name not in self.shapes or gaps is None or steps is None or not one_list:
                raise UserError(f"{self.path}: {name}: gaps and steps do not pair up", DAMAGED)
            known = entry.dtype if entry.dtype in DTYPES.values() else None
            found[name] = _Entries(gaps, steps, entry.count, self._checked_dtype(name, known, entry.dtype))
        return found

    def _checked_dtype(self, name: str, dtype: str | None, stored: str) -> str:
        declared = None if self.dtype_names is None else self.dtype_names[name]
        if dtype is None or (dtype != declared if declared else not dtype.startswith(("float", "bfloat"))):
            wanted = declared or "floating-point numbers"
            raise UserError(f"{self.path}: {name}: the values are {stored}, not {wanted}", DAMAGED)
        return dtype

    @property
    def dtypes(self) -> dict[str, torch.dtype] | None:
        """``dtype_names`` as dtypes."""
        return None if self.dtype_names is None else {name: torch_dtype(one) for name, one in self.dtype_names.items()}

    @property
    def count(self) -> int:
        """Entries of all tensors."""
        return sum(self.counts.values())

    def dtype(self, name: str) -> torch.dtype | None:
        """Return the dtype of a tensor's values; None when it has no entries."""
        return self._entries[name].dtype if name in self._entries else None

    def dtype_name(self, name: str) -> str | None:
        """Return the name of a tensor's dtype once applied, without torch; None where the delta does not say."""
        if self.dtype_names is not None:
            return self.dtype_names[name]
        listed = {entries.dtype_name for entries in self._entries.values()}
        if name in self._entries:
            return self._entries[name].dtype_name
        return listed.pop() if len(listed) == 1 else None

    def blocks(self, name: str) -> Iterator[tuple[Tensor, Any]]:
        """Yield a tensor's changes in order, as (indices int64 ``[m]``, ``[m]`` for ``values``) with m at most 2^20.

        Raises:
            UserError: indices out of range or out of order, or corrupt data.
        """
        import torch

        for indices, coded in self._checked_blocks(name):
            yield torch.from_numpy(indices), coded

    def _checked_blocks(self, name: str, *, values: bool = True) -> Iterator[tuple[Any, Any]]:
        """Yield as ``blocks`` does, indices as numpy arrays; plain values only where they are wanted."""
        if name not in self._entries:
            return
        numel, done = math.prod(self.shapes[name]), 0
        blocks = self._packed_blocks(name, numel) if self.small else self._plain_blocks(name, numel, values)
        try:
            for indices, coded in blocks:
                done += len(indices)
                if len(indices) != len(coded) or done > self.counts[name]:
                    raise ValueError("indices and values do not pair up")
                yield indices, coded
            if done != self.counts[name]:
                raise ValueError(f"it holds {done:,} of {self.counts[name]:,} entries")
        except ValueError as error:
            raise UserError(f"{self.path}: {name}: {error}", DAMAGED) from error

    def check(self, name: str) -> None:
        """Read a tensor's changes for their errors, which are those of ``blocks``; values are not looked at, torch not used."""
        for _ in self._checked_blocks(name, values=False):
            pass

    def _plain_blocks(self, name: str, numel: int, values: bool) -> Iterator[tuple[Any, Any]]:
        import numpy as np

        entries, last = self._entries[name], -1
        pieces = read_pieces(self.path, entries.values, BLOCK_ENTRIES) if values else None
        for stored in read_integers(self.path, entries.indices, BLOCK_ENTRIES):
            indices = stored.astype(np.int64)
            if indices[0] <= last or indices[-1] >= numel or (np.diff(indices) <= 0).any():
                raise ValueError(f"indices are not ascending within 0..{numel - 1}")
            last = int(indices[-1])
            yield indices, indices if pieces is None else next(pieces)

    def _packed_blocks(self, name: str, numel: int) -> Iterator[tuple[Any, Any]]:
        entries = self._entries[name]
        with self.path.open("rb") as one, self.path.open("rb") as other:
            gaps, steps = TensorBytes(one, entries.indices), TensorBytes(other, entries.values)
            width = dtype_bytes(entries.dtype_name)
            yield from zip(unpack_indices(gaps, numel), unpack_steps(steps, width), strict=True)

    def values(self, name: str, coded: Any, before: Tensor) -> Tensor:
        """Return the new values ``[m]`` of a block, in the tensor's dtype.

        Args:
            name: of the tensor.
            coded: as ``blocks`` gave it.
            before: the base's values ``[m]`` at the block's indices, as the run loaded them, on the CPU.
        """
        if not self.small:
            plain: Tensor = coded
            return plain
        return add_steps(before.to(self._entries[name].dtype), coded)

    def change(self, name: str, before: BaseValues | None = None) -> tuple[Tensor, Tensor]:
        """Read all changes of a tensor that has entries; ``before`` is needed for the small form.

        Raises:
            UserError: as in ``blocks``, or no ``before`` where it is needed.
        """
        import torch

        if self.small and before is None:
            raise UserError(
                f"{self.path}: its values are steps from those of {self.base.name}, which is not at hand",
                "give the base too, or make a plain delta: `ssrctl delta diff --format plain`",
            )
        found: list[tuple[Tensor, Tensor]] = []
        for indices, coded in self.blocks(name):
            found.append((indices, coded if before is None else self.values(name, coded, before(name, indices))))
        if not found:
            return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=self.dtype(name))
        indices, values = map(torch.cat, zip(*found, strict=True))
        return indices, values

    def load(self, before: BaseValues | None = None) -> Delta:
        """Read all changes; arguments and errors as in ``change``."""
        return Delta(self.base, self.shapes, {name: self.change(name, before) for name in self.counts})


def load_delta(path: str | Path, before: BaseValues | None = None) -> Delta:
    """Read a delta, its indices checked against the shapes.

    Args:
        path: the file.
        before: the base's values, which the small form needs.

    Raises:
        UserError: truncated or foreign file, indices out of range or out of order, values that do not pair up, or no
            ``before`` where it is needed.
    """
    return DeltaFile(path).load(before)


def check_base(delta: DeltaFile, fingerprint: str) -> None:
    """Raise a UserError unless a delta belongs to the model with this fingerprint."""
    if fingerprint != delta.base.fingerprint:
        raise UserError(
            f"{delta.path} belongs to {delta.base.name} {delta.base.fingerprint}, this model has {fingerprint}",
            "give the model that the run started from",
        )


def apply_delta(
    delta: DeltaFile, tensors: Mapping[str, Tensor], fingerprint: str, starts: Mapping[str, int] | None = None
) -> None:
    """Write a delta's values into a model's tensors, in place, after checking that it belongs to it.

    Args:
        delta: what to apply.
        tensors: the base model's tensors by name, unchanged, in the dtype that the delta's values have.
        fingerprint: the base model's.
        starts: of tensors that are rows of the base's, the flat index there of their first coordinate; None: of whole ones.

    Raises:
        UserError: another base, other shapes, or another dtype, and nothing is written then; or corrupt entries, after
            which the model is of no use.
    """
    import torch

    from ssrctl.core.bits import bit_patterns

    check_base(delta, fingerprint)
    for name in delta.counts:
        tensor, dtype = tensors.get(name), delta.dtype(name)
        rows = 0 if starts is None else 1  # the number of rows is a process's own
        if tensor is None or tuple(tensor.shape)[rows:] != delta.shapes[name][rows:]:
            raise UserError(f"{delta.path}: {name} is absent or has another shape in the model")
        if dtype is not None and tensor.dtype != dtype:
            raise UserError(
                f"{delta.path}: {name} holds {dtype_name(dtype)}, the model was loaded as {dtype_name(tensor.dtype)}",
                f"load the model with --dtype {dtype_name(dtype)}",
            )

    def put(name: str) -> None:
        tensor = tensors[name].detach().view(-1)
        flat = bit_patterns(tensor)  # integers are copied twice as fast, and 8-bit floats not at all
        start = 0 if starts is None else starts[name]
        for indices, coded in delta.blocks(name):
            first, last = torch.searchsorted(indices, torch.tensor([start, start + len(flat)])).tolist()
            indices, coded = (indices[first:last] - start).to(flat.device), coded[first:last]
            before = flat.index_select(0, indices).cpu().view(tensor.dtype)
            flat.index_copy_(0, indices, bit_patterns(delta.values(name, coded, before)).to(flat.device))

    _in_threads(put, delta.counts)


def dtype_name(dtype: torch.dtype) -> str:
    """``bfloat16`` and the like, as ``--dtype`` and config.json spell it."""
    return str(dtype).removeprefix("torch.")


def torch_dtype(name: str) -> torch.dtype:
    """Return the dtype that ``dtype_name`` names."""
    import torch

    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _dtypes_field(metadata: Mapping[str, str], shapes: Mapping[str, object], path: str | Path) -> dict[str, str] | None:
    if "dtypes" not in metadata:
        return None
    names = json_field(metadata, "dtypes", path)
    known = DTYPES.values()
    if not isinstance(names, dict) or names.keys() != shapes.keys() or not all(one in known for one in names.values()):
        raise UserError(f"{path}: metadata 'dtypes' does not name every tensor's dtype", DAMAGED)
    return names
