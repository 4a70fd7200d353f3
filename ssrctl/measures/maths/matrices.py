"""Which tensors are matrices, their single matrices, and the update of each, read once for all measures of a pair."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.io.console import note
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ssrctl.checkpoints.pairs import Comparison, TensorPair

T = TypeVar("T")

# Of a stack of experts at most this many are measured, evenly spread.
MAX_EXPERTS = 8
# One core's time for rank, spectrum and landing of a matrix, over its size times its smaller side.
SECONDS_PER_UNIT = 1e-9
LONG_SECONDS = 900


@dataclass(frozen=True)
class OfMatrix(Generic[T]):
    """A measure of one matrix.

    Attributes:
        shape: (m, n).
        value: the measure, or the reason why there is none.
    """

    shape: tuple[int, int]
    value: T | Unmeasured


def skip_reason(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Return why a tensor has no rank and spectrum, None when it has; needs no weights, so that none are read in vain."""
    if not dtype.is_floating_point:
        return f"its dtype is {str(dtype).removeprefix('torch.')}: not real weights"
    if len(shape) < 2:
        return "it is no matrix but a vector" if len(shape) == 1 else "it is no matrix but a single number"
    if len(shape) > 3:
        return f"it has {len(shape)} dimensions"
    if min(shape[-2:]) < 2:
        return f"it has a side of {min(shape[-2:])}"
    if shape[0] == 0:
        return "it is empty"
    return None


def skipped_tensors(comparison: Comparison) -> dict[str, str]:
    """Return the compared tensors that are not matrices, each with the reason."""
    shapes, dtypes = comparison.base.shapes, comparison.base.dtypes
    reasons = {name: skip_reason(shapes[name], dtypes[name]) for name in comparison.names}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def warn_if_long(comparison: Comparison, num_workers: int) -> None:
    """Say how long the decompositions take, before hours are spent on them; once for a comparison."""
    skipped = skipped_tensors(comparison)
    shapes = [comparison.base.shapes[name] for name in comparison.names if name not in skipped]
    seconds = SECONDS_PER_UNIT * sum(math.prod(shape) * min(shape[-2:]) for shape in shapes) / num_workers
    if seconds > LONG_SECONDS:
        note(
            f"decomposing {len(shapes)} matrices takes about {seconds / 3600:.1f} hours; --layers 0,15,31 takes some of "
            "them, --measures sparsity,size none"
        )


def stacked(name: str, *tensors: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Yield (label, the same matrix of each tensor): a matrix as it is, of a stack ``[experts, m, n]`` some experts.

    Expert i is called ``name.i``; of more than ``MAX_EXPERTS`` only that many are taken, evenly spread from the first
    to the last.
    """
    if tensors[0].ndim == 2:
        yield name, tensors
        return
    count = tensors[0].shape[0]
    taken = min(count, MAX_EXPERTS)
    for expert in sorted({round(place * (count - 1) / max(1, taken - 1)) for place in range(taken)}):
        yield f"{name}.{expert}", tuple(one[expert] for one in tensors)


def updates(pair: TensorPair) -> dict[str, UpdateMatrix | Unmeasured]:
    """Return the update of each matrix of a pair, by label; read once and shared by all measures of the pair."""
    if "updates" not in pair.memo:
        pair.memo["updates"] = {
            label: read_update(base, tuned) for label, (base, tuned) in stacked(pair.name, pair.base, pair.tuned)
        }
    found: dict[str, UpdateMatrix | Unmeasured] = pair.memo["updates"]
    return found


def matrix_shape(update: UpdateMatrix) -> tuple[int, int]:
    """Return (m, n) as stored, where ``UpdateMatrix`` may hold the matrix turned."""
    rows, columns = update.shape
    return (columns, rows) if update.wide else (rows, columns)


def place_of(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """Return the fields that each row of a report's tensors begins with."""
    return {"name": name, "layer": layer_index(name), "kind": matrix_kind(name), "shape": list(shape)}


def unmeasured(found: Mapping[str, OfMatrix[Any]]) -> list[dict[str, str]]:
    """Return name and reason of the matrices that a measure lacks."""
    return [
        {"name": name, "reason": one.value.reason} for name, one in found.items() if isinstance(one.value, Unmeasured)
    ]
