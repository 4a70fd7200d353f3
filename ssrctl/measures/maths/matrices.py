"""The weight matrices of a tensor, and the update of each, read once for all measures of a pair."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ssrctl.checkpoints.pairs import TensorPair
from ssrctl.measures.maths.low_rank import Spectrum, spectrum, upright
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update

# Of a stack of experts at most this many are measured, evenly spread.
MAX_EXPERTS = 8


def skip_reason(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Return why a tensor has no rank and spectrum, None when it has; read no weights."""
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


def stacked(name: str, *tensors: Tensor) -> Iterator[tuple[str, tuple[Tensor, ...]]]:
    """Yield (label, the same matrix of each tensor): a matrix as it is, of a stack ``[experts, m, n]`` some experts.

    The label of expert i is ``name.i``; of more than ``MAX_EXPERTS`` only that many are taken, evenly spread from the
    first to the last.
    """
    if tensors[0].ndim == 2:
        yield name, tensors
        return
    count = tensors[0].shape[0]
    taken = min(count, MAX_EXPERTS)
    for expert in sorted({round(place * (count - 1) / max(1, taken - 1)) for place in range(taken)}):
        yield f"{name}.{expert}", tuple(one[expert] for one in tensors)


def updates(pair: TensorPair, device: str = "cpu") -> dict[str, UpdateMatrix | Unmeasured]:
    """Return the update of each matrix of a pair, by label; read once and shared by all measures of the pair."""
    if "updates" not in pair.memo:
        pair.memo["updates"] = {
            label: read_update(base, tuned, device)
            for label, (base, tuned) in stacked(pair.name, pair.base, pair.tuned)
        }
    found: dict[str, UpdateMatrix | Unmeasured] = pair.memo["updates"]
    return found


def base_spectrum(pair: TensorPair, label: str, base: Tensor, device: str = "cpu") -> Spectrum:
    """Return the spectrum of a matrix of the base, decomposed once for all measures of the pair."""
    key = "base spectrum", label
    if key not in pair.memo:
        pair.memo[key] = spectrum(upright(base, device))
    found: Spectrum = pair.memo[key]
    return found
