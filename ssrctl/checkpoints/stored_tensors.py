"""The tensors of a folder that hold a model's parameters: what other loaders than transformers know the weights by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ssrctl.checkpoints.names import Part

if TYPE_CHECKING:
    from torch import Tensor

Changes = Mapping[str, "tuple[Tensor, Tensor]"]


@dataclass(frozen=True)
class StoredTensors:
    """The tensors of a folder, and the parameters in them.

    Attributes:
        shapes: of the folder's tensors, by name.
        parts: by parameter, the ranges of these tensors that it consists of, in order.
    """

    shapes: Mapping[str, tuple[int, ...]]
    parts: Mapping[str, tuple[Part, ...]]

    @classmethod
    def of(cls, folder: str | Path, shapes: Mapping[str, tuple[int, ...]]) -> StoredTensors:
        """Read the headers of a folder that a model with parameters of these shapes is stored in.

        Raises:
            ValueError: a parameter whose tensors the folder lacks.
            UserError: the folder cannot be read.
        """
        from ssrctl.checkpoints.reader import TensorReader

        with TensorReader(folder) as reader:
            reader.align(shapes)
            stored = {name: one.shape for file in reader.files for name, one in reader.stored_in(file).items()}
            parts = {}
            for name, shape in shapes.items():
                if reader.shapes.get(name) != shape:
                    raise ValueError(f"{folder} has no tensors that make up {name} of shape {list(shape)}")
                whole = (Part(reader.name_map.to_file(name), 0, math.prod(shape)),)
                parts[name] = tuple(reader.name_map.joined.get(name, whole))
        return cls(stored, parts)

    @classmethod
    def same(cls, shapes: Mapping[str, tuple[int, ...]]) -> StoredTensors:
        """Return the map of parameters that are stored as they are."""
        return cls(shapes, {name: (Part(name, 0, math.prod(shape)),) for name, shape in shapes.items()})

    def changes(self, changes: Changes) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the changes of parameters, (ascending flat indices, values), as those of the folder's tensors."""
        import torch

        found: dict[str, tuple[Tensor, Tensor]] = {}
        for name, (indices, values) in changes.items():
            start = 0
            for part in self.parts[name]:
                first, past = torch.searchsorted(indices, torch.tensor([start, start + part.count])).tolist()
                before = found.get(part.name, (indices[:0], values[:0]))
                mine = indices[first:past] - start + part.start, values[first:past]
                found[part.name] = (torch.cat([before[0], mine[0]]), torch.cat([before[1], mine[1]]))
                start += part.count
        order = {name: indices.argsort() for name, (indices, _) in found.items()}
        return {
            name: (indices[order[name]], values[order[name]])
            for name, (indices, values) in found.items()
            if len(indices)
        }

    def tensors(self, named: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole parameters, contiguous, as the folder's tensors."""
        found: dict[str, Tensor] = {}
        for name, tensor in named.items():
            flat, start = tensor.reshape(-1), 0
            for part in self.parts[name]:
                mine = flat[start : start + part.count]
                start += part.count
                if part.count == math.prod(self.shapes[part.name]):
                    found[part.name] = mine.view(self.shapes[part.name])
                else:
                    whole = found.setdefault(part.name, tensor.new_empty(self.shapes[part.name]))
                    whole.view(-1)[part.start : part.start + part.count] = mine
        return found
