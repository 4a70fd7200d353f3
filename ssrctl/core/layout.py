"""One numbering of the coordinates of many tensors, so that one operation serves all of them.

A model has hundreds of tensors, most of them small; an operation per tensor costs more than its work. So the
optimizer keeps its bits, sums and state by *shard*: neighbouring tensors, joined up to a size that bounds scratch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

# Coordinates of a shard, whose update takes scratch for all of it; a larger tensor is one by itself. On a GPU an operation costs
# more than the work of a small shard.
SHARD, DEVICE_SHARD = 1 << 22, 1 << 26
WORD = 64  # tensors begin at whole words of bits


class Layout:
    """Positions number the coordinates through all tensors in order, each tensor from a multiple of ``align``.

    Attributes:
        numels: of the tensors, by name.
        offsets: the position of each tensor's first coordinate, by name.
        size: one past the last position, a multiple of ``align``.
    """

    def __init__(self, tensors: Mapping[str, Tensor], align: int) -> None:
        self.offsets: dict[str, int] = {}
        self.size = 0
        self.numels = {name: tensor.numel() for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self.offsets[name] = self.size
            self.size += -(-tensor.numel() // align) * align

    def split(self, positions: Tensor) -> dict[str, Tensor]:
        """Ascending positions (int64) as flat indices per tensor: views of one storage."""
        if not self.numels:
            return {}
        edges = torch.tensor([*self.offsets.values(), self.size], device=positions.device)
        counts = torch.searchsorted(positions, edges).diff()
        indices = positions - torch.repeat_interleave(edges[:-1], counts, output_size=positions.numel())
        return dict(zip(self.numels, indices.split(counts.tolist()), strict=True))

    def join(self, indices: Mapping[str, Tensor]) -> Tensor:
        """Return the positions (int64) of flat indices of some of the tensors, in the order of the mapping."""
        parts = list(indices.values())
        if len(parts) == 1:
            return parts[0] + self.offsets[next(iter(indices))]
        positions = torch.cat(parts)
        counts = torch.tensor([part.numel() for part in parts], device=positions.device)
        offsets = torch.tensor([self.offsets[name] for name in indices], device=positions.device)
        return positions.add_(offsets.repeat_interleave(counts, output_size=positions.numel()))

    def bits(self, packed: Tensor) -> dict[str, Tensor]:
        """Return each tensor's bits (as in ``core.bits``) as views of the bits of all positions, uint8."""
        starts = {name: offset // 8 for name, offset in self.offsets.items()}
        return {name: packed[start : start - (-self.numels[name] // 8)] for name, start in starts.items()}


class Shards:
    """Layouts that cover all tensors, in order.

    Attributes:
        layouts: of neighbouring tensors of one dtype on one device, each of up to ``SHARD`` coordinates, or ``DEVICE_SHARD``.
        number_of: by tensor name, the number of its layout.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.layouts: list[Layout] = []
        self.number_of: dict[str, int] = {}
        self.add(tensors)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add tensors in layouts of their own."""
        opened: dict[str, Tensor] = {}
        size, kind = 0, None
        for name, tensor in tensors.items():
            most = SHARD if tensor.device.type in ("cpu", "meta") else DEVICE_SHARD
            if opened and (kind != (tensor.dtype, tensor.device) or size + tensor.numel() > most):
                self._close(opened)
                opened, size = {}, 0
            opened[name], kind = tensor, (tensor.dtype, tensor.device)
            size += tensor.numel()
        if opened:
            self._close(opened)

    def _close(self, tensors: Mapping[str, Tensor]) -> None:
        self.number_of |= dict.fromkeys(tensors, len(self.layouts))
        self.layouts.append(Layout(tensors, align=WORD))

    def parts(self, indices: Mapping[str, Tensor]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Yield the indices by shard: (number of the layout, its non-empty indices by tensor name)."""
        found: dict[int, dict[str, Tensor]] = {}
        for name, chosen in indices.items():
            if chosen.numel():
                found.setdefault(self.number_of[name], {})[name] = chosen
        yield from found.items()

    def bits(self, packed: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return each tensor's bits as a view of its shard's bits (uint8 ``[size / 8]``, one per layout)."""
        views: dict[str, Tensor] = {}
        for layout, bits in zip(self.layouts, packed, strict=True):
            views |= layout.bits(bits)
        return views
