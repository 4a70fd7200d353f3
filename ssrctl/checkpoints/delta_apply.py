"""A base with a delta put in, written as a checkpoint of the same layout, in memory that does not depend on either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.delta import DeltaFile, dtype_name
from ssrctl.checkpoints.files import INDEX, SINGLE
from ssrctl.checkpoints.fingerprint import RunningFingerprint
from ssrctl.checkpoints.parameter_names import tied_copies
from ssrctl.checkpoints.reader import TensorReader
from ssrctl.errors import UserError
from ssrctl.io.files import whole_file, write_text
from ssrctl.io.tensor_writing import NewTensor, aligned_order, stored_bytes, write_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class AppliedCheckpoint:
    """The tensors of a base with a delta put in, piece by piece.

    A tensor that the delta does not list keeps the base's values, but not always its dtype: a run computes in one
    dtype, so its delta gives that dtype to every floating-point parameter; a delta of two checkpoints names the
    dtype of each. Tied copies follow what they are copies of. Everything else that the base stores stays as it is.

    Attributes:
        base: open, its shapes checked against the delta's.
        delta: the changes.
        dtypes: what each of the base's tensors is written as.
        copies: {tied head: embedding}, of what the base stores twice.
    """

    def __init__(self, base: TensorReader, delta: DeltaFile, load_dtype: torch.dtype | None) -> None:
        """Decide the dtype of every tensor.

        Args:
            base: as above.
            delta: as above.
            load_dtype: what the base's floating-point tensors were rounded to before the run; None: not at all.

        Raises:
            UserError: the delta has floating-point values for a tensor of integers, or the other way round.
        """
        self.base, self.delta, self._load_dtype = base, delta, load_dtype
        self.copies = tied_copies(base, delta.shapes)
        self.dtypes = base.dtypes | self._parameter_dtypes()
        self.dtypes |= {head: self.dtypes[embedding] for head, embedding in self.copies.items()}
        for name, dtype in self.dtypes.items():
            ours = base.dtypes[name]
            if ours != dtype and not (ours.is_floating_point and dtype.is_floating_point):
                raise UserError(
                    f"{delta.path}: {name} holds {dtype_name(dtype)}, {base.label} stores {dtype_name(ours)}",
                    "give the model that the delta was made from",
                )

    def _parameter_dtypes(self) -> dict[str, torch.dtype]:
        if self.delta.dtypes is not None:
            return self.delta.dtypes
        listed = {name: dtype for name in self.delta.counts if (dtype := self.delta.dtype(name)) is not None}
        common = next(iter(listed.values())) if len(set(listed.values())) == 1 else self._load_dtype
        floating = [name for name in self.delta.shapes if self.base.dtypes[name].is_floating_point]
        return (dict.fromkeys(floating, common) if common is not None else {}) | listed

    @property
    def uniform_dtype(self) -> torch.dtype | None:
        """The dtype of all floating-point tensors, if it is one."""
        found = {dtype for dtype in self.dtypes.values() if dtype.is_floating_point}
        return found.pop() if len(found) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as written."""
        return sum(tensor.nbytes for file in self.base.files for tensor in self.tensors_of(file))

    def tensors_of(self, file: Path) -> list[NewTensor]:
        """Return the tensors that a file of the base holds once written, by its own names, in the order of the bytes."""
        names = self.base.name_map
        return aligned_order(
            NewTensor(
                name,
                self.dtypes[parts[0].name if (parts := names.parts_of(name)) else names.to_parameter(name)],
                stored.shape,
            )
            for name, stored in self.base.stored_in(file).items()
        )

    def stored_pieces(self, name: str) -> Iterator[Tensor]:
        """Yield a tensor of a file, by its name there, with its changes put in, as flat tensors in order.

        Raises:
            UserError: indices out of range or out of order.
        """
        parts = self.base.name_map.parts_of(name)
        if not parts:
            yield from self.pieces(self.base.name_map.to_parameter(name))
        for part in parts:
            yield from self.pieces(part.name, part.start, part.start + part.count)

    def pieces(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Tensor]:
        """Yield a tensor of the model, from flat index ``start`` to before ``stop``, likewise."""
        source = self.copies.get(name, name)
        if source not in self.delta.shapes:
            yield from self.base.pieces(source, start, stop)
            return
        blocks = _Blocks(self.delta.blocks(source))
        if start:
            for _ in blocks.below(start):
                pass
        for piece in self.base.pieces(source, start, stop):
            loaded = self._load_dtype if self._load_dtype is not None and piece.is_floating_point() else piece.dtype
            piece = piece.to(loaded).to(self.dtypes[name])
            for indices, coded in blocks.below(start + piece.numel()):
                places = indices - start
                piece[places] = self.delta.values(source, coded, piece[places])
            yield piece
            start += piece.numel()
        if stop is None:
            left_over = any(blocks.below(start + 1))
            assert not left_over, "indices beyond the tensor are refused as they are read"


class _Blocks:
    """Changes in order, as ``DeltaFile.blocks`` gives them, handed out up to a bound that moves along."""

    def __init__(self, blocks: Iterator[tuple[Tensor, Any]]) -> None:
        self._blocks = blocks
        self._left: tuple[Tensor, Any] | None = None

    def below(self, stop: int) -> Iterator[tuple[Tensor, Any]]:
        """Yield the changes at flat indices below ``stop`` that were not handed out yet."""
        import torch

        while (block := self._left or next(self._blocks, None)) is not None:
            indices, coded = block
            end = int(torch.searchsorted(indices, stop))
            self._left = (indices[end:], coded[end:]) if end < len(indices) else None
            if end:
                yield indices[:end], coded[:end]
            if self._left is not None:
                return


def write_applied(
    made: AppliedCheckpoint, folder: Path, metadata: Mapping[str, str], advance: Callable[[str], None]
) -> str:
    """Write the weights into ``folder`` in the base's layout: one file, or the same shards and an index.

    Args:
        made: what to write.
        folder: an existing folder.
        metadata: of every file.
        advance: called with each tensor's name once it is written.

    Returns:
        The fingerprint of the parameters, as written.

    Raises:
        UserError: indices out of range or out of order.
    """
    running = RunningFingerprint()
    weight_map = {}
    for file in made.base.files:
        target = file.relative_to(made.base.folder) if made.base.sharded else Path(SINGLE)
        tensors = made.tensors_of(file)
        with whole_file(folder / target) as temporary, temporary.open("wb") as stream:
            write_header(stream, tensors, metadata)
            for tensor in tensors:
                weight_map[tensor.name] = target.as_posix()
                parameter = made.base.name_map.to_parameter(tensor.name)
                hashed = parameter in made.delta.shapes and not made.base.name_map.parts_of(tensor.name)
                if hashed:
                    running.begin(parameter, tensor.dtype, tensor.shape)
                for piece in made.stored_pieces(tensor.name):
                    stream.write(stored_bytes(piece))
                    if hashed:
                        running.update(piece)
                advance(tensor.name)
    for name in made.base.name_map.joined:
        running.begin(name, made.dtypes[name], made.base.shapes[name])
        for piece in made.pieces(name):
            running.update(piece)
    if made.base.sharded:
        index = {"metadata": {"total_size": made.nbytes}, "weight_map": dict(sorted(weight_map.items()))}
        write_text(folder / INDEX, json.dumps(index, indent=2, ensure_ascii=False) + "\n")
    return running.digest()
