"""Parts of an update: the largest changes of all tensors together, or as many random ones.

Both are cut from a ranking of the changed weights. Changes of equal size, of which an update in bfloat16 has many, are
ordered by chance, so that no layer comes first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ssrctl.core.seeds import derive_seed

Order = Literal["largest", "random"]
# Changes whose sizes differ by less than this, relative to the larger, are ordered by chance. A power of two far above the
# rounding of float32, so that equal changes get many different ranks.
_NEARLY_EQUAL = 2.0**-8


class PrunedUpdate:
    """An update whose changed weights are ranked.

    Attributes:
        names: the tensors that the update changes.
        num_changed: weights whose values differ; 0 and -0 are equal.
    """

    def __init__(
        self, names: Sequence[str], base: Callable[[str], Tensor], tuned: Callable[[str], Tensor], seed: int
    ) -> None:
        """Count the changed weights; reads all tensors once.

        Args:
            names: the tensors.
            base, tuned: read a tensor by name, of one shape and with finite floats.
            seed: of the random order.
        """
        self._base, self._tuned, self._seed = base, tuned, seed
        counts = {name: int(self._differences(name).count_nonzero()) for name in names}
        self.names = [name for name, count in counts.items() if count]
        self.num_changed = sum(counts.values())

    def thresholds(self, order: Order, shares: Sequence[float]) -> dict[float, float]:
        """Return for each share in (0, 1] the score from which the changes are kept; at least one change is.

        Reads the tensors once more, and holds 4 bytes for each changed weight.

        Raises:
            ValueError: nothing changed.
        """
        if not self.num_changed:
            raise ValueError("an update without changes has no parts")
        scores = np.concatenate([self._scored(name, order) for name in self.names])
        places = {share: self.num_changed - max(1, round(share * self.num_changed)) for share in shares}
        scores.partition(sorted(set(places.values())))
        return {share: float(scores[place]) for share, place in places.items()}

    def kept(self, name: str, order: Order, threshold: float) -> tuple[Tensor, int]:
        """Return (one tensor with only the changes of a score from ``threshold`` on, float32; their number)."""
        scores = self._scores(name, order)
        chosen = scores >= threshold
        return torch.where(chosen, self._tuned(name).float(), self._base(name).float()), int(chosen.count_nonzero())

    def _differences(self, name: str) -> Tensor:
        return self._tuned(name).float() - self._base(name).float()

    def _scored(self, name: str, order: Order) -> np.ndarray:
        scores = self._scores(name, order)
        found: np.ndarray = scores[scores > 0].numpy()
        return found

    def _scores(self, name: str, order: Order) -> Tensor:
        """Return float32 in the tensor's shape: above 0 for changed weights, and 0 for the others."""
        sizes = self._differences(name).abs_()
        draws = torch.rand(sizes.shape, generator=torch.Generator().manual_seed(self._seed_of(name, order)))
        if order == "random":
            return torch.where(sizes > 0, 1 + draws, 0.0)
        return sizes.mul_(draws.mul_(_NEARLY_EQUAL).add_(1))

    def _seed_of(self, name: str, order: Order) -> int:
        return derive_seed(self._seed, "prune", order, name)
