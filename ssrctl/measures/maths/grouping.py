"""Tensors put together by layer and by kind of matrix, for any measure whose numbers add up."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ssrctl.checkpoints.names import KINDS, layer_index, matrix_kind

T = TypeVar("T")


def by_layer(found: Mapping[str, T]) -> dict[int | None, list[T]]:
    """What was found for each layer's tensors, layers in order; None holds what lies in no layer and comes last."""
    layers: dict[int | None, list[T]] = {}
    for name, one in found.items():
        layers.setdefault(layer_index(name), []).append(one)
    return {layer: layers[layer] for layer in sorted(layers, key=lambda layer: (layer is None, layer or 0))}


def by_kind(found: Mapping[str, T]) -> dict[str, list[T]]:
    """What was found for each kind of matrix, in the order of ``KINDS``."""
    kinds: dict[str, list[T]] = {}
    for name, one in found.items():
        kinds.setdefault(matrix_kind(name), []).append(one)
    return {kind: kinds[kind] for kind in KINDS if kind in kinds}


def grouped(found: Mapping[str, T], summary: Callable[[Sequence[T]], dict[str, Any]]) -> dict[str, Any]:
    """``total``, ``layers``, ``kinds``, ``cells`` (layer and kind) and ``tensors``, each summarised.

    Args:
        found: a measure of each tensor, by name.
        summary: the numbers of several tensors together; called with an empty list when there is no tensor.
    """
    cells: dict[tuple[int | None, str], list[T]] = {}
    for name, one in found.items():
        cells.setdefault((layer_index(name), matrix_kind(name)), []).append(one)
    order = sorted(cells, key=lambda cell: (cell[0] is None, cell[0] or 0, KINDS.index(cell[1])))
    return {
        "total": summary(list(found.values())),
        "layers": [{"layer": layer} | summary(some) for layer, some in by_layer(found).items()],
        "kinds": [{"kind": kind} | summary(some) for kind, some in by_kind(found).items()],
        "cells": [{"layer": layer, "kind": kind} | summary(cells[layer, kind]) for layer, kind in order],
        "tensors": [
            {"name": name, "layer": layer_index(name), "kind": matrix_kind(name)} | summary([one])
            for name, one in found.items()
        ],
    }


def layer_label(layer: int | None) -> str:
    """A layer number as figures show it."""
    return "outside" if layer is None else str(layer)
