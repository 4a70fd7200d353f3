"""A gradient that is spread over processes: each has the values of a range of the coordinates, as a reduce-scatter leaves them.

Ranges follow each other by rank through all tensors in order, so that a tie between processes goes to the lowest coordinate as
it does in one process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ssrctl.core.counting import Group
from ssrctl.core.layout import WORD, Layout
from ssrctl.core.topk import select_topk

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def range_size(layout: Layout, num_processes: int) -> int:
    """Return the positions of each process's range: whole words of bits, and together at least all positions."""
    return -(-layout.size // (WORD * num_processes)) * WORD


class GradientPart:
    """This process's range of a gradient.

    Args:
        values: ``[range_size]``, at the positions from ``rank * range_size`` on; 0 between tensors.
        layout: of the tensors that have a gradient, with ``WORD`` as its alignment; the same in all processes.
        process_group: whose processes hold the ranges, by rank.
    """

    def __init__(self, values: Tensor, layout: Layout, process_group: ProcessGroup) -> None:
        self.values, self.layout, self.group = values, layout, process_group
        self.start = process_group.rank() * values.numel()

    def select(self, k: int, taken: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Select the ``k`` coordinates of all processes with the largest |g| that are not taken.

        Args:
            k: number of coordinates.
            taken: bits of whole tensors by name, as in ``core.topk.select_topk``.

        Returns:
            In every process, by name, ascending flat indices (int64 ``[k_t]``) and the gradient there: what one process
            would select from the whole gradient.

        Raises:
            NonFiniteGradient: in all processes, NaN or infinity in an eligible coordinate of one.
        """
        pieces: dict[str, Tensor] = {}
        bits: dict[str, Tensor] = {}
        firsts: dict[str, int] = {}  # the position of each piece
        for name, offset in self.layout.offsets.items():
            first = min(max(offset, self.start), offset + self.layout.numels[name])
            last = max(first, min(offset + self.layout.numels[name], self.start + self.values.numel()))
            firsts[name], place = first, (first - offset) // 8
            pieces[name] = self.values[first - self.start : last - self.start] if last > first else self.values[:0]
            if name in taken:
                bits[name] = taken[name][place : place - (first - last) // 8]
        chosen = select_topk(pieces, k, bits, process_group=self.group)
        places = torch.cat([indices + firsts[name] for name, indices in chosen.items()])
        group = Group(self.group)
        values = group.joined(self.values[places - self.start])
        everywhere = self.layout.split(group.joined(places))
        counts = [indices.numel() for indices in everywhere.values()]
        return everywhere, dict(zip(everywhere, values.split(counts), strict=True))
