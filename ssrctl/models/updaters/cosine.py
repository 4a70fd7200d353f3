"""Cosines between whole gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_matrix(gradients: Sequence[dict[str, Tensor]]) -> list[list[float]]:
    """Cosines between gradients over all tensors, products accumulated in float64; 0 where one is zero.

    Args:
        gradients: one mapping of parameter name to gradient per unit; an absent name counts as zero.
    """
    size = len(gradients)
    products = torch.zeros(size, size, dtype=torch.float64)
    # in order, not as a set: the order of additions decides the last bit
    for name in dict.fromkeys(name for gradient in gradients for name in gradient):
        # one tensor at a time, so that the float64 copies stay small
        rows = [gradient[name].flatten().double() if name in gradient else None for gradient in gradients]
        for i, a in enumerate(rows):
            for j, b in enumerate(rows[: i + 1]):
                if a is not None and b is not None:
                    products[i, j] += torch.dot(a, b).cpu()
    products = products + products.tril(-1).T
    norms = products.diagonal().sqrt()
    scale = norms.unsqueeze(0) * norms.unsqueeze(1)
    return torch.where(scale > 0, products / scale.clamp_min(1e-300), 0.0).clamp(-1.0, 1.0).tolist()
