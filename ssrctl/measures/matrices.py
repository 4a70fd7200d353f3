"""Which tensors have a rank and a spectrum, and measuring one of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ssrctl.core.seeds import derive_seed
from ssrctl.measures.maths.update_matrix import Unmeasured, UpdateMatrix, read_update
from ssrctl.measures.rank import UpdateRank, update_rank
from ssrctl.measures.spectrum import SpectrumChange, spectrum_change

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# Of a stack of experts so many are measured, evenly spread.
MAX_EXPERTS = 8


@dataclass(frozen=True, kw_only=True)
class MatrixMeasures:
    """One matrix; a measure that was not asked for is None.

    Attributes:
        shape: (m, n).
        dtypes: of base and tuned, as stored.
        rank, spectrum: the measures, or why there is none.
    """

    shape: tuple[int, int]
    dtypes: tuple[str, str]
    rank: UpdateRank | Unmeasured | None = None
    spectrum: SpectrumChange | Unmeasured | None = None


def skip_reason(shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why a tensor has no rank and spectrum; None when it has. Needs no weights, so that none are read in vain."""
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


def measure_tensor(
    name: str,
    base: Tensor,
    tuned: Tensor,
    *,
    k: int | None = None,
    seed: int = 0,
    rank: bool = True,
    spectrum: bool = True,
) -> dict[str, MatrixMeasures]:
    """Measure one tensor for which ``skip_reason`` is None.

    A stack of experts ``[experts, m, n]`` counts as matrices ``name.0``, ``name.1``, ...; of more than ``MAX_EXPERTS``
    so many are taken, evenly spread from the first to the last.

    Args:
        name: the tensor's; random draws derive from it and from ``seed``.
        base, tuned: of one shape, any real floating dtypes.
        k: directions to compare, see ``default_k``.
        rank, spectrum: which to measure.

    Raises:
        ValueError: a tensor that ``skip_reason`` names, or shapes that differ.
    """
    for tensor in (base, tuned):
        if (reason := skip_reason(tensor.shape, tensor.dtype)) is not None:
            raise ValueError(f"{name} has no spectrum: {reason}")
    if base.shape != tuned.shape:
        raise ValueError(f"{name}: shapes differ: {list(base.shape)} and {list(tuned.shape)}")
    return {
        label: _measure(label, before, after, k, seed, rank, spectrum)
        for label, before, after in _matrices(name, base, tuned)
    }


def _matrices(name: str, base: Tensor, tuned: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    if base.ndim == 2:
        yield name, base, tuned
        return
    count = base.shape[0]
    taken = min(count, MAX_EXPERTS)
    for expert in sorted({round(place * (count - 1) / max(1, taken - 1)) for place in range(taken)}):
        yield f"{name}.{expert}", base[expert], tuned[expert]


def _measure(
    label: str, base: Tensor, tuned: Tensor, k: int | None, seed: int, rank: bool, spectrum: bool
) -> MatrixMeasures:
    shape = (base.shape[0], base.shape[1])
    dtypes = (str(base.dtype).removeprefix("torch."), str(tuned.dtype).removeprefix("torch."))
    update = read_update(base, tuned)
    ranks: UpdateRank | Unmeasured | None = None
    change: SpectrumChange | Unmeasured | None = None
    if rank:
        ranks = update_rank(update) if isinstance(update, UpdateMatrix) else update
    if spectrum:
        norm = ranks.spectral_norm if isinstance(ranks, UpdateRank) else None
        change = (
            spectrum_change(update, k=k, seed=derive_seed(seed, "spectrum", label), update_norm=norm)
            if isinstance(update, UpdateMatrix)
            else update
        )
    return MatrixMeasures(shape=shape, dtypes=dtypes, rank=ranks, spectrum=change)
