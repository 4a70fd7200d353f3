"""Sketches: d numbers per gradient, whose inner products are on average those of the gradients.

A structured count sketch (Charikar, Chen and Farach-Colton 2002). Each tensor is cut into pieces of d coordinates;
every coordinate gets a random sign, every piece a random rotation, and the pieces are added up. Two coordinates of
one piece never meet, two of different pieces meet with probability 1/d, and signs are independent, so that for
gradients u and v with sketches s and t

    E[s . t] = u . v,    Var[s . t] <= (|u|^2 |v|^2 + (u . v)^2) / d <= (2 / d) |u|^2 |v|^2.

The map is linear and the same at every training step: sketches of parts add up to the sketch of the whole, and a
dense gradient of the batch never has to exist. It costs one pass over the gradient and no table of hashes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ssrctl.core.bits import unpack_bits
from ssrctl.core.seeds import derive_seed


@dataclass(frozen=True)
class GradientSketch:
    """The sketching map of a run.

    Args:
        numels: coordinates of each tensor by name, in the model's order.
        max_size: d; a model with no more coordinates than that is not sketched but stored as it is.
        seed: each tensor's signs and rotations derive from it and from the tensor's name.

    Raises:
        ValueError: ``max_size`` below 1.
    """

    numels: Mapping[str, int]
    max_size: int
    seed: int

    def __post_init__(self) -> None:
        if self.max_size < 1:
            raise ValueError(f"a sketch has at least 1 number, got {self.max_size}")

    @property
    def num_coordinates(self) -> int:
        """Coordinates of all tensors."""
        return sum(self.numels.values())

    @property
    def exact(self) -> bool:
        """True if the sketch is the gradient itself, tensor after tensor."""
        return self.num_coordinates <= self.max_size

    @property
    def size(self) -> int:
        """Numbers in a sketch."""
        return min(self.num_coordinates, self.max_size)

    @cached_property
    def _offsets(self) -> dict[str, int]:
        offsets, end = {}, 0
        for name, numel in self.numels.items():
            offsets[name] = end
            end += numel
        return offsets

    def zeros(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the sketch of a zero gradient: float64 ``[size]``."""
        return torch.zeros(self.size, dtype=torch.float64, device=device)

    def add(self, total: Tensor, name: str, gradient: Tensor) -> None:
        """Add the sketch of one tensor's gradient to ``total``, in place.

        Args:
            total: float64 ``[size]``, on the gradient's device.
            name: the tensor.
            gradient: its gradient, of any shape and dtype.

        Raises:
            ValueError: the gradient has another number of coordinates than the tensor.
        """
        flat = gradient.detach().reshape(-1)
        if flat.numel() != self.numels[name]:
            raise ValueError(f"{name} has {self.numels[name]} coordinates, its gradient {flat.numel()}")
        if self.exact:
            total[self._offsets[name] :][: flat.numel()] += flat
            return
        size = self.size
        # Drawn on the CPU, so that signs and rotations are the same on every device.
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "gradient sketch", name))
        for start in range(0, flat.numel(), size):
            piece = flat[start : start + size]
            shift = int(torch.randint(size, (1,), generator=generator))
            packed = torch.randint(256, (math.ceil(piece.numel() / 8),), dtype=torch.uint8, generator=generator)
            negative = unpack_bits(packed.to(piece.device), 0, piece.numel())
            signed = torch.where(negative, -piece, piece)
            before_the_end = min(piece.numel(), size - shift)
            total[shift : shift + before_the_end] += signed[:before_the_end]
            total[: piece.numel() - before_the_end] += signed[before_the_end:]
