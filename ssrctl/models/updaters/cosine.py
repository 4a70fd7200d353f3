"""Cosines between the gradients of a question's units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from ssrctl.models.step_gradients.compare import gradient_dot


def cosine_matrix(gradients: Sequence[Mapping[str, Tensor]]) -> list[list[float]]:
    """Cosines between gradients over all tensors, products accumulated in float64; 0 where one is zero.

    Args:
        gradients: one mapping of parameter name to gradient per unit; an absent name counts as zero.
    """
    products = [[gradient_dot(a, b) for b in gradients[: i + 1]] for i, a in enumerate(gradients)]
    norms = [products[i][i] ** 0.5 for i in range(len(gradients))]

    def cosine(i: int, j: int) -> float:
        scale = norms[i] * norms[j]
        return min(1.0, max(-1.0, products[max(i, j)][min(i, j)] / scale)) if scale > 0 else 0.0

    return [[cosine(i, j) for j in range(len(gradients))] for i in range(len(gradients))]
