"""The difference of two checkpoints as a delta, in memory that depends neither on the model nor on the difference."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import INT32_MAX, KIND, changed_indices, delta_metadata, dtype_name, small_metadata
from ssrctl.checkpoints.fingerprint import RunningFingerprint
from ssrctl.checkpoints.parameter_names import paired_pieces
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.checkpoints.tensor_files import TensorSpool
from ssrctl.errors import UserError
from ssrctl.io.artifacts import ModelIdentity, header_metadata
from ssrctl.io.files import part_folder, whole_file
from ssrctl.io.packed_numbers import IndexPacker, StepPacker, byte_tensor

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class TensorChange:
    """How much of a tensor changed; ``dtype`` is the tuned one's."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    changed: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Difference:
    """What a delta that was written holds.

    Attributes:
        base: the model it applies to.
        tuned: what applying it gives.
        tensors: what changed in every tensor, by name.
    """

    base: ModelIdentity
    tuned: ModelIdentity
    tensors: list[TensorChange]


def write_difference(
    path: Path,
    base: TensorReader,
    tuned: TensorReader,
    names: Iterable[str],
    *,
    settings: Mapping[str, Any],
    small: bool = True,
) -> Difference:
    """Write what turns ``base`` into ``tuned`` as a delta, whole or not at all.

    Where dtypes differ, the tuned one's counts, provided that the base's values convert to it without rounding;
    the changes are those after the conversion.

    Args:
        path: the delta to write.
        base: open, its names aligned with ``tuned``'s.
        tuned: likewise.
        names: the tensors to compare, each of one shape in both but for the number of rows, of which the base's counts;
            reading is fastest in the order on disk.
        settings: what made the delta, for its metadata.
        small: write gaps and steps, packed; False: indices and values, as they are.

    Raises:
        UserError: a tensor whose dtype changed and whose base values would have to be rounded.
    """
    with whole_file(path) as temporary, part_folder(temporary.with_name(Path(path).name)) as folder:
        spool = TensorSpool(folder)
        try:
            comparison = _Comparison(base, tuned, spool, small)
            tensors = sorted((comparison.compare(name) for name in names), key=lambda one: one.name)
            before, after = comparison.before.digest(), comparison.after.digest()
            made = Difference(base.identity(before), tuned.identity(after), tensors)
            spool.save(temporary, header_metadata(KIND, _metadata(made, settings, small)))
        finally:
            spool.close()
    return made


def _metadata(made: Difference, settings: Mapping[str, Any], small: bool) -> dict[str, Any]:
    shapes = {one.name: one.shape for one in made.tensors}
    count = sum(one.changed for one in made.tensors)
    dtypes = {one.name: dtype_name(one.dtype) for one in made.tensors}
    coding = (
        small_metadata({one.name: (one.changed, one.dtype) for one in made.tensors if one.changed}) if small else {}
    )
    return delta_metadata(made.base, shapes, count, settings) | coding | {"tuned": asdict(made.tuned), "dtypes": dtypes}


class _Comparison:
    """Two checkpoints, tensor by tensor; what differs goes to a spool, all of it into the fingerprints."""

    def __init__(self, base: TensorReader, tuned: TensorReader, spool: TensorSpool, small: bool) -> None:
        self.base, self.tuned, self.spool = base, tuned, spool
        self.entries: type[_PackedEntries | _PlainEntries] = _PackedEntries if small else _PlainEntries
        self.before, self.after = RunningFingerprint(), RunningFingerprint()

    def compare(self, name: str) -> TensorChange:
        dtype, shape = self.tuned.dtypes[name], self.base.shapes[name]
        entries = self.entries(self.spool, name, math.prod(shape), dtype)
        self.before.begin(name, self.base.dtypes[name], shape)
        self.after.begin(name, dtype, shape)
        start = changed = 0
        for ours, theirs in paired_pieces(self.base.pieces(name), self.tuned.pieces(name)):
            self.before.update(ours)
            self.after.update(theirs)
            before = _converted(ours, dtype, name)
            indices = changed_indices(before, theirs)
            if indices.numel():
                entries.add(indices + start, theirs[indices], before[indices])
            start += theirs.numel()
            changed += indices.numel()
        if changed:
            entries.finish()
        return TensorChange(name, shape, dtype, changed)


class _PlainEntries:
    """A tensor's changes on their way into a spool, as they are."""

    def __init__(self, spool: TensorSpool, name: str, numel: int, dtype: torch.dtype) -> None:
        import torch

        self._spool, self._name = spool, name
        self._index_dtype = torch.int32 if numel - 1 <= INT32_MAX else torch.int64

    def add(self, indices: Tensor, values: Tensor, before: Tensor) -> None:
        self._spool.append(f"{self._name}.values", values)
        self._spool.append(f"{self._name}.indices", indices.to(self._index_dtype))

    def finish(self) -> None:
        """Do nothing: everything is in the spool."""


class _PackedEntries:
    """The same as gaps and steps."""

    def __init__(self, spool: TensorSpool, name: str, numel: int, dtype: torch.dtype) -> None:
        self._spool, self._name = spool, name
        self._gaps, self._steps = IndexPacker(numel), StepPacker(dtype)

    def add(self, indices: Tensor, values: Tensor, before: Tensor) -> None:
        self._append(self._gaps.add(indices), self._steps.add(values, before))

    def finish(self) -> None:
        self._append(self._gaps.finish(), self._steps.finish())

    def _append(self, gaps: bytes, steps: bytes) -> None:
        self._spool.append(f"{self._name}.gaps", byte_tensor(gaps))
        self._spool.append(f"{self._name}.steps", byte_tensor(steps))


def _converted(piece: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """``piece`` in ``dtype``, provided that every value has an exact form there (NaN as any NaN)."""
    if piece.dtype == dtype:
        return piece
    ours, theirs = dtype_name(piece.dtype), dtype_name(dtype)
    if not (piece.dtype.is_floating_point and dtype.is_floating_point):
        raise UserError(f"{name} is {ours} in BASE and {theirs} in TUNED", "compare checkpoints of one model")
    converted = piece.to(dtype)
    wide = (piece.double(), converted.double())  # holds every value of either type
    lost = int(((wide[0] != wide[1]) & ~(wide[0].isnan() & wide[1].isnan())).sum())
    if lost:
        raise UserError(
            f"{name} is {ours} in BASE and {theirs} in TUNED, and {lost:,} of {piece.numel():,} base values have no "
            f"exact {theirs} form, so their differences would be rounding",
            f"save TUNED as {ours} or BASE as {theirs} first: from_pretrained(..., dtype=...).save_pretrained(...)",
        )
    return converted
