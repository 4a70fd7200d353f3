"""The model's parameters among a checkpoint's tensors, without loading it: a mask has to cover these.

Training knows a model by its ``named_parameters``: a tied tensor once, no buffers, in the dtype that its config asks
for. A file may hold a tied head as well, buffers, and names without the model's prefix.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.checkpoints.conversion import empty_model
from ssrctl.checkpoints.model_folder import CONFIG
from ssrctl.checkpoints.names import is_constant, is_head
from ssrctl.checkpoints.parameter_names import tied_copies
from ssrctl.checkpoints.reader import TensorReader, check_weights
from ssrctl.errors import UserError, first_line
from ssrctl.report.formats import times

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class StoredParameters:
    """The parameters of an open checkpoint.

    Attributes:
        reader: the checkpoint, its names aligned with the model's.
        names: of the parameters, sorted.
        dtype: in which the model's floating-point weights are loaded; None: as stored.
        notes: sentences that a reader needs so as not to be misled.
    """

    reader: TensorReader
    names: list[str]
    dtype: torch.dtype | None
    notes: list[str] = field(default_factory=list)

    @functools.cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: self.reader.shapes[name] for name in self.names}

    def dtype_of(self, name: str) -> torch.dtype:
        """Return the dtype in which a parameter is loaded."""
        stored = self.reader.dtypes[name]
        return self.dtype if self.dtype is not None and stored.is_floating_point else stored

    def tensor(self, name: str) -> Tensor:
        """Read a parameter as training starts from it; memory-mapped unless its dtype changes on loading."""
        return self.reader.tensor(name).to(self.dtype_of(name))

    def pieces(self, name: str) -> Iterator[Tensor]:
        """Yield the same in flat pieces of 2^20 elements in order."""
        dtype = self.dtype_of(name)
        return (piece.to(dtype) for piece in self.reader.pieces(name))


def stored_parameters(reader: TensorReader) -> StoredParameters:
    """Find the parameters of an open checkpoint; aligns the reader's names with the model's.

    With a config.json next to the weights they are those of the model that transformers makes from it. Without, or where
    transformers does not know the model, they are all floating-point tensors of the file except for constants and a
    head that is a bit for bit copy of the embedding.

    Raises:
        UserError: no weights, or parameters that are not stored under their names, or in other shapes.
    """
    if not (reader.folder / CONFIG).is_file():
        return _as_stored(reader, [])
    try:
        model = empty_model(reader.folder)
    except Exception as error:  # whatever a foreign config makes transformers raise
        note = f"Tensors were taken as stored, as transformers cannot use {CONFIG}: {first_line(error)}"
        return _as_stored(reader, [note])
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = [name for name, _ in model.named_parameters(remove_duplicate=False) if name not in shapes]
    reader.align(shapes)
    # Tied by the config, yet stored with values of its own: transformers leaves it untied.
    untied = {name for name in tied if name in reader.shapes} - tied_copies(reader, shapes).keys()
    differing = [name for name, shape in shapes.items() if reader.shapes.get(name) != shape]
    if differing:
        name = min(differing)
        found = reader.shapes.get(name)
        raise UserError(
            f"{reader.label}: {len(differing)} of the model's {len(shapes)} parameters are not stored as it has them, "
            f"first {name}: {list(shapes[name])} in the model, {'absent' if found is None else list(found)} in the file",
            f"the weights must fit the {CONFIG} next to them",
        )
    dtype = reader.load_dtype() or _first_floating(reader)
    return StoredParameters(reader, sorted(shapes.keys() | untied), dtype)


def check_exportable(folder: Path, shapes: Mapping[str, tuple[int, ...]], fingerprint: str) -> None:
    """Check that a run's delta, which has parameter names, can be applied to the files that the model was loaded from.

    Args:
        folder: of the files.
        shapes: of the parameters in training.
        fingerprint: of the weights as loaded; compared where tensors are joined on loading, which reads all of them.

    Raises:
        UserError: parameters that are not stored as the model has them and of which the map is unknown.
    """
    with TensorReader(folder) as reader:
        reader.align(shapes)
        differing = sorted(name for name, shape in shapes.items() if reader.shapes.get(name) != shape)
        if differing:
            raise UserError(
                f"{reader.label} cannot be trained: {times(len(differing), 'parameter')} of {len(shapes)} (first "
                f"{differing[0]}) are put together on loading in a way that `delta apply` cannot reverse",
                "load and save the model with transformers and name that folder, or use another model",
            )
        if reader.name_map.joined:
            check_weights(folder, reader.identity(fingerprint), shapes, reader)


def _as_stored(reader: TensorReader, notes: list[str]) -> StoredParameters:
    """Take everything in the file but tied copies, constants, and tensors of other than floating-point numbers."""
    weights = [name for name in reader.shapes if not is_constant(name) and reader.dtypes[name].is_floating_point]
    if not weights:
        raise UserError(f"{reader.label} holds no floating-point weights", "give a model that is not quantised")
    copies = tied_copies(reader, [name for name in weights if not is_head(name)])
    notes = notes + [
        f"{head} is stored as a copy of {one} (tied) and was counted once." for head, one in copies.items()
    ]
    if left_out := len(reader.shapes) - len(weights):
        notes.append(f"{times(left_out, 'tensor')} that are not weights (constants, codes) left out.")
    return StoredParameters(reader, [name for name in weights if name not in copies], None, notes)


def _first_floating(reader: TensorReader) -> torch.dtype | None:
    """Return the dtype of the first floating-point tensor, in which transformers loads a model without a dtype."""
    first = [name for name in reader.shapes if reader.file_of(name) == reader.files[0]]
    return next((reader.dtypes[name] for name in first if reader.dtypes[name].is_floating_point), None)
