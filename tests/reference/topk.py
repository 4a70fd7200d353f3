"""Selection by sorting Python floats."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def largest(gradients: Mapping[str, Tensor], k: int, taken: Mapping[str, set[int]]) -> dict[str, list[int]]:
    """The k largest |g| that are not taken, by a stable sort over (tensor, index): ascending indices by name.

    Python's floats are float64 and hold every float32, bfloat16 and float16 exactly.
    """
    candidates = []
    for name, gradient in gradients.items():
        for index, value in enumerate(gradient.flatten().tolist()):
            if index not in taken.get(name, set()):
                candidates.append((name, index, abs(value)))
    candidates.sort(key=lambda one: -one[2])
    chosen: dict[str, list[int]] = {name: [] for name in gradients}
    for name, index, _ in candidates[:k]:
        chosen[name].append(index)
    return {name: sorted(indices) for name, indices in chosen.items()}
