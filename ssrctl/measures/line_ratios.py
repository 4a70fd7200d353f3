"""Changed shares of the rows and columns of a matrix at several steps of a run (Zhu et al. 2025, figures 3 and 14).

``rho_i(t)``, the changed share of row i at step t, keeps its peaks and troughs in published RL while the overall density
grows: stripes of rows in q, k and v, of columns in o.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from ssrctl.checkpoints.names import layer_index, matrix_kind
from ssrctl.measures.maths.grouping import middle_layer
from ssrctl.measures.maths.row_column_counts import Profile
from ssrctl.report.document import Figure, Lines

# Points of a curve at most, each the mean over a block of rows or columns; all blocks but the last are of one size.
_POINTS = 96
_PICTURED = (("q", "qkv"), ("o",))


@dataclass(frozen=True, kw_only=True)
class LineRatios:
    """The changed shares of one matrix's rows and columns.

    Attributes:
        name: of the matrix.
        steps: the training steps shown, ascending.
        row_starts, column_starts: first row and column of each block.
        rows, columns: ``[steps][blocks]``, the mean changed share of a block's rows, and of its columns.
    """

    name: str
    steps: list[float]
    row_starts: list[int]
    rows: list[list[float]]
    column_starts: list[int]
    columns: list[list[float]]

    def numbers(self) -> dict[str, Any]:
        """Return the form of the json report."""
        return asdict(self)


def pictured(shapes: Mapping[str, Sequence[int]], names: Sequence[str], chosen: str | None) -> list[str]:
    """Return the matrices whose rows and columns are shown: the chosen one, or q (or qkv) and o of the middle layer.

    Of models without these, the first matrix of the middle layer.
    """
    if chosen is not None:
        return [chosen]
    matrices = [name for name in names if len(shapes[name]) == 2]
    middle = middle_layer(matrices)
    inside = [name for name in matrices if layer_index(name) == middle]
    found = [next((name for name in inside if matrix_kind(name) in kinds), None) for kinds in _PICTURED]
    return [name for name in found if name is not None] or inside[:1]


def line_ratios(name: str, profiles: Sequence[Profile], steps: Sequence[float]) -> LineRatios:
    """Average the profiles of a matrix at its first, middle and last step over blocks.

    Args:
        profiles: one for each step, at least one.
        steps: the training steps.
    """
    last = len(steps) - 1
    places = sorted({0, last // 2, last})
    some = [profiles[place] for place in places]
    height, width = some[0].rows.numel(), some[0].columns.numel()
    return LineRatios(
        name=name,
        steps=[steps[place] for place in places],
        row_starts=_starts(height),
        rows=[_blocks(one.rows, width) for one in some],
        column_starts=_starts(width),
        columns=[_blocks(one.columns, height) for one in some],
    )


def _size(num_lines: int) -> int:
    return max(1, math.ceil(num_lines / _POINTS))


def _starts(num_lines: int) -> list[int]:
    return list(range(0, num_lines, _size(num_lines)))


def _blocks(counts: Tensor, length: int) -> list[float]:
    shares = counts.double() / max(1, length)
    return [float(part.mean()) for part in shares.split(_size(shares.numel())) if part.numel()]


def _means(side: str, starts: Sequence[int]) -> str:
    size = starts[1] - starts[0] if len(starts) > 1 else 1
    return f"Each point is the mean of {size} {side}s." if size > 1 else f"Each point is a {side}."


def ratio_figures(found: LineRatios) -> list[Figure]:
    """Return the curves of the rows and of the columns."""
    sides = (("row", found.row_starts, found.rows), ("column", found.column_starts, found.columns))
    return [
        Lines(
            title=f"Changed share by {side} of {found.name}",
            x=starts,
            series={f"step {step:g}": values for step, values in zip(found.steps, shares, strict=True)},
            x_label=side,
            y_label="share changed",
            shares=True,
            caption=f"{_means(side, starts)} Peaks that stay are rows or columns that training keeps changing "
            "(compare Zhu et al. 2025, figures 3 and 14).",
        )
        for side, starts, shares in sides
        if starts
    ]
