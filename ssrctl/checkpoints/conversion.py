"""The parameters that transformers makes of a file's tensors when it renames, joins or splits them on loading.

transformers 5 joins the experts of a mixture (``experts.0.w1.weight``, ``experts.0.w3.weight``, ... become
``experts.gate_up_proj``) and renames others (``embed_out`` becomes ``lm_head``), and reverses it on saving. Here its own
conversion is run on row numbers instead of weights: where row 7 of a file's tensor ends up is where its values do. So
nothing of the weights is read, and whatever transformers joins, splits or reorders by rows is followed. A conversion that
moves elements within rows (a transposition) is not, and its parameters are left out of the map.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssrctl.checkpoints.names import Part

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]


def empty_model(folder: Path) -> Any:
    """Make the model that config.json describes, without memory for its weights and without running its own code."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    with torch.device("meta"):  # accelerate's init_empty_weights would untie
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def parameter_parts(model: Any, stored: Mapping[str, Shape]) -> dict[str, tuple[Part, ...]]:
    """Return {parameter: the flat ranges of the file's tensors that it consists of, in order}.

    Args:
        model: as ``empty_model`` makes it.
        stored: the shapes of the file's tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    transforms = get_model_conversion_mapping(model)
    renamings = [one for one in transforms if not isinstance(one, WeightConverter)]
    converters = [one for one in transforms if isinstance(one, WeightConverter)]
    shapes: dict[str, Shape] = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    found: dict[str, tuple[Part, ...]] = {}
    running: dict[str, Any] = {}
    rows = _Rows(stored)
    for name in sorted(stored, key=dot_natural_key):
        target = name
        for renaming in renamings:
            target, _ = renaming.rename_source_key(target)
        pattern = None
        for converter in converters:
            target, pattern = converter.rename_source_key(target)
            if pattern is not None:
                break
        target = _with_prefix(target, model.base_model_prefix, shapes)
        if target not in shapes and name in shapes:
            target, pattern = name, None
        if target not in shapes:
            continue
        if pattern is None:
            if stored[name] == shapes[target]:
                found[target] = (Part(name, 0, math.prod(stored[name])),)
            continue
        own = running.setdefault(target, copy.deepcopy(converter))
        own.add_tensor(target, name, pattern, rows.of(name))
    for target, converter in running.items():
        for name, numbers in converter.convert(target, model=model, config=model.config).items():
            numbers = numbers[0] if isinstance(numbers, list) else numbers
            if name in shapes and tuple(numbers.shape) == _by_rows(shapes[name]):
                parts = rows.parts(numbers.flatten(), _width(shapes[name]))
                if parts is not None:
                    found[name] = parts
    return found


def _with_prefix(name: str, prefix: str, shapes: Mapping[str, Shape]) -> str:
    """Add or remove the base model's prefix where that gives a tensor of the model."""
    if name not in shapes and f"{prefix}.{name}" in shapes:
        return f"{prefix}.{name}"
    bare = name.removeprefix(f"{prefix}.")
    return bare if name not in shapes and bare in shapes else name


def _width(shape: Shape) -> int:
    """Return the elements of a row: the last dimension; a vector's rows have one element."""
    return shape[-1] if len(shape) > 1 else 1


def _by_rows(shape: Shape) -> Shape:
    """Return the shape that a tensor's row numbers have."""
    return (*shape[:-1], 1) if len(shape) > 1 else shape


class _Rows:
    """Row numbers of a file's tensors, each number once in the whole file."""

    def __init__(self, stored: Mapping[str, Shape]) -> None:
        self._stored = stored
        self._first: list[int] = []
        self._names: list[str] = []
        self._count = 0

    def of(self, name: str) -> Tensor:
        """Return the row numbers of a tensor, in its shape but for the last dimension."""
        import torch

        shape = _by_rows(self._stored[name])
        numbers = torch.arange(self._count, self._count + math.prod(shape)).view(shape)
        self._first.append(self._count)
        self._names.append(name)
        self._count += numbers.numel()
        return numbers

    def parts(self, numbers: Tensor, width: int) -> tuple[Part, ...] | None:
        """Return the flat ranges that rows of ``width`` elements are; None where the file's rows have another width."""
        import torch

        first = torch.tensor(self._first)
        owner = torch.searchsorted(first, numbers, right=True) - 1
        cut = (numbers.diff() != 1) | (owner.diff() != 0)
        starts = [0, *(cut.nonzero().flatten() + 1).tolist()]
        parts = []
        for start, stop in zip(starts, [*starts[1:], len(numbers)], strict=True):
            place = int(owner[start])
            name = self._names[place]
            if _width(self._stored[name]) != width:
                return None
            row = int(numbers[start]) - self._first[place]
            parts.append(Part(name, row * width, (stop - start) * width))
        return tuple(parts)
