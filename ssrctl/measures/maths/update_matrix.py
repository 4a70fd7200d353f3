"""The update of one weight matrix, read once: norms, counts of changes, and the share that rounding could explain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ssrctl.measures.maths.low_rank import CPU, Rows, difference, plain

# Elements up to which a pair is converted once and for all: 32 MiB each.
_SMALL = 1 << 22


@dataclass(frozen=True)
class Unmeasured:
    """The reason why a tensor has no such numbers."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class UpdateMatrix:
    """A matrix before and after training, turned so that it has no fewer rows than columns.

    Attributes:
        base, tuned: ``[rows, columns]``, rows >= columns; small ones as float64, large ones as they are stored.
        wide: True = they were transposed for that.
        base_norm, norm: Frobenius norms of the base and of the update D = tuned - base.
        largest_row, largest_column: largest L2 norm of a row and of a column of D.
        changed_rows, changed_columns: number of rows and of columns of D that are not all zero.
        rounding_norm: expected Frobenius norm of the rounding errors of the tuned weights, if each was rounded once
            to its dtype from a value spread evenly within its step: sqrt(sum of (step^2 / 12)). The coarser dtype of
            base and tuned counts.
        device: where products and decompositions are computed.
    """

    base: Tensor
    tuned: Tensor
    wide: bool
    base_norm: float
    norm: float
    largest_row: float
    largest_column: float
    changed_rows: int
    changed_columns: int
    rounding_norm: float
    device: torch.device = CPU

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) as turned."""
        return self.base.shape[0], self.base.shape[1]

    @property
    def base_rows(self) -> Rows:
        """The base in float64 pieces."""
        return plain(self.base, self.device)

    @property
    def tuned_rows(self) -> Rows:
        """The tuned matrix in float64 pieces."""
        return plain(self.tuned, self.device)

    @property
    def update_rows(self) -> Rows:
        """D in float64 pieces; for weights of 16 bits the subtraction is exact."""
        return difference(self.base, self.tuned, self.device)


def read_update(base: Tensor, tuned: Tensor, device: torch.device | str = "cpu") -> UpdateMatrix | Unmeasured:
    """Read the update of a pair of matrices ``[m, n]`` of any real floating dtypes, on the CPU.

    Args:
        base: before.
        tuned: after.
        device: for the products and decompositions that follow.

    Returns:
        ``Unmeasured`` when weights are NaN or infinite, or so large or small that their squares are.

    Raises:
        ValueError: not two matrices of one shape.
    """
    if base.ndim != 2 or base.shape != tuned.shape:
        raise ValueError(f"two matrices of one shape are needed, got {list(base.shape)} and {list(tuned.shape)}")
    wide = base.shape[0] < base.shape[1]
    if wide:
        base, tuned = base.T, tuned.T
    coarse = max((base.dtype, tuned.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    if base.numel() <= _SMALL:
        base, tuned = base.to(torch.float64), tuned.to(torch.float64)
    row_squares = torch.zeros(base.shape[0], dtype=torch.float64)
    column_squares = torch.zeros(base.shape[1], dtype=torch.float64)
    changed_columns = torch.zeros(base.shape[1], dtype=torch.bool)
    base_square = rounding_square = 0.0
    changed_rows = 0
    for start, stop, piece in plain(tuned).pieces():
        before = base[start:stop].to(torch.float64)
        rounding_square += float(_steps(piece, coarse).square_().sum()) / 12
        base_square += float(before.square().sum())
        update = piece - before
        changed = update != 0
        changed_rows += int(changed.any(dim=1).sum())
        changed_columns |= changed.any(dim=0)
        squares = update.square_()
        row_squares[start:stop] = squares.sum(dim=1)
        column_squares += squares.sum(dim=0)
    square = float(row_squares.sum())
    if not math.isfinite(square) or not math.isfinite(base_square):
        return Unmeasured(_why_not_finite(base, tuned))
    if changed_rows and square < torch.finfo(torch.float64).tiny:
        return Unmeasured("its differences are so small that their squares vanish")
    return UpdateMatrix(
        base=base,
        tuned=tuned,
        wide=wide,
        base_norm=math.sqrt(base_square),
        norm=math.sqrt(square),
        largest_row=math.sqrt(float(row_squares.max())),
        largest_column=math.sqrt(float(column_squares.max())),
        changed_rows=changed_rows,
        changed_columns=int(changed_columns.sum()),
        rounding_norm=math.sqrt(rounding_square),
        device=torch.device(device),
    )


def _steps(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the distance from each weight (float64) to the next larger magnitude that ``dtype`` can store."""
    limits = torch.finfo(dtype)
    # |w| = f 2^e with f in [1/2, 1): its binade starts at 2^(e - 1). Below the smallest normal all steps are equal.
    exponent = torch.frexp(weights.abs().clamp_(min=limits.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(weights, limits.eps / 2), exponent)


def _why_not_finite(base: Tensor, tuned: Tensor) -> str:
    for what, rows in (("base", plain(base)), ("tuned", plain(tuned))):
        bad = sum(int((~piece.isfinite()).sum()) for _, _, piece in rows.pieces())
        if bad:
            return (
                f"{bad:,} weight{'' if bad == 1 else 's'} of the {what} {'is' if bad == 1 else 'are'} NaN or infinite"
            )
    return "its weights are so large that their squares overflow"
